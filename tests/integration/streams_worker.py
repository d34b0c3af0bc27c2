"""Steps on logical streams without one of the waits, and with all: what is found then. Run by zero3_worker.py."""

from __future__ import annotations

import inspect
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

from alignvlm.training.zero3 import shortcuts
from tests.integration import shortcuts_worker
from tests.integration.shortcuts_worker import RECOMPUTED, trainer_by
from tests.one_rank import micro_batches, take_step
from tests.training.logical_streams import Device
from tests.training.on_streams import logical_streams

CASES = {
    "vectors stay": ("zero3", (RECOMPUTED,), {
        "stage3_param_persistence_threshold": 100, "reduce_bucket_size": 10_000, "stage3_prefetch_bucket_size": 9_000,
    }),
    "nothing stays": ("zero3", (), {"stage3_param_persistence_threshold": 0, "reduce_bucket_size": 10_000}),
}  # fmt: skip
STEPS = {"vectors stay": 1, "nothing stays": 4}


class Mutant(NamedTuple):
    """Shortcuts with other code in one place."""

    case: str
    race: str | None
    """What the text of one of its races looks like; None where there is none."""
    function: str = ""
    old: str = ""
    new: str = ""

    def change(self) -> AbstractContextManager[Any]:
        """The shortcuts have the other code while this is open."""
        if not self.function:
            return nullcontext()
        source, scope = inspect.getsource(getattr(shortcuts, self.function)), dict(vars(shortcuts))
        assert source.count(self.old) == 1, f"{self.function} is another: {self.old}"
        exec(source.replace(self.old, self.new), scope)
        return patch.object(shortcuts, self.function, scope[self.function])


class Blind(Mutant):
    """The host never reads what a device holds, and so never waits for it."""

    def change(self) -> AbstractContextManager[Any]:
        return patch.object(Device, "look_at", lambda device, tensor: None)


MUTANTS = {
    "none": Mutant("nothing stays", None),
    "gradients are reduced before they are there": Mutant(
        "vectors stay", "aten.cat.* by reduce_scatter_coalesced .* after the write by aten.* on the default stream",
        "collect_in_place", "optimizer.reduce_and_partition_stream.wait_stream(get_accelerator().current_stream())",
        "pass",
    ),
    "gradients are let go while they are reduced": Mutant(
        "vectors stay", "let go while in use, for the next allocation of the default stream: aten.cat",
        "add_at_once", "parameter.grad.record_stream(get_accelerator().current_stream())", "pass",
    ),
    "gradients are added on the wrong stream": Mutant(
        "vectors stay", "aten._foreach_.* on the default stream",
        "add_at_once", "if found:", "with get_accelerator().stream(get_accelerator().default_stream()):",
    ),
    "weights are let go while they are used": Mutant(
        "vectors stay", "let go while in use, for the next allocation of stream 1: .* on the default stream",
        "release_directly", "free_param(parameter)",
        "parameter.data, parameter.ds_status = parameter.data.new_empty(0), ZeroParamStatus.NOT_AVAILABLE",
    ),
    "weights are gathered while they are updated": Blind(
        "nothing stays", "all_gather.* after the write by aten.copy_.* on the default stream, by _reassign"
    ),
}  # fmt: skip
"""By what goes wrong."""


def mutants(model: Path, world: Any) -> dict[str, tuple[list[str], int]]:
    """By mutant: this rank's races, and how often the host waited for the whole device in the last step."""
    found = {}
    batches = micro_batches(shortcuts_worker.ACCUMULATION)[world.rank :: world.size]
    with patch.object(shortcuts_worker, "CASES", CASES):
        for name, mutant in MUTANTS.items():
            with mutant.change(), logical_streams() as device:
                trainer = trainer_by(shortcuts.VERSION, mutant.case, model, world)
                for _ in range(STEPS[mutant.case]):
                    before = device.num_waits
                    take_step(trainer, batches, world)
                found[name] = list(device.races), device.num_waits - before
                trainer.close()
    return found
