"""A source ready for a plan: its shards and its sample lengths (tokens, tiles), measured once per encoder."""

from __future__ import annotations

import hashlib
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.errors import DataError, LoadError
from data_pipeline.files import (
    has_shape,
    load_array,
    must_write,
    read_needed,
    read_or_make,
    save_array,
    write_json_lines,
)
from data_pipeline.masking import mask
from data_pipeline.parallel import pool, usable_cores
from data_pipeline.progress import Progress, silent
from data_pipeline.samples.schema import Encoder, SampleError
from data_pipeline.samples.selection import Selection
from data_pipeline.shards.reader import SourceReader
from data_pipeline.shards.sidecars import beside, publish, searched, writable_place

ALL = Selection()
UNSELECTED = (0, 1)
"""Tokens and tiles of a sample that is not selected."""
_CHUNK = (256, 20_000)
"""Fewest and most samples that one measuring task takes."""
PART_SECONDS = 30.0
"""How often what is measured so far is saved."""


@dataclass(frozen=True)
class BadSample:
    """A sample that cannot be used, as the ledger writes it."""

    source: str
    shard: str
    key: str
    error: str


@dataclass(frozen=True)
class Source:
    """What plan and loader need of one source (fulfils `order.PlanSource`).

    `measures` are the sample lengths, uint32 [N, 2] (tokens, tiles), memory-mapped; 0 tokens: not selected where tiles
    are 1, else see `unusable`. `fingerprint` changes with content, prompt, encoder and selection.
    """

    name: str
    reader: SourceReader
    fingerprint: str
    measures: np.ndarray
    unusable: list[BadSample]

    @property
    def shard_starts(self) -> np.ndarray:
        return self.reader.shard_starts

    def __len__(self) -> int:
        return len(self.reader)


def open_source(
    name: str, folder: str | os.PathLike[str], encoder: Encoder, prompt: str = "", selection: Selection = ALL
) -> Source:
    """A measured source. Raises DataError when the folder has no manifest or no measures for this encoder."""
    reader = SourceReader(folder, name, prompt)
    lengths = _measures_name(reader, encoder, selection)
    error: DataError = LoadError(
        f"{mask(reader.storage.url)}: samples are not measured for this processor yet: no lengths"
        f"{searched(reader.storage) or ' beside the shards'}; run `alignvlm data plan RECIPE`"
    )
    for path in beside(reader.storage, lengths, _bad_path(Path(lengths)).name):
        try:
            way_out = "`alignvlm data plan RECIPE` measures its samples anew"
            measures, bad = read_needed(path, lambda path: _read(path, len(reader)), way_out)
        except DataError as damaged:
            error = damaged
        else:
            fingerprint = _fingerprint(reader, encoder, selection)
            return Source(name, reader, fingerprint, measures, [BadSample(name, **row) for row in bad])
    raise error


def measure_source(
    folder: str | os.PathLike[str],
    encoder: Encoder,
    prompt: str = "",
    selection: Selection = ALL,
    *,
    num_processes: int | None = None,
    progress: Progress = silent,
) -> Path:
    """Measure every sample of a folder unless it was done before; returns the file `measures-<fingerprint>.npy`.

    It lies beside the shards, or in a cache folder where they cannot be written (sidecars.py). Samples that cannot be
    measured get 0 tokens and a line in `measures-<fingerprint>.bad.jsonl`; those that are not selected get 0 tokens
    and 1 tile. Damaged measures are made anew. After a kill it goes on where it was.
    """
    reader = SourceReader(folder, prompt=prompt)
    found = _find_measures(reader, encoder, selection)
    if found is not None:
        return found
    if not selection:
        path = writable_place(reader.storage) / _measures_name(reader, encoder, ALL)
        return keep_measures(reader, encoder, *_measure_all(reader, encoder, path, num_processes, progress))
    whole = measure_source(folder, encoder, prompt, num_processes=num_processes, progress=progress)
    selected = _select_from(reader, selection, *_read(whole, len(reader)), num_processes, progress)
    return keep_measures(reader, encoder, *selected, selection)


def is_measured(reader: SourceReader, encoder: Encoder) -> bool:
    """Whether the lengths of all samples are there."""
    return _find_measures(reader, encoder, ALL) is not None


def _find_measures(reader: SourceReader, encoder: Encoder, selection: Selection) -> Path | None:
    """The file of measures that is there and whole."""
    name = _measures_name(reader, encoder, selection)
    for path in beside(reader.storage, name, _bad_path(Path(name)).name):
        if read_or_make(path, lambda path: _read(path, len(reader)), lambda: None) is not None:
            return path
    return None


def keep_measures(
    reader: SourceReader,
    encoder: Encoder,
    measures: np.ndarray,
    bad: list[dict[str, str]],
    selection: Selection = ALL,
) -> Path:
    """Write the lengths of a source's samples, [N, 2], and what is wrong with the unusable ones, in their order."""
    path = writable_place(reader.storage) / _measures_name(reader, encoder, selection)
    _save(path, measures, bad)
    _remove_parts(path)
    publish(reader.storage, path.parent, *(each.name for each in (_bad_path(path), path) if each.exists()))
    return path


def _measure_all(
    reader: SourceReader, encoder: Encoder, path: Path, num_processes: int | None, progress: Progress
) -> tuple[np.ndarray, list[dict[str, str]]]:
    """The measures of all samples, and what is wrong with those that have none.

    It goes on where a process that was killed has saved its part beside `path`.
    """
    total = len(reader)
    known, bad = _newest_part(path)
    ranges = _ranges(reader, num_processes, done := len(known))
    measures = np.zeros((total, 2), dtype=np.uint32)
    measures[:done] = known
    saved = time.monotonic()
    with pool(num_processes, len(ranges)) as executor, progress(f"measure {reader.name}", total) as advance:
        advance(done)
        run = map if executor is None else executor.map
        tasks = run(_measure, [reader] * len(ranges), [encoder] * len(ranges), ranges)
        for (begin, end), (rows, errors) in zip(ranges, tasks, strict=True):
            measures[begin:end] = rows
            bad += errors
            advance(end - begin)
            if time.monotonic() - saved > PART_SECONDS and end < total:
                part = _part_path(path, end)
                _save(part, measures[:end], bad)
                _remove_parts(path, kept=part)
                saved = time.monotonic()
    return measures, bad


def _select_from(
    reader: SourceReader,
    selection: Selection,
    measures: np.ndarray,
    bad: list[dict[str, str]],
    num_processes: int | None,
    progress: Progress,
) -> tuple[np.ndarray, list[dict[str, str]]]:
    """The measures of all samples, with those that are not selected as UNSELECTED, and the unusable among the rest."""
    ranges, taken = _ranges(reader, num_processes), np.zeros(len(reader), dtype=bool)
    with pool(num_processes, len(ranges)) as executor, progress(f"select {reader.name}", len(reader)) as advance:
        run = map if executor is None else executor.map
        parts = run(_select, [reader] * len(ranges), [selection] * len(ranges), ranges)
        for (begin, end), part in zip(ranges, parts, strict=True):
            taken[begin:end] = part
            advance(end - begin)
    unusable = np.flatnonzero(~measures.any(axis=1))
    selected = np.where(taken[:, None], measures, np.asarray(UNSELECTED, dtype=np.uint32))
    return selected, [row for number, row in zip(unusable, bad, strict=True) if taken[number]]


def _select(reader: SourceReader, selection: Selection, samples: tuple[int, int]) -> list[bool]:
    entries = (reader.entry(number) for number in range(*samples))
    taken = [selection.takes_place(entry.shard, entry.key) for entry in entries]
    if selection.filter:
        chosen = [number for number, is_chosen in zip(range(*samples), taken, strict=True) if is_chosen]
        for number, record in zip(chosen, reader.records(chosen), strict=True):
            if not isinstance(record, SampleError):  # else it stays among the unusable ones, which are named
                taken[number - samples[0]] = selection.takes(record[2])
    return taken


def _ranges(reader: SourceReader, num_processes: int | None, first: int = 0) -> list[tuple[int, int]]:
    """(first sample, sample after the last) of each task, from sample `first` on."""
    total = len(reader)
    chunk = min(max(total // ((num_processes or usable_cores()) * 8), _CHUNK[0]), _CHUNK[1])
    return [(begin, min(begin + chunk, total)) for begin in range(first, total, chunk)]


def measure_messages(encoder: Encoder, messages: list[dict[str, Any]], sizes: list[tuple[int, int]]) -> tuple[int, int]:
    """(tokens, tiles) of a sample with images of these sizes. Raises SampleError when it cannot be used."""
    tokens, tiles = encoder.measure(messages, sizes)
    if tokens < 1:
        raise SampleError("the sample has no tokens")
    return tokens, tiles


def _measure(
    reader: SourceReader, encoder: Encoder, samples: tuple[int, int]
) -> tuple[np.ndarray, list[dict[str, str]]]:
    begin, end = samples
    rows = np.zeros((end - begin, 2), dtype=np.uint32)
    bad = []
    numbers = range(begin, end)
    for number, record in zip(numbers, reader.records(numbers), strict=True):
        try:
            if isinstance(record, SampleError):
                raise record
            rows[number - begin] = measure_messages(encoder, *record[:2])
        except SampleError as error:
            entry = reader.entry(number)
            bad.append({"shard": entry.shard, "key": entry.key, "error": str(error)})
    return rows, bad


def _fingerprint(reader: SourceReader, encoder: Encoder, selection: Selection) -> str:
    parts = [reader.manifest.fingerprint, encoder.fingerprint, reader.prompt]
    parts += [selection.fingerprint] if selection else []
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _measures_name(reader: SourceReader, encoder: Encoder, selection: Selection) -> str:
    return f"measures-{_fingerprint(reader, encoder, selection)}.npy"


def _bad_path(measures: Path) -> Path:
    return measures.with_suffix(".bad.jsonl")


def _part_path(path: Path, num_samples: int | None = None) -> Path:
    """Where the measures of the first samples are kept until all are there; without a number, a pattern of such names.

    The number is in the name because a part is two files: whoever is killed between them leaves the part before whole.
    """
    return path.with_name(f"{path.stem}.first-{'*' if num_samples is None else num_samples}.npy")


def _parts(path: Path) -> list[tuple[int, Path]]:
    """(number of samples, file), the largest part first."""
    found = ((part.stem.rpartition("-")[2], part) for part in path.parent.glob(_part_path(path).name))
    return sorted(((int(number), part) for number, part in found if number.isdecimal()), reverse=True)


def _newest_part(path: Path) -> tuple[np.ndarray, list[dict[str, str]]]:
    for num_samples, part in _parts(path):
        found = read_or_make(part, lambda part, number=num_samples: _read(part, number), lambda: None)  # type: ignore[misc]
        if found is not None:
            return found
    return np.zeros((0, 2), dtype=np.uint32), []


def _remove_parts(path: Path, kept: Path | None = None) -> None:
    for _, part in _parts(path):
        if part != kept:
            part.unlink(missing_ok=True)
            _bad_path(part).unlink(missing_ok=True)


def _save(path: Path, measures: np.ndarray, bad: list[dict[str, str]]) -> None:
    with must_write(path, "make its folder writable"):
        if bad:
            write_json_lines(_bad_path(path), bad)
        else:
            _bad_path(path).unlink(missing_ok=True)
        save_array(path, measures)


def _read(path: Path, num_samples: int) -> tuple[np.ndarray, list[dict[str, str]]]:
    """The measures, and what is wrong with the samples of 0 tokens. Raises what damage makes it raise."""
    measures = load_array(path, np.uint32, (num_samples, 2))
    bad_path = _bad_path(path)
    bad = [json.loads(line) for line in bad_path.read_bytes().splitlines()] if bad_path.exists() else []
    if not has_shape(bad, [{"shard": str, "key": str, "error": str}]):
        raise ValueError(f"{bad_path.name} is damaged")
    num_unusable = len(measures) - int(np.count_nonzero(measures.any(axis=1)))
    if len(bad) != num_unusable:
        raise ValueError(f"{bad_path.name} names {len(bad)} of {num_unusable} unusable samples")
    return measures, bad
