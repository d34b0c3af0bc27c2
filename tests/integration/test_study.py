"""A study end to end: two variants with two seeds, killed in its second run and started again; page and data."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from alignvlm.config.schema import Recipe
from alignvlm.errors import UserError
from alignvlm.parts import part_of
from alignvlm.studies.cells.batches import match_samples
from alignvlm.studies.cells.grid import Variant
from alignvlm.studies.registry import STUDIES, find_study
from alignvlm.studies.study import Study
from data_pipeline.files import read_json_lines
from tests.fixtures.command import Command
from tests.jobs import TINY, job_environment, metrics
from tests.report.test_report import Page

SHORT = (
    "stages.connector.max_steps=3", "stages.connector.global_batch_packs=1", "stages.instruct=null",
    "train.processes=1", "data.num_workers=0",
    "checkpoint.every_steps=1", "evaluation.gallery=0",
)  # fmt: skip

PROGRAM = """
import os
import signal
import sys
import alignvlm
from alignvlm.cli import main
from alignvlm.studies import registry
from alignvlm.studies.cells import execute
from alignvlm.training import run


class Untracked:  # a server is no part of this, and its client takes two seconds per run
    def __init__(self, run):
        self.notify = lambda: None
        self.close = lambda: True


class Kill(alignvlm.Callback):
    def on_step(self, state, record):
        if record.step == 2:
            os.kill(os.getpid(), signal.SIGKILL)


def here(command, processes):  # instead of a process per run, each of which imports everything anew
    recipe = alignvlm.load_recipe(command[4], command[5:])
    return alignvlm.train(recipe, callbacks=[Kill()] if recipe.name == os.environ.get("KILL") else [])


run.Tracker = Untracked
execute.run_local = here
registry.STUDIES["two"] = "tests.integration.test_study"
sys.exit(main(sys.argv[1:]))
"""


class Two(Study):
    """ALIGN, and a Perceiver that makes half as many visual tokens."""

    name = "two"
    title = "Two"
    question = "Does it work?"

    def variants(self, recipe: Recipe) -> list[Variant]:
        return [
            Variant("align"),
            Variant("few", ("model.connector.kind=perceiver", "model.connector.num_latents=2")),
        ]


STUDY = Two()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a study was killed in its second run."""
    folder = tmp_path_factory.mktemp("study")
    process = program(folder, KILL="tiny-few-seed7")
    assert process.returncode == -signal.SIGKILL, process.stdout[-4000:]
    return folder


def program(folder: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`alignvlm study two` with two seeds, all runs in the study's own process."""
    words = ("study", "two", str(TINY), *SHORT, "--seeds", "2", *words)
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, *words], cwd=folder, env=job_environment(**environment), text=True, timeout=500,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def test_a_killed_study_goes_on_and_compares_what_it_trained(
    folder: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    early = json.loads(Path("runs/tiny-study-two/results.json").read_text())
    assert early["finished"] is False
    assert [len(each["cells"]) for each in early["variants"].values()] == [1, 0]

    done = program(folder)
    assert done.returncode == 0, done.stdout[-4000:]
    assert "cell 1 of 4: tiny-align-seed7: finished before" in done.stdout
    attempts = read_json_lines(Path("runs/tiny-few-seed7/attempts.jsonl"))
    assert len(attempts) == 2
    page = Page(Path("runs/tiny-study-two/index.html").read_text())
    assert "4 of 4 runs" in " ".join(page.text)
    content = json.loads(Path("runs/tiny-study-two/results.json").read_text())
    assert content["finished"] is True
    for variant, tokens in (("align", 4), ("few", 2)):
        for cell in content["variants"][variant]["cells"]:
            run = Path("runs") / cell["run"]
            lines = {line["step"]: line for line in metrics(run)}
            weights = load_file(run / "1-connector" / "export" / "model.safetensors")
            assert cell["steps"] == len(lines) == 3
            assert cell["samples"] == sum(line["samples"] for line in lines.values())
            assert cell["final_loss"] == lines[3]["loss"]
            assert cell["tokens_per_tile"] == tokens
            assert cell["parameters"] == sum(weight.numel() for weight in weights.values())
            assert cell["connector_parameters"] == sum(
                w.numel() for n, w in weights.items() if part_of(n) == "connector"
            )
            scores = json.loads((run / "1-connector" / "evaluation" / "results.json").read_text())["tasks"]
            assert cell["scores"] == {"test": scores["test"]["exact_match"]}
            read = content["batches"][cell["run"]]["connector"]
            assert read["samples"] == cell["samples"]
    reads = {name: read["connector"] for name, read in content["batches"].items()}
    assert reads["tiny-align-seed7"]["plan"] != reads["tiny-align-seed8"]["plan"]
    assert reads["tiny-few-seed7"]["sequence_length"] < reads["tiny-align-seed7"]["sequence_length"] == 192
    for seed in (7, 8):
        few, many = (reads[f"tiny-{name}-seed{seed}"]["samples"] for name in ("few", "align"))
        assert abs(few - many) <= 0.05 * many
    monkeypatch.setitem(STUDIES, "two", __name__)
    words = ("study", "two", TINY, *SHORT, "--seeds", "2", "--report", "--output", "elsewhere")
    assert command(*words).splitlines()[-1] == "study two, 4 of 4 runs trained: elsewhere/index.html"
    again = json.loads(Path("elsewhere/results.json").read_text())
    assert again["variants"] == content["variants"]
    assert "started with another recipe" in command(*words, "stages.connector.max_steps=2", code=2)


def test_variants_see_the_same_batches_or_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)

    class Shorter(Two):
        def variants(self, recipe: Recipe) -> list[Variant]:
            return [*super().variants(recipe)[:1], Variant("shorter", ("stages.connector.max_steps=2",))]

    grid, batches = match_samples(find_study("connectors").grid(str(TINY), ("stages.instruct=null",), 2))
    for cell in grid.cells:
        found, expected = (batches[name]["connector"] for name in (cell.name, f"tiny-align-seed{cell.seed}"))
        if cell.variant.name == "h_reducer":  # makes five visual tokens of a tile instead of four
            assert found.plan != expected.plan
            assert abs(found.samples - expected.samples) <= 0.05 * expected.samples
        else:
            assert found == expected
    with pytest.raises(UserError, match="variant shorter of study two sees other batches than align"):
        match_samples(Shorter().grid(str(TINY), SHORT))
