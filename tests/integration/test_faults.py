"""Faults planted in real two-process runs: what the user sees, and that nothing is lost. docs/faults.md lists them."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults import Jobs
from tests.jobs import TINY, metrics, run

SHORT = ["stages.instruct=null", "evaluation.tasks.test=null"]
Train = Callable[..., str]


@pytest.fixture
def train(jobs: Jobs, tmp_path: Path) -> Train:
    def train(faults: str, *overrides: str, code: int = 0, recipe: Path = TINY) -> str:
        """Run one stage to the end with faults; the output."""
        ended = jobs.at(tmp_path).train([str(recipe), *SHORT, *overrides], worker=faults, patience=30.0)  # for MLflow
        assert ended.code == code, f"exit code {ended.code}:\n{ended.output[-4000:]}"
        return ended.output

    return train


def stage_records(folder: Path) -> list[dict]:
    return [r for r in metrics(folder / "runs" / "tiny") if r["stage"] == "connector"]


def window(folder: Path, step: int) -> list[float]:
    """The losses that a checkpoint of the first stage keeps for the comparison with the next one."""
    checkpoint = folder / "runs" / "tiny" / "1-connector" / "checkpoints" / f"step-{step:08d}"
    return json.loads((checkpoint / "state.json").read_text())["callbacks"]["BadNumbers"]["losses"]


def test_a_nan_and_a_full_disk_on_one_rank_do_not_stop_training(train: Train, tmp_path: Path) -> None:
    """The step of the NaN is skipped on all ranks, and the checkpoint that has no room is left out."""
    output = train("nan,disk")
    assert "WARNING: no checkpoint at step" in output
    assert "No space left on device" in output
    records = stage_records(tmp_path)
    assert [r["step"] for r in records if r["skipped"]] == [3, 4]
    assert [r["step"] for r in records] == list(range(1, 9))
    assert all(math.isfinite(r["loss"]) for r in records if not r["skipped"])


def test_nans_without_end_stop_the_run_and_keep_the_last_checkpoint(train: Train, tmp_path: Path) -> None:
    output = train("nan-forever", "resilience.max_bad_steps=3", code=2)
    assert "3 steps in a row up to step 5 had a loss or gradient that is not finite" in output
    assert "Traceback" not in output
    checkpoints = tmp_path / "runs" / "tiny" / "1-connector" / "checkpoints"
    assert (checkpoints / "step-00000002" / "manifest.json").exists()


def test_a_hanging_rank_is_named_with_its_samples(train: Train) -> None:
    limits = ["resilience.start_up_minutes=1", "resilience.step_minutes=0.1", "resilience.step_factor=2"]
    output = train("hang,untracked", *limits, "stages.connector.max_steps=26", code=137)
    assert re.search(r"rank 1 on \S+ hangs in steps, step 24 of stage connector, samples (fields|charts)/", output)
    assert re.search(
        r"^  lagging: rank 1 on \S+, in steps, step 24 .* its process is sleeping or waiting$", output, re.M
    )
    assert "lagging: rank 0" not in output
    assert "fault_worker.py" in output  # the stack of the sleeping rank
    assert "finished: runs/tiny" in train("untracked", "stages.connector.max_steps=26")


def test_a_rank_whose_shards_cannot_be_read_says_so_in_one_line(train: Train) -> None:
    output = train("storage", code=2)
    assert "tar cannot be read: Input/output error; trying again in 0.1 s" in output
    assert re.search(r"^alignvlm: rank 1: data/\w+/000000\.tar cannot be read: Input/output error$", output, re.M)
    assert "alignvlm: 1 of 2 ranks could not load their data and say why" in output
    assert "Traceback" not in output
    assert "finished: runs/tiny" in train("untracked")


def test_a_spike_goes_back_and_leaves_the_packs_out(train: Train, tmp_path: Path) -> None:
    longer = ["stages.connector.max_steps=14", "checkpoint.every_steps=5", "resilience.spike_factor=10"]
    output = train("spike,slow-disk,untracked", *longer, code=75)
    assert "going back to step 10, steps 11 to 12 will be left out" in output
    assert window(tmp_path, 10) == [r["loss"] for r in stage_records(tmp_path) if r["step"] <= 10]
    train("untracked", *longer)
    assert [r["step"] for r in stage_records(tmp_path)] == [*range(1, 11), 13, 14]
    assert window(tmp_path, 14) == [r["loss"] for r in stage_records(tmp_path)], "the restart emptied the window"
    skipped = tmp_path / "runs" / "tiny" / "1-connector" / "skipped_steps.json"
    assert json.loads(skipped.read_text()) == [10, 11]


def test_ranks_with_text_only_and_ranks_with_images_never_wait_for_each_other(train: Train, tmp_path: Path) -> None:
    """Hundreds of micro-batches under ZeRO-3; text-only conversations and pictures fall to the ranks as they come."""
    turns = [[{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": str(i)}] for i in range(300)]
    lines = [{"key": f"t{i}", "messages": messages} for i, messages in enumerate(turns)]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run("data", "write", "--from-jsonl", "text.jsonl", "data/text", cwd=tmp_path)
    recipe = tmp_path / "mixed.yaml"
    recipe.write_text(
        f"extends: {TINY}\n"
        "data: {sources: {text: {path: text}}}\n"
        "stages:\n"
        "  connector:\n"
        "    {mixture: {text: 20, fields: 1, charts: null}, max_steps: 60, sequence_length: 64, warmup_steps: 0}\n"
        "checkpoint: {every_steps: 1000}\n"
    )
    train("untracked", recipe=recipe)
    records = metrics(tmp_path / "runs" / "mixed")
    assert len(records) == 60  # of 4 micro-batches each
    assert any(r["tiles"] == 0 for r in records)
    assert any(0 < r["tiles"] < 4 for r in records)  # fewer than micro-batches: one rank had pictures, another had none
