"""Tensor operators without any knowledge of models: the vocabulary softmax of ALIGN and the memory-lean token loss."""

from alignvlm.kernels.align.moments import Moments, vocab_moments
from alignvlm.kernels.align.vocab_softmax import vocab_softmax
from alignvlm.kernels.linear_cross_entropy import linear_cross_entropy

__all__ = ["Moments", "linear_cross_entropy", "vocab_moments", "vocab_softmax"]
