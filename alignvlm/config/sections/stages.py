"""What a recipe says about a stage of the training."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, Lt

from alignvlm.settings import Count, Float, Fraction, NonNegativeFloat, PositiveFloat, PositiveInt, filled, settings
from data_pipeline.order.settings import LARGEST

Part = Literal["vision", "connector", "language"]
PARTS: tuple[Part, ...] = ("vision", "connector", "language")


@settings
class LoraConfig:
    """Low-rank adapters of linear layers: the weight W is frozen, and the layer computes with W + alpha/rank BA."""

    rank: Annotated[PositiveInt, Le(4096)] = 16
    """Rows of A and columns of B, an adapter's two factors."""
    alpha: PositiveFloat = 32.0
    """Strength of the adapters: what they add is scaled by alpha / rank."""
    dropout: Annotated[Float, Ge(0), Lt(1)] = 0.05
    """Share of a layer's input that its adapter does not see, drawn anew for every micro-batch."""
    targets: list[str] = field(default_factory=lambda: ["language.*"])
    """Globs over names of linear layers of `language.*` and `vision.*`; the LM head has no adapter."""
    init: str = "kaiming"
    """How A is initialised, `kaiming` or `gaussian`; B starts with zeros, so adapters change nothing at first."""

    @property
    def scale(self) -> float:
        """The factor of what the adapters add."""
        return self.alpha / self.rank


@settings
class StageConfig:
    """One part of the training: what is trained, on what, how fast, for how long."""

    name: str = filled("")
    """Key of the stage in `stages`."""
    number: int = filled(0)
    """Position among the stages, from 1."""
    mixture: dict[str, PositiveFloat] = field(default_factory=dict)
    """Source name -> weight; weights are normalised."""
    trainable: list[str] = field(default_factory=lambda: ["*"])
    """Globs over parameter names; parts are `vision.*`, `connector.*`, `language.*`. With `lora`, what is
    trained in full beside the adapters: [connector.*], or [] for the adapters alone."""
    lora: LoraConfig | None = None
    """Adapters for layers with frozen weights; null trains no adapters. The stage's export has the merged weights."""
    lr: dict[str, Annotated[Float, Gt(0), Le(1000)]] = field(default_factory=dict)
    """Part (`vision`, `connector`, `language`, or `default`) -> peak learning rate."""
    epochs: Annotated[PositiveInt, Le(LARGEST["epochs"])] = 1
    """Passes over the mixture."""
    max_steps: PositiveInt | None = None
    """Stop after this many optimizer steps, even in the middle of an epoch."""
    global_batch_packs: Annotated[PositiveInt, Le(LARGEST["global_batch_packs"])] = 8
    """Packs per optimizer step, over all ranks and micro-batches."""
    micro_batch_packs: PositiveInt = 1
    """Packs per rank and micro-batch."""
    sequence_length: Annotated[PositiveInt, Le(LARGEST["sequence_length"])] = 2048
    """Tokens per pack, visual tokens included."""
    max_text_tokens: PositiveInt | None = None
    """Truncate the text of a sample after this many tokens (never an image); null does not truncate."""
    warmup_steps: Count = 0
    """Steps in which the learning rate rises linearly from 0 to its peak."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the learning rate after the warm-up."""
    min_lr_ratio: Fraction = 0.0
    """Learning rate at the end as a fraction of the peak."""
    weight_decay: NonNegativeFloat = 0.0
    """AdamW's weight decay; for matrices only, never for biases, norms or embeddings."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    """AdamW's decay rates of the first and the second moment."""
    max_grad_norm: NonNegativeFloat = 1.0
    """Gradients are clipped to this norm; 0 does not clip."""
    deepspeed: str = ""
    """Name of a file in ds_configs/, or a path; default: `train.deepspeed`."""

    @property
    def trained(self) -> list[str]:
        """Globs over the names of everything that is trained, adapters included."""
        return self.trainable + [f"{glob}.lora_*" for glob in (self.lora.targets if self.lora else ())]
