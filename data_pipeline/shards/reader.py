"""Random access to the samples of a folder of shards, without an encoder: one ranged read each, checksums verified."""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any

import numpy as np

from data_pipeline.checksums import crc32
from data_pipeline.parallel import usable_cores
from data_pipeline.samples.decoding import decode_member
from data_pipeline.samples.images import MAX_IMAGE_BYTES, check_size, image_members
from data_pipeline.samples.schema import (
    MAX_IMAGES,
    MAX_JSON_BYTES,
    Sample,
    SampleError,
    caption_messages,
    normalise_messages,
)
from data_pipeline.samples.turns import row_messages
from data_pipeline.shards.index import index_lines
from data_pipeline.shards.manifest import Manifest, ShardInfo, load_manifest
from data_pipeline.shards.sidecars import index_storage
from data_pipeline.shards.storage import Storage, open_storage
from data_pipeline.stores.fetch_ahead import GAP_BYTES, REQUEST_BYTES, FetchAhead, Range, reads_in_flight
from data_pipeline.stores.object_storage import ObjectStorage

MAX_OPEN_INDEXES = 256
RECORDS_AHEAD = 256
"""Records that are asked for together from an object store, while those before them are used."""
ReadRange = Callable[[str, int, int], bytes | memoryview]
"""(name of a shard, offset, size) -> bytes."""
Members = Mapping[str, tuple[int, int, int]]
"""Extension -> (offset, size, crc32)."""
Conversation = tuple[list[dict[str, Any]], dict[str, Any]]
"""Messages and meta data of a sample."""
Record = tuple[list[dict[str, Any]], list[tuple[int, int]], dict[str, Any]]
"""Messages, image sizes and meta data of a sample whose images are not read."""
TEXT_MEMBERS = ("json", "txt")


@dataclass(frozen=True)
class IndexEntry:
    """One sample in a shard: members are extension -> (offset, size, crc32); sizes are (width, height) or None."""

    shard: str
    key: str
    members: dict[str, tuple[int, int, int]]
    image_sizes: list[tuple[int, int] | None]


def entry_label(source: str, entry: IndexEntry) -> str:
    """`source/shard/key`: the name of a sample in logs and micro-batches."""
    return f"{source}/{entry.shard}/{entry.key}"


class ShardIndex:
    """The lines of one index file; a line is parsed when it is asked for."""

    def __init__(self, storage: Storage, place: Storage, shard: ShardInfo) -> None:
        self.shard, self.lines = shard.name, index_lines(storage, place, shard)

    def __getitem__(self, number: int) -> IndexEntry:
        entry = json.loads(self.lines[number])
        members = {extension: (m[0], m[1], m[2]) for extension, m in entry["members"].items()}
        sizes = [None if size is None else (size[0], size[1]) for size in entry["sizes"]]
        return IndexEntry(self.shard, entry["key"], members, sizes)


class SourceReader:
    """The samples of one source: `len(reader)`, `reader[i] -> Sample`. May be pickled and used in forked workers.

    Args:
        folder: folder or URL with shards, indexes and manifest.
        name: the source's name in samples, keys and the ledger; empty takes the manifest's.
        prompt: user text put after the image of image-caption pairs.

    Raises:
        DataError: no manifest, or indexes that do not fit it.
    """

    def __init__(self, folder: str | os.PathLike[str], name: str = "", prompt: str = "") -> None:
        self.storage = open_storage(folder)
        self.manifest: Manifest = load_manifest(self.storage)
        self._index_storage = index_storage(self.storage)
        self.name = name or self.manifest.source
        self.prompt = prompt
        if isinstance(self.storage, ObjectStorage):
            self.storage.pin(self.manifest.sizes, self.manifest.etags)
        self.shard_starts = self.manifest.shard_starts()
        self._indexes: OrderedDict[int, ShardIndex] = OrderedDict()
        self._lock = Lock()

    def __len__(self) -> int:
        return int(self.shard_starts[-1])

    def __getitem__(self, number: int) -> Sample:
        """Sample `number`, decoded. Raises SampleError when it cannot be used."""
        entry = self.entry(number)
        return self.decode(entry, self.read(entry))

    def read(self, entry: IndexEntry, read_range: ReadRange | None = None) -> dict[str, bytes]:
        """The members that make a sample, by one ranged read, checksums verified. Raises SampleError.

        `read_range` is called in the place of the storage's own.
        """
        return self._members(entry, self._wanted(entry), read_range)

    def span(self, entry: IndexEntry) -> tuple[int, int] | None:
        """The bytes [begin, end) of the shard that `read` reads; None when it reads none, or raises SampleError."""
        wanted = self._wanted(entry)
        return None if not wanted or too_large(wanted) else _span(wanted)

    def _wanted(self, entry: IndexEntry) -> dict[str, tuple[int, int, int]]:
        wanted = [*image_members(entry.members), *(name for name in TEXT_MEMBERS if name in entry.members)]
        return {extension: entry.members[extension] for extension in wanted}

    def decode(self, entry: IndexEntry, data: Mapping[str, bytes], said: Conversation | None = None) -> Sample:
        """The sample of what `read` returned. Raises SampleError when it cannot be used.

        Args:
            said: what `conversation` gave already.
        """
        messages, meta = said or self.conversation(entry, data)
        images = [decode_member(extension, data[extension]) for extension in image_members(entry.members)]
        return Sample(entry.key, self.name, messages, images, meta)

    def conversation(self, entry: IndexEntry, data: Mapping[str, bytes]) -> Conversation:
        """Messages and meta data of what `read` returned. Raises SampleError when they cannot be used."""
        return conversation(data, entry.image_sizes, self.prompt)

    def record(self, number: int) -> Record:
        """Sample `number` without its images. Raises SampleError."""
        return self._record(self.entry(number))

    def records(self, numbers: Sequence[int]) -> Iterator[Record | SampleError]:
        """What `record` returns or raises for each of many samples; from an object store, many reads at a time."""
        for entry, read_range in self._ahead(numbers, _texts, REQUEST_BYTES):
            try:
                yield self._record(entry, read_range)
            except SampleError as error:
                yield error

    def samples(self, numbers: Sequence[int]) -> Iterator[Sample | SampleError]:
        """What `self[number]` returns or raises for each of many; from an object store, many reads at a time."""
        for entry, read_range in self._ahead(numbers, self._wanted, GAP_BYTES):
            try:
                yield self.decode(entry, self.read(entry, read_range))
            except SampleError as error:
                yield error

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) of the source's content."""
        return self.manifest.fingerprint

    def messages(self) -> Iterator[list[dict[str, Any]]]:
        """The conversations of all usable samples, in order, without reading images (tokenizer training)."""
        for record in self.records(range(len(self))):
            if not isinstance(record, SampleError):  # named when the source is measured
                yield record[0]

    def entry(self, number: int) -> IndexEntry:
        """Where sample `number` lies."""
        if not 0 <= number < len(self):
            raise IndexError(f"sample {number} of {len(self)} in source {self.name!r}")
        shard = int(np.searchsorted(self.shard_starts, number, side="right")) - 1
        with self._lock:
            index = self._indexes.get(shard)
            if index is not None:
                self._indexes.move_to_end(shard)
        if index is None:  # two threads may both read it, which is harmless; neither waits for the other
            index = ShardIndex(self.storage, self._index_storage, self.manifest.shards[shard])
            with self._lock:
                self._indexes[shard] = index
                if len(self._indexes) > MAX_OPEN_INDEXES:
                    self._indexes.popitem(last=False)
        return index[number - int(self.shard_starts[shard])]

    def label(self, number: int) -> str:
        """`source/shard/key`: the name of a sample in logs and micro-batches."""
        return entry_label(self.name, self.entry(number))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_indexes": OrderedDict(), "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=Lock())

    def _record(self, entry: IndexEntry, read_range: ReadRange | None = None) -> Record:
        return text_record(self._members(entry, _texts(entry), read_range), entry.image_sizes, self.prompt)

    def _ahead(
        self, numbers: Sequence[int], wanted: Callable[[IndexEntry], Members], gap_bytes: int
    ) -> Iterator[tuple[IndexEntry, ReadRange | None]]:
        """Where samples lie, and how their `wanted` members are read; ranges with such a gap are one request."""
        storage = self.storage
        if not isinstance(storage, ObjectStorage):
            yield from ((self.entry(number), None) for number in numbers)
            return
        fetch = FetchAhead(reads_in_flight(usable_cores()), gap_bytes=gap_bytes)

        def block(begin: int) -> tuple[list[IndexEntry], list[Range]]:
            entries = [self.entry(number) for number in numbers[begin : begin + RECORDS_AHEAD]]
            members = [(each.shard, wanted(each)) for each in entries]
            spans = [(shard, _span(each)) for shard, each in members if each and not too_large(each)]
            return entries, [Range(storage, shard, *span) for shard, span in spans]

        def read_range(name: str, offset: int, size: int) -> memoryview:
            return fetch.take(Range(storage, name, offset, offset + size))

        entries, ranges = block(0)
        for begin in range(0, len(numbers), RECORDS_AHEAD):
            generation = fetch.expect(ranges)
            now, (later, ahead) = ranges, block(begin + RECORDS_AHEAD)
            fetch.foresee(generation, now, ahead)
            yield from ((entry, read_range) for entry in entries)
            entries, ranges = later, ahead

    def _members(
        self, entry: IndexEntry, wanted: Mapping[str, tuple[int, int, int]], read_range: ReadRange | None = None
    ) -> dict[str, bytes]:
        """Bytes of these members by one ranged read, checksums verified."""
        if not wanted:
            return {}
        if error := too_large(wanted):
            raise SampleError(error)
        begin, end = _span(wanted)
        data, wrong = _cut((read_range or self.storage.read_range)(entry.shard, begin, end - begin), begin, wanted)
        if wrong and self.storage.local_path(entry.shard) is None:  # damaged on the way: read once more
            data, wrong = _cut(self.storage.read_range(entry.shard, begin, end - begin), begin, wanted)
        if wrong:
            raise SampleError(f"member .{wrong} does not match its checksum: the shard changed after it was indexed")
        return data


def conversation(
    data: Mapping[str, bytes], image_sizes: Sequence[tuple[int, int] | None], prompt: str = ""
) -> Conversation:
    """(messages, meta data) of a sample's .json and .txt members, for images of these sizes. Raises SampleError."""
    num_images = len(image_sizes)
    if num_images > MAX_IMAGES:
        raise SampleError(f"{num_images} images; at most {MAX_IMAGES} are read")
    for size in image_sizes:
        if size is not None:
            check_size(*size)
    meta = decode_member("json", data["json"]) if "json" in data else {}
    if isinstance(meta, list):
        meta = {"conversations": meta}  # as energon's VQA samples and LLaVA-OneVision-1.5's of single images
    if not isinstance(meta, dict):
        raise SampleError(f"the .json member is a {type(meta).__name__}, neither an object nor a list of turns")
    if "messages" in meta:
        return normalise_messages(meta.pop("messages"), num_images), meta
    messages, used = row_messages(meta, num_images)
    if messages:
        return messages, {name: value for name, value in meta.items() if name not in used}
    caption = decode_member("txt", data["txt"]) if "txt" in data else meta.get("caption")
    if not isinstance(caption, str):
        raise SampleError(
            "neither 'messages' nor 'conversations' nor 'texts' nor a question nor a caption: "
            "not a chat and not an image-caption pair"
        )
    if num_images != 1:
        raise SampleError(f"an image-caption pair has one image, this one has {num_images}")
    return caption_messages(caption, prompt), meta


def text_record(data: Mapping[str, bytes], image_sizes: Sequence[tuple[int, int] | None], prompt: str = "") -> Record:
    """The record of a sample's .json and .txt members. Raises SampleError."""
    messages, meta = conversation(data, image_sizes, prompt)
    sizes = [size for size in image_sizes if size is not None]
    if len(sizes) < len(image_sizes):
        raise SampleError("an image has no readable header, or far more pixels than are decoded")
    return messages, sizes, meta


def _texts(entry: IndexEntry) -> dict[str, tuple[int, int, int]]:
    """The members that hold no image."""
    return {extension: member for extension, member in entry.members.items() if extension in TEXT_MEMBERS}


def too_large(wanted: Mapping[str, tuple[int, int, int]]) -> str:
    """What is wrong with the sizes of members; empty when nothing is."""
    for extension, (_, size, _) in wanted.items():
        limit = MAX_JSON_BYTES if extension in TEXT_MEMBERS else MAX_IMAGE_BYTES
        if size > limit:
            return f"member .{extension} has {size:,} bytes; at most {limit:,} are read"
    return ""


def _span(wanted: Mapping[str, tuple[int, int, int]]) -> tuple[int, int]:
    """The bytes [begin, end) that hold all members."""
    return min(offset for offset, _, _ in wanted.values()), max(offset + size for offset, size, _ in wanted.values())


def _cut(
    data: bytes | memoryview, begin: int, wanted: Mapping[str, tuple[int, int, int]]
) -> tuple[dict[str, bytes], str]:
    """The members in bytes of a shard from `begin` on, and the first of them with another checksum, or ""."""
    block, members = memoryview(data), {}
    for extension, (offset, size, crc) in wanted.items():
        member = bytes(block[offset - begin : offset - begin + size])
        if crc32(member) != crc:
            return {}, extension
        members[extension] = member
    return members, ""
