"""`alignvlm estimate`: every recipe works offline, figures are arithmetic, and what does not fit names its way out."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from alignvlm.config import list_recipes, load_recipe, with_names
from alignvlm.config.deepspeed import read_strategy
from alignvlm.config.schema import PARTS, DataConfig, RecomputeConfig, SourceConfig, StageConfig
from alignvlm.estimates import estimate_run
from alignvlm.model.network import build_network, largest_list
from data_pipeline.order.summary import summarise
from data_pipeline.shards.writer import write_shards


@pytest.mark.parametrize("name", list_recipes())
def test_every_recipe_is_estimated(name: str) -> None:
    recipe = load_recipe(name)
    estimate = estimate_run(recipe, recipe.train.processes)
    assert [stage.name for stage in estimate.stages] == list(recipe.stages)
    for stage in estimate.stages:
        assert stage.volume.steps > 0
        assert stage.total_flops > 0
        assert stage.memory.gpu_total > 0
        assert not [problem for problem in stage.problems if "sequence_length" in problem]
    assert json.loads(json.dumps(estimate.to_dict()))["fits"] == estimate.fits


@pytest.mark.parametrize("name", [name for name in list_recipes() if name.startswith("paper_")])
def test_the_papers_runs_fit_on_64_h100_and_match_its_batches(name: str) -> None:
    estimate = estimate_run(load_recipe(name), 64)
    assert estimate.fits
    assert estimate.stages[0].samples_per_step == pytest.approx(512, rel=0.05)
    later = 512 if name.endswith("1b") else 256
    for stage in estimate.stages[1:]:
        assert stage.samples_per_step == pytest.approx(later, rel=0.05)
    assert estimate.stages[2].trainable["vision"] == 0
    assert estimate.max_tokens_per_image == 7290


@pytest.mark.parametrize("name", [name for name in list_recipes() if name.startswith("paper_")])
def test_the_prefetch_bucket_holds_a_whole_layer(name: str) -> None:
    """Of ZeRO-3: layers are gathered as wholes, and a smaller bucket would look ahead by a part of one."""
    recipe = load_recipe(name)
    network = build_network(recipe)
    layers = [layer for part in ("vision", "language") for layer in largest_list(network.part(part))[2]]
    largest = max(sum(parameter.numel() for parameter in layer.parameters()) for layer in layers)
    for stage in recipe.stages.values():
        assert largest <= read_strategy(stage)["zero_optimization"]["stage3_prefetch_bucket_size"]


def test_plain_form_has_the_papers_size() -> None:
    """10 crops x 729 tokens x 128,256 in bf16 are the 1.74 GiB of one tensor."""
    overrides = ["stages.alignment.sequence_length=7290", "stages.alignment.max_text_tokens=null"]
    stage = estimate_run(load_recipe("paper_llama32_1b", overrides), 64).stages[0]
    assert stage.naive_vocabulary / 2**30 == pytest.approx(1.74, abs=0.005)
    assert stage.our_vocabulary < stage.naive_vocabulary / 6


def test_estimate_is_the_sources_arithmetic() -> None:
    overrides = ["stages.alignment.max_steps=100"]
    whole = estimate_run(load_recipe("paper_llama32_1b"), 64).stages[0]
    part = estimate_run(load_recipe("paper_llama32_1b", overrides), 64).stages[0]
    assert whole.volume.samples == 8_100_000
    assert whole.volume.tokens == 8_100_000 * (3 * 729 + 40)
    assert not whole.volume.exact
    assert part.volume.steps == 100
    assert part.samples_per_step == pytest.approx(whole.samples_per_step)
    assert part.hours == pytest.approx(whole.hours * 100 / whole.volume.steps)


def test_what_does_not_fit_names_the_setting_that_mends_it() -> None:
    overrides = ["train.gradient_checkpointing=false", "train.deepspeed=zero1"]
    recipe = load_recipe("paper_llama31_8b", overrides)
    stage = estimate_run(recipe, 64).stages[1]
    assert not stage.fit.fits
    assert stage.fit.fix is not None
    mended = load_recipe("paper_llama31_8b", [*overrides, *stage.fit.fix.split()])
    assert estimate_run(mended, 64).stages[1].fit.fits
    assert stage.fit.fix in stage.problems[-1]


def test_the_least_recomputation_fits_and_cheaper_ones_do_not() -> None:
    estimate = estimate_run(load_recipe("paper_llama32_1b"), 64, gpu_memory=48)
    least = estimate.least_recomputation
    assert estimate.fits
    assert least is not None
    assert 0 < least.flops < sum(stage.flops[part].recomputed for stage in estimate.stages for part in PARTS)
    chosen = estimate_run(load_recipe("paper_llama32_1b", least.overrides.split()), 64, gpu_memory=48)
    assert chosen.fits
    assert chosen.recompute == least.recompute
    assert sum(stage.flops[part].recomputed for stage in chosen.stages for part in ("vision", "language")) == (
        pytest.approx(least.flops)
    )
    less = [
        "train.gradient_checkpointing.vision=0",
        f"train.gradient_checkpointing.language={least.recompute.language}",
    ]
    assert not estimate_run(load_recipe("paper_llama32_1b", less), 64, gpu_memory=48).fits


def test_auto_recomputes_stage_by_stage_what_training_would() -> None:
    estimate = estimate_run(load_recipe("paper_llama32_1b", ["train.gradient_checkpointing=auto"]), 8, gpu_memory=64)
    assert estimate.fits
    assert estimate.recompute is None
    short, long, frozen = (stage.recompute for stage in estimate.stages)
    assert long not in (short, frozen, RecomputeConfig(0, 0))  # 26,624 tokens per pack, every part trained


def test_a_lower_stage_of_zero_is_named_where_it_fits() -> None:
    paper = estimate_run(load_recipe("paper_llama32_1b"), 64)
    alignment, documents, _ = paper.stages
    parameters = sum(paper.parameters.values())
    assert (alignment.accumulation, documents.accumulation) == (1, 2)
    for stage, name, gradients in ((alignment, "zero1", 2), (documents, "zero2", 4 / 64)):
        assert stage.lower is not None
        assert stage.lower[0] == name  # sums of several micro-batches are in bf16 under ZeRO-1
        mine = load_recipe("paper_llama32_1b", [f"stages.{stage.name}.deepspeed={name}"])
        found = next(other for other in estimate_run(mine, 64).stages if other.name == stage.name)
        assert found.lower is None
        assert found.memory.gpu_total == stage.lower[1]
        states = sum(found.memory.gpu[kind] for kind in ("weights", "gradients", "fp32 masters", "optimizer states"))
        assert states == pytest.approx(parameters * (2 + gradients + 12 / 64))


def test_nothing_helps_on_a_tiny_gpu() -> None:
    stage = estimate_run(load_recipe("paper_llama31_8b"), 64, gpu_memory=4).stages[0]
    assert stage.fit.fix is None
    assert stage.lower is None
    assert "use more or larger GPUs" in stage.problems[-1]


def test_batches_that_do_not_divide_are_reported() -> None:
    estimate = estimate_run(load_recipe("paper_llama32_1b"), 48)
    assert estimate.stages[0].accumulation is None
    assert "set it to 48 or 96, or use 32 ranks" in estimate.stages[0].problems[0]


def test_a_pack_shorter_than_a_tile_is_reported() -> None:
    overrides = ["stages.alignment.sequence_length=512", "stages.alignment.max_text_tokens=null"]
    estimate = estimate_run(load_recipe("paper_llama32_1b", overrides), 64)
    assert "one tile alone takes 729 tokens: set it to more than 7290" in estimate.stages[0].problems[-1]


def test_shards_in_place_give_the_exact_plan(tmp_path: Path) -> None:
    from alignvlm.stage_data import ensure_lengths, ensure_processor, ensure_shards, stage_plan, stage_sources

    name, first = next(iter(load_recipe("quickstart").stages.items()))
    small = [f"data.sources.{source}.generator_args.num_samples=24" for source in first.mixture]
    recipe = load_recipe("quickstart", [f"data.root={tmp_path}", "model.language.tokenizer.vocab_size=400", *small])
    recipe = replace(recipe, stages={name: recipe.stages[name]})
    assert not estimate_run(recipe, 2).stages[0].volume.exact
    ensure_shards(stage_sources(recipe, recipe.stages[name]))
    processor = ensure_processor(recipe)
    assert not estimate_run(recipe, 2).stages[0].volume.exact  # shards that are not measured yet
    ensure_lengths(recipe, recipe.stages.values(), processor)
    plan = stage_plan(recipe, recipe.stages[name], processor)
    volume = estimate_run(recipe, 2).stages[0].volume
    assert volume.exact
    assert volume.assumed == ()
    assert volume.steps == plan.num_steps
    summary = summarise(plan, 0)
    assert volume.fill == summary["fill"]
    assert volume.tokens == pytest.approx(summary["tokens_per_epoch"] * plan.num_steps / summary["steps_per_epoch"])


def test_shards_that_are_not_measured_yet_are_at_least_counted(tmp_path: Path) -> None:
    text = [{"role": "user", "content": "say one"}, {"role": "assistant", "content": "one"}]
    write_shards(({"key": f"k{i}", "messages": text} for i in range(30)), tmp_path / "mine", num_processes=1)
    stage = StageConfig(mixture={"mine": 1}, sequence_length=64, global_batch_packs=1)
    recipe = replace(
        load_recipe("quickstart"),
        data=DataConfig(root=str(tmp_path), sources={"mine": SourceConfig(tokens_per_sample=10, tiles_per_sample=0)}),
        stages={"only": stage},
    )
    recipe = with_names(recipe)
    volume = estimate_run(recipe, 1).stages[0].volume
    assert (volume.exact, volume.samples, volume.assumed) == (False, 30, ())
