"""A recipe is checked whole before anything runs: files, generators, and the model on the meta device."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from alignvlm.checks import check_files, check_held_out, check_model
from alignvlm.config import load_recipe
from alignvlm.errors import UserError
from tests.data_pipeline.shards.test_overlap import make
from tests.fixtures.command import Command

TINY = str(Path(__file__).parent / "recipes" / "tiny.yaml")
LLAMA = "{model_type: llama, hidden_size: 32, num_attention_heads: 4, num_hidden_layers: 1}"


def check(*overrides: str) -> None:
    recipe = load_recipe(TINY, overrides)
    check_files(recipe)
    check_model(recipe, for_training=True)


def error_of(*overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        check(*overrides)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith((f"override {overrides[-1]!r}: ", f"{TINY}:")), message
    return message


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    "override",
    [
        "seed=1",
        "model.language.config={model_type: gpt2, n_embd: 32, n_layer: 2, n_head: 4}",
        "model.language.config={model_type: mixtral, hidden_size: 32, num_hidden_layers: 1, num_attention_heads: 4, "
        "num_key_value_heads: 2, intermediate_size: 64, num_local_experts: 2}",
        "model.vision.config={model_type: clip_vision_model, hidden_size: 32, num_hidden_layers: 2, "
        "num_attention_heads: 2, image_size: 64, patch_size: 16}",
    ],
)
def test_good_recipes_pass(override: str) -> None:
    check(override)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (
            "model.vision.config.hidden_sise=32",
            "unknown field 'hidden_sise' of siglip_vision_model: did you mean 'hidden_",
        ),
        (
            "model.language.config.rms_nrm_eps=1e-5",
            "unknown field 'rms_nrm_eps' of llama: did you mean 'rms_norm_eps'?",
        ),
        ("model.language.config.zzz=1", "unknown field 'zzz' of llama: see LlamaConfig in the documentation"),
        (
            "model.language.config.rope_parameters={rope_typ: default}",
            "unknown field 'rope_typ': did you mean 'rope_type'",
        ),
        ("model.attention=flash", "model.attention = 'flash' needs a CUDA device"),
        ("model.vision.config.model_type=siglip_vison_model", "did you mean 'siglip_vision_model'?"),
        ("model.vision.config.model_type=[1]", "model_type is missing"),
        (f"model.vision.config={LLAMA}", "model.vision.config.model_type: 'llama' is not a vision encoder"),
        ("model.vision.config={model_type: siglip}", "'siglip' is not a vision encoder"),
        ("model.language.config={model_type: siglip_vision_model}", "is not a causal language model"),
        ("model.vision.config.num_attention_heads=5", "num_attention_heads is 5, but must divide hidden_size, 32"),
        ("model.language.config.num_attention_heads=5", "num_attention_heads is 5, but must divide hidden_size, 32"),
        ("model.language.config.num_key_value_heads=3", "is 3, but must divide num_attention_heads, 4"),
        ("model.language.config.num_attention_heads=0", "num_attention_heads is 0, but must divide"),
        ("model.vision.config.hidden_size=wide", "expected int, got str"),
        ("model.vision.config.hidden_act=gelo", "model.vision.config.hidden_act cannot be built: KeyError 'gelo'"),
        ("model.vision.config.num_channels=1", "num_channels is 1, but images have 3"),
        ("model.vision.config.image_size=[64, 64]", "image_size [64, 64] and patch_size 16 must be"),
        ("model.vision.config.image_size=100000", "each one whole number up to 8,192"),
        ("model.language.config.num_hidden_layers=-3", "num_hidden_layers is -3, but must be at least 1"),
        ("model.vision.config={model_type: swin, image_size: 64, patch_size: 4}", "model cannot be built"),
        ("model.language.config={model_type: bert}", "'bert' is not a causal language model"),
        ("data.sources.fields.path=gopher://x", "data.sources.fields.path: 'gopher://x': unknown scheme"),
        ("model.vision.config.patch_size=128", "image_size 64 and patch_size 128 must be"),
        (
            "model.language.config.num_hidden_layers=1000000000",
            "num_hidden_layers is 1000000000, but must be at least 1",
        ),
        ("model.language.config.intermediate_size=1000000000000", "parameters, more than"),
        ("model.tiles.merge=5", "model.tiles.merge = 5 is more than the 4 patches"),
        (
            "stages.connector.trainable=['language.layerz.*']",
            "stages.connector.trainable[0] is 'language.layerz.*', which",
        ),
        (
            "stages.connector={trainable: [connector.*], lora: {targets: [language.lm_head]}}",
            "stages.connector.lora.targets[0] is 'language.lm_head', the LM head: the loss reads its weight",
        ),
        (
            "stages.connector={trainable: ['language.*q_proj.*'], lora: {}}",
            "stages.connector.trainable has 'language.*q_proj.*', which trains language.model.layers.0.",
        ),
        (
            "model.language.chat_template='{% for m in messages %}'",
            "model.language.chat_template is not a Jinja template",
        ),
        ("model.language.chat_template='{{ messages | nofilter }}'", "No filter named 'nofilter'"),
        ("model.language.chat_template=none.jinja", "'none.jinja', which cannot be read"),
        ("model.vision.path=/no/such/folder", "model.vision.path is '/no/such/folder', which is no folder"),
        ("model.vision.path=.", "a folder without config.json and weights"),
        ("train.deepspeed=none.json", "train.deepspeed: deepspeed: the file 'none.json' does not exist"),
        ("data.sources.fields.generator=feilds", "data.sources.fields.generator: unknown generator 'feilds': did you"),
        ("data.sources.fields.generator_args.num_samples=many", "num_samples is 'many', but must be a valid integer"),
        ("data.sources.fields.generator_args.sede=1", "unknown argument 'sede': did you mean 'seed'?"),
        ("data.sources.fields.generator_args.seed=-1", "seed -1: must be from 0 to"),
        ("data.sources.fields.generator_args.num_samples=1e12", "num_samples is 1000000000000.0"),
        ("data.sources.fields.generator_args.size=0", "size 0: must be from 24 to 4,096"),
        ("data.sources.fields.generator_args.digits=[1]", "digits [1]: must be the fewest and the most"),
        ("data.sources.fields.generator_args.forms={field: x}", "forms['field'] is 'x', but must be a valid number"),
        ("data={sources: {new: {generator: fields}}}", "the argument 'num_samples' is missing"),
    ],
)
def test_a_recipe_that_cannot_run_is_one_line_with_its_place(override: str, said: str) -> None:
    assert said in error_of(override)


def test_experimental_strategies_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    check_files(load_recipe(TINY, ["train.deepspeed=zero3"]))
    assert not caplog.records
    mine = tmp_path / "mine.json"
    mine.write_text('{"zero_optimization": {"stage": 3, "zero_quantized_weights": true}}')
    check_files(load_recipe(TINY, ["train.deepspeed=zeropp", f"stages.instruct.deepspeed={mine}"]))
    first, second = (record.getMessage() for record in caplog.records)
    assert "train.deepspeed 'zeropp' is experimental: a second partition of the weights" in first
    assert "stages.instruct.deepspeed" in second
    assert "quantised weights have never run" in second
    caplog.clear()
    check_files(load_recipe(TINY, ["train.deepspeed=zeropp"]))
    assert len(caplog.records) == 1  # for both stages


def test_a_file_stands_where_a_folder_is_needed(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to("nothing")
    assert "model.vision.path is 'file', which is no folder" in error_of("model.vision.path=file")
    for key in ("runs", "data.root", "data.sources.test.path"):
        assert f"{key} needs the folder" in error_of("data.root=.", f"{key}=file")
    assert "'file' is a file" in error_of("runs=file/below")
    assert "'link' is a link to nothing" in error_of("runs=link")
    with pytest.raises(UserError, match="more than 255 bytes"):
        check(f"runs={'x' * 300}")


def test_a_dry_run_looks_at_files_too(tmp_path: Path, command: Command) -> None:
    (tmp_path / "file").write_text("")
    assert "'file' is a file" in command("train", TINY, "--dry-run", "runs=file", code=2)
    assert "stage" not in command("train", TINY, "--dry-run", "name=a/b", code=2)
    assert not (tmp_path / "runs").exists()


def test_weights_on_the_hub_are_not_asked_for(tmp_path: Path, command: Command) -> None:
    text = re.sub(
        r"  language:.*?(?=  connector:)", "  language: {path: nobody/nothing}\n", Path(TINY).read_text(), flags=re.S
    )
    (tmp_path / "hub.yaml").write_text(text)
    out = command("config", "check", "hub.yaml")
    assert "not checked: recipe 'tiny': the shape of 'nobody/nothing' is not on this machine" in out
    out = command("config", "check", "hub.yaml", "model.vision.config.hidden_sise=1", code=2)
    assert "did you mean 'hidden_size'?" in out


def test_a_folder_with_damaged_weights_is_one_line(tmp_path: Path) -> None:
    from alignvlm.model.build import build_model, load_processor

    folder = tmp_path / "weights"
    folder.mkdir()
    for name in ("model.safetensors", "config.json"):
        (folder / name).write_text("{")
    overrides = ["model.language.tokenizer=null", f"model.language.path={folder}"]
    recipe = load_recipe(TINY, overrides)
    with pytest.raises(UserError, match=r"model.language.path is '.*weights', which transformers cannot load: "):
        load_processor(recipe)
    config = dict(recipe.model.vision.config)
    (folder / "config.json").write_text(json.dumps(config))
    recipe = load_recipe(TINY, [f"model.vision.path={folder}"])
    with pytest.raises(UserError, match=r"model.vision.path is '.*weights', which transformers cannot load: "):
        build_model(recipe, None)  # type: ignore[arg-type]  # the encoder comes first


def test_a_task_whose_shards_a_stage_trains_on_is_refused() -> None:
    make(Path("data/fields"), "one")
    shutil.copytree("data/fields", "data/test")
    check_held_out(load_recipe(TINY, ["evaluation.tasks.test.allow_leak=true"]))
    with pytest.raises(
        UserError, match=rf"^{TINY}:\d+: evaluation.tasks.test.source is 'test', whose shard .*'fields'"
    ):
        check_held_out(load_recipe(TINY))
    loss = "evaluation={loss: {sources: [test]}, tasks: {test: null}}"
    with pytest.raises(
        UserError, match=r"evaluation.loss.sources\[0\] is 'test', whose shard .*evaluation.loss.allow_"
    ):
        check_held_out(load_recipe(TINY, [loss]))
    split = "data={sources: {fields: {filter: {split: a}}, test: {path: fields, filter: {split: b}}}}"
    check_held_out(load_recipe(TINY, [loss, split]))
    shutil.rmtree("data/test")
    make(Path("data/test"), "two")
    check_held_out(load_recipe(TINY))
