"""How much a stage reads: steps, samples, tokens, tiles. From the shards' exact plan where they are, else estimated."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from alignvlm.config.schema import Recipe, SourceConfig, StageConfig
from alignvlm.model.build import load_processor, tokenizer_folder
from alignvlm.model.flops import Work
from alignvlm.model.network import Dimensions
from alignvlm.stage_data import read_choices, stage_plan, stage_sources
from data_pipeline.shards.sidecars import is_indexed
from data_pipeline.shards.storage import open_storage

logger = logging.getLogger(__name__)

ASSUMED_FILL = 0.98
"""Part of a pack that best-fit packing fills; measured on real length distributions it is 0.98 to 0.995."""
ASSUMED_SAMPLES = 10_000
ASSUMED_TEXT_TOKENS = 64
ASSUMED_TILES = 1.0


@dataclass(frozen=True)
class Volume:
    """What a stage reads over all its epochs, or until `max_steps`."""

    steps: int
    samples: float
    tokens: float
    tiles: float
    attended: float
    """Sum of squared document lengths, as if all samples of a source were equally long: a lower bound."""
    text_tokens: float
    fill: float
    exact: bool
    """Whether it comes from the shards' own plan; else it is an estimate from the recipe's figures."""
    assumed: tuple[str, ...] = ()
    """Figures that neither the recipe nor the shards state."""
    reads: dict[str, str] = field(default_factory=dict)
    """Source in an object store -> how its shards are read, and why; where the plan is exact."""

    @property
    def work(self) -> Work:
        """The work whose FLOPs are counted; all text tokens count as supervised, which is an upper bound."""
        return Work(self.tokens, self.tiles, self.text_tokens, self.attended)


def stage_volume(recipe: Recipe, stage: StageConfig, dims: Dimensions, world_size: int) -> Volume:
    """Volume of a stage of the recipe, on so many GPUs."""
    from data_pipeline.errors import DataError

    if shards_are_here(recipe, stage):
        try:
            return _exact(recipe, stage, dims, world_size)
        except DataError as error:  # shards that were not measured yet
            logger.info("stages.%s is estimated: %s", stage.name, error)
    return estimate(recipe, stage, dims)


def shards_are_here(recipe: Recipe, stage: StageConfig) -> bool:
    """Whether all shards of the stage, and the tokenizer that measures them, are on this machine."""
    if not all(is_indexed(open_storage(source.folder)) for source in stage_sources(recipe, stage)):
        return False
    path = recipe.model.language.path
    return (tokenizer_folder(recipe) if path is None else Path(path)).is_dir()


def estimate(recipe: Recipe, stage: StageConfig, dims: Dimensions) -> Volume:
    """The volume by the figures per sample that the sources state; an epoch is what the data plan would draw."""
    from data_pipeline.order.mixing import epoch_draws

    sizes: dict[str, int] = {}
    assumed: list[str] = []
    for source in stage_sources(recipe, stage):
        sizes[source.name] = _num_samples(source, assumed)
    samples = tokens = tiles = attended = text = 0.0
    for name, count in epoch_draws(sizes, stage.mixture).items():
        source = recipe.data.sources[name]
        text_each = _figure(source.tokens_per_sample, ASSUMED_TEXT_TOKENS, f"{name}.tokens_per_sample", assumed)
        tiles_each = _figure(source.tiles_per_sample, ASSUMED_TILES, f"{name}.tiles_per_sample", assumed)
        text_each = min(text_each, stage.max_text_tokens or text_each)
        each = text_each + tiles_each * dims.tokens_per_tile
        samples += count
        tokens += count * each
        tiles += count * tiles_each
        attended += count * each**2
        text += count * text_each
    packs = math.ceil(tokens / (stage.sequence_length * ASSUMED_FILL))
    steps = math.ceil(packs / stage.global_batch_packs) * stage.epochs
    done = _until(stage, steps)
    part = done / steps * stage.epochs
    return Volume(
        steps=done,
        samples=samples * part,
        tokens=tokens * part,
        tiles=tiles * part,
        attended=attended * part,
        text_tokens=text * part,
        fill=ASSUMED_FILL,
        exact=False,
        assumed=tuple(assumed),
    )


def _exact(recipe: Recipe, stage: StageConfig, dims: Dimensions, world_size: int) -> Volume:
    from data_pipeline.order.summary import summarise

    plan = stage_plan(recipe, stage, load_processor(recipe))
    summary: Mapping[str, float] = summarise(plan, 0)
    steps = int(summary["steps"])
    part = steps / summary["steps_per_epoch"]
    samples, tokens, tiles = (summary[f"{what}_per_epoch"] * part for what in ("samples", "tokens", "tiles"))
    return Volume(
        steps=steps,
        samples=samples,
        tokens=tokens,
        tiles=tiles,
        attended=tokens**2 / max(samples, 1),
        text_tokens=tokens - tiles * dims.tokens_per_tile,
        fill=summary["fill"],
        exact=True,
        reads={name: str(choice) for name, choice in read_choices(recipe, stage, plan, world_size).items()},
    )


def _until(stage: StageConfig, steps: int) -> int:
    return steps if stage.max_steps is None else min(steps, stage.max_steps)


def _num_samples(source: SourceConfig, assumed: list[str]) -> int:
    """Samples in the shards where these are on this machine, else the number that the recipe states."""
    from data_pipeline.shards.manifest import load_manifest

    storage = open_storage(source.folder)
    if is_indexed(storage):
        return max(1, round(load_manifest(storage).num_samples * source.sample))
    generated = source.generator_args.get("num_samples")
    stated = source.num_samples or (generated if isinstance(generated, int) else None)
    count = _figure(stated, ASSUMED_SAMPLES, f"{source.name}.num_samples", assumed)
    return max(1, round(count * source.sample))


def _figure(stated: float | None, default: float, key: str, assumed: list[str]) -> float:
    if stated is None:
        assumed.append(f"data.sources.{key} = {default:g}")
        return default
    return stated
