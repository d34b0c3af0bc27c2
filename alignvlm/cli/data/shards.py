"""`alignvlm data fetch|index|verify`: copy shards, index those made elsewhere, and check them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignvlm.cli.arguments import add_engine, choose_engine, path, word
from data_pipeline.masking import mask

if TYPE_CHECKING:
    from data_pipeline.shards.manifest import Manifest


def add_parser(actions: Any) -> None:
    """Add `fetch`, `index` and `verify` to the actions of `data`."""
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
