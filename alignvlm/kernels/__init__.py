"""Tensor operators without any knowledge of models: the vocabulary softmax of ALIGN and the memory-lean token loss."""

from alignvlm.kernels.linear_cross_entropy import linear_cross_entropy
from alignvlm.kernels.vocab_softmax import vocab_softmax

__all__ = ["linear_cross_entropy", "vocab_softmax"]
