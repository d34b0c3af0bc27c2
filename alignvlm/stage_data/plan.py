"""The plan and the loader of a stage, and what must exist before: shards, tokenizer, sample lengths."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from alignvlm.checks import check_held_out
from alignvlm.stage_data.processor import ensure_processor, stage_encoder
from alignvlm.stage_data.sources import ensure_shards, measured_sources, stage_sources, used_sources
from data_pipeline.stores.folders import local_folder

if TYPE_CHECKING:
    from alignvlm.config.schema import Recipe, SourceConfig, StageConfig
    from alignvlm.model import AlignVLMProcessor
    from data_pipeline.loading.ledger import Ledger
    from data_pipeline.loading.loader import Loader
    from data_pipeline.loading.read_mode import Choice, Read
    from data_pipeline.order.plan import Plan
    from data_pipeline.progress import Progress
    from data_pipeline.samples.selection import Selection


def prepare(
    recipe: Recipe, stages: Iterable[StageConfig] | None = None, progress: Progress | None = None
) -> AlignVLMProcessor:
    """Make what plans of these stages need: shards, tokenizer, sample lengths. Returns the processor.

    Without `stages`, what the whole run needs, its evaluation included.
    """
    evaluated = stages is None
    # A tokenizer of the recipe's own is trained on the text of all stages.
    whole = evaluated or recipe.model.language.tokenizer is not None
    stages = list(recipe.stages.values() if stages is None else stages)
    ensure_shards(used_sources(recipe) if whole else measured_sources(recipe, *stages), progress)
    if evaluated:
        check_held_out(recipe)
    processor = ensure_processor(recipe)
    ensure_lengths(recipe, stages, processor, progress)
    return processor


def ensure_lengths(
    recipe: Recipe, stages: Iterable[StageConfig], processor: AlignVLMProcessor, progress: Progress | None = None
) -> None:
    """Measure the sample lengths of these stages' sources; what was measured before is kept. One process only."""
    from data_pipeline.progress import silent
    from data_pipeline.shards.sources import measure_source

    for stage in stages:
        encoder = stage_encoder(stage, processor)
        for source in measured_sources(recipe, stage):
            measure_source(source.folder, encoder, source.prompt, _selection(source), progress=progress or silent)


def _selection(source: SourceConfig) -> Selection:
    from data_pipeline.samples.selection import Selection

    return Selection(source.sample, source.filter)


def stage_plan(recipe: Recipe, stage: StageConfig, processor: AlignVLMProcessor) -> Plan:
    """The plan of a stage over its measured sources. Raises DataError where shards or lengths are missing."""
    from data_pipeline.order.hashing import hash_key
    from data_pipeline.order.plan import Plan
    from data_pipeline.order.settings import PlanSettings
    from data_pipeline.shards.sources import open_source

    data, encoder = recipe.data, stage_encoder(stage, processor)
    sources = {
        s.name: open_source(s.name, s.folder, encoder, s.prompt, _selection(s)) for s in stage_sources(recipe, stage)
    }
    settings = PlanSettings(
        seed=hash_key(recipe.seed, stage.name) & 0x7FFFFFFF,  # stages that share a source see it in different orders
        sequence_length=stage.sequence_length,
        global_batch_packs=stage.global_batch_packs,
        window_shards=data.window_shards,
        mix_block=data.mix_block,
        pack_window=data.pack_window,
        epochs=stage.epochs,
        max_steps=stage.max_steps,
    )
    return Plan(sources, stage.mixture, settings, cache=local_folder(data.root) / "plans")


def stage_loader(
    recipe: Recipe,
    stage: StageConfig,
    plan: Plan,
    processor: AlignVLMProcessor,
    *,
    rank: int = 0,
    world_size: int = 1,
    start_step: int = 0,
    ledger: Ledger | None = None,
    pin_memory: bool = False,
) -> Loader:
    """This rank's batches of a stage from `start_step` on.

    Samples that could not be measured go to rank 0's ledger at once.
    """
    from data_pipeline.loading.loader import build_loader
    from data_pipeline.shards.sources import Source

    if ledger is not None and rank == 0:
        for source in plan.sources.values():
            assert isinstance(source, Source)
            ledger.record(len(source), source.unusable)
    return build_loader(
        plan,
        stage_encoder(stage, processor),
        rank=rank,
        world_size=world_size,
        micro_batch_packs=stage.micro_batch_packs,
        start_step=start_step,
        num_workers=recipe.data.num_workers,
        prefetch=recipe.data.prefetch,
        ledger=ledger,
        pin_memory=pin_memory,
        reads=stage_reads(recipe, stage),
        cache_bytes=cache_bytes(recipe),
    )


def stage_reads(recipe: Recipe, stage: StageConfig) -> dict[str, Read]:
    """Source -> how its shards are read where they lie in an object store."""
    return {source.name: source.read for source in stage_sources(recipe, stage)}


def read_choices(recipe: Recipe, stage: StageConfig, plan: Plan, ranks: int) -> dict[str, Choice]:
    """How the sources of a stage that lie in object stores are read by so many ranks, and why."""
    from data_pipeline.loading.read_mode import choose

    return choose(plan, stage_reads(recipe, stage), num_nodes(recipe, ranks), cache_bytes(recipe))


def num_nodes(recipe: Recipe, ranks: int) -> int:
    """Nodes of so many ranks, each with `train.processes`."""
    return -(-ranks // min(recipe.train.processes, ranks))


def cache_bytes(recipe: Recipe) -> int | None:
    """Most bytes of whole shards on each node's disk; None where the recipe does not say."""
    return None if recipe.data.cache_gb is None else round(recipe.data.cache_gb * 1e9)
