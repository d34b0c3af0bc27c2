"""What `alignvlm data` shows and checks of a recipe: plans, batches, and how its stages read a folder of shards."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignvlm.checks import check_files
from alignvlm.config.load import SUFFIXES
from alignvlm.config.validate import canonical
from alignvlm.errors import UserError
from alignvlm.stage_data.plan import cache_bytes, prepare, stage_plan, stage_reads
from alignvlm.stage_data.processor import ensure_processor, stage_encoder
from alignvlm.stage_data.sources import ensure_shards, open_reader, stage_sources, used_sources

if TYPE_CHECKING:
    from alignvlm.config.schema import Recipe, StageConfig
    from data_pipeline.preparation.index import Measuring
    from data_pipeline.progress import Progress
    from data_pipeline.shards.verify import Reading


def plan_summaries(
    recipe: Recipe,
    stages: Iterable[StageConfig],
    world_size: int | None = None,
    progress: Progress | None = None,
    step_seconds: float | None = None,
) -> dict[str, Any]:
    """{"recipe", "stages": {stage: its plan as JSON}}; with a world size also how the ranks share the batches.

    "traffic" has what each stage asks of object stores, per second where `step_seconds` says how long a step takes.
    """
    from data_pipeline.loading.traffic import traffic
    from data_pipeline.order.summary import summarise, world_summary

    stages = list(stages)
    ranks, per_node = world_size or recipe.train.processes, min(recipe.train.processes, world_size or 256)
    far = {}
    check_files(recipe)
    processor = prepare(recipe, stages, progress)
    summaries: dict[str, Any] = {}
    for stage in stages:
        plan = stage_plan(recipe, stage, processor)
        summaries[stage.name] = summarise(plan)
        if world_size is not None:
            summaries[stage.name]["world"] = world_summary(plan, world_size, stage.micro_batch_packs)
        reads, limit = stage_reads(recipe, stage), cache_bytes(recipe)
        if asked := traffic(plan, recipe.data.num_workers, ranks, per_node, step_seconds, reads, limit):
            far[stage.name] = asked
    return {"recipe": recipe.name, "stages": summaries} | ({"traffic": far} if far else {})


def saved_or_new_plans(target: str, progress: Progress | None = None) -> dict[str, Any]:
    """What `plan_summaries` says of the order: read from a `.json` file, or made for all stages of a recipe."""
    from alignvlm.config import load_recipe

    if not target.endswith(".json"):
        recipe = load_recipe(target)
        return plan_summaries(recipe, recipe.stages.values(), progress=progress)
    way_out = "write one with `alignvlm data plan RECIPE --json`"
    try:
        plans = json.loads(Path(target).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{target}: not a saved plan ({error}); {way_out}") from error
    if not (isinstance(plans, dict) and isinstance(plans.get("stages"), dict)):
        raise UserError(f"{target}: not a saved plan (it has no stages); {way_out}")
    return plans


def batch_page(recipe: Recipe, stage: StageConfig, step: int, max_packs: int, progress: Progress | None = None) -> str:
    """HTML of the packs of one optimizer step, images and labels drawn. Raises UserError for a step out of range."""
    from data_pipeline.loading.show import render_batch

    check_files(recipe)
    processor = prepare(recipe, [stage], progress)
    plan = stage_plan(recipe, stage, processor)
    if not 0 <= step < plan.num_steps:
        raise UserError(f"step {step}: stage {stage.name} has steps 0 to {plan.num_steps - 1}")
    return render_batch(
        next(plan.batches(step)),
        [open_reader(recipe.data.sources[name]) for name in plan.names],
        stage_encoder(stage, processor),
        sequence_length=plan.settings.sequence_length,
        decode_token=lambda token: processor.tokenizer.decode([token]),
        image_token_id=processor.image_token_id,
        max_packs=max_packs,
        title=f"{recipe.name}, stage {stage.name}",
    )


def shard_folders(target: str) -> list[str]:
    """Folders or URLs of shards: the folder `target`, or those of all sources that a recipe uses."""
    from alignvlm.config import load_recipe

    if "://" in target or Path(target).is_dir():
        return [target]
    if "/" in target and not target.endswith(SUFFIXES) and not Path(target).exists():
        raise UserError(f"{target}: no such folder of shards")
    return [source.folder for source in used_sources(load_recipe(target))]


def training_readings(recipe: Recipe, folder: str, progress: Progress | None = None) -> list[Reading]:
    """The ways in which the recipe's stages read a folder of shards, each once.

    A folder that no stage trains on is read as every stage would. A tokenizer of the recipe's own is made when missing.
    """
    from data_pipeline.shards.verify import Reading

    stages = list(recipe.stages.values())
    if recipe.model.language.tokenizer is not None:
        ensure_shards(stage_sources(recipe, *stages), progress)
    processor = ensure_processor(recipe)
    pairs = [(source, stage) for stage in stages for source in stage_sources(recipe, stage)]
    reading = [(source, stage) for source, stage in pairs if canonical(source.folder) == canonical(folder)]
    ways = [(source.prompt, stage.max_text_tokens) for source, stage in reading]
    ways = ways or [("", stage.max_text_tokens) for stage in stages]
    return [Reading(prompt, processor.with_text_limit(limit)) for prompt, limit in dict.fromkeys(ways)]


def trains_tokenizer(target: str) -> bool:
    """Whether the recipe `target` has a tokenizer of its own, trained on the text of its sources."""
    from alignvlm.config import load_recipe

    return load_recipe(target).model.language.tokenizer is not None


def measurings(target: str, folder: str, progress: Progress | None = None) -> list[Measuring]:
    """The ways in which the stages of the recipe `target` measure the samples of a folder of shards, each once."""
    from alignvlm.config import load_recipe
    from data_pipeline.preparation.index import Measuring

    readings = training_readings(load_recipe(target), folder, progress)
    return [Measuring(each.encoder, each.prompt) for each in readings if each.encoder is not None]
