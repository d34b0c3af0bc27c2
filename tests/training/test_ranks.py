"""What is on the disk is rank 0's word: hosts see a new file of a shared disk at different times."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterable
from itertools import repeat
from pathlib import Path
from typing import Any, cast

import pytest

from alignvlm.config.schema import Recipe
from alignvlm.launch.local import free_port
from alignvlm.run_folder import checkpoint_folder
from alignvlm.system.signals import Signals
from alignvlm.system.timeline import Timeline
from alignvlm.training import run as run_module
from alignvlm.training.callbacks.bad_numbers import agreed_skips
from alignvlm.training.checkpoints.store import CheckpointStore
from alignvlm.training.distributed import World
from data_pipeline.errors import DataError
from tests.jobs import ROOT, job_environment
from tests.training.fakes import FakeWorld, stage_state
from tests.training.test_checkpoint import Engine


class Main(FakeWorld):
    """Rank 0, which keeps what it tells the others."""

    def __init__(self) -> None:
        super().__init__(size=2, rank=0)
        self.told: list[Any] = []

    def broadcast(self, value: Any) -> Any:
        self.told.append(value)
        return value


class Other(FakeWorld):
    """Rank 1, and what rank 0 tells it, in order."""

    def __init__(self, told: Iterable[Any]) -> None:
        super().__init__(size=2, rank=1)
        self.told = iter(told)

    def broadcast(self, value: Any) -> Any:
        return next(self.told)


def test_a_rank_leaves_out_the_steps_that_rank_0_has_read(recipe: Recipe, tmp_path: Path) -> None:
    state, main = stage_state(recipe, tmp_path), Main()
    state.folder.skipped_steps.write_text("[3, 4]")
    state.world = cast(World, main)
    assert agreed_skips(state) == {3, 4}
    state.folder.skipped_steps.unlink()
    state.world = cast(World, Other(main.told))
    assert agreed_skips(state) == {3, 4}


def test_a_damaged_list_ends_the_other_ranks_too(recipe: Recipe, tmp_path: Path) -> None:
    state, main = stage_state(recipe, tmp_path), Main()
    state.folder.skipped_steps.write_text("[3, ")
    state.world = cast(World, main)
    with pytest.raises(DataError, match=r"skipped_steps\.json cannot be read"):
        agreed_skips(state)
    state.folder.skipped_steps.unlink()
    state.world = cast(World, Other(main.told))
    with pytest.raises(DataError, match=r"skipped_steps\.json cannot be read"):
        agreed_skips(state)


@pytest.mark.parametrize("finished", [False, True])
def test_a_rank_trains_the_stages_that_rank_0_finds_unfinished(
    finished: bool, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[str] = []
    monkeypatch.setattr(run_module, "run_processor", lambda run: None)
    monkeypatch.setattr(run_module, "evaluate_stage", lambda *arguments: None)
    monkeypatch.setattr(run_module, "train_stage", lambda run, stage, *rest: trained.append(stage.name))
    run = stage_state(recipe, tmp_path).run
    for folder in run.stage_folders():
        if not finished:  # the opposite of what rank 0 says
            folder.export.mkdir(parents=True)
    world = cast(World, Other(repeat(finished)))
    assert run_module._train(run, world, None, Signals(), (), Timeline()) == 0
    assert trained == ([] if finished else list(run.recipe.stages))


def test_ranks_that_see_other_checkpoints_agree(tmp_path: Path) -> None:
    """Two processes: one host does not see the newest checkpoint yet, and still sees one that was removed."""
    folders = [tmp_path / "first" / "checkpoints", tmp_path / "second" / "checkpoints"]
    for folder, losses in zip(folders, ({10: 2.0, 20: 2.0}, {10: 2.0, 30: 1.0}), strict=True):
        store = CheckpointStore(folder, cast(World, FakeWorld()), keep_last=9, keep_every=None)
        store.attach(engine := Engine())
        for step, loss in losses.items():
            assert store.begin(engine, {"step": step, "world_size": 1, "scores": {"loss/held_out": loss}}) is None
            assert store.finish() is None
        store.close()
    shutil.copytree(*(checkpoint_folder(folder, 10) for folder in folders), dirs_exist_ok=True)  # the same one
    port = str(free_port())
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.training.ranks_worker"], cwd=folder.parent, stdout=subprocess.PIPE,
            env=job_environment(
                WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port, RANK=str(rank), PYTHONPATH=str(ROOT)
            ),
        )
        for rank, folder in enumerate(folders)
    ]  # fmt: skip
    try:
        found = [json.loads(process.communicate(timeout=120)[0].splitlines()[-1]) for process in processes]
    finally:
        for process in processes:
            process.kill()
    # A step that the second cannot read is no one's; what only the second sees takes part in nothing.
    assert found == [{"newest": 10, "is best": [True, False]}] * 2
