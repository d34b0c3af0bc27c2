"""What a recipe may say: one dataclass per section, one docstring per field. No reading of files here (load.py).

A connector's options stand in its own file: `model.connector` is the options class of the kind that it names.
"""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Any, Literal

from annotated_types import Ge

from alignvlm.connectors import AlignOptions, ConnectorOptions
from alignvlm.settings import (
    Bool,
    Count,
    Float,
    Fraction,
    Int,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    filled,
    settings,
)

Part = Literal["vision", "connector", "language"]
PARTS: tuple[Part, ...] = ("vision", "connector", "language")


@settings
class VisionConfig:
    """The vision encoder: any SigLIP-like vision model of transformers."""

    path: str | None = None
    """Folder or hub id with pretrained weights; null starts from scratch with `config`."""
    config: dict[str, Any] = field(default_factory=dict)
    """Fields of its transformers config, with `model_type`. Needed from scratch, and by `alignvlm estimate` offline."""
    position_std: PositiveFloat | None = None
    """Standard deviation of new position embeddings; null leaves it to the class (SigLIP: 1/sqrt(width), far below the
    patch embeddings: a small encoder from scratch finds out where things are much sooner with 1)."""
    image_mean: list[Float] = field(default_factory=lambda: [0.5, 0.5, 0.5])
    """Of pixels in [0, 1], per channel; a pretrained encoder needs its own (SigLIP: 0.5)."""
    image_std: list[Float] = field(default_factory=lambda: [0.5, 0.5, 0.5])
    """Of pixels in [0, 1], per channel. Mostly white pages from scratch: a mean near 0.9 and 0.25 here."""


@settings
class TokenizerConfig:
    """A tokenizer trained on the recipe's own shards, for models that start from scratch."""

    vocab_size: PositiveInt = 1024
    """Size of the byte-level BPE vocabulary, special tokens included; every digit stays its own token."""


@settings
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


@settings
class TilesConfig:
    """How an image becomes tiles and visual tokens (paper, section on the vision side; Ovis' coverage rule)."""

    max_tiles: PositiveInt = 9
    """Most tiles of one image, overview not counted."""
    min_coverage: Fraction = 0.9
    """The fewest tiles whose grid covers more than this part of its canvas win."""
    overview: Bool = True
    """Put the whole image, scaled to one tile, in front when there is more than one tile."""
    merge: PositiveInt = 1
    """Merge each merge x merge block of patch features into one visual token (its channels are concatenated)."""


@settings
class ModelConfig:
    """The whole network: vision encoder, connector, language model."""

    vision: VisionConfig = field(default_factory=VisionConfig)
    """From pixels to features."""
    language: LanguageConfig = field(default_factory=LanguageConfig)
    """From embeddings to text."""
    connector: ConnectorOptions = field(default_factory=AlignOptions)
    """Between the two: its kind, and options of that kind."""
    tiles: TilesConfig = field(default_factory=TilesConfig)
    """How images are cut up."""
    attention: Literal["auto", "flash", "varlen", "sdpa"] = "auto"
    """`flash` = flash-attn, `varlen` = PyTorch's own variable-length kernel (CUDA), `sdpa` = per document;
    `auto` takes the first of them that runs here."""


@settings
class SourceConfig:
    """One dataset of shards."""

    name: str = filled("")
    """Its key in `data.sources`."""
    folder: str = filled("")
    """Folder or URL of its shards: `path`, below `data.root` where it is relative."""
    path: str = ""
    """Folder of WebDataset tar shards, relative to `data.root`; the source's own name where not stated."""
    generator: str | None = None
    """Name of a built-in generator that writes the shards when the folder is empty (the quickstart's)."""
    generator_args: dict[str, Any] = field(default_factory=dict)
    """Arguments of the generator."""
    prompt: str = ""
    """User text put after the image of image-caption pairs."""
    num_samples: PositiveInt | None = None
    """Only for estimates while the shards are not here: how many samples the source has."""
    tokens_per_sample: Count | None = None
    """Only for estimates while the shards are not here: mean number of text tokens."""
    tiles_per_sample: NonNegativeFloat | None = None
    """Only for estimates while the shards are not here: mean number of tiles."""


@settings
class DataConfig:
    """Sources, shuffling, packing and loading."""

    root: str = "data"
    """Folder that the sources' paths are relative to."""
    sources: dict[str, SourceConfig] = field(default_factory=dict)
    """Source name -> dataset, for training and for evaluation."""
    window_shards: PositiveInt = 16
    """Shards per shuffle window: samples mix freely inside a window."""
    mix_block: PositiveInt = 1024
    """Samples per mixing block: the mixture's quotas are exact within each block."""
    pack_window: PositiveInt = 65536
    """Samples that are packed together."""
    num_workers: Count = 1
    """Loader processes per rank; 0 decodes in the training process."""
    prefetch: PositiveInt = 4
    """Micro-batches that each loader process keeps ready."""
    max_bad_fraction: Fraction = 0.01
    """Stop when more than this fraction of the samples seen (and at least 10) were quarantined."""


@settings
class StageConfig:
    """One part of the training: what is trained, on what, how fast, for how long."""

    name: str = filled("")
    """Its key in `stages`."""
    number: int = filled(0)
    """Its place among the stages, from 1."""
    mixture: dict[str, PositiveFloat] = field(default_factory=dict)
    """Source name -> weight; weights are normalised."""
    trainable: list[str] = field(default_factory=lambda: ["*"])
    """Globs over parameter names; parts are `vision.*`, `connector.*`, `language.*`."""
    lr: dict[str, PositiveFloat] = field(default_factory=dict)
    """Part (`vision`, `connector`, `language`, or `default`) -> peak learning rate."""
    epochs: PositiveInt = 1
    """Passes over the mixture."""
    max_steps: PositiveInt | None = None
    """End after this many optimizer steps, in the middle of an epoch if need be."""
    global_batch_packs: PositiveInt = 8
    """Packs per optimizer step, over all ranks and micro-batches."""
    micro_batch_packs: PositiveInt = 1
    """Packs per rank and micro-batch."""
    sequence_length: PositiveInt = 2048
    """Tokens per pack, visual tokens included."""
    max_text_tokens: PositiveInt | None = None
    """Text of a sample is cut after this many tokens (never inside an image span); null cuts nothing."""
    warmup_steps: Count = 0
    """Steps in which the learning rate rises linearly from 0 to its peak."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the learning rate after the warm-up."""
    min_lr_ratio: Fraction = 0.0
    """Learning rate at the end as a fraction of the peak."""
    weight_decay: NonNegativeFloat = 0.0
    """Applied to matrices only: never to biases, norms or embeddings."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    """AdamW's decay rates of the first and the second moment."""
    max_grad_norm: NonNegativeFloat = 1.0
    """0 clips nothing."""
    deepspeed: str = ""
    """Name of a file in ds_configs/, or a path; `train.deepspeed` where not stated."""


@settings
class TrainConfig:
    """Settings of the trainer that hold for every stage."""

    processes: PositiveInt = 1
    """Processes per node that `alignvlm train` starts by itself when no launcher did."""
    deepspeed: str = "zero3"
    """Name of a file in ds_configs/, or a path."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Of weights, activations and gradients; the optimizer keeps fp32 masters either way."""
    gradient_checkpointing: Bool = False
    """Recompute activations of vision and language layers in the backward pass (non-reentrant)."""
    loss_chunk: PositiveInt = 2048
    """Supervised positions per chunk of the loss: logits of more are never held."""
    timeout_minutes: PositiveFloat = 30.0
    """Of collectives: a rank that hangs longer ends the job."""


@settings
class CheckpointConfig:
    """Cadence and retention of checkpoints."""

    every_steps: PositiveInt = 500
    """A checkpoint every so many steps, and at the end of a stage."""
    keep_last: PositiveInt = 2
    """Older ones are removed."""
    keep_every: PositiveInt | None = None
    """Steps divisible by this are kept for good."""
    background: Bool = True
    """Write while training goes on, from a copy in host memory."""


@settings
class ResilienceConfig:
    """What to do when a step goes wrong or does not end."""

    max_bad_steps: PositiveInt = 10
    """Stop after so many steps in a row whose loss or gradient was not finite; each of them changes no weight."""
    spike_factor: Annotated[Float, Ge(1)] | None = None
    """A loss above this multiple of the median of the last 50 steps sends the run back to the last checkpoint, from
    where it goes on without the packs since; null never does."""
    watchdog_factor: Annotated[Float, Ge(2)] = 20.0
    """A step that takes this many times the median of its predecessors counts as hanging ..."""
    watchdog_minutes: PositiveFloat = 10.0
    """... but never before so many minutes."""


@settings
class TaskConfig:
    """One held-out evaluation."""

    name: str = filled("")
    """Its key in `evaluation.tasks`."""
    source: str = ""
    """A source of `data.sources` (not part of any mixture); the task's own name where not stated."""
    limit: PositiveInt | None = None
    """Evaluate only the first so many samples."""
    max_new_tokens: PositiveInt = 32
    """Most tokens of a generated answer."""
    metrics: list[str] = field(default_factory=lambda: ["exact_match", "anls", "relaxed_accuracy"])
    """Names of the metrics; the first stands for the task where one number is shown."""


@settings
class EvaluationConfig:
    """What is generated and scored on held-out samples."""

    tasks: dict[str, TaskConfig] = field(default_factory=dict)
    """Task name -> held-out evaluation; all of them run before the first and after every stage."""
    batch_size: PositiveInt = 16
    """Questions that are answered together, per rank."""
    gallery: Count = 12
    """Predictions per task that the report shows."""


@settings
class TrackingConfig:
    """MLflow tracking."""

    uri: str | None = None
    """MLflow tracking URI; null is a SQLite file beside the runs; `MLFLOW_TRACKING_URI` wins."""
    experiment: str | None = None
    """MLflow experiment; null takes the run's name."""
    interval: PositiveInt = 10
    """Steps per batch of metrics sent to MLflow."""


@settings
class Recipe:
    """A whole run."""

    name: str = ""
    """Name of the run; the file's own name when not stated (it is never inherited)."""
    extends: str | None = None
    """Name or path of a recipe whose values this one starts from."""
    description: str = ""
    """One or two sentences for people."""
    imports: list[str] = field(default_factory=list)
    """Python modules (`package.module`, or a file `mine.py`) to import first: what registers connectors, metrics,
    importers or storage of your own."""
    seed: Int = 0
    """Of weights from scratch and of the order of the data."""
    runs: str = "runs"
    """Folder of all runs; this run's is `<runs>/<name>`."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The network."""
    data: DataConfig = field(default_factory=DataConfig)
    """Where samples come from and how they are shuffled and packed."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """What all stages share."""
    stages: dict[str, StageConfig] = field(default_factory=dict)
    """In the order they run."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """When checkpoints are written and which are kept."""
    resilience: ResilienceConfig = field(default_factory=ResilienceConfig)
    """Hangs, bad numbers, spikes."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """Held-out tasks."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """MLflow."""
