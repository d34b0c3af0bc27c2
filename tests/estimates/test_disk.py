"""The disk of a run: how many checkpoints lie there at once. test_bf16.py compares the size of one with real files."""

from __future__ import annotations

import pytest

from alignvlm.config import load_recipe
from alignvlm.config.schema import CheckpointConfig
from alignvlm.estimates import estimate_run
from alignvlm.estimates.disk import num_checkpoints
from tests.jobs import TINY


@pytest.mark.parametrize(("settings", "steps", "count"), [
    (CheckpointConfig(), 5000, 3), (CheckpointConfig(keep_best="loss/held_out"), 5000, 4),
    (CheckpointConfig(keep_last=3, keep_best="task/test"), 5000, 5), (CheckpointConfig(), 1, 1),
    (CheckpointConfig(keep_every=1000), 5000, 8), (CheckpointConfig(every_steps=400, keep_every=1000), 5000, 5),
])  # fmt: skip
def test_the_last_ones_the_best_and_the_one_being_written(settings: CheckpointConfig, steps: int, count: int) -> None:
    assert num_checkpoints(settings, steps) == count


def test_a_run_has_checkpoints_exports_and_masters() -> None:
    recipe = load_recipe(str(TINY), ["train.precision=bf16", "checkpoint.keep_best=task/test"])
    run = estimate_run(recipe, 2)
    parameters, first, second = sum(run.parameters.values()), *(stage.disk for stage in run.stages)
    learns = sum(run.stages[1].trainable.values())
    assert first.checkpoint == 12 * parameters  # ZeRO-3
    assert second.checkpoint == 12 * learns + 2 * (parameters - learns)
    assert (first.num_checkpoints, second.num_checkpoints) == (4, 4)
    assert first.export == second.export == 2 * parameters
    assert (first.masters, second.masters) == (4 * parameters, 0)
    assert run.disk == 3 * first.export + first.masters + 4 * (first.checkpoint + second.checkpoint)
    assert run.to_dict()["stages"][1]["disk"]["total"] == second.total
    assert [stage.host for stage in run.stages] == [
        {"copy of a checkpoint": disk.checkpoint} for disk in (first, second)
    ]
    assert estimate_run(recipe, 2, gpus_per_node=1).stages[0].host == {"copy of a checkpoint": first.checkpoint / 2}
    offloading = estimate_run(load_recipe(str(TINY), ["train.precision=bf16", "train.deepspeed=zero3_offload"]), 16)
    stage = offloading.stages[0]
    assert stage.host == {"offloaded": 8 * stage.memory.host_total, "copy of a checkpoint": first.checkpoint / 2}
