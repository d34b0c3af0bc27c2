"""`alignvlm data write`: the shards that a recipe generates, or shards of data of your own."""

from __future__ import annotations

import argparse
from typing import Any

from alignvlm.cli.arguments import add_engine, add_overrides, choose_engine, columns, positive, word
from alignvlm.errors import UserError
from data_pipeline.masking import mask


def add_parser(actions: Any) -> None:
    """Add `write` to the actions of `data`."""
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
        "--samples-per-shard",
        type=positive,
        default=1000,
        metavar="N",
        help="most samples of a shard (default: %(default)s)",
    )
    write.add_argument("--dry-run", action="store_true", help="print what would be written")
    add_engine(write)
    write.set_defaults(handler=run_write)


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
