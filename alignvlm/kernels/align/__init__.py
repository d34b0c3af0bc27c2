"""The vocabulary softmax of ALIGN: a reference, blocks of the vocabulary, chunks of tokens. Use it from here."""

from alignvlm.kernels.align.costs import kept_logits_bytes, recomputed_flops, workspace_bytes
from alignvlm.kernels.align.dispatch import IMPLEMENTATIONS, vocab_softmax
from alignvlm.kernels.align.moments import Moments, SharedMoments, moments_pay_off, vocab_moments
from alignvlm.kernels.align.reference import vocab_probabilities, vocab_softmax_reference
from alignvlm.kernels.align.vocab_blocks import default_block

__all__ = [
    "IMPLEMENTATIONS",
    "Moments",
    "SharedMoments",
    "default_block",
    "kept_logits_bytes",
    "moments_pay_off",
    "recomputed_flops",
    "vocab_moments",
    "vocab_probabilities",
    "vocab_softmax",
    "vocab_softmax_reference",
    "workspace_bytes",
]
