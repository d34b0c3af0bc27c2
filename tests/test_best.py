"""The best checkpoint by a score: losses down, others up, earlier ones first, what is no number never."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from alignvlm.best import best_checkpoint, find_best, is_better, last_checkpoints, stage_scores
from alignvlm.config import load_recipe
from alignvlm.errors import UserError
from alignvlm.run_folder import RunFolder, StageFolder, checkpoint_folder, checkpoint_step
from tests.fixtures.command import Command
from tests.jobs import TINY


@pytest.mark.parametrize(("name", "score", "than", "better"), [
    ("loss/held_out", 1.0, 2.0, True), ("loss/held_out", 2.0, 1.0, False), ("loss/held_out", 1.0, 1.0, False),
    ("task/test", 2.0, 1.0, True), ("task/test", 1.0, 1.0, False), ("task/test", 0.0, None, True),
    ("loss/held_out", float("nan"), None, False), ("task/test", float("inf"), 1.0, False),
])  # fmt: skip
def test_losses_are_better_when_lower_and_the_rest_when_higher(
    name: str, score: float, than: float | None, better: bool
) -> None:
    assert is_better(name, score, than) is better


def test_the_first_of_equal_checkpoints_is_the_best() -> None:
    rows = [(Path(f"step-{step}"), {"loss/a": loss}) for step, loss in ((1, 3.0), (2, 2.0), (3, 2.0))]
    best = find_best([(Path("step-0"), {}), *rows], "loss/a")
    assert best is not None
    assert (best.step, best.score) == (2, 2.0)
    assert find_best(rows, "loss/b") is None


def test_task_scores_are_those_of_the_last_checkpoint(tmp_path: Path) -> None:
    stage = StageFolder(tmp_path / "1-connector", 1, "connector")
    states: dict[int, dict[str, Any]] = {
        2: {"scores": {"loss/held_out": 2.0, "loss/a": None, "loss/b": "low"}},
        4: {"scores": [1]},
        8: {"scores": {"loss/held_out": 3}},
    }
    for step, state in states.items():
        write_checkpoint(stage, step, **state)
    checkpoint_folder(stage.checkpoints, 6).mkdir()  # damaged: nothing in it
    before = [(2, {"loss/held_out": 2.0}), (4, {}), (6, {}), (8, {"loss/held_out": 3})]
    found = [(int(folder.name[5:]), scores) for folder, scores in stage_scores(stage)]
    assert found == before
    stage.export.mkdir()
    stage.evaluation.path.mkdir()
    entry = {"anls": 0.5, "exact_match": 0.25, "items": 4, "baseline": 0.1}
    metrics = {name: {"title": name, "note": ""} for name in ("exact_match", "anls")}
    stage.evaluation.results.write_text(json.dumps({"model": "m", "tasks": {"test": entry | {"metrics": metrics}}}))
    found = [(int(folder.name[5:]), scores) for folder, scores in stage_scores(stage)]
    assert found == [*before[:-1], (8, {"loss/held_out": 3, "task/test": 0.25})]


def write_checkpoint(stage: StageFolder, step: int, **state: Any) -> Path:
    folder = checkpoint_folder(stage.checkpoints, step)
    folder.mkdir(parents=True)
    (folder / "state.json").write_text(json.dumps({"step": step, "num_steps": 8} | state))
    return folder


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """Two stages with scored checkpoints."""
    run = RunFolder(tmp_path / "runs" / "2-tiny")  # a run may be named like a stage
    for number, name, losses in ((1, "connector", {2: 3.0, 4: 1.5, 8: 2.0}), (2, "instruct", {2: 1.5, 8: 1.75})):
        for step, loss in losses.items():
            write_checkpoint(run.stage(number, name), step, scores={"loss/held_out": loss})
    run.stage(0, "init").export.mkdir(parents=True)
    run.config.write_text("checkpoint: {keep_best: loss/held_out}\n")
    return run


def test_a_run_and_a_stage_have_a_best_checkpoint(run: RunFolder) -> None:
    chosen = {path: best_checkpoint(path)[1] for path in (run.path, run.path / "1-connector", run.path / "2-instruct")}
    assert [(best.folder.parents[1].name, best.step, best.score) for best in chosen.values()] == [
        ("1-connector", 4, 1.5), ("1-connector", 4, 1.5), ("2-instruct", 2, 1.5),
    ]  # fmt: skip


def test_the_last_checkpoints_are_those_of_a_stage(run: RunFolder) -> None:
    first, last = run.path / "1-connector", run.path / "2-instruct"
    places = [(run.path, 2), (last, 1), (first, 3), (checkpoint_folder(first / "checkpoints", 4), 2)]
    found = [
        [(each.parents[1].name[0], checkpoint_step(each)) for each in last_checkpoints(*place)] for place in places
    ]
    assert found == [[("2", 2), ("2", 8)], [("2", 8)], [("1", 2), ("1", 4), ("1", 8)], [("1", 2), ("1", 4)]]


def test_what_cannot_be_exported_is_one_line(run: RunFolder, command: Command, tmp_path: Path) -> None:
    def message(folder: Path, *options: str) -> str:
        return command("export", folder, tmp_path / "out", *options, code=2)

    stage = run.path / "2-instruct"
    assert "holds 2 of the 3 checkpoints to average; take fewer, or keep more" in message(stage, "--average", "3")
    assert "holds 1 of the 2 checkpoints" in message(checkpoint_folder(stage / "checkpoints", 2), "--average", "2")
    assert "not allowed with argument" in message(stage, "--average", "3", "--best")
    assert f"{tmp_path} is no run or stage; give runs/<name>" in message(tmp_path, "--best")
    assert "is no run or stage" in message(tmp_path / "missing", "--average", "2")
    assert "step-00000002: not a finished checkpoint (manifest.json is missing)" in message(stage, "--best")
    run.config.write_text("checkpoint: {keep_best: task/test}\n")
    assert "no checkpoint has the score task/test (checkpoint.keep_best) yet" in message(run.path, "--best")
    run.config.write_text("checkpoint: {keep_best: null}\n")
    assert "checkpoint.keep_best names no score" in message(stage, "--best")


@pytest.mark.parametrize("score", ["loss", "loss/test", "task/fields", "held_out"])
def test_a_score_that_nothing_gives_is_an_error_with_its_line(score: str) -> None:
    with pytest.raises(UserError, match=rf"checkpoint.keep_best is '{score}', which no evaluation gives: .*task/test"):
        load_recipe(str(TINY), [f"checkpoint.keep_best={score}"])


@pytest.mark.parametrize("score", ["null", "task/test"])
def test_patience_needs_a_loss(score: str) -> None:
    with pytest.raises(UserError, match=r"checkpoint.patience is 2, but checkpoint.keep_best is .* such as loss/held_"):
        load_recipe(str(TINY), [f"checkpoint.keep_best={score}", "checkpoint.patience=2"])


@pytest.mark.parametrize("score", ["loss/held_out", "loss/test", "task/test"])
def test_scores_of_losses_and_tasks_can_choose(score: str) -> None:
    measured = ["evaluation.loss.sources=[test]", f"checkpoint.keep_best={score}"]
    assert load_recipe(str(TINY), measured).checkpoint.keep_best == score
