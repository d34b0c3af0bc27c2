"""From a recipe to data: shards made and measured, plans and loaders of its stages. The only place where both sides
meet.

Order of use: `ensure_shards` (before a tokenizer is trained on them), `ensure_measures` (with the processor; one
process only, others wait), then `stage_plan` and `stage_loader` on every rank.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignvlm.errors import UserError

if TYPE_CHECKING:
    from alignvlm.config.schema import Recipe, SourceConfig, StageConfig
    from data_pipeline.loading.ledger import Ledger
    from data_pipeline.loading.loader import Loader
    from data_pipeline.order.plan import Plan
    from data_pipeline.progress import Progress
    from data_pipeline.samples.schema import Encoder
    from data_pipeline.shards.reader import SourceReader
    from data_pipeline.shards.sources import Source


def source_config(recipe: Recipe, name: str) -> SourceConfig:
    """A source of the recipe by name. Raises UserError when there is none."""
    if name not in recipe.data.sources:
        known = ", ".join(recipe.data.sources) or "none"
        raise UserError(f"recipe {recipe.name}: source {name!r} is not in data.sources (there: {known})")
    return recipe.data.sources[name]


def source_folder(recipe: Recipe, name: str) -> str:
    """Folder or URL of a source: its path, relative to `data.root`; the source's name where it has no path."""
    path = source_config(recipe, name).path or name
    return path if "://" in path else str(Path(recipe.data.root) / path)


def stage_config(recipe: Recipe, stage: str | None = None) -> StageConfig:
    """A stage by name; the first where None. Raises UserError when there is none."""
    if not recipe.stages:
        raise UserError(f"recipe {recipe.name} has no stages")
    name = stage or next(iter(recipe.stages))
    if name not in recipe.stages:
        raise UserError(f"recipe {recipe.name} has no stage {name!r}; its stages are {', '.join(recipe.stages)}")
    return recipe.stages[name]


def used_sources(recipe: Recipe) -> list[str]:
    """Sources of the stages' mixtures and of the evaluation, each once; others of the recipe are never touched."""
    names = [name for stage in recipe.stages.values() for name in stage.mixture]
    names += [task.source or name for name, task in recipe.evaluation.tasks.items()]
    return list(dict.fromkeys(names))


def ensure_shards(recipe: Recipe, names: Iterable[str] | None = None, progress: Progress | None = None) -> None:
    """Generate the shards of sources that have a generator and no shards, index foreign ones. Idempotent; one process
    only.
    """
    from data_pipeline.importers.prepare import FolderSpec, prepare_folders
    from data_pipeline.progress import silent

    specs = []
    for name in used_sources(recipe) if names is None else names:
        config = source_config(recipe, name)
        specs.append(FolderSpec(name, source_folder(recipe, name), config.generator, config.generator_args))
    prepare_folders(specs, progress or silent)


def open_reader(recipe: Recipe, name: str) -> SourceReader:
    """Random access to a source's samples, without an encoder: for evaluation and tokenizer training."""
    from data_pipeline.shards.reader import SourceReader

    return SourceReader(source_folder(recipe, name), name, source_config(recipe, name).prompt)


def stage_encoder(stage: StageConfig, encoder: Any) -> Encoder:
    """The processor with the stage's limit on text tokens."""
    return encoder.with_text_limit(stage.max_text_tokens)


def ensure_measures(recipe: Recipe, encoder: Any, progress: Progress | None = None) -> None:
    """Measure every stage's sources with its encoder. Idempotent; one process only."""
    from data_pipeline.progress import silent

    for stage in recipe.stages.values():
        measure_stage(recipe, stage, encoder, progress or silent)


def measure_stage(recipe: Recipe, stage: StageConfig, encoder: Any, progress: Progress) -> None:
    """Measure the sources of one stage; what was measured before is kept."""
    from data_pipeline.shards.sources import measure_source

    limited = stage_encoder(stage, encoder)
    for name in stage.mixture:
        measure_source(source_folder(recipe, name), limited, source_config(recipe, name).prompt, progress=progress)


def open_sources(recipe: Recipe, encoder: Encoder, names: Iterable[str]) -> dict[str, Source]:
    """Measured sources by name. Raises DataError where shards or measures are missing."""
    from data_pipeline.shards.sources import open_source

    return {
        name: open_source(name, source_folder(recipe, name), encoder, source_config(recipe, name).prompt)
        for name in names
    }


def stage_plan(recipe: Recipe, stage_name: str, encoder: Any) -> Plan:
    """The plan of a stage over its measured sources."""
    from data_pipeline.order.hashing import hash_key
    from data_pipeline.order.plan import Plan
    from data_pipeline.order.settings import PlanSettings

    stage, data = stage_config(recipe, stage_name), recipe.data
    return Plan(
        open_sources(recipe, stage_encoder(stage, encoder), stage.mixture),
        stage.mixture,
        PlanSettings(
            # Stages that share a source see it in different orders.
            seed=hash_key(recipe.seed, stage_name) & 0x7FFFFFFF,
            sequence_length=stage.sequence_length,
            global_batch_packs=stage.global_batch_packs,
            window_shards=data.window_shards,
            mix_block=data.mix_block,
            pack_window=data.pack_window,
            epochs=stage.epochs,
            max_steps=stage.max_steps,
        ),
        cache=Path(data.root) / "plans",
    )


def stage_loader(
    recipe: Recipe,
    stage_name: str,
    plan: Plan,
    encoder: Any,
    *,
    rank: int = 0,
    world_size: int = 1,
    start_step: int = 0,
    ledger: Ledger | None = None,
    pin_memory: bool = False,
) -> Loader:
    """This rank's batches of a stage from `start_step` on. Samples that could not be measured go to rank 0's ledger at
    once.
    """
    from data_pipeline.loading.loader import build_loader
    from data_pipeline.shards.sources import Source

    stage = stage_config(recipe, stage_name)
    if ledger is not None and rank == 0:
        for source in plan.sources.values():
            assert isinstance(source, Source)
            ledger.record(len(source), source.unusable)
    return build_loader(
        plan,
        stage_encoder(stage, encoder),
        rank=rank,
        world_size=world_size,
        micro_batch_packs=stage.micro_batch_packs,
        start_step=start_step,
        num_workers=recipe.data.num_workers,
        prefetch=recipe.data.prefetch,
        ledger=ledger,
        pin_memory=pin_memory,
    )
