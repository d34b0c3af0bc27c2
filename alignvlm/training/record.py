"""What an optimizer step produced: the record that callbacks see, metrics.jsonl keeps and MLflow shows."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any


@dataclass
class StepRecord:
    """One optimizer step over the global batch. Field names are the keys of metrics.jsonl and of MLflow's metrics.

    All values are equal on all ranks, except the times and the memory, which are those of this rank; rank 0 writes.
    """

    stage: str
    """Name of the stage."""
    step: int
    """Optimizer steps of the stage after this one: the first step is 1."""
    time: float
    """End of the step, in seconds since 1970."""
    epoch: int
    """Epoch of the plan, from 0."""
    loss: float
    """Mean cross entropy per supervised token of the global batch, in nats."""
    lr: dict[str, float]
    """Learning rate of this step, by part of the model; only trainable parts."""
    grad_norm: float
    """L2 norm of the gradient over all trainable parameters, before clipping."""
    tokens: int
    """Tokens that entered the language model, visual tokens included."""
    samples: int
    """Documents."""
    supervised: int
    """Tokens with a loss."""
    tiles: int
    """Image tiles."""
    skipped: bool
    """The gradient was not finite, and the step changed no weight."""
    seconds: float
    """Wall time of the step, waiting for data included."""
    tokens_per_second: float
    """`tokens` / `seconds`, all ranks together."""
    samples_per_second: float
    """`samples` / `seconds`, all ranks together."""
    mfu: float
    """Model FLOPs utilisation, as a fraction of the ranks' peak; see `throughput.py`."""
    data_wait: float
    """Seconds of the step in which this rank waited for its data."""
    memory_gib: float
    """GiB: highest GPU memory so far, or the process's resident memory on a CPU."""
    fill: float
    """`tokens` as a fraction of what the packs of the global batch can hold."""
    checkpoint_stall: float
    """Seconds that training stood still for checkpoints between the previous step and this one."""
    source_loss: dict[str, float] = field(default_factory=dict)
    """Mean cross entropy per supervised token of each source in the global batch; sources without any are left out."""
    source_tokens: dict[str, int] = field(default_factory=dict)
    """`tokens` of each source."""
    source_supervised: dict[str, int] = field(default_factory=dict)
    """`supervised` of each source."""
    ranks: dict[str, dict[str, float]] = field(default_factory=dict)
    """Once per tracking interval: seconds of `compute`, `wait` (for others) and `data`, and `tiles` and `tokens`, per
    step and rank: `mean` and `max` over the ranks, and which `rank` has the maximum. Of the steps since the last time;
    empty with a single rank."""
    stragglers: list[str] = field(default_factory=list)
    """Ranks that were far slower than the others over the last minutes, with their nodes."""
    extra: dict[str, float] = field(default_factory=dict)
    """What callbacks add, by name: further keys of the line."""

    def to_json(self) -> dict[str, Any]:
        """The line of metrics.jsonl, where a number that is not finite is null (a skipped step has such).

        Raises:
            ValueError: a name in `extra` is that of a field.
        """
        line = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "extra"}
        taken = [name for name in self.extra if name in line]
        if taken:
            raise ValueError(f"StepRecord.extra: {taken[0]!r} is a field of the record; choose another name")
        return line | self.extra
