"""Recipes that no machine could run are refused when they are read: numbers, names, and YAML made to explode."""

from __future__ import annotations

from pathlib import Path

import pytest

from alignvlm.config import load_recipe
from alignvlm.config.tree import MAX_BYTES
from alignvlm.errors import UserError

BASE = """\
model:
  vision: {config: {model_type: siglip_vision_model}}
  language: {path: somewhere, config: {model_type: llama}}
data:
  sources:
    pages: {generator: fields, generator_args: {num_samples: 3}}
    forms: {}
stages:
  first: {mixture: {pages: 2, forms: 1}, lr: {default: 1e-3}}
"""


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "base.yaml"
    path.write_text(BASE)
    return path


def error_of(recipe: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_recipe(str(recipe), overrides)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 1000
    return message


STAGE = "{mixture: {pages: 1}, lr: {default: 1e-3}}"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("stages.first.lr.default=.nan", "stages.first.lr.default is nan, but must be finite"),
        ("stages.first.lr.default=1e999", "stages.first.lr.default is inf, but must be finite"),
        ("stages.first.mixture.pages=.inf", "stages.first.mixture.pages is inf, but must be finite"),
        ("stages.first.betas=[0.9, .NaN]", "stages.first.betas[1] is nan, but must be finite"),
        ("model.connector.gain=-.inf", "model.connector.gain is -inf, but must be finite"),
        ("model.vision.config.layer_norm_eps=.nan", "model.vision.config.layer_norm_eps is nan"),
        ("data.sources.pages.generator_args.forms={field: .nan}", "generator_args.forms.field is nan"),
        ("stages.first.weight_decay=1e39", "stages.first.weight_decay is 1e+39, but must be a number of 32 bits"),
        (f"model.vision.config.hidden_size={10**30}", "model.vision.config.hidden_size is 1000000"),
        (f"seed={10**30}", "seed is 1000000"),
        ("seed=1e30", "seed is 1e+30, but must be a whole number, at least 0 and at most 9,223,372,036,854,775,807"),
        ("seed=-1", "seed is -1, but must be a whole number, at least 0"),
        (f"seed={'9' * 5000}", "is not a number"),
        ("model.tiles.max_tiles=100000000", "model.tiles.max_tiles is 100000000, but must be a whole number"),
        ("model.tiles.max_tiles=2000", "at least 1 and at most 1,024"),
        ("stages.first.sequence_length=1e12", "stages.first.sequence_length is 1000000000000.0, but must be"),
        ("stages.first.global_batch_packs=1000000000000", "at most 1,048,576"),
        ("stages.first.max_steps=1e12", "stages.first.max_steps is 1000000000000.0"),
        ("stages.first.mixture.forms=1e-12", "stages.first.mixture has weights from 1e-12 to 2: an epoch would"),
        ("stages.first.lr.default=1e9", "stages.first.lr.default is 1000000000.0, but must be a number, more than 0"),
        ("train.processes=100000", "train.processes is 100000, but must be a whole number"),
        ("train.timeout_minutes=1e30", "train.timeout_minutes is 1e+30, but must be a number"),
        ("data.num_workers=100000", "data.num_workers is 100000"),
        ("model.vision.image_mean=[0.5, 0.5]", "model.vision.image_mean is [0.5, 0.5], but must be a list of 3 values"),
        ("model.vision.image_std=[0, 1, 1]", "model.vision.image_std[0] is 0, but must be a number, more than 0"),
        ("train.deepspeed=zreo2", "train.deepspeed: deepspeed: unknown strategy 'zreo2': did you mean 'zero2'?"),
        ("stages.first.deepspeed=zero9", "stages.first.deepspeed: deepspeed: unknown strategy 'zero9'"),
        ('description="a\\0b"', "description is 'a\\x00b', but must be text without NUL"),
        ('description="\\ud800"', "description is '\\ud800', but must be text without NUL"),
        ('data={sources: {"a\\nb": {}}}', "the key 'a\\nb' is no name"),
        (f"name={'[' * 5000}", "more than 32 values inside each other"),
        (f"model.vision.config.{'a.' * 500}b=1", "at most 32 keys"),
        ("model.vision.config.a\nb=1", "the key 'a\\nb' is no name"),
        (f"model.vision.config.{'k' * 300}=1", "is no name: at most 200 printable characters"),
        ("model.tiles=[[1]]", "model.tiles is [[1]], but must be a mapping of keys to values"),
        ("data.sources=[[1]]", "data.sources is [[1]], but must be a mapping of keys to values"),
        ("model.connector=[[1]]", "model.connector is [[1]], but must be a mapping of keys to values"),
        ("name=..", "name: the name '..' must be that of a file"),
        ("name=../../x", "name: the name '../../x' must be that of a file"),
        ("name=a/b", "must be that of a file"),
        ("name=.hidden", "must be that of a file"),
        (f"name={'x' * 101}", "must be that of a file: 1 to 100 printable characters"),
        (f"name={'é' * 101}", "must be that of a file"),
        (f"stages={{a/b: {STAGE}}}", "stages: the name 'a/b' must be that of a file"),
        (f"stages={{..: {STAGE}}}", "stages: the name '..' must be that of a file"),
        ("evaluation={tasks: {../../../../../z: {source: forms}}}", "evaluation.tasks: the name '../../../../../z'"),
        ("data={sources: {pages: {}, forms: {}, a/b: {}}}", "data.sources: the name 'a/b' must be that of a file"),
    ],
)
def test_what_no_machine_holds_is_refused(base: Path, override: str, said: str) -> None:
    message = error_of(base, override)
    assert message.startswith(("override '", 'override "', f"{base}:"))
    assert said in message


def test_a_file_without_a_name_must_have_one_that_fits(base: Path, tmp_path: Path) -> None:
    hidden = base.rename(tmp_path / ".base.yaml")
    assert f"{hidden}:1: name: the name '.base'" in error_of(hidden)


def test_unusual_names_stay_possible(base: Path) -> None:
    name = "llava+next (v2), größer"
    recipe = load_recipe(str(base), [f"name={name}", f"data={{sources: {{'{name}': {{}}}}}}"])
    assert recipe.name in recipe.data.sources


def bomb(levels: int) -> str:
    lines = ["a0: &a0 [1, 2, 3, 4, 5, 6, 7, 8, 9]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, levels)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (f"seed: 1\n{bomb(12)}\n", ": this recipe has more than 20,000 values, its aliases written out"),
        ("seed: 1\nmodel: &m\n  vision: *m\n", "an alias inside the value that it names"),
        ("seed: &s [*s]\n", "an alias inside the value that it names"),
        (f"seed: 1\ndata: {'[' * 5000}\n", ":2: not valid YAML: more than 32 values inside each other"),
        (f"seed: 1\n{''.join(f'{chr(32) * n}a:{chr(10)}' for n in range(200))}", ":33: not valid YAML: more than 32"),
        ("seed: 1\nname: a\0b\n", ":2: not valid YAML: the character U+0000 is not text"),
        (f"description: {'x' * MAX_BYTES}\n", f"this recipe has more than {MAX_BYTES:,} bytes"),
        (f"{'k' * 300}: 1\n", ":1: the key 'kkkk"),
        ('seed: 1\n"a\\nb": 1\n', ":2: the key 'a\\nb' is no name"),
        ("name: !!python/object:os.system x\n", ":1: the YAML tag 'tag:yaml.org,2002:python/object:os.system'"),
        ("a: 1\n---\nb: 2\n", ":2: not valid YAML: but found another document"),
    ],
)
def test_yaml_that_explodes_is_one_line(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    message = error_of(path)
    assert message.startswith(f"{path}:")
    assert said in message


def test_a_long_chain_of_recipes_is_refused(tmp_path: Path) -> None:
    for number in range(30):
        (tmp_path / f"r{number}.yaml").write_text(f"extends: r{number + 1}.yaml\n")
    assert "more than 16 recipes extend one after the other" in error_of(tmp_path / "r0.yaml")


def test_recipes_are_not_found_where_paths_are_impossible() -> None:
    for name in ("x" * 5000 + ".yaml", "~nobody-has-this-name/x.yaml", "a\0.yaml", "x" * 5000):
        error_of(Path(name))


def test_a_task_may_not_read_what_a_stage_trains_on_under_another_name(base: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(tmp_path)
    source = f"data.sources.forms.path={tmp_path}"
    data = f"data={{sources: {{pages: {{path: {tmp_path}}}, held: {{path: {link}}}}}}}"
    overrides = [data, source, "stages.first.mixture.forms=null", "evaluation={tasks: {read: {source: held}}}"]
    message = error_of(base, *overrides)
    assert "is 'held', which stage 'first' trains on as 'pages', from the same folder" in message
    assert "evaluation.tasks.read.allow_leak: true" in message
    recipe = load_recipe(str(base), [*overrides, "evaluation.tasks.read.allow_leak=true"])
    assert recipe.evaluation.tasks["read"].allow_leak


def test_a_module_that_raises_is_one_line_with_its_place(base: Path, tmp_path: Path) -> None:
    module = tmp_path / "raises.py"
    module.write_text("import os\nraise RuntimeError('two\\nlines')\n")
    message = error_of(base, f"imports=[{module}]")
    assert f"'{module}' cannot be imported ({module}:2: RuntimeError: two lines)" in message


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        ("{sources: [nosuch]}", "evaluation.loss.sources[0] is the unknown source 'nosuch'"),
        ("{sources: []}", "evaluation.loss.sources is empty: name held-out sources of data.sources"),
        ("{sources: [forms]}", "is 'forms', of which stage 'first' trains on samples (source 'forms')"),
        ("{sources: [other, other]}", "evaluation.loss.sources[1] is 'other': it is named twice"),
        ("{sources: [held_out]}", "is 'held_out': loss/held_out is the loss of all sources"),
        ("{sources: [other], max_packs: 0}", "evaluation.loss.max_packs is 0, but must be a whole number, at least 1"),
        (
            "{sources: [other], every_steps: 0}",
            "evaluation.loss.every_steps is 0, but must be a whole number, at least",
        ),
        ("{sources: [other], packs: 3}", "unknown key 'evaluation.loss.packs': did you mean 'max_packs'?"),
        ("{every_steps: 5}", "evaluation.loss.sources is empty"),
    ],
)
def test_a_held_out_loss_that_cannot_be_measured_is_an_error_with_its_line(base: Path, loss: str, message: str) -> None:
    sources = "data={sources: {other: {path: elsewhere}, held_out: {path: more}}}"
    assert message in error_of(base, sources, f"evaluation={{loss: {loss}}}")


@pytest.mark.parametrize(
    ("trained", "held", "apart"),
    [
        ("{split: train}", "{split: validation}", True),
        ("{split: [train, more]}", "{split: [validation, more]}", False),
        ("{split: {not: [validation, test]}}", "{split: validation}", True),
        ("{split: {not: test}}", "{split: validation}", False),
        ("{rating: {min: 3}}", "{rating: {min: 4}}", False),
        ("{}", "{split: validation}", False),
    ],
)
def test_filters_that_no_sample_passes_both_of_make_a_held_out_source(
    base: Path, trained: str, held: str, apart: bool
) -> None:
    sources = f"data={{sources: {{forms: {{filter: {trained}}}, held: {{path: forms, filter: {held}}}}}}}"
    overrides = [sources, "evaluation={loss: {sources: [held]}}"]
    if apart:
        assert load_recipe(str(base), overrides).evaluation.held_out == ["held"]
    else:
        assert "filters that tell them apart" in error_of(base, *overrides)
