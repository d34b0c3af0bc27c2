"""A connector from outside the package, in one file: a recipe imports it, and every command knows it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from jsonschema import Draft202012Validator
from safetensors.torch import load_file

from alignvlm.config import load_recipe
from alignvlm.errors import UserError
from alignvlm.model import AlignVLMForConditionalGeneration, AlignVLMProcessor
from alignvlm.model.build import load_processor
from alignvlm.model.network import build_network
from tests.faults import Jobs
from tests.fixtures.command import Command
from tests.jobs import ROOT, TINY, job_environment, metrics, run

EXAMPLE = ROOT / "examples" / "own_connector.py"
RECIPE = f"""extends: {TINY}
name: own
imports: [{EXAMPLE}]
model:
  connector: {{kind: pooling, window: 2}}
  tiles: {{merge: 1}}
"""
LOAD = """
import sys
from transformers import AutoModelForImageTextToText, AutoProcessor
import alignvlm.model
model = AutoModelForImageTextToText.from_pretrained(sys.argv[1])
print(type(model.model.connector).__name__, AutoProcessor.from_pretrained(sys.argv[1]).spec.tokens_per_tile)
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "own.yaml"
    path.write_text(RECIPE)
    return path


def test_estimate_counts_it(recipe: Path, command: Command) -> None:
    data = json.loads(command("estimate", recipe, "--json"))
    assert data["connector"] == "pooling"
    assert data["tokens_per_tile"] == 4  # 4 x 4 patches
    assert data["parameters"]["connector"] == 32 * 32 + 32
    stage = data["stages"][0]
    connector = stage["flops"]["connector"]
    assert connector["forward"] == pytest.approx(2 * 32 * 32 * 4 * stage["volume"]["tiles"])
    assert connector["backward"] == 2 * connector["forward"]
    assert stage["memory"]["gpu"]["connector activations"] > 0


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{kind: pooling, windows: 2}", r"own.yaml:5: unknown key 'model.connector.windows': did you mean .*window"),
        ("{kind: pooling, window: two}", r"own.yaml:5: model.connector.window is 'two', but must be a whole number"),
        ("{kind: pooling, gain: 2.0}", r"own.yaml:5: unknown key 'model.connector.gain': it is an option of align"),
        ("{kind: poolin}", r"own.yaml:5: model.connector.kind is 'poolin': did you mean .*pooling"),
    ],
)
def test_wrong_options_are_errors_with_their_line(recipe: Path, line: str, message: str) -> None:
    recipe.write_text(RECIPE.replace("{kind: pooling, window: 2}", line))
    with pytest.raises(UserError, match=message):
        load_recipe(str(recipe))


def test_its_own_checks_are_errors_of_the_recipe(recipe: Path) -> None:
    loaded = load_recipe(str(recipe), ["model.connector.window=3"])
    for use in (load_processor, build_network):
        with pytest.raises(UserError, match=r"'own'.*connector.window = 3 does not divide the 4 features"):
            use(loaded)


def test_the_schema_for_editors_has_it(recipe: Path, command: Command) -> None:
    load_recipe(str(recipe))  # imports the connector into this process
    validator = Draft202012Validator(json.loads(command("config", "schema")))
    assert validator.is_valid(yaml.safe_load(RECIPE))
    assert not validator.is_valid(yaml.safe_load(RECIPE.replace("window: 2", "windows: 2")))


@pytest.mark.integration
def test_two_ranks_train_it_and_the_export_loads(recipe: Path, jobs: Jobs) -> None:
    folder = recipe.parent
    overrides = ["stages.connector.max_steps=2", "stages.instruct=null", "evaluation.tasks.test=null"]
    overrides += ["checkpoint.every_steps=1"]
    assert "finished: runs/own" in jobs.at(folder).finish(str(recipe), *overrides)
    records = metrics(folder / "runs" / "own")
    assert [record["step"] for record in records] == [1, 2]
    assert all(record["mfu"] > 0 for record in records)

    export = folder / "runs" / "own" / "1-connector" / "export"
    load_recipe(str(recipe))  # imports the connector into this process
    model = AlignVLMForConditionalGeneration.from_pretrained(export)
    saved = load_file(export / "model.safetensors")["model.connector.linear.weight"]
    assert torch.equal(model.model.connector.linear.weight.detach(), saved)
    assert AlignVLMProcessor.from_pretrained(export).spec.tokens_per_tile == 4

    words = [sys.executable, "-c", LOAD, str(export)]
    fresh = subprocess.run(
        words, cwd=folder, env=job_environment(ALIGNVLM_IMPORTS=str(EXAMPLE)), capture_output=True, text=True
    )
    assert fresh.stdout.strip() == "PoolingConnector 4", fresh.stderr
    without = subprocess.run(words, cwd=folder, env=job_environment(), capture_output=True, text=True)
    assert "connector kind 'pooling' is unknown" in without.stderr
    assert "ALIGNVLM_IMPORTS" in without.stderr

    checkpoint = folder / "runs" / "own" / "1-connector" / "checkpoints" / "step-00000002"
    run("export", str(checkpoint), "again", cwd=folder, ALIGNVLM_IMPORTS=str(EXAMPLE))
    again = load_file(folder / "again" / "model.safetensors")["model.connector.linear.weight"]
    assert torch.equal(again, saved)
