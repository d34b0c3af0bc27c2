"""The seal of a finished run covers its benchmarks: data and results. Held-out tasks: integration/test_run.py."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from alignvlm.config import BenchmarkConfig, Recipe
from alignvlm.run_folder import Run, checkpoint_folder
from alignvlm.training.finished import is_finished, seal


@pytest.fixture
def run(recipe: Recipe, tmp_path: Path) -> Run:
    """A run with a benchmark whose data is one question, as sealed."""
    data = tmp_path / "ChartQA_TEST.tsv"
    data.write_text("index\timage\tquestion\tanswer\tsplit\n0\tAAAA\tq\ta\thuman\n")
    evaluation = replace(recipe.evaluation, tasks={}, benchmarks={"chartqa": BenchmarkConfig(path=str(data))})
    run = Run(replace(recipe, runs=str(tmp_path / "runs"), evaluation=evaluation))
    for stage in run.stage_folders():
        stage.export.mkdir(parents=True)
        stage.benchmarks.path.mkdir()
        stage.benchmarks.results.write_text("{}")
    seal(run)
    assert is_finished(run)
    return run


@pytest.mark.parametrize("changed", ["removed", "another one is better"])
def test_the_best_checkpoint_is_sealed(run: Run, changed: str) -> None:
    run = Run(replace(run.recipe, checkpoint=replace(run.recipe.checkpoint, keep_best="loss/held_out")))
    folders = [checkpoint_folder(run.stage_folders()[1].checkpoints, step) for step in (2, 4)]
    for folder, loss in zip(folders, (1.0, 2.0), strict=True):
        folder.mkdir(parents=True)
        (folder / "state.json").write_text(json.dumps({"scores": {"loss/held_out": loss}}))
    seal(run)
    (folders[1] / "manifest.json").touch()  # not the best one
    assert is_finished(run)
    if changed == "removed":
        shutil.rmtree(folders[0])
    else:
        (folders[1] / "state.json").write_text(json.dumps({"scores": {"loss/held_out": 0.5}}))
    assert not is_finished(run)


@pytest.mark.parametrize("changed", ["data", "no data", "results"])
def test_a_benchmark_with_work_left_breaks_the_seal(run: Run, changed: str) -> None:
    data = Path(run.recipe.evaluation.benchmarks["chartqa"].path)
    if changed == "data":
        data.write_text(data.read_text() + "1\tAAAA\tq\ta\thuman\n")
    elif changed == "no data":
        data.unlink()
    else:
        run.stage_folders()[-1].benchmarks.results.unlink()
    assert not is_finished(run)
