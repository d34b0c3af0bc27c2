"""The processor of a recipe, and the tokenizer that some recipes train on the text of their sources."""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignvlm.stage_data.sources import open_reader, stage_sources
from data_pipeline.files import must_write, read_or_make

if TYPE_CHECKING:
    from alignvlm.config.schema import Recipe, StageConfig
    from alignvlm.model import AlignVLMProcessor
    from data_pipeline.shards.reader import SourceReader

MADE_FROM = "made_from.json"
"""File in a trained tokenizer's folder: its size, the fingerprints of its sources, checksums of its files."""


def ensure_processor(recipe: Recipe) -> AlignVLMProcessor:
    """The recipe's processor; a tokenizer that it asks for is trained first, on the text of all stages' sources.

    The tokenizer is kept in `data.root`, or in the node's cache where that is a URL, and trained anew when its sources
    or its size change, or when it is damaged. One process only.
    """
    from alignvlm.model.build import load_processor, tokenizer_folder
    from alignvlm.model.inputs.tokenizer import train_tokenizer

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


def _texts(readers: Iterable[SourceReader]) -> Iterator[str]:
    """Everything that is said in the samples, roles included."""
    for reader in readers:
        for messages in reader.messages():
            for message in messages:
                yield message["role"]
                yield from (part["text"] for part in message["content"] if part["type"] == "text")


def stage_encoder(stage: StageConfig, processor: AlignVLMProcessor) -> AlignVLMProcessor:
    """The processor with the stage's limit on text tokens."""
    return processor.with_text_limit(stage.max_text_tokens)
