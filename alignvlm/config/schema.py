"""What a recipe may say: one dataclass per section, one docstring per field. No reading of files here (load.py)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class VisionConfig:
    """The vision encoder: any SigLIP-like vision model of transformers."""

    path: str | None = None
    """Folder or hub id with pretrained weights; null starts from scratch with `config`."""
    config: dict[str, Any] = field(default_factory=dict)
    """Fields of its transformers config, `model_type` included. Needed from scratch, and lets `alignvlm plan` work offline."""


@dataclass(frozen=True)
class TokenizerConfig:
    """A tokenizer trained on the recipe's own shards, for models that start from scratch."""

    vocab_size: int = 1024
    """Size of the byte-level BPE vocabulary, special tokens included; every digit stays its own token."""


@dataclass(frozen=True)
class LanguageConfig:
    """The language model: any causal LM of transformers."""

    path: str | None = None
    """Folder or hub id with pretrained weights and tokenizer; null starts from scratch with `config`."""
    config: dict[str, Any] = field(default_factory=dict)
    """Fields of its transformers config, `model_type` included. `vocab_size` is filled in from a trained tokenizer."""
    tokenizer: TokenizerConfig | None = None
    """Train a tokenizer instead of loading the one at `path`."""
    chat_template: str | None = None
    """Jinja chat template (ChatML when the tokenizer has none); a `.jinja` file name is read."""


@dataclass(frozen=True)
class ConnectorConfig:
    """From visual features to LLM inputs. The defaults are the paper's ALIGN connector."""

    kind: Literal["align", "mlp", "perceiver"] = "align"
    """`align` averages text embeddings; `mlp` and `perceiver` are the paper's baselines."""
    gain: float = 1.0
    """Initial gamma of the LayerNorm over the vocabulary (align). 1 as in LayerNorm; small LMs learn faster with 5."""
    temperature: float = 1.0
    """The logits are divided by it before the softmax (align). The paper states none."""
    norm_hidden: bool = True
    """LayerNorm over D after W1 (align)."""
    norm_vocab: bool = True
    """LayerNorm over V before the softmax (align)."""
    hidden_size: int | None = None
    """Hidden width of the mlp and perceiver connectors; null takes the LLM's width."""
    num_latents: int = 64
    """Latent queries per tile (perceiver)."""
    num_layers: int = 2
    """Cross-attention layers (perceiver)."""
    num_heads: int = 8
    """Attention heads (perceiver)."""


@dataclass(frozen=True)
class TilesConfig:
    """How an image becomes tiles and visual tokens (paper, section on the vision side; Ovis' coverage rule)."""

    max_tiles: int = 9
    """Most tiles of one image, overview not counted."""
    min_coverage: float = 0.9
    """The fewest tiles whose grid covers more than this part of its canvas win."""
    overview: bool = True
    """Put the whole image, scaled to one tile, in front when there is more than one tile."""
    merge: int = 1
    """Merge each merge x merge block of patch features into one visual token (its channels are concatenated)."""


@dataclass(frozen=True)
class ModelConfig:
    vision: VisionConfig = field(default_factory=VisionConfig)
    language: LanguageConfig = field(default_factory=LanguageConfig)
    connector: ConnectorConfig = field(default_factory=ConnectorConfig)
    tiles: TilesConfig = field(default_factory=TilesConfig)
    attention: Literal["auto", "flash", "varlen", "sdpa"] = "auto"
    """`flash` = flash-attn, `varlen` = PyTorch's own variable-length kernel (CUDA), `sdpa` = per document; `auto` takes the first that runs."""


@dataclass(frozen=True)
class SourceConfig:
    """One dataset of shards."""

    path: str = ""
    """Folder of WebDataset tar shards with their indexes; relative to `data.root`."""
    generator: str | None = None
    """Name of a built-in generator that writes the shards when the folder is empty (the quickstart's)."""
    generator_args: dict[str, Any] = field(default_factory=dict)
    """Arguments of the generator."""
    prompt: str = ""
    """User text put after the image of image-caption pairs."""
    num_samples: int | None = None
    """Only for planning while the shards are not here: how many samples the source has."""
    tokens_per_sample: int | None = None
    """Only for planning while the shards are not here: mean number of text tokens."""
    tiles_per_sample: float | None = None
    """Only for planning while the shards are not here: mean number of tiles."""


@dataclass(frozen=True)
class DataConfig:
    root: str = "data"
    """Folder that the sources' paths are relative to."""
    sources: dict[str, SourceConfig] = field(default_factory=dict)
    window_shards: int = 16
    """Shards per shuffle window: samples mix freely inside a window."""
    mix_block: int = 1024
    """Samples per mixing block: the mixture's quotas are exact within each block."""
    pack_window: int = 65536
    """Samples that are packed together."""
    num_workers: int = 1
    """Loader processes per rank; 0 decodes in the training process."""
    prefetch: int = 4
    """Micro-batches that each loader process keeps ready."""
    max_bad_fraction: float = 0.01
    """Stop when more than this fraction of the samples seen (and at least 10) were quarantined."""


@dataclass(frozen=True)
class StageConfig:
    """One part of the training: what learns, from what, how fast, for how long."""

    mixture: dict[str, float] = field(default_factory=dict)
    """Source name -> weight; weights are normalised."""
    trainable: list[str] = field(default_factory=lambda: ["*"])
    """Globs over parameter names; parts are `vision.*`, `connector.*`, `language.*`."""
    lr: dict[str, float] = field(default_factory=dict)
    """Part (`vision`, `connector`, `language`, or `default`) -> peak learning rate."""
    epochs: int = 1
    """Passes over the mixture."""
    max_steps: int | None = None
    """End after this many optimizer steps, in the middle of an epoch if need be."""
    global_batch_packs: int = 8
    """Packs per optimizer step, over all ranks and micro-batches."""
    micro_batch_packs: int = 1
    """Packs per rank and micro-batch."""
    sequence_length: int = 2048
    """Tokens per pack, visual tokens included."""
    max_text_tokens: int | None = None
    """Text of a sample is cut after this many tokens (never inside an image span); null cuts nothing."""
    warmup_steps: int = 0
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the learning rate after the warm-up."""
    min_lr_ratio: float = 0.0
    """Learning rate at the end as a fraction of the peak."""
    weight_decay: float = 0.0
    """Applied to matrices only: never to biases, norms or embeddings."""
    betas: tuple[float, float] = (0.9, 0.95)
    max_grad_norm: float = 1.0
    """0 clips nothing."""
    deepspeed: str | None = None
    """Overrides `train.deepspeed` for this stage."""


@dataclass(frozen=True)
class TrainConfig:
    processes: int = 1
    """Processes per node that `alignvlm train` starts by itself when no launcher did."""
    deepspeed: str = "zero3"
    """Name of a file in ds_configs/, or a path."""
    precision: Literal["bf16", "fp32"] = "bf16"
    gradient_checkpointing: bool = False
    """Recompute activations of vision and language layers in the backward pass (non-reentrant)."""
    loss_chunk: int = 2048
    """Supervised positions per chunk of the loss: logits of more are never held."""
    timeout_minutes: float = 30.0
    """Of collectives: a rank that hangs longer ends the job."""


@dataclass(frozen=True)
class CheckpointConfig:
    every_steps: int = 500
    """A checkpoint every so many steps, and at the end of a stage."""
    keep_last: int = 2
    """Older ones are removed."""
    keep_every: int | None = None
    """Steps divisible by this are kept for good."""


@dataclass(frozen=True)
class TaskConfig:
    """One held-out evaluation."""

    source: str = ""
    """A source of `data.sources` (not part of any mixture)."""
    limit: int | None = None
    """Evaluate only the first so many samples."""
    max_new_tokens: int = 32


@dataclass(frozen=True)
class EvaluationConfig:
    tasks: dict[str, TaskConfig] = field(default_factory=dict)
    batch_size: int = 16
    gallery: int = 12
    """Predictions per task that the report shows."""


@dataclass(frozen=True)
class TrackingConfig:
    uri: str | None = None
    """MLflow tracking URI; null is a SQLite file beside the runs; `MLFLOW_TRACKING_URI` wins."""
    experiment: str | None = None
    """MLflow experiment; null takes the recipe's name."""
    interval: int = 10
    """Steps per batch of metrics sent to MLflow."""


@dataclass(frozen=True)
class Recipe:
    """A whole run."""

    name: str = ""
    extends: str | None = None
    """Name or path of a recipe whose values this one starts from."""
    description: str = ""
    seed: int = 0
    runs: str = "runs"
    """Folder of all runs; this run's is `<runs>/<name>`."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    stages: dict[str, StageConfig] = field(default_factory=dict)
    """In the order they run."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
