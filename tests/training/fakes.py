"""Stand-ins that let training's parts run in milliseconds: one rank, an engine without a model, a stage on paper."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from alignvlm.config.schema import Recipe, StageConfig
from alignvlm.run_folder import Run
from alignvlm.system.monitor.heart import Heart
from alignvlm.system.ranks import Ranks
from alignvlm.training.callbacks import Callback, StageState
from alignvlm.training.optim import Group
from alignvlm.training.record import StepRecord
from data_pipeline.loading.collate import MicroBatch


@dataclass
class FakeWorld(Ranks):
    """Rank 0 of `size` ranks without a process group; `others` is what the other ranks add to each sum."""

    size: int = 1
    rank: int = 0
    others: list[float] = field(default_factory=list)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    sums: list[tuple[float, ...]] = field(default_factory=list)
    reduced: list[float] = field(default_factory=list)
    heart: Heart = field(default_factory=Heart)

    def barrier(self) -> None: ...

    def seed(self, number: int) -> None:
        torch.default_generator.manual_seed(number)

    def all_reduce_sum(self, *values: float) -> list[float]:
        self.sums.append(values)
        others = self.others if len(self.others) == len(values) else [0.0] * len(values)
        return [float(value) + other for value, other in zip(values, others, strict=True)]

    def all_reduce(self, tensor: torch.Tensor) -> None:
        self.reduced.append(tensor[0].item())

    def broadcast(self, value: Any) -> Any:
        return value

    def all_gather(self, value: Any) -> list[Any]:
        return [value]


class FakeEngine:
    """Answers with one loss per micro-batch: its unnormalised `sums`, divided as the model divides it."""

    def __init__(self, *sums: float, overflow: bool = False) -> None:
        self.sums, self.calls = list(sums), 0
        self.optimizer = SimpleNamespace(param_groups=[{"lr": 0.0}], overflow=overflow)
        self.divisors: list[float] = []
        self.backwards: list[float] = []

    def __call__(self, num_items_in_batch: float, **inputs: Any) -> Any:
        self.divisors.append(num_items_in_batch)
        self.calls += 1
        return SimpleNamespace(loss=torch.tensor(self.sums[self.calls - 1] / num_items_in_batch, dtype=torch.float64))

    def backward(self, loss: torch.Tensor) -> None:
        self.backwards.append(float(loss))

    def step(self) -> None: ...

    def get_global_grad_norm(self) -> float:
        return 2.5


def fake_trainer(*sums: float, overflow: bool = False) -> Any:
    """A trainer around `FakeEngine` with one parameter group of peak rate 0.5."""
    return SimpleNamespace(
        engine=FakeEngine(*sums, overflow=overflow),
        groups=[Group("connector", 0.5, 0.1, ("connector.w",))],
        same_weights=nullcontext,
        seed=0,
    )


def micro_batch(lengths: list[int], supervised: int = 0, tiles: int = 0, step: int = 0) -> MicroBatch:
    """A micro-batch of documents of these lengths; without documents it is the loader's filler of one token."""
    documents, total = lengths or [1], sum(lengths) or 1
    return MicroBatch(
        input_ids=torch.zeros(1, total, dtype=torch.int64),
        position_ids=torch.zeros(1, total, dtype=torch.int64),
        cu_seqlens=torch.tensor([0, *torch.tensor(documents).cumsum(0).tolist()], dtype=torch.int32),
        max_seqlen=max(documents),
        tiles=torch.zeros(tiles, 3, 2, 2, dtype=torch.uint8),
        visual_positions=torch.zeros(0, dtype=torch.int64),
        target_positions=torch.arange(supervised),
        targets=torch.zeros(supervised, dtype=torch.int64),
        target_sources=torch.zeros(supervised, dtype=torch.int64),
        document_sources=torch.zeros(len(documents), dtype=torch.int64),
        keys=[f"s/0.tar/{i}" for i in range(len(lengths))],
        num_samples=len(lengths),
        step=step,
        epoch=1,
    )


def record(step: int = 1, loss: float = 1.0, skipped: bool = False) -> StepRecord:
    """A step's record with plain numbers."""
    return StepRecord(
        stage="connector", step=step, time=1e9, epoch=0, loss=loss, lr={"connector": 1e-3}, grad_norm=1.0, tokens=100,
        samples=4, supervised=50, tiles=2, skipped=skipped, seconds=2.0, tokens_per_second=50.0,
        samples_per_second=2.0, mfu=0.5, data_wait=0.1, memory_gib=1.0, fill=0.9, checkpoint_stall=0.0,
    )  # fmt: skip


class FakeStore:
    """The store of checkpoints as the callback sees it: what was asked of it, and what it answers."""

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.is_written = False
        self.newest_step = 0
        self.pending_step: int | None = None
        self.problem: str | None = None
        self.best = False

    def attach(self, engine: Any) -> None:
        self.calls.append("attach")

    def begin(self, engine: Any, state: dict[str, Any]) -> str | None:
        self.calls.append(("begin", state))
        return self.problem

    def is_best(self, scores: dict[str, float], step: int) -> bool:
        return self.best

    def finish(self, wait: bool = True) -> None:
        self.calls.append("finish" if wait else "go on")
        if wait and self.pending_step is not None:
            self.newest_step, self.pending_step = self.pending_step, None

    def close(self) -> None:
        self.calls.append("close")


def stage_state(recipe: Recipe, folder: Path, step: int = 0, num_steps: int = 100, **changes: Any) -> StageState:
    """The first stage of a recipe at `step`, on rank 0 of one, with a fake store and no engine."""
    stage: StageConfig = next(iter(recipe.stages.values()))
    run = Run(replace(recipe, runs=str(folder)))
    run.stage_folder(stage).path.mkdir(parents=True, exist_ok=True)
    callbacks: list[Callback] = changes.pop("callbacks", [])
    fields: dict[str, Any] = {
        "recipe": run.recipe, "run": run, "stage": stage, "folder": run.stage_folder(stage), "world": FakeWorld(),
        "trainer": SimpleNamespace(engine=None), "processor": None, "store": FakeStore(), "num_steps": num_steps,
        "signals": None,
        "plan": SimpleNamespace(names=[], position=lambda at: SimpleNamespace(to_json=lambda: {"step": at})),
        "step": step,
    }  # fmt: skip
    return StageState(**(fields | {"callbacks": callbacks} | changes))
