"""Where a recipe meets data_pipeline: its sources as shards, the tokenizer, the plan and the loader of a stage.

Order of use: `ensure_shards`, `ensure_processor` (which may train a tokenizer on them), `ensure_lengths`, each by one
process while the others wait; then `stage_plan` and `stage_loader` on every rank.
"""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignvlm.checks import check_files, check_held_out
from alignvlm.errors import UserError
from data_pipeline.errors import nearest
from data_pipeline.files import must_write, read_or_make
from data_pipeline.stores.folders import local_folder

if TYPE_CHECKING:
    from alignvlm.config.schema import Recipe, SourceConfig, StageConfig
    from alignvlm.model import AlignVLMProcessor
    from data_pipeline.loading.ledger import Ledger
    from data_pipeline.loading.loader import Loader
    from data_pipeline.order.plan import Plan
    from data_pipeline.preparation.index import Measuring
    from data_pipeline.progress import Progress
    from data_pipeline.samples.selection import Selection
    from data_pipeline.shards.reader import SourceReader
    from data_pipeline.shards.verify import Reading


MADE_FROM = "made_from.json"
"""In the folder of a trained tokenizer: its size, the fingerprints of its sources, checksums of its files."""


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


def used_sources(recipe: Recipe) -> list[SourceConfig]:
    """Sources of all stages and of the evaluation, each once; others of the recipe are never touched."""
    evaluated = [recipe.data.sources[task.source] for task in recipe.evaluation.tasks.values()]
    sources = [*stage_sources(recipe, *recipe.stages.values()), *evaluated]
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


def ensure_processor(recipe: Recipe) -> AlignVLMProcessor:
    """The recipe's processor; a tokenizer that it asks for is trained first, on the text of all stages' sources.

    The tokenizer is kept in `data.root`, or in the node's cache where that is a URL, and trained anew when its sources
    or its size change, or when it is damaged. One process only.
    """
    from alignvlm.model.build import load_processor, tokenizer_folder
    from alignvlm.model.tokenizer import train_tokenizer

    options = recipe.model.language.tokenizer
    if options is None:
        return load_processor(recipe)
    sources = sorted(stage_sources(recipe, *recipe.stages.values()), key=lambda source: source.name)
    readers = [open_reader(source) for source in sources]
    made_from = {"vocab_size": options.vocab_size, "sources": {r.name: r.fingerprint for r in readers}}
    folder = tokenizer_folder(recipe)

    def train() -> bool:
        tokenizer = train_tokenizer(_texts(readers), options.vocab_size)
        partial = folder.with_name("tokenizer.partial")
        with must_write(folder, "make data.root writable, or give another one: data.root=FOLDER"):
            shutil.rmtree(partial, ignore_errors=True)
            partial.parent.mkdir(parents=True, exist_ok=True)
            tokenizer.save_pretrained(partial)
            stamp = json.dumps(made_from | {"files": _checksums(partial)}, indent=2)
            (partial / MADE_FROM).write_text(stamp, encoding="utf-8")
            shutil.rmtree(folder, ignore_errors=True)
            partial.rename(folder)
        return True

    read_or_make(folder, lambda folder: _is_made_from(folder, made_from), train)
    return load_processor(recipe)


def _is_made_from(folder: Path, expected: dict[str, Any]) -> bool | None:
    """True for a tokenizer of this origin, None for one of another. Raises ValueError when its files are damaged."""
    made_from = json.loads((folder / MADE_FROM).read_bytes())
    checksums = made_from.pop("files", None)
    if made_from != expected:
        return None
    if checksums != _checksums(folder):
        raise ValueError("the checksums of its files are missing or do not fit")
    return True


def _checksums(folder: Path) -> dict[str, int]:
    """CRC-32 of every file of a tokenizer."""
    paths = sorted(path for path in folder.iterdir() if path.is_file() and path.name != MADE_FROM)
    return {path.name: zlib.crc32(path.read_bytes()) for path in paths}


def stage_encoder(stage: StageConfig, processor: AlignVLMProcessor) -> AlignVLMProcessor:
    """The processor with the stage's limit on text tokens."""
    return processor.with_text_limit(stage.max_text_tokens)


def ensure_lengths(
    recipe: Recipe, stages: Iterable[StageConfig], processor: AlignVLMProcessor, progress: Progress | None = None
) -> None:
    """Measure the sample lengths of these stages' sources; what was measured before is kept. One process only."""
    from data_pipeline.progress import silent
    from data_pipeline.shards.sources import measure_source

    for stage in stages:
        encoder = stage_encoder(stage, processor)
        for source in stage_sources(recipe, stage):
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
    )


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
    ensure_shards(used_sources(recipe) if whole else stage_sources(recipe, *stages), progress)
    if evaluated:
        check_held_out(recipe)
    processor = ensure_processor(recipe)
    ensure_lengths(recipe, stages, processor, progress)
    return processor


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
        if asked := traffic(plan, recipe.data.num_workers, ranks, per_node, step_seconds):
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


def shard_folders(target: str) -> list[str]:
    """Folders or URLs of shards: the folder `target`, or those of all sources that a recipe uses."""
    from alignvlm.config import load_recipe

    if "://" in target or Path(target).is_dir():
        return [target]
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
    reading = [(source, stage) for source, stage in pairs if _same_folder(source.folder, folder)]
    ways = [(source.prompt, stage.max_text_tokens) for source, stage in reading]
    ways = ways or [("", stage.max_text_tokens) for stage in stages]
    return [Reading(prompt, processor.with_text_limit(limit)) for prompt, limit in dict.fromkeys(ways)]


def measurings(target: str, folder: str, progress: Progress | None = None) -> list[Measuring]:
    """The ways in which the stages of the recipe `target` measure the samples of a folder of shards, each once."""
    from alignvlm.config import load_recipe
    from data_pipeline.preparation.index import Measuring

    readings = training_readings(load_recipe(target), folder, progress)
    return [Measuring(each.encoder, each.prompt) for each in readings if each.encoder is not None]


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


def _same_folder(one: str, other: str) -> bool:
    if "://" in one or "://" in other:
        return one.rstrip("/") == other.rstrip("/")
    return Path(one).absolute() == Path(other).absolute()


def _texts(readers: Iterable[SourceReader]) -> Iterator[str]:
    """Everything that is said in the samples, roles included."""
    for reader in readers:
        for messages in reader.messages():
            for message in messages:
                yield message["role"]
                yield from (part["text"] for part in message["content"] if part["type"] == "text")
