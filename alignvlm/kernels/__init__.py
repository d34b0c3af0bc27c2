"""Tensor operators without any knowledge of models: the vocabulary softmax of ALIGN and the memory-lean token loss."""

from alignvlm.kernels.linear_cross_entropy import linear_cross_entropy
from alignvlm.kernels.moments import Moments, vocab_moments
from alignvlm.kernels.vocab_softmax import vocab_softmax

__all__ = ["Moments", "linear_cross_entropy", "vocab_moments", "vocab_softmax"]
