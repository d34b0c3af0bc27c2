"""The sources of a recipe's stages: which, their shards, and their samples one by one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from alignvlm.errors import UserError
from data_pipeline.errors import nearest

if TYPE_CHECKING:
    from alignvlm.config.schema import Recipe, SourceConfig, StageConfig
    from data_pipeline.progress import Progress
    from data_pipeline.shards.reader import SourceReader


def find_stage(recipe: Recipe, name: str | None = None) -> StageConfig:
    """A stage by name; the first where None. Raises UserError when there is none."""
    if name is None:
        return next(iter(recipe.stages.values()))
    if name not in recipe.stages:
        raise UserError(f"recipe {recipe.name} has no stage {name!r}: {nearest(name, recipe.stages)}")
    return recipe.stages[name]


def stage_sources(recipe: Recipe, *stages: StageConfig) -> list[SourceConfig]:
    """Sources of these stages' mixtures, each once."""
    return [recipe.data.sources[name] for name in dict.fromkeys(name for stage in stages for name in stage.mixture)]


def measured_sources(recipe: Recipe, *stages: StageConfig) -> list[SourceConfig]:
    """What these stages train on, and what the held-out loss is measured on."""
    return [*stage_sources(recipe, *stages), *(recipe.data.sources[name] for name in recipe.evaluation.held_out)]


def used_sources(recipe: Recipe) -> list[SourceConfig]:
    """Sources of all stages and of the evaluation, each once; others of the recipe are never touched."""
    evaluated = [recipe.data.sources[task.source] for task in recipe.evaluation.tasks.values()]
    sources = [*measured_sources(recipe, *recipe.stages.values()), *evaluated]
    return list({source.name: source for source in sources}.values())


def ensure_shards(sources: Iterable[SourceConfig], progress: Progress | None = None) -> None:
    """Generate the shards of sources that have a generator and no shards, index foreign ones.

    Idempotent; one process only.
    """
    from data_pipeline.importers.prepare import FolderSpec, prepare_folders
    from data_pipeline.progress import silent

    specs = [FolderSpec(source.name, source.folder, source.generator, source.generator_args) for source in sources]
    prepare_folders(specs, progress or silent)


def open_reader(source: SourceConfig) -> SourceReader:
    """Random access to a source's samples, without an encoder: for evaluation and tokenizer training."""
    from data_pipeline.shards.reader import SourceReader

    return SourceReader(source.folder, source.name, source.prompt)
