"""The section `evaluation` of a recipe: held-out tasks and loss, published benchmarks."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated

from annotated_types import Le

from alignvlm.settings import Bool, Count, PositiveInt, filled, settings


@settings
class TaskConfig:
    """One held-out evaluation."""

    name: str = filled("")
    """Key of the task in `evaluation.tasks`."""
    source: str = ""
    """A source of `data.sources` that no mixture contains; default: the task's name."""
    limit: PositiveInt | None = None
    """Evaluate only this many samples, the first ones."""
    max_new_tokens: Annotated[PositiveInt, Le(2**20)] = 32
    """Maximum number of tokens of a generated answer."""
    metrics: list[str] = field(default_factory=lambda: ["exact_match", "anls", "relaxed_accuracy"])
    """Names of the metrics; the first stands for the task where one number is shown."""
    allow_leak: Bool = False
    """Evaluate the task although a stage trains on its data."""


@settings
class BenchmarkConfig:
    """A published benchmark."""

    path: str
    """File or folder of its data, in any of its layouts (docs/benchmarks.md)."""
    limit: PositiveInt | None = None
    """Ask only this many questions, the first ones."""
    flavour: str | None = None
    """Whose prompt and metric: `vlmevalkit`, `lmms_eval`, `docowl` or `official`; default: the benchmark's first."""


@settings
class TextConfig:
    """Held-out text for the language model alone."""

    path: str
    """A `.txt` file, which is one document, or rows: a `.jsonl`, `.json`, `.parquet` or `.arrow` file or a folder of
    them."""
    name: str = filled("")
    """Key of the text in `evaluation.text`."""
    field: str = "text"
    """Field of a row that holds its document."""
    split: str = ""
    """Split of the rows, such as `test`, where a folder has several."""
    limit: PositiveInt | None = None
    """Read only this many documents, the first ones."""
    window: Annotated[PositiveInt, Le(2**20)] = 2048
    """Tokens that the language model sees at once."""


@settings
class HeldOutLossConfig:
    """The loss on held-out data inside a stage: forward passes only, which change nothing of the training."""

    sources: list[str] = field(default_factory=list)
    """Sources of `data.sources` that no stage trains on."""
    every_steps: PositiveInt = 200
    """Optimizer steps between two measurements; another one follows the last step of a stage."""
    max_packs: PositiveInt = 64
    """At most this many packs of each source, kept in memory: the first of its shuffled order, the same for any number
    of ranks."""
    allow_leak: Bool = False
    """Measure the loss although a stage trains on its data."""


@settings
class EvaluationConfig:
    """Held-out evaluation: answers are generated and scored, the loss is measured."""

    tasks: dict[str, TaskConfig] = field(default_factory=dict)
    """Task name -> task; all tasks run before the first stage and after every stage."""
    benchmarks: dict[str, BenchmarkConfig] = field(default_factory=dict)
    """Name of a published benchmark (`docvqa`, `chartqa`, …) -> its data; they run when tasks do."""
    loss: HeldOutLossConfig | None = None
    """Held-out loss while a stage trains; null measures none."""
    text: dict[str, TextConfig] = field(default_factory=dict)
    """Name -> text on which the language model's perplexity is measured, before the first stage and after every one."""
    batch_size: Annotated[PositiveInt, Le(2**16)] = 16
    """Questions per batch and rank."""
    gallery: Annotated[Count, Le(10_000)] = 12
    """Samples per task that the report shows."""

    @property
    def held_out(self) -> list[str]:
        """Sources whose loss is measured."""
        return self.loss.sources if self.loss else []
