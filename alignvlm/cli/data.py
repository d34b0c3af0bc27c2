"""`alignvlm data write|fetch|index|verify|plan|diff|show`: make shards, check them, see the order before training."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from data_pipeline.shards.index import Manifest


def add_parser(subparsers: Any) -> None:
    """Add `data` and its actions to the command line."""
    parser = subparsers.add_parser(
        "data", help="write, fetch, index, verify shards; plan, compare and show the training order"
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")

    write = actions.add_parser("write", help="write a recipe's generated shards, or shards of your own data")
    write.add_argument("target", help="recipe (name or path); with --from the new folder of shards")
    write.add_argument("overrides", nargs="*", metavar="key=value", help="of the recipe; with --from of the format")
    write.add_argument("--from", dest="source", type=Path, metavar="PATH", help="your own data, a file or a folder")
    write.add_argument("--format", default="auto", metavar="NAME", help="of your data (default: by its suffix): jsonl")
    write.add_argument(
        "--from-jsonl", type=Path, metavar="FILE", help="JSON lines with messages and image files: a short way"
    )
    write.add_argument(
        "--images", type=Path, metavar="DIR", help="folder that image files are relative to (default: the file's)"
    )
    write.add_argument("--samples-per-shard", type=int, default=1000)
    write.set_defaults(handler=run_write)

    fetch = actions.add_parser(
        "fetch", help="copy shards that commands print (pipe: URLs) into a folder and index them"
    )
    fetch.add_argument("url", help="for example 'pipe:aws s3 cp s3://bucket/{0000..0099}.tar -'")
    fetch.add_argument("folder", type=Path)
    fetch.add_argument("--allow-pipe", action="store_true", help="run the URL's shell commands")
    fetch.set_defaults(handler=run_fetch)

    index = actions.add_parser("index", help="index a folder of WebDataset tars, also foreign ones (img2dataset)")
    index.add_argument("folder", type=Path)
    index.set_defaults(handler=run_index)

    verify = actions.add_parser("verify", help="read all shards again and compare them with their indexes")
    verify.add_argument("target", help="folder of shards, or recipe")
    verify.add_argument("--decode", action="store_true", help="also decode every sample")
    verify.set_defaults(handler=run_verify)

    plan = actions.add_parser("plan", help="steps, mixture, fill and first batches of a recipe's stages")
    _add_recipe(plan)
    plan.add_argument("--stage", help="only this stage")
    plan.add_argument("--world-size", type=int, help="also check batch sizes and balance for so many ranks")
    plan.add_argument("--json", action="store_true", help="print JSON (which `alignvlm data diff` reads)")
    plan.set_defaults(handler=run_plan)

    diff = actions.add_parser("diff", help="compare two plans; exit code 1 when they differ")
    diff.add_argument("old", help="recipe, or a file written by `alignvlm data plan --json`")
    diff.add_argument("new", help="recipe, or a file written by `alignvlm data plan --json`")
    diff.set_defaults(handler=run_diff)

    show = actions.add_parser("show", help="draw a packed batch: images, tokens, labels")
    _add_recipe(show)
    show.add_argument("--stage", help="default: the first")
    show.add_argument("--step", type=int, default=0, help="optimizer step, from 0")
    show.add_argument("--packs", type=int, default=4, help="how many of its packs")
    show.add_argument("--out", type=Path, help="HTML file (default: <recipe>-<stage>-<step>.html)")
    show.set_defaults(handler=run_show)


def _add_recipe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help="name or path")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="for example stages.joint.sequence_length=4096"
    )


def run_write(args: argparse.Namespace) -> int:
    """Shards of a recipe's generators, or of a user's own data."""
    from alignvlm.progress import data_progress

    source, name = (args.from_jsonl, "jsonl") if args.from_jsonl else (args.source, args.format)
    if source is None:
        from alignvlm.config import load_recipe
        from alignvlm.stage_data import ensure_shards, open_reader, used_sources

        sources = used_sources(load_recipe(args.target, args.overrides))
        ensure_shards(sources, data_progress)
        for source in sources:
            reader = open_reader(source)
            print(f"{source.name}: {len(reader)} samples in {len(reader.manifest.shards)} shards, {reader.storage.url}")
        return 0
    from data_pipeline.importers import read_records
    from data_pipeline.shards.writer import write_shards

    options: dict[str, Any] = {key: value for key, _, value in (word.partition("=") for word in args.overrides)}
    if args.images is not None:
        options["images"] = args.images
    records = read_records(source, name, **options)
    with data_progress("write", None) as advance:
        counted = (advance(1) or record for record in records)
        manifest = write_shards(counted, args.target, samples_per_shard=args.samples_per_shard)
    print(f"{args.target}: {manifest.num_samples} samples in {len(manifest.shards)} shards")
    return 0


def run_fetch(args: argparse.Namespace) -> int:
    """Shards that shell commands print, copied and indexed."""
    from alignvlm.progress import data_progress
    from data_pipeline.importers.fetch import fetch_shards

    _print_indexed(args.folder, fetch_shards(args.url, args.folder, allow_pipe=args.allow_pipe, progress=data_progress))
    return 0


def run_index(args: argparse.Namespace) -> int:
    """Index and manifest of a folder of tars."""
    from alignvlm.progress import data_progress
    from data_pipeline.shards.index import index_shards

    _print_indexed(args.folder, index_shards(args.folder, progress=data_progress))
    return 0


def _print_indexed(folder: Path, manifest: Manifest) -> None:
    print(f"{folder}: {manifest.num_samples} samples in {len(manifest.shards)} shards, {manifest.fingerprint[:16]}")


def run_verify(args: argparse.Namespace) -> int:
    """Exit code 1 when anything does not match."""
    from alignvlm.progress import data_progress
    from data_pipeline.shards.verify import verify_folder

    problems = []
    for folder in _folders(args.target):
        found = verify_folder(folder, decode=args.decode, progress=data_progress)
        print(f"{folder}: {'as indexed' if not found else f'{len(found)} problem(s)'}")
        problems += found
    for line in problems:
        print(f"  {line}")
    return 1 if problems else 0


def run_plan(args: argparse.Namespace) -> int:
    """Print the plan of one or all stages; makes and measures shards that are missing."""
    import json

    plans = _plans(args.recipe, args.overrides, args.stage, args.world_size)
    if args.json:
        print(json.dumps(plans, indent=1))
    else:
        for name, plan in plans["stages"].items():
            print("\n".join(_lines(name, plan)))
    return 0


def run_diff(args: argparse.Namespace) -> int:
    """Exit code 1 when the plans differ."""
    from data_pipeline.order.summary import diff_plans

    lines = diff_plans(_saved_or_recipe(args.old), _saved_or_recipe(args.new))
    print("\n".join(lines) if lines else "the plans are the same")
    return 1 if lines else 0


def run_show(args: argparse.Namespace) -> int:
    """Write the page of one step's batch."""
    from alignvlm.config import load_recipe
    from alignvlm.errors import UserError
    from alignvlm.progress import data_progress
    from alignvlm.stage_data import find_stage, open_reader, prepare, stage_encoder, stage_plan
    from data_pipeline.loading.show import render_batch

    recipe = load_recipe(args.recipe, args.overrides)
    stage = find_stage(recipe, args.stage)
    processor = prepare(recipe, [stage], data_progress)
    plan = stage_plan(recipe, stage, processor)
    if not 0 <= args.step < plan.num_steps:
        raise UserError(f"--step {args.step}: stage {stage.name} has steps 0 to {plan.num_steps - 1}")
    page = render_batch(
        next(plan.batches(args.step)),
        [open_reader(recipe.data.sources[name]) for name in plan.names],
        stage_encoder(stage, processor),
        sequence_length=plan.settings.sequence_length,
        decode_token=lambda token: processor.tokenizer.decode([token]),
        image_token_id=processor.image_token_id,
        max_packs=args.packs,
        title=f"{recipe.name}, stage {stage.name}",
    )
    out = args.out or Path(f"{recipe.name}-{stage.name}-{args.step}.html")
    out.write_text(page, encoding="utf-8")
    print(out)
    return 0


def _folders(target: str) -> list[str]:
    """A folder of shards, or all of a recipe's."""
    if Path(target).is_dir():
        return [target]
    from alignvlm.config import load_recipe
    from alignvlm.stage_data import used_sources

    return [source.folder for source in used_sources(load_recipe(target))]


def _plans(name: str, overrides: list[str], stage: str | None, world_size: int | None) -> dict[str, Any]:
    """Plans of one stage (None: all) as JSON; shards and sample lengths that are missing are made."""
    from alignvlm.config import load_recipe
    from alignvlm.progress import data_progress
    from alignvlm.stage_data import find_stage, plan_summaries

    recipe = load_recipe(name, overrides)
    stages = [find_stage(recipe, stage)] if stage else list(recipe.stages.values())
    return plan_summaries(recipe, stages, world_size, data_progress)


def _saved_or_recipe(name: str) -> dict[str, Any]:
    import json

    from alignvlm.errors import UserError

    if not name.endswith(".json"):
        return _plans(name, [], None, None)
    try:
        plan = json.loads(Path(name).read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"{name}: not a saved plan ({error}); write one with `alignvlm data plan RECIPE --json`"
        ) from error
    return plan if isinstance(plan, dict) else {"plan": plan}


def _lines(name: str, plan: dict[str, Any]) -> list[str]:
    """A stage's plan for people."""
    lines = [
        f"stage {name}: {plan['steps']} steps ({plan['steps_per_epoch']} per epoch, {plan['epochs']} epoch(s)), "
        f"{plan['global_batch_packs']} packs of {plan['sequence_length']} tokens per step",
        f"  one epoch: {plan['samples_per_epoch']} samples, {plan['packs_per_epoch']} packs {plan['fill']:.2%} full, "
        f"{plan['tokens_per_epoch']} tokens, {plan['tiles_per_epoch']} tiles",
        f"  plan {plan['fingerprint']} version {plan['version']}, order {plan['order'][:16]}",
    ]
    for source, row in plan["mixture"].items():
        dropped = row["dropped_too_long"] + row["dropped_unusable"]
        lines.append(
            f"  {source}: {row['realised']:.2%} of samples (asked {row['weight']:.2%}), {row['draws_per_epoch']} of "
            f"{row['samples']} samples = {row['passes_per_epoch']:.2f} passes, {row['shards']} shards"
            + (f", DROPPED {row['dropped_too_long']} too long, {row['dropped_unusable']} unusable" if dropped else "")
        )
    for batch in plan["first_batches"]:
        first = " ".join(batch["packs"][0]) if batch["packs"] else ""
        lines.append(
            f"  step {batch['step']}: {batch['samples']} samples, {batch['tokens']} tokens, {batch['tiles']} tiles; "
            f"first pack {first[:90]}"
        )
    if "world" in plan:
        world = plan["world"]
        lines.append(
            f"  {world['world_size']} ranks x {world['micro_batch_packs']} packs x "
            f"{world['accumulation_steps']} micro-batches; "
            f"heaviest rank has {world['tile_imbalance']:.3f} of the mean tiles"
        )
    return lines
