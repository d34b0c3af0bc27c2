"""`alignvlm analyze vocab`: which tokens the ALIGN connector uses, and an export that keeps only those."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignvlm.cli.arguments import folder, fraction, path, positive, word
from alignvlm.progress import Progress

if TYPE_CHECKING:
    from PIL.Image import Image


def add_parser(subparsers: Any) -> None:
    """Add `analyze` and its analyses to the command line."""
    parser = subparsers.add_parser("analyze", help="analyse a trained connector")
    kinds = parser.add_subparsers(dest="analysis", required=True, metavar="ANALYSIS")
    vocab = kinds.add_parser(
        "vocab",
        help="find the vocabulary tokens that the connector uses; write an export with only those",
        description="Average the connector's probabilities over the vocabulary on some images, and write an export "
        "whose connector keeps the fewest tokens that hold --keep-mass of them, or the --num-active most used ones. "
        "The LLM keeps its whole vocabulary.",
    )
    vocab.add_argument("export", type=path, metavar="EXPORT", help="export folder of a trained model")
    vocab.add_argument(
        "--data", type=folder, required=True, nargs="+", metavar="FOLDER", help="folders of shards with images"
    )
    kept = vocab.add_mutually_exclusive_group()
    kept.add_argument(
        "--keep-mass",
        type=fraction,
        default=0.999,
        metavar="SHARE",
        help="probability mass to keep (default: %(default)g)",
    )
    kept.add_argument("--num-active", type=positive, metavar="N", help="keep this many tokens, the most used ones")
    vocab.add_argument(
        "--images",
        type=positive,
        default=100,
        metavar="N",
        help="number of images, spread over the sources (default: %(default)s)",
    )
    vocab.add_argument(
        "--device", type=word, metavar="DEVICE", help="cpu, cuda, … (default: CUDA where there is a GPU)"
    )
    vocab.add_argument(
        "--output", type=path, metavar="FOLDER", help="new folder (default: the export's name with -active)"
    )
    vocab.set_defaults(handler=run)


def _counted(images: Iterable[Image], bar: Progress) -> Iterator[Image]:
    for image in images:
        yield image
        bar.advance()


def run(arguments: argparse.Namespace) -> int:
    """Measure, write the export and print what it holds."""
    from alignvlm.cli.imports import import_model
    from alignvlm.errors import UserError
    from alignvlm.exports import check_export

    export: Path = arguments.export
    output = arguments.output or Path(f"{os.path.abspath(export)}-active")
    check_export(export)
    if output.exists():
        raise UserError(f"{output} already exists; give another --output")
    import_model()
    from alignvlm.evaluation.answering import find_device
    from alignvlm.evaluation.vocabulary_mass import images_of, measure_mass, write_restricted
    from alignvlm.model import AlignVLMForConditionalGeneration, AlignVLMProcessor

    device = find_device(arguments.device)
    model = AlignVLMForConditionalGeneration.from_pretrained(export).to(device).eval()
    processor = AlignVLMProcessor.from_pretrained(export)
    with Progress("analyse images", arguments.images) as bar:
        measured = measure_mass(model, processor, _counted(images_of(arguments.data, arguments.images), bar))
    count, mass = arguments.num_active, arguments.keep_mass
    ids = measured.most_used(count) if count else measured.active(mass)
    summary = write_restricted(model, processor, measured, ids, output)
    print(
        f"{summary['num_active']:,} of {summary['vocab_size']:,} tokens hold {summary['kept_mass']:.4g} of the mass "
        f"over {summary['images']} images ({summary['visual_tokens']:,} visual tokens); "
        f"largest mean probability {summary['largest_mean_probability']:.4g}"
    )
    print(f"wrote {output}")
    return 0
