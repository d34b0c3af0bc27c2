"""`alignvlm analyze vocab`: which tokens the ALIGN connector uses, and an export that keeps only those."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("analyze", help="look into a trained connector")
    kinds = parser.add_subparsers(dest="analysis", required=True, metavar="ANALYSIS")
    vocab = kinds.add_parser(
        "vocab",
        help="which vocabulary tokens carry the mass; write an export with only those",
        description="Averages P_vocab over images and writes an export whose connector keeps the fewest tokens that "
        "hold --keep-mass of it. The LLM and its own vocabulary stay as they are.",
    )
    vocab.add_argument("export", type=Path, help="Hugging Face folder of a trained model (a stage's export)")
    vocab.add_argument("--data", type=Path, required=True, nargs="+", help="folders of sources with images")
    vocab.add_argument("--keep-mass", type=float, default=0.999, help="mass to keep (default 0.999)")
    vocab.add_argument("--images", type=int, default=100, help="images to measure, spread over the sources (100)")
    vocab.add_argument("--output", type=Path, help="folder to write (default: the export's name with -active)")
    vocab.set_defaults(handler=run)


def run(arguments: argparse.Namespace) -> int:
    from alignvlm.errors import UserError

    export: Path = arguments.export
    output = arguments.output or export.with_name(f"{export.name}-active")
    if not 0 < arguments.keep_mass <= 1:
        raise UserError(f"--keep-mass {arguments.keep_mass}: give a number above 0 and at most 1")
    if arguments.images < 1:
        raise UserError(f"--images {arguments.images}: give at least 1")
    if not (export / "config.json").is_file():
        raise UserError(f"{export} holds no exported model (no config.json); give the `export` folder of a stage")
    if output.exists():
        raise UserError(f"{output} exists already; give another --output")
    from alignvlm.evaluation.vocabulary_mass import measure_mass, write_restricted
    from alignvlm.model import AlignVLMForConditionalGeneration, AlignVLMProcessor

    model = AlignVLMForConditionalGeneration.from_pretrained(export).eval()
    processor = AlignVLMProcessor.from_pretrained(export)
    measured = measure_mass(model, processor, spread_images(arguments.data, arguments.images))
    summary = write_restricted(model, processor, measured, arguments.keep_mass, output)
    print(
        f"{summary['num_active']:,} of {summary['vocab_size']:,} tokens hold {arguments.keep_mass:.4g} of the mass "
        f"over {summary['images']} images ({summary['visual_tokens']:,} visual tokens); "
        f"largest mean probability {summary['largest_mean_probability']:.4g}"
    )
    print(f"wrote {output}")
    return 0


def spread_images(folders: list[Path], count: int) -> Iterator[Any]:
    """About `count` images, the same number from each source, evenly spread over its samples; unusable samples pass."""
    from data_pipeline.samples.schema import SampleError
    from data_pipeline.shards.reader import SourceReader

    for position, folder in enumerate(folders):
        reader = SourceReader(folder)
        wanted = count * (position + 1) // len(folders) - count * position // len(folders)
        numbers = sorted({i * len(reader) // wanted for i in range(wanted)}) if len(reader) else []
        for number in numbers:
            try:
                sample = reader[number]
            except SampleError:
                continue
            yield from sample.images[:1]
