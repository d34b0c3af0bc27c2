"""Tensor operators: the vocabulary softmax of ALIGN, the memory-lean token loss, and fused layers for a model's own."""

from alignvlm.kernels.align import Moments, SharedMoments, moments_pay_off, vocab_moments, vocab_softmax
from alignvlm.kernels.linear_cross_entropy import linear_cross_entropy

__all__ = ["Moments", "SharedMoments", "linear_cross_entropy", "moments_pay_off", "vocab_moments", "vocab_softmax"]
