"""What is on the disk is rank 0's word: hosts see a new file of a shared disk at different times."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import repeat
from pathlib import Path
from typing import Any, cast

import pytest

from alignvlm.config.schema import Recipe
from alignvlm.system.signals import Signals
from alignvlm.system.timeline import Timeline
from alignvlm.training import run as run_module
from alignvlm.training.callbacks.bad_numbers import agreed_skips
from alignvlm.training.distributed import World
from data_pipeline.errors import DataError
from tests.training.fakes import FakeWorld, stage_state


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
