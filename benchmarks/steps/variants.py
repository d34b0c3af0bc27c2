"""What `benchmarks/train.py` compares: models, packs, and variants of a training step, each a few named overrides."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from _common import NARROW


@dataclass(frozen=True)
class Pack:
    """A micro-batch; what it holds is spread evenly over its documents."""

    tokens: int
    """Tokens that enter the language model, visual ones included."""
    tiles: int
    documents: int
    supervised: int


@dataclass(frozen=True)
class Model:
    """A recipe, and packs as it trains on."""

    recipe: str
    packs: dict[str, Pack]
    overrides: tuple[str, ...] = ()
    """Of the recipe."""


@dataclass(frozen=True)
class Variant:
    """What differs from the model's recipe."""

    overrides: tuple[str, ...] = ()
    """Of the recipe."""
    deepspeed: dict[str, Any] = field(default_factory=dict)
    """Top-level entries of DeepSpeed's configuration; a dictionary is merged into the recipe's."""
    whole_layers: bool = True
    """Under ZeRO-3, gather the layers of the backbones as wholes."""
    shortcuts: bool = True
    """Under ZeRO-3, those of `alignvlm/training/zero3/shortcuts.py`."""
    compiled: tuple[str, ...] = ()
    """Parts of the model whose layers torch.compile compiles."""
    loss: str | None = None
    """Implementation of `linear_cross_entropy`; null leaves the choice to it."""
    pack: str = "captions"
    """Name of the model's pack."""


PAPER = {
    "captions": Pack(tokens=18_432, tiles=24, documents=8, supervised=300),
    "long answers": Pack(tokens=18_432, tiles=22, documents=11, supervised=2_000),
    "documents": Pack(tokens=26_624, tiles=32, documents=4, supervised=2_000),
}
"""The packs of the paper's first stage, captions of images that take three tiles each, and of its second."""
TINY = (
    *NARROW, "model.vision.config.num_hidden_layers=2", "model.language.config.num_hidden_layers=2",
    "train.deepspeed=cpu_zero3",
)  # fmt: skip

SMALL = {
    "captions": Pack(tokens=160, tiles=24, documents=4, supervised=20),
    "long answers": Pack(tokens=160, tiles=20, documents=4, supervised=60),
    "documents": Pack(tokens=192, tiles=32, documents=2, supervised=40),
}

MODELS = {
    "1b": Model("paper_llama32_1b", PAPER),
    "3b": Model("paper_llama32_3b", PAPER),
    "8b": Model("paper_llama31_8b", PAPER, ("stages.alignment.trainable=[connector.*]",)),
    "tiny": Model("paper_llama32_1b", SMALL, TINY),
}
"""All of 8B's optimizer states fit no single GPU: its connector learns alone."""

VARIANTS: dict[str, Variant] = {
    "default": Variant(),
    "no-checkpointing": Variant(("train.gradient_checkpointing=false",)),
    "reuse-2e9": Variant(deepspeed={"zero_optimization": {"stage3_max_reuse_distance": 2_000_000_000}}),
    "no-shortcuts": Variant(shortcuts=False),
    "modules": Variant(whole_layers=False),
    "modules-reuse-2e9": Variant(
        deepspeed={"zero_optimization": {"stage3_max_reuse_distance": 2_000_000_000}}, whole_layers=False
    ),
    "checkpointing-2": Variant(("train.gradient_checkpointing={vision: 2, language: 2}",)),
    "checkpointing-language": Variant(("train.gradient_checkpointing={language: 1}",)),
    "layers-unfused": Variant(("model.fused_layers=none",)),
    "layers-liger": Variant(("model.fused_layers=liger",)),
    "loss-liger": Variant(loss="liger"),
    "attention-varlen": Variant(("model.attention=varlen",)),
    "attention-sdpa": Variant(("model.attention=sdpa",)),
    "attention-flash4": Variant(("model.attention=flash4",)),
    "attention-flash": Variant(("model.attention=flash",)),
    "connector-mlp": Variant(("model.connector.kind=mlp",)),
    "deepspeed-linear": Variant(deepspeed={"zero_optimization": {"memory_efficient_linear": True}}),
    "gradients-in-bucket": Variant(deepspeed={"zero_optimization": {"contiguous_gradients": True}}),
    "compile-vision": Variant(compiled=("vision",)),
    "compile-language": Variant(compiled=("language",)),
    "kept-logits": Variant(("train.kept_logits_gib=8",)),
    "zero1": Variant(("train.deepspeed=zero1",)),
    "zero2": Variant(("train.deepspeed=zero2",)),
    "no-overlap": Variant(deepspeed={"zero_optimization": {"overlap_comm": False}}),
    "adam-unfused": Variant(deepspeed={"optimizer": {"params": {"fused": False}}}),
    "sums-bf16": Variant(deepspeed={"data_types": {"grad_accum_dtype": "bf16"}}),
    "frozen-vision": Variant(("stages.alignment.trainable=[connector.*, language.*]",)),
    "long-answers": Variant(pack="long answers"),
    "documents": Variant(pack="documents"),
}
"""Name -> what differs."""
ALL = tuple(dict.fromkeys([
    "default", "no-checkpointing", "no-checkpointing+no-shortcuts", "no-checkpointing+zero1",
    "no-checkpointing+gradients-in-bucket", "no-checkpointing+gradients-in-bucket+no-overlap", "no-checkpointing+zero2",
    "no-checkpointing+kept-logits", *VARIANTS,
]))  # fmt: skip
"""In the order of what a short time should rather see."""


def find_variant(name: str) -> Variant:
    """A variant by name, or several of them together: "zero1+no-checkpointing".

    Raises:
        KeyError: there is no such variant.
    """
    parts = [VARIANTS[part] for part in name.split("+")]
    deepspeed: dict[str, Any] = {}
    for part in parts:
        deepspeed = merged(deepspeed, part.deepspeed)
    return Variant(
        overrides=tuple(override for part in parts for override in part.overrides),
        deepspeed=deepspeed,
        whole_layers=all(part.whole_layers for part in parts),
        shortcuts=all(part.shortcuts for part in parts),
        compiled=tuple(dict.fromkeys(name for part in parts for name in part.compiled)),
        loss=next((part.loss for part in parts if part.loss), None),
        pack=next((part.pack for part in parts if part.pack != Variant.pack), Variant.pack),
    )


def merged(config: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """The config with these changes, dictionaries merged."""
    inner = {k: merged(config.get(k, {}), v) if isinstance(v, dict) else v for k, v in changes.items()}
    return {**config, **inner}
