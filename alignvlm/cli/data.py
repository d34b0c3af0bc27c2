"""`alignvlm data write|fetch|index|verify|plan|diff|show`: make shards, check them, see the order before training."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignvlm.cli.arguments import (
    add_engine,
    add_overrides,
    add_recipe,
    choose_engine,
    columns,
    count,
    path,
    positive,
    positive_number,
    word,
)
from alignvlm.errors import UserError
from data_pipeline.masking import mask

if TYPE_CHECKING:
    from data_pipeline.shards.manifest import Manifest


def add_parser(subparsers: Any) -> None:
    """Add `data` and its actions to the command line."""
    parser = subparsers.add_parser(
        "data", help="write, fetch, index and verify shards; print, compare and draw the training order"
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")

    write = actions.add_parser("write", help="write the shards that a recipe generates, or shards of your own data")
    write.add_argument(
        "target", type=word, metavar="TARGET", help="a recipe; with --from, the folder or URL for the new shards"
    )
    add_overrides(write, "settings of the recipe; with --from, options of the format")
    write.add_argument(
        "--from", dest="source", type=word, metavar="PATH", help="file or folder with your data, or its URL"
    )
    write.add_argument(
        "--format",
        type=word,
        default="auto",
        metavar="NAME",
        help="format of your data, such as jsonl or llava (default: by its suffix and first row)",
    )
    write.add_argument("--from-jsonl", type=word, metavar="FILE", help="short for --from FILE --format jsonl")
    write.add_argument(
        "--images",
        type=word,
        metavar="PATH",
        help="folder or zip archive with the image files that your data names (default: the data's own folder)",
    )
    write.add_argument(
        "--columns",
        type=columns,
        metavar="NAME=COLUMN,…",
        help="which column of your data is what, such as images=pages",
    )
    write.add_argument(
        "--samples-per-shard", type=positive, default=1000, metavar="N", help="at most (default: %(default)s)"
    )
    write.add_argument("--dry-run", action="store_true", help="print what would be written")
    add_engine(write)
    write.set_defaults(handler=run_write)

    fetch = actions.add_parser("fetch", help="copy the shards behind a URL into a local folder")
    fetch.add_argument("url", type=word, metavar="URL", help="folder of shards, for example s3://bucket/docs")
    fetch.add_argument(
        "folder", type=path, metavar="FOLDER", help="new folder, or the folder of an earlier call, to go on with"
    )
    fetch.set_defaults(handler=run_fetch)

    index = actions.add_parser("index", help="index WebDataset tars (written here, by img2dataset or others)")
    index.add_argument("folder", type=word, metavar="FOLDER", help="folder of shards, or its URL")
    index.add_argument(
        "--measure", type=word, metavar="RECIPE", help="also measure the samples as this recipe's training would"
    )
    add_engine(index)
    index.set_defaults(handler=run_index)

    verify = actions.add_parser("verify", help="read all shards and compare them with their indexes")
    verify.add_argument("target", type=word, metavar="TARGET", help="folder of shards, its URL, or recipe")
    verify.add_argument("--decode", action="store_true", help="also decode every sample")
    verify.add_argument(
        "--recipe",
        type=word,
        metavar="RECIPE",
        help="also encode every sample as this recipe's training would, and name the unusable",
    )
    verify.set_defaults(handler=run_verify)

    plan = actions.add_parser("plan", help="print steps, mixture, fill and first batches of a recipe's stages")
    add_recipe(plan, "stages.joint.sequence_length=4096")
    plan.add_argument("--stage", type=word, metavar="STAGE", help="only this stage")
    plan.add_argument(
        "--world-size", type=positive, metavar="N", help="also check batch sizes and balance for this number of ranks"
    )
    plan.add_argument(
        "--step-seconds",
        type=positive_number,
        metavar="S",
        help="seconds that a step takes: also print requests and bytes per second of object stores",
    )
    plan.add_argument("--json", action="store_true", help="print JSON, which `alignvlm data diff` reads")
    plan.set_defaults(handler=run_plan)

    diff = actions.add_parser("diff", help="compare two plans; exit code 1 when they differ")
    diff.add_argument("old", type=word, metavar="OLD", help="recipe, or a file written by `alignvlm data plan --json`")
    diff.add_argument("new", type=word, metavar="NEW", help="recipe, or a file written by `alignvlm data plan --json`")
    diff.set_defaults(handler=run_diff)

    show = actions.add_parser("show", help="draw the packs of one step as HTML: images, tokens, labels")
    add_recipe(show, "stages.joint.sequence_length=4096")
    show.add_argument("--stage", type=word, metavar="STAGE", help="default: the first stage")
    show.add_argument(
        "--step", type=count, default=0, metavar="N", help="optimizer step, from 0 (default: %(default)s)"
    )
    show.add_argument(
        "--packs", type=positive, default=4, metavar="N", help="number of packs to draw (default: %(default)s)"
    )
    show.add_argument("--output", type=path, metavar="FILE", help="HTML file (default: <recipe>-<stage>-<step>.html)")
    show.set_defaults(handler=run_show)


def run_write(args: argparse.Namespace) -> int:
    """Write the shards of a recipe's generators, or of the user's own data."""
    if args.from_jsonl is not None:
        args.source, args.format = args.from_jsonl, "jsonl"
    if args.source is not None:
        from data_pipeline.importers import format_of
        from data_pipeline.importers.rows.far_path import any_path
        from data_pipeline.importers.rows.files import READERS

        args.source = any_path(args.source, tuple(READERS))
        args.images = None if args.images is None else any_path(args.images, (".zip",))
        format = format_of(args.source, args.format)
        return _write_dataset(args) if format is None else _write_own_data(args, format)
    if args.images is not None or args.format != "auto" or args.columns:
        raise UserError("--images, --columns and --format describe data of your own: give it by --from PATH")
    from alignvlm.config import load_recipe
    from alignvlm.progress import data_progress
    from alignvlm.stage_data import ensure_shards, open_reader, used_sources

    sources = used_sources(load_recipe(args.target, args.overrides))
    if args.dry_run:
        print("\n".join(f"{source.name}: {source.folder}" for source in sources))
        return 0
    ensure_shards(sources, data_progress)
    for source in sources:
        reader = open_reader(source)
        print(
            f"{source.name}: {len(reader)} samples in {len(reader.manifest.shards)} shards, {mask(reader.storage.url)}"
        )
    return 0


def _options(args: argparse.Namespace) -> dict[str, Any]:
    """Options of the format from `key=value` words."""
    return {key: value for key, _, value in (word.partition("=") for word in args.overrides)}


def _write_own_data(args: argparse.Namespace, format: str) -> int:
    """One process reads the records one after the other, and stops at the first mistake."""
    from alignvlm.progress import data_progress
    from data_pipeline.importers import read_records
    from data_pipeline.shards.writer import write_shards

    if args.columns or args.tasks or args.finish or args.ray is not None:
        raise UserError(f"format {format} is read by one process: it takes no --columns, --tasks, --finish or --ray")
    options = _options(args)
    if args.images is not None:
        options["images"] = args.images
    records = read_records(args.source, format, **options)
    if args.dry_run:
        print(f"{mask(str(args.source))}: {sum(1 for _ in records)} records of {format}")
        return 0
    with data_progress("write", None) as advance:
        counted = (advance(1) or record for record in records)
        manifest = write_shards(
            counted, args.target, samples_per_shard=args.samples_per_shard, num_processes=args.processes
        )
    print(f"{mask(args.target)}: {manifest.num_samples} samples in {len(manifest.shards)} shards")
    return 0


def _write_dataset(args: argparse.Namespace) -> int:
    """A published dataset: its shards are tasks of one or many machines, rows that cannot be used are counted."""
    import inspect

    from alignvlm.progress import data_progress
    from data_pipeline.importers.records import open_dataset
    from data_pipeline.preparation import write

    engine, options = choose_engine(args), _options(args)
    known = set(inspect.signature(open_dataset).parameters) - {"path", "format", "images", "columns"}
    if options.keys() - known:
        raise UserError(f"{sorted(options.keys() - known)[0]!r}: the options of --from are {', '.join(sorted(known))}")
    dataset = open_dataset(args.source, args.format, images=args.images, columns=args.columns, **options)
    files, folder = len(dataset.files), args.target
    print(f"{mask(str(args.source))}: {files} file(s), read as {dataset.reading.format} ({', '.join(dataset.columns)})")
    if args.dry_run:
        plan = write.make_plan(dataset, args.samples_per_shard, num_processes=args.processes, progress=data_progress)
        print(f"{mask(folder)}: {plan.num_rows} rows would be written as {len(plan.ranges)} shards")
        return 0
    if not (args.tasks or args.finish) or write.is_written(folder):
        written = write.write_dataset(
            dataset, folder, samples_per_shard=args.samples_per_shard, engine=engine, progress=data_progress
        )
    else:
        plan = write.plan_folder(
            dataset, folder, args.samples_per_shard, num_processes=args.processes, progress=data_progress
        )
        if not args.finish:
            done = write.write_missing(
                plan, folder, task=args.task, tasks=args.tasks, engine=engine, progress=data_progress
            )
            task = f"task {args.task} of {args.tasks}"
            print(f"{mask(folder)}: {task} wrote {done} shards; --finish comes when all are done")
            return 0
        written = write.finish(plan, folder, engine=engine, progress=data_progress)
    manifest, rejected = written.manifest, sum(written.rejected.values())
    print(f"{mask(folder)}: {manifest.num_samples} samples in {len(manifest.shards)} shards")
    if rejected:
        print(f"{rejected} rows were rejected; {mask(folder)}/*.rejected.jsonl names each with its reason, most often:")
        print("\n".join(f"  {count} x {reason}" for reason, count in list(written.rejected.items())[:3]))
    return 0


def run_fetch(args: argparse.Namespace) -> int:
    """Copy the shards behind a URL, with their indexes."""
    from alignvlm.progress import data_progress
    from data_pipeline.importers.fetch import fetch_shards

    _print_indexed(args.folder, fetch_shards(args.url, args.folder, progress=data_progress))
    return 0


def run_index(args: argparse.Namespace) -> int:
    """Write the indexes and the manifest of a folder of tars."""
    from alignvlm.progress import data_progress
    from data_pipeline.shards.index import index_shards

    engine, processes = choose_engine(args), args.processes
    if not (args.measure or args.tasks or args.finish or args.ray):
        _print_indexed(args.folder, index_shards(args.folder, num_processes=processes, progress=data_progress))
        return 0
    from alignvlm.stage_data import measurings, trains_tokenizer
    from data_pipeline.preparation import far_index
    from data_pipeline.preparation import index as near_index

    is_far = far_index.is_far(args.folder)
    index: Any = far_index if is_far else near_index
    is_late = is_far and args.tasks and not args.finish and args.measure and trains_tokenizer(args.measure)
    is_measured = args.measure and not is_late  # a tokenizer is trained on the shards of a folder that is indexed
    job = index.open_job(args.folder, measurings(args.measure, args.folder, data_progress) if is_measured else [])
    if not args.finish:
        done = index.index_missing(
            job, task=args.task or 0, tasks=args.tasks or 1, engine=engine, progress=data_progress
        )
        if args.tasks:
            task = f"task {args.task} of {args.tasks}"
            print(f"{mask(str(args.folder))}: {task} did {done} shards; --finish comes when all are done")
            return 0
    _print_indexed(args.folder, index.finish(job, num_processes=processes, progress=data_progress))
    return 0


def _print_indexed(folder: Path | str, manifest: Manifest) -> None:
    counts = f"{manifest.num_samples} samples in {len(manifest.shards)} shards"
    print(f"{mask(str(folder))}: {counts}, {manifest.fingerprint[:16]}")


def run_verify(args: argparse.Namespace) -> int:
    """Exit code 1 when anything does not match, or a sample cannot be used."""
    from alignvlm.config import load_recipe
    from alignvlm.progress import data_progress
    from alignvlm.stage_data import shard_folders, training_readings
    from data_pipeline.shards.verify import verify_folder

    recipe = load_recipe(args.recipe) if args.recipe else None
    problems = []
    for shards in shard_folders(args.target):
        readings = training_readings(recipe, shards, data_progress) if recipe else []
        found = verify_folder(shards, decode=args.decode, readings=readings, progress=data_progress)
        print(f"{mask(shards)}: {'OK' if not found else f'{len(found)} problem(s)'}")
        problems += found
    for line in problems:
        print(f"  {line}")
    return 1 if problems else 0


def run_plan(args: argparse.Namespace) -> int:
    """Print the plan of one or all stages; shards and sample lengths that are missing are made first."""
    from alignvlm.config import load_recipe
    from alignvlm.progress import data_progress
    from alignvlm.stage_data import find_stage, plan_summaries
    from data_pipeline.files import to_json
    from data_pipeline.loading import traffic
    from data_pipeline.order.summary import describe

    recipe = load_recipe(args.recipe, args.overrides)
    stages = [find_stage(recipe, args.stage)] if args.stage else list(recipe.stages.values())
    plans = plan_summaries(recipe, stages, args.world_size, data_progress, args.step_seconds)
    if args.json:
        print(to_json(plans, indent=1))
    else:
        for name, plan in plans["stages"].items():
            print("\n".join(describe(name, plan)))
            if name in plans.get("traffic", {}):
                print(traffic.describe(plans["traffic"][name]))
    return 0


def run_diff(args: argparse.Namespace) -> int:
    """Exit code 1 when the plans differ."""
    from alignvlm.progress import data_progress
    from alignvlm.stage_data import saved_or_new_plans
    from data_pipeline.order.summary import diff_plans

    old, new = (saved_or_new_plans(target, data_progress) for target in (args.old, args.new))
    for plans in (old, new):
        plans.pop("traffic", None)  # says where the data lies, not in which order it is read
    lines = diff_plans(old, new)
    print("\n".join(lines) if lines else "the plans are the same")
    return 1 if lines else 0


def run_show(args: argparse.Namespace) -> int:
    """Write the page of one step's batch and print its path."""
    from alignvlm.config import load_recipe
    from alignvlm.progress import data_progress
    from alignvlm.stage_data import batch_page, find_stage

    recipe = load_recipe(args.recipe, args.overrides)
    stage = find_stage(recipe, args.stage)
    page = batch_page(recipe, stage, args.step, args.packs, data_progress)
    out = args.output or Path(f"{recipe.name}-{stage.name}-{args.step}.html")
    out.write_text(page, encoding="utf-8", errors="backslashreplace")
    print(out)
    return 0
