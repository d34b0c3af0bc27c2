"""Recipes from files: places in errors, inheritance, overrides, and the way back to YAML."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from alignvlm.config import diff_recipes, find_recipe, list_recipes, load_recipe, recipe_to_dict, recipe_to_yaml
from alignvlm.connectors.options import AlignOptions, PerceiverOptions
from alignvlm.errors import UserError

BASE = """\
name: base
model:
  vision:
    config: {model_type: siglip_vision_model, hidden_size: 64}
  language:
    path: somewhere
data:
  sources:
    pages: {path: pages}
    forms: {path: forms}
stages:
  connector:
    mixture: {pages: 2, forms: 1}
    trainable: ["connector.*"]
    lr: {default: 1e-3}
    global_batch_packs: 16
"""


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "base.yaml"
    path.write_text(BASE)
    return path


def write(folder: Path, text: str, name: str = "child.yaml") -> str:
    path = folder / name
    path.write_text(text)
    return str(path)


def error_of(recipe: str | Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_recipe(str(recipe), overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_values_arrive_with_their_types(base: Path) -> None:
    stage = load_recipe(str(base)).stages["connector"]
    assert stage.lr == {"default": 1e-3}
    assert stage.mixture == {"pages": 2.0, "forms": 1.0}
    assert stage.betas == (0.9, 0.95)
    assert stage.max_steps is None


@pytest.mark.parametrize(
    ("old", "new", "line", "parts"),
    [
        ("lr: {default", "lrs: {default", 15, ["unknown key 'stages.connector.lrs'", "did you mean 'lr'?"]),
        ("data:", "dta:", 7, ["unknown key 'dta'", "did you mean 'data'?"]),
        ("16", "sixteen", 16, ["stages.connector.global_batch_packs is 'sixteen'", "whole number, at least 1"]),
        ("16", "0", 16, ["stages.connector.global_batch_packs is 0", "at least 1"]),
        ("16", "1.5", 16, ["stages.connector.global_batch_packs is 1.5", "a whole number"]),
        ("1e-3", "-1", 15, ["stages.connector.lr.default is -1", "more than 0"]),
        ("1e-3", "true", 15, ["stages.connector.lr.default is true", "a number"]),
        ("default: 1e-3", "conector: 1e-3", 15, ["unknown part 'conector'", "did you mean 'connector'?"]),
        ("default: 1e-3", "vision: 1e-3", 15, ["stages.connector.lr has no entry for 'connector'"]),
        (
            "connector.*",
            "conector.*",
            14,
            ["stages.connector.trainable[0]", "'conector.*'", "did you mean 'connector'?"],
        ),
        ("connector.*", "connector", 14, ["write 'connector.*'"]),
        ('["connector.*"]', "connector.*", 14, ["stages.connector.trainable is 'connector.*'", "a list"]),
        ("forms: 1", "form: 1", 13, ["unknown source 'form'", "did you mean 'forms'?"]),
        ("path: somewhere", "path: 7", 6, ["model.language.path is 7", "text (put it in quotes)"]),
        ("path: somewhere", "chat_template: x", 5, ["model.language has no weights and no shape"]),
        ("name: base", "name: base\nseed: 1\nseed: 2", 3, ["the key 'seed' is given twice", ":2)"]),
        ("name: base", "name: [base", 2, ["not valid YAML"]),
    ],
)
def test_mistake_names_file_line_key_and_what_is_allowed(
    tmp_path: Path, old: str, new: str, line: int, parts: list[str]
) -> None:
    assert BASE.count(old) == 1
    path = write(tmp_path, BASE.replace(old, new), "wrong.yaml")
    message = error_of(path)
    assert message.startswith(f"{path}:{line}: ")
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("stages.conector.lr.default=1", ["unknown key 'stages.conector'", "did you mean 'connector'?"]),
        ("stages.connector.shedule=linear", ["did you mean 'schedule'?"]),
        ("stages.connector.schedule=cosin", ["one of cosine, linear, constant", "did you mean 'cosine'?"]),
        ("stages.connector.epochs.first=1", ["stages.connector.epochs is a single value"]),
        ("stages.connector.betas=[0.9]", ["a list of 2 values"]),
        ("stages.connector.betas=[0.9, 1.5]", ["stages.connector.betas[1] is 1.5", "at most 1"]),
        ("stages.connector.trainable=[*]", ["not valid YAML"]),
        ("stages.connector=null", ["at least one stage"]),
        ("stages=null", ["stages is null"]),
        ("train.precision", ["key.subkey=value"]),
        ("train=fp32", ["train is 'fp32'", "a mapping"]),
        ("train.gradient_checkpointing=some", ["a mapping of keys to values or true or false or auto"]),
        ("train.gradient_checkpointing.vison=1", ["did you mean 'vision'?"]),
        ("train.gradient_checkpointing.vision=-1", ["gradient_checkpointing.vision is -1", "at least 0"]),
        ("data.sources.page.path=x", ["unknown key 'data.sources.page'", "did you mean 'pages'?"]),
        ("model.language.tokenizer.vocab=1", ["did you mean 'vocab_size'?"]),
        ("stages.connector.max_text_tokens=4096", ["max_text_tokens is 4096, more than the sequence_length 2048"]),
        ("stages.connector.micro_batch_packs=3", ["a multiple of micro_batch_packs (3)"]),
        ("stages.connector.lora={rnk: 8}", ["unknown key 'stages.connector.lora.rnk'", "did you mean 'rank'?"]),
        ("stages.connector.lora={dropout: 1}", ["lora.dropout is 1", "at least 0 and less than 1"]),
        (
            "stages.connector={lora: {}, lr: {default: null, connector: 1}}",
            ["lr has no entry for 'language', which is"],
        ),
        ("stages.connector.lora={targets: []}", ["stages.connector.lora.targets is empty"]),
        ("stages.connector.lora={targets: [connector.*]}", ["targets[0] is 'connector.*': a connector is small"]),
        ("stages.connector.lora={targets: [langage.*]}", ["'langage.*'", "did you mean 'language'?"]),
        ("stages.connector={lora: {}, trainable: ['*']}", ["trainable has '*'", "state what is trained in full"]),
        ("stages.connector.lora={init: pissa}", ["lora.init is 'pissa'", "from weights or data", "kaiming or gauss"]),
        ("stages.connector.lora={init: kaming}", ["lora.init is 'kaming'", "did you mean 'kaiming'?"]),
    ],
)
def test_mistaken_override_names_itself(base: Path, override: str, parts: list[str]) -> None:
    message = error_of(base, override)
    assert message.startswith((f"override {override!r}: ", f"{base}:"))
    for part in parts:
        assert part in message


def test_overrides_reach_everywhere(base: Path) -> None:
    recipe = load_recipe(
        str(base),
        [
            "stages.connector.lr.vision=2e-6",
            "stages.connector.trainable=['*']",
            "stages.connector.mixture.forms=null",
            "model.vision.config.num_hidden_layers=3",
            "data.sources.pages.prompt=''",
            "data.sources.forms.num_samples=10",
            "name=other",
        ],
    )
    stage = recipe.stages["connector"]
    assert stage.lr == {"default": 1e-3, "vision": 2e-6}
    assert stage.mixture == {"pages": 2.0}
    assert recipe.model.vision.config == {
        "model_type": "siglip_vision_model",
        "hidden_size": 64,
        "num_hidden_layers": 3,
    }
    assert recipe.data.sources["forms"].num_samples == 10
    assert recipe.name == "other"


def test_extends_merges_and_null_removes(base: Path, tmp_path: Path) -> None:
    child = write(
        tmp_path,
        """\
extends: base.yaml
data:
  sources: {forms: null}
stages:
  connector:
    mixture: {forms: null}
  joint: {mixture: {pages: 1}, lr: {default: 1e-4}}
""",
    )
    recipe = load_recipe(child)
    assert recipe.name == "child"
    assert recipe.extends is None
    assert list(recipe.stages) == ["connector", "joint"]
    assert recipe.stages["connector"].mixture == {"pages": 2.0}
    assert recipe.stages["connector"].lr == {"default": 1e-3}
    assert list(recipe.data.sources) == ["pages"]


def test_config_of_another_architecture_replaces_the_inherited_one(base: Path, tmp_path: Path) -> None:
    other = "{model_type: clip_vision_model, patch_size: 8}"
    child = write(tmp_path, f"extends: base.yaml\nmodel: {{vision: {{config: {other}}}}}\n")
    assert load_recipe(child).model.vision.config == {"model_type": "clip_vision_model", "patch_size": 8}


def test_extends_in_a_circle_is_refused(tmp_path: Path) -> None:
    first = write(tmp_path, "extends: b.yaml\n", "a.yaml")
    write(tmp_path, "extends: a.yaml\n", "b.yaml")
    assert "circle: a.yaml → b.yaml → a.yaml" in error_of(first)


def test_mistake_in_a_parent_names_the_parent(base: Path, tmp_path: Path) -> None:
    base.write_text(BASE.replace("16", "-1"))
    child = write(tmp_path, "extends: base.yaml\n")
    assert error_of(child).startswith(f"{base}:16: ")


def test_unknown_recipes_list_the_known_ones(tmp_path: Path) -> None:
    assert "did you mean 'quickstart'?" in error_of("quikstart")
    assert "does not exist" in error_of(tmp_path / "none.yaml")
    child = write(tmp_path, "name: x\nextends: paper_lama32_1b\n")
    message = error_of(child)
    assert message.startswith(f"{child}:2: extends: unknown recipe")
    assert "paper_llama32_1b" in message
    assert find_recipe("quickstart").name == "quickstart.yaml"


def test_yaml_of_a_recipe_loads_to_an_equal_recipe(base: Path, tmp_path: Path) -> None:
    awkward = ["description=yes", "data.sources.pages.prompt='1e-3'", "data.sources.forms.prompt='null'"]
    recipe = load_recipe(str(base), awkward)
    assert load_recipe(write(tmp_path, recipe_to_yaml(recipe))) == recipe


def test_diff_names_what_changed(base: Path) -> None:
    old = recipe_to_dict(load_recipe(str(base)))
    new = recipe_to_dict(
        load_recipe(str(base), ["seed=3", "stages.connector.lr.vision=0.1", "data.sources.forms.prompt=a"])
    )
    assert diff_recipes(old, new) == [
        "seed: 0 → 3",
        "data.sources.forms.prompt: '' → 'a'",
        "stages.connector.lr.vision: (absent) → 0.1",
    ]
    assert diff_recipes(old, old) == []


def test_ignored_settings_are_told(base: Path, caplog: pytest.LogCaptureFixture) -> None:
    load_recipe(str(base), ["stages.connector.lr.vision=1e-3"])
    (message,) = [record.getMessage() for record in caplog.records]
    assert "stages.connector.lr.vision is ignored: no parameter of vision is trainable" in message


def test_an_option_of_another_connector_is_an_error_with_its_line(base: Path, tmp_path: Path) -> None:
    path = write(tmp_path, "extends: base.yaml\nmodel:\n  connector:\n    kind: mlp\n    num_latents: 8\n")
    assert error_of(path) == (
        f"{path}:5: unknown key 'model.connector.num_latents': it is an option of perceiver, not of mlp"
    )
    message = error_of(base, "model.connector.kind=percever")
    assert "model.connector.kind is 'percever': did you mean 'perceiver'?" in message
    assert "model.connector.num_heads is 0, but must be a whole number, at least 1" in error_of(
        base, "model.connector.kind=perceiver", "model.connector.num_heads=0"
    )


def test_another_kind_of_connector_leaves_the_former_options_behind(base: Path) -> None:
    gained = ["model.connector.gain=2"]
    assert load_recipe(str(base), gained).model.connector == AlignOptions(gain=2.0)
    overridden = load_recipe(str(base), [*gained, "model.connector.kind=perceiver", "model.connector.num_latents=3"])
    assert overridden.model.connector == PerceiverOptions(num_latents=3)


def test_names_and_defaults_are_resolved(base: Path) -> None:
    overrides = ["evaluation={tasks: {heldout: {}}}", "data={sources: {heldout: {}, pages: {path: s3://bucket/pages}}}"]
    overrides += ["stages.connector.mixture.forms=null", "train.deepspeed=zero2", "data.root=/shards", "name=mine"]
    recipe = load_recipe(str(base), overrides)
    assert [(stage.name, stage.number, stage.deepspeed) for stage in recipe.stages.values()] == [
        ("connector", 1, "zero2")
    ]
    assert {name: (source.name, source.folder) for name, source in recipe.data.sources.items()} == {
        "pages": ("pages", "s3://bucket/pages"),
        "forms": ("forms", "/shards/forms"),
        "heldout": ("heldout", "/shards/heldout"),
    }
    task = recipe.evaluation.tasks["heldout"]
    assert (task.name, task.source) == ("heldout", "heldout")
    assert recipe.tracking.experiment == "mine"
    assert "unknown key 'stages.connector.name'" in error_of(base, "stages.connector.name=x")


def test_evaluation_needs_held_out_sources(base: Path) -> None:
    assert "did you mean 'pages'?" in error_of(base, "evaluation={tasks: {read: {source: page}}}")
    message = error_of(base, "evaluation={tasks: {read: {source: pages}}}")
    assert "which stage 'connector' trains on" in message


def test_recipes_are_read_without_torch() -> None:
    code = "import sys, alignvlm.config; alignvlm.config.load_recipe('quickstart'); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_every_recipe_of_the_package_loads_and_returns() -> None:
    assert {"quickstart", "paper_llama32_1b", "paper_llama32_3b", "paper_llama31_8b", "low_resource_3b"} <= set(
        list_recipes()
    )
    for name in list_recipes():
        assert load_recipe(name).name == name


def test_the_paper_recipes_state_the_papers_numbers() -> None:
    rates = {"paper_llama32_1b": 5e-5, "paper_llama32_3b": 5e-5, "paper_llama31_8b": 1e-5}
    for name, rate in rates.items():
        stages = list(load_recipe(name).stages.values())
        assert [stage.lr for stage in stages] == [{"default": 1e-5}, {"default": rate}, {"default": rate}]
        assert [stage.epochs for stage in stages] == [1, 1, 5]
        assert [stage.max_text_tokens for stage in stages] == [1024, 2048, 2048]
        assert [stage.trainable for stage in stages] == [["*"], ["*"], ["connector.*", "language.*"]]
    stages = load_recipe("low_resource_3b").stages
    assert stages["alignment"].lr == {"default": 1e-3}
    assert stages["alignment"].trainable == ["connector.*"]
    assert stages["instructions"].lr == {"default": 1e-5, "vision": 2e-6}
