"""Tensor operators without any knowledge of models: the vocabulary softmax of ALIGN and the memory-lean token loss."""

from alignvlm.kernels.align import Moments, SharedMoments, moments_pay_off, vocab_moments, vocab_softmax
from alignvlm.kernels.linear_cross_entropy import linear_cross_entropy

__all__ = ["Moments", "SharedMoments", "linear_cross_entropy", "moments_pay_off", "vocab_moments", "vocab_softmax"]
