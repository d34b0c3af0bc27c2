"""What a recipe may say: one dataclass per section, one docstring per field. No reading of files here (load.py).

A connector declares its options in its own file: `model.connector` is an instance of the options class of its kind.
"""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le

from alignvlm.config.sections.evaluation import EvaluationConfig
from alignvlm.config.sections.resilience import MINUTES, ResilienceConfig
from alignvlm.config.sections.stages import PARTS as PARTS
from alignvlm.config.sections.stages import Part as Part
from alignvlm.config.sections.stages import StageConfig
from alignvlm.connectors.options import AlignOptions, ConnectorOptions
from alignvlm.settings import (
    FILLED,
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
from data_pipeline.order.settings import LARGEST


@settings
class VisionConfig:
    """The vision encoder: any SigLIP-like vision model of transformers."""

    path: str | None = None
    """Folder or hub id with pretrained weights; null starts from scratch with `config`."""
    config: dict[str, Any] = field(default_factory=dict)
    """Fields of its transformers config, with `model_type`. Needed from scratch, and by `alignvlm estimate` offline."""
    feature_layer: Annotated[Int, Ge(-4096), Le(-1)] = -1
    """Layer whose output is taken as features, counted from the end: -1 is the last one, followed by the encoder's
    final norm; -2 is the last but one, without the norm, as in LLaVA. Later layers are neither computed nor loaded."""
    position_std: PositiveFloat | None = None
    """Standard deviation of new position embeddings; null keeps the class's default (SigLIP: 1/sqrt(width), far below
    the patch embeddings: a small encoder from scratch learns positions much sooner with 1)."""
    image_mean: tuple[Fraction, Fraction, Fraction] = (0.5, 0.5, 0.5)
    """Mean of the pixels in [0, 1], per channel; a pretrained encoder needs its training's mean (SigLIP: 0.5)."""
    image_std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] = (0.5, 0.5, 0.5)
    """Standard deviation of the pixels, per channel. For white pages from scratch: a mean near 0.9 and 0.25 here."""

    @property
    def final_norm(self) -> bool:
        """Whether features pass the encoder's final norm."""
        return self.feature_layer == -1


@settings
class TokenizerConfig:
    """A tokenizer trained on the recipe's own shards, for models that start from scratch."""

    vocab_size: Annotated[Int, Ge(260), Le(2**20)] = 1024
    """Size of the byte-level BPE vocabulary, special tokens included; every digit is a token."""


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
    """How an image is split into tiles and visual tokens (the coverage rule of Ovis, which the paper cites)."""

    max_tiles: Annotated[PositiveInt, Le(1024)] = 9
    """Maximum number of tiles per image, not counting the overview."""
    min_coverage: Fraction = 0.9
    """The grid with the fewest tiles that covers more than this fraction of the image is chosen."""
    overview: Bool = True
    """Put the whole image, scaled to one tile, first when there is more than one tile."""
    merge: PositiveInt = 1
    """Merge each merge x merge block of patch features into one by concatenating their channels; zeros fill the last
    blocks where it does not divide a tile's side."""


@settings
class ModelConfig:
    """The whole network: vision encoder, connector, language model."""

    vision: VisionConfig = field(default_factory=VisionConfig)
    """The vision encoder."""
    language: LanguageConfig = field(default_factory=LanguageConfig)
    """The language model."""
    connector: ConnectorOptions = field(default_factory=AlignOptions)
    """The connector between them: its kind, and options of that kind."""
    tiles: TilesConfig = field(default_factory=TilesConfig)
    """How images are split into tiles."""
    attention: Literal["auto", "flash4", "flash", "varlen", "sdpa"] = "auto"
    """`flash` = flash-attn, `varlen` = PyTorch's own variable-length kernel (CUDA), `sdpa` = per document; `auto` takes
    the first of these that is available. `flash4` = flash-attn-4, for Hopper and later GPUs."""
    fused_layers: Literal["auto", "liger", "none"] = "auto"
    """Whether layers that compute RMSNorm, SwiGLU and RoPE as Llama does use liger-kernel's kernels in training; `auto`
    does so on CUDA when liger-kernel is installed. `alignvlm estimate` shows for which layers."""


@settings
class SourceConfig:
    """One dataset of shards."""

    name: str = filled("")
    """Key of the source in `data.sources`."""
    folder: str = filled("")
    """Folder or URL of the shards: `path`, relative to `data.root`."""
    path: str = ""
    """Folder of WebDataset tar shards, relative to `data.root`, or its URL; default: the source's name."""
    generator: str | None = None
    """Name of a generator that writes the shards when the folder is empty (used by the quickstart)."""
    generator_args: dict[str, Any] = field(default_factory=dict)
    """Arguments of the generator."""
    prompt: str = ""
    """User text placed after the image of an image-caption pair."""
    sample: Annotated[Fraction, Gt(0)] = 1.0
    """Share of the samples that training uses, chosen by the hash of shard and key: the same on any machine."""
    filter: dict[str, Any] = field(default_factory=dict)
    """Conditions on the samples' meta data: name of a field -> what it must be for training to use a sample, which is a
    value, a list of values, or {min, max, not, missing}. In a field that is a list, every item must fit."""
    read: Literal["auto", "ranges", "shards"] = "auto"
    """How shards in an object store are read: `ranges` requests each sample, `shards` fetches whole shards onto the
    node's disk ahead of the plan, `auto` takes what costs less. `alignvlm data plan` says which, and why."""
    num_samples: Annotated[Int, Ge(1), Le(10**12)] | None = None
    """Number of samples, for estimates while the shards are not on this machine."""
    tokens_per_sample: Count | None = None
    """Mean number of text tokens, for estimates while the shards are not on this machine."""
    tiles_per_sample: NonNegativeFloat | None = None
    """Mean number of tiles, for estimates while the shards are not on this machine."""


@settings
class DataConfig:
    """Sources, shuffling, packing and loading."""

    root: str = "data"
    """Folder or URL (s3:, gs:, az:, https:) that the sources' paths are relative to."""
    sources: dict[str, SourceConfig] = field(default_factory=dict)
    """Source name -> dataset, for training and for evaluation."""
    window_shards: Annotated[PositiveInt, Le(LARGEST["window_shards"])] = 16
    """Shards per shuffle window: samples mix freely inside a window."""
    mix_block: Annotated[PositiveInt, Le(LARGEST["mix_block"])] = 1024
    """Samples per mixing block: the mixture's quotas are exact within each block."""
    pack_window: Annotated[PositiveInt, Le(LARGEST["pack_window"])] = 65536
    """Samples that are packed together; more samples fill packs better."""
    num_workers: Annotated[Count, Le(256)] = 1
    """Loader processes per rank; 0 decodes in the training process."""
    prefetch: Annotated[PositiveInt, Le(1024)] = 4
    """Micro-batches that each loader process keeps ready."""
    cache_gb: Annotated[Float, Gt(0)] | None = None
    """GB of whole shards that a node may keep on its disk, in ALIGNVLM_CACHE; null means three quarters of the free
    space, at most 200."""
    max_bad_fraction: Fraction = 0.01
    """Stop when more than 10 samples and more than this fraction of those seen were quarantined."""


@settings
class RecomputeConfig:
    """Which layers recompute their activations in the backward pass instead of keeping them, part by part."""

    vision: Annotated[Count, Le(4096)] = 0
    """One vision layer in this many; 1 is every layer, 0 is none."""
    language: Annotated[Count, Le(4096)] = 0
    """One layer of the language model in this many."""

    @property
    def words(self) -> str:
        """The layers that recompute: "vision none, language one in 4"."""
        degrees = {0: "none", 1: "all"}
        parts = (("vision", self.vision), ("language", self.language))
        return ", ".join(f"{part} {degrees.get(every, f'one in {every}')}" for part, every in parts)


@settings
class TrainConfig:
    """Settings of the trainer that apply to every stage."""

    processes: Annotated[PositiveInt, Le(256)] = 1
    """Processes that `alignvlm train` starts on this machine when no launcher did."""
    deepspeed: str = "zero3"
    """Name of a file in ds_configs/, or a path."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Precision of weights, activations and gradients; the optimizer keeps fp32 master weights in either case."""
    gradient_checkpointing: RecomputeConfig | Bool | Literal["auto"] = False
    """Recompute activations in the backward pass (non-reentrant): `true` those of all vision and language layers,
    `{vision: 0, language: 2}` those of every second language layer, `auto` the least with which each stage fits the
    GPUs by the estimate (none without a GPU). It changes no number; `alignvlm estimate` names the least that fits."""
    loss_chunk: Annotated[PositiveInt, Le(2**24)] = 2048
    """Supervised positions per chunk of the loss: at most this many rows of logits exist at once."""
    kept_logits_gib: Annotated[Float, Ge(0), Le(1024)] = 0.0
    """GiB of a GPU's memory in which the ALIGN (or Ovis) connector keeps logits for the backward pass instead of
    computing them again there. A block takes 2 bytes x visual tokens x 8,192. Results are the same to the last bit."""
    timeout_minutes: Annotated[Float, Gt(0), Le(MINUTES)] = 30.0
    """Timeout of collectives: a rank that hangs longer ends the job."""

    @property
    def recompute(self) -> RecomputeConfig:
        """`gradient_checkpointing` part by part; `auto` must have become a number first, stage by stage."""
        stated = self.gradient_checkpointing
        assert stated != "auto"
        return stated if isinstance(stated, RecomputeConfig) else RecomputeConfig(int(stated), int(stated))


@settings
class CheckpointConfig:
    """When checkpoints are written, which are kept, and whether a stage ends when they get no better."""

    every_steps: PositiveInt = 500
    """Steps between two checkpoints; another one is written at the end of a stage."""
    keep_last: PositiveInt = 2
    """Number of checkpoints to keep; older ones are removed."""
    keep_every: PositiveInt | None = None
    """Checkpoints whose step is divisible by this are kept permanently."""
    keep_best: str | None = None
    """Score by which the best checkpoint of each stage is kept too: `loss/held_out` or `loss/<source>` (the lowest), or
    `task/<name>` (the highest). When a held-out loss improves, a checkpoint is written at that step."""
    patience: PositiveInt | None = None
    """End a stage early when the score of `keep_best`, a loss, has not improved in this many validations in a row. Its
    export has the weights of the last step, and the next stage begins. null trains every stage to its end."""
    min_delta: NonNegativeFloat = 0.0
    """By how much the loss must fall to count as an improvement for `patience`."""
    background: Bool = True
    """Write in the background while training continues, from a copy in host memory."""


@settings
class TrackingConfig:
    """Where the numbers of a run go, besides its folder."""

    uri: str | None = None
    """MLflow tracking URI; null is a SQLite file beside the runs. The variable `MLFLOW_TRACKING_URI` takes precedence.
    A password in the URI is masked wherever the recipe is printed or written; a run from such a copy needs the
    variable."""
    experiment: str | None = None
    """MLflow experiment; null takes the run's name."""
    interval: PositiveInt = 10
    """Steps per batch of metrics sent to MLflow and the others."""
    also: list[Literal["tensorboard", "wandb"]] = field(default_factory=list)
    """Further trackers beside MLflow, each with a package to install (docs/tracking.md)."""


@settings
class Recipe:
    """A whole run."""

    name: str = ""
    """Name of the run; default: the name of the file (it is never inherited)."""
    extends: str | None = None
    """Name or path of a recipe that this one extends."""
    description: str = ""
    """One or two sentences about the recipe."""
    imports: list[str] = field(default_factory=list)
    """Python modules (`package.module`, or a file `mine.py`) to import first: what registers connectors, metrics,
    importers or storage of your own."""
    seed: Annotated[Int, Ge(0), Le(2**63 - 1)] = 0
    """Seed of new weights and of the data order."""
    runs: str = "runs"
    """Folder of all runs; this run's is `<runs>/<name>`."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The network."""
    data: DataConfig = field(default_factory=DataConfig)
    """Sources, shuffling, packing and loading."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Settings of the trainer that all stages share."""
    stages: dict[str, StageConfig] = field(default_factory=dict)
    """Stage name -> stage, in the order they run."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """When checkpoints are written, which are kept, and whether a stage ends when they get no better."""
    resilience: ResilienceConfig = field(default_factory=ResilienceConfig)
    """What happens at hangs, non-finite numbers and loss spikes."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """Held-out tasks."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """MLflow and other trackers."""
    places: dict[str, str] = field(default_factory=dict, compare=False, repr=False, metadata={FILLED: True})
    """Dotted key -> file and line where it was written, for errors."""
