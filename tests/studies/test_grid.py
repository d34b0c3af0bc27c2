"""Cells, forecast, execution and the command line of studies, with nothing trained."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from alignvlm.config import list_recipes, load_recipe
from alignvlm.connectors.options import BUILT_IN
from alignvlm.errors import UserError
from alignvlm.run_folder import RunFolder
from alignvlm.studies import run as story
from alignvlm.studies.cells import execute
from alignvlm.studies.cells.forecast import forecast
from alignvlm.studies.cells.grid import Grid, Variant
from alignvlm.studies.registry import STUDIES, find_study
from data_pipeline.files import write_json_lines
from tests.fixtures.command import Command
from tests.jobs import TINY


@pytest.fixture
def grid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Grid:
    monkeypatch.chdir(tmp_path)
    return find_study("connectors").grid(str(TINY), ("train.processes=1",), 2)


@pytest.mark.parametrize("name", list(STUDIES))
def test_every_study_of_the_quickstart_has_runs_of_its_own(name: str) -> None:
    grid = find_study(name).grid("quickstart", (), 2 if name == "connectors" else 1)
    names = [cell.name for cell in grid.cells]
    assert len(set(names)) == len(names) == len(grid.seeds) * len(grid.variants)
    assert grid.reference.name == "align"
    assert grid.reference.overrides == ()
    assert [cell.seed for cell in grid.cells] == sorted(cell.seed for cell in grid.cells)
    for cell in grid.cells:
        assert cell.recipe.seed == cell.seed
        assert cell.recipe.tracking.experiment == "quickstart"


def test_the_connector_study_has_every_kind_for_every_recipe() -> None:
    for name in list_recipes():
        kinds = {kind for variant in find_study("connectors").variants(load_recipe(name)) for kind in kinds_of(variant)}
        assert kinds | {"align"} == set(BUILT_IN)


def kinds_of(variant: Variant) -> list[str]:
    """The kind that a variant states."""
    stated = "model.connector.kind="
    return [setting.removeprefix(stated) for setting in variant.overrides if setting.startswith(stated)]


def test_studies_share_the_runs_of_the_reference() -> None:
    recipe = load_recipe("quickstart")
    assert find_study("connectors").variants(recipe)[0] == find_study("init").variants(recipe)[0]


def test_a_recipe_that_a_study_cannot_vary_is_refused() -> None:
    with pytest.raises(UserError, match="study init varies the ALIGN connector; recipe tiny has mlp"):
        find_study("init").grid(str(TINY), ["model.connector.kind=mlp"])
    with pytest.raises(UserError, match=r"unknown study 'noisy'.*noise"):
        find_study("noisy")


def test_hours_are_those_of_measured_steps(grid: Grid) -> None:
    unknown = forecast(grid)
    assert {each.left for each in unknown} == {None}
    assert {tuple(each.steps.items()) for each in unknown} == {(("connector", 8), ("instruct", 4))}
    folder = RunFolder(Path(grid.cells[0].recipe.runs) / "tiny-align-seed7")
    folder.path.mkdir(parents=True)
    lines = [{"stage": "connector", "step": step, "seconds": 50.0 if step == 1 else 2.0} for step in range(1, 6)]
    write_json_lines(folder.metrics, lines)
    found = forecast(grid)
    assert {each.left for each in found} == {None}  # nobody knows the second stage yet
    write_json_lines(folder.metrics, [*lines, {"stage": "instruct", "step": 1, "seconds": 3.0}])
    found = forecast(grid)
    assert [each.state for each in found] == ["resumes", *["new"] * (len(found) - 1)]
    assert found[0].left == pytest.approx((3 * 2 + 3 * 3) / 3600)
    assert found[1].left == pytest.approx((8 * 2 + 4 * 3) / 3600)
    assert forecast(grid, step_seconds=10)[1].left == pytest.approx(12 * 10 / 3600)


def test_dry_run_prints_runs_steps_and_hours(grid: Grid, command: Command) -> None:
    words = ("study", "connectors", TINY, "train.processes=1", "--seeds", "2", "--dry-run")
    printed = command(*words)
    for cell in grid.cells:
        assert cell.name in printed
    assert "12 steps" in printed
    assert "--step-seconds" in printed
    assert f"hours: {len(grid.cells) * 12 * 100 / 3600:.2f}" in command(*words, "--step-seconds", "100")
    assert not Path("runs").exists()
    assert "--seeds 0" in command(*words[:4], "--seeds", "0", code=2)


def test_a_report_makes_no_data(grid: Grid, command: Command) -> None:
    command("study", "connectors", TINY, "--report", "--output", "page")
    assert "No run of this study is finished yet." in Path("page/index.html").read_text(encoding="utf-8")
    assert not Path("data").exists()


def test_codes_of_runs_decide_how_a_study_goes_on(grid: Grid, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[str] = []
    codes = {"tiny-mlp-seed7": 9}

    def run(command: list[str], processes: int) -> int:
        assert command[1:5] == ["-m", "alignvlm", "train", str(TINY)]
        started.append(load_recipe(command[4], command[5:]).name)
        return codes.get(started[-1], 0)

    monkeypatch.setattr(execute, "run_local", run)
    assert execute.train_cells(grid) == ["tiny-mlp-seed7"]
    assert started == [cell.name for cell in grid.cells]
    codes["tiny-ovis-seed7"] = 75
    started.clear()
    with pytest.raises(execute.StoppedError, match="tiny-ovis-seed7: stopped; the same command"):
        execute.train_cells(grid)
    assert started[-1] == "tiny-ovis-seed7"
    codes["tiny-align-seed7"] = 2
    with pytest.raises(UserError, match="tiny-align-seed7: the run was refused"):
        execute.train_cells(grid)


def test_runs_of_an_array_are_read_as_they_were_written(
    grid: Grid, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for sbatch runs the script of the last task, with a stand-in for train.sbatch."""
    monkeypatch.setattr(story, "match", lambda grid: (grid, {}))  # the data is not needed here
    for name, text in (
        (
            "sbatch",
            'echo "$@" >submitted; export SLURM_ARRAY_TASK_ID=1; shift $(($# - 3)); bash "$1" ./train "$3"; echo 7',
        ),
        ("train", 'printf "%s\\n" "$ALIGNVLM_LOGS" "$@" >trained'),
    ):
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    words = ("study", "connectors", TINY, "train.processes=1", "--seeds", "2", "--slurm", "--gpus-per-node", "0")
    output = command(*words, "description=two words")
    assert f"submitted array 7 of {len(grid.cells)} runs" in output
    assert f"--array=0-{len(grid.cells) - 1} --job-name=tiny-connectors" in (tmp_path / "submitted").read_text()
    logs, recipe, *overrides = (tmp_path / "trained").read_text().splitlines()
    second = grid.cells[1]
    assert (logs, recipe) == (f"runs/{second.name}/logs", str(TINY))
    assert load_recipe(recipe, overrides).name == second.name
    assert load_recipe(recipe, overrides).description == "two words"
    first = {path: path.read_text() for path in Path("runs/tiny-study-connectors").glob("runs-*.txt")}
    command(*words[:5], "1", *words[6:], "description=two words")
    assert len(first) == 1
    assert {path: path.read_text() for path in first} == first  # tasks of the first array start again by it
    password = "tracking.uri=postgresql://me:secret@host/db"
    assert "no place for a password" in command(*words, password, code=2)
