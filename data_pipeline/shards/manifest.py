"""The manifest of a folder of shards: what it holds, in which order, and a fingerprint of the content.

`manifest.json` lists the shards in the order that sample numbers follow; index.py writes it.
"""

from __future__ import annotations

import hashlib
import io
import json
import zlib
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar, overload

import numpy as np

from data_pipeline.errors import DataError, LoadError
from data_pipeline.files import check_name, has_shape, reason, write_atomic
from data_pipeline.masking import mask
from data_pipeline.shards.sidecars import index_storage, searched
from data_pipeline.shards.storage import Storage
from data_pipeline.stores.failures import NO_STORE
from data_pipeline.stores.folders import ETAGS, MANIFEST
from data_pipeline.stores.node_cache import CachedFolder

MANIFEST_VERSION = 1


def _is_row(row: Any) -> bool:
    """Whether JSON data is a shard's row of a manifest."""
    return isinstance(row, list) and len(row) == 4 and all(map(has_shape, row, (str, int, int, str))) and row[1] >= 0


_MANIFEST_SHAPE = {"source": str, "fingerprint": str, "origin?": dict}

_ETAGS_SHAPE = {"url": str, "manifest": str}
_ROWS = b',\n "shards": [\n', b"\n ]\n}\n"
_ETAGS = b',\n"etags": {\n', b"\n}\n}"
"""What stands before and behind the lines of the shards in manifest.json and etags.json."""
V = TypeVar("V")


@dataclass(frozen=True, slots=True)
class ShardInfo:
    """One line of the manifest; `sha256` is the digest of the shard's index: keys, places, checksums and content."""

    name: str
    samples: int
    size: int
    sha256: str


class ShardTable(Sequence[ShardInfo]):
    """The lines of a manifest by columns: as objects, 100,000 of them took four times the memory (scale.py).

    `names` are strings, `samples` and `sizes` arrays of int64.
    """

    def __init__(self, rows: Iterable[ShardInfo] = ()) -> None:
        self.samples, self.sizes = array("q"), array("q")
        self.names, self._digests = _Texts(), bytearray()
        self._places: tuple[np.ndarray, np.ndarray] | None = None
        for row in rows:
            self.add(row.name, row.samples, row.size, row.sha256)

    def add(self, name: str, samples: int, size: int, sha256: str) -> None:
        """Add a line. Raises ValueError for a digest that is none, and for a name that is no text."""
        digest = bytes.fromhex(sha256)
        if len(digest) != 32:
            raise ValueError(f"{sha256!r} is no sha256")
        self.names.append(name)
        self.samples.append(samples)
        self.sizes.append(size)
        self._digests += digest
        self._places = None

    def __len__(self) -> int:
        return len(self.samples)

    @overload
    def __getitem__(self, row: int) -> ShardInfo: ...
    @overload
    def __getitem__(self, row: slice) -> list[ShardInfo]: ...
    def __getitem__(self, row: int | slice) -> ShardInfo | list[ShardInfo]:
        if isinstance(row, slice):
            return [self[each] for each in range(*row.indices(len(self)))]
        row = range(len(self))[row]
        return ShardInfo(self.names[row], self.samples[row], self.sizes[row], self._digest(row))

    def _digest(self, row: int) -> str:
        return self._digests[32 * row : 32 * row + 32].hex()

    def lines(self) -> Iterator[bytes]:
        """What the fingerprint is made of."""
        digests = (self._digest(row).encode() for row in range(len(self)))
        for line in zip(self.names.each(), self.samples, self.sizes, digests, strict=True):
            yield b"%b\n%d\n%d\n%b\n" % line

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ShardTable) and self._columns() == other._columns()

    __hash__ = None  # type: ignore[assignment]

    def _columns(self) -> tuple[object, ...]:
        return self.names.data, self.names.ends, self.samples, self.sizes, self._digests

    def row_of(self, name: str) -> int:
        """The number of a shard. Raises KeyError."""
        if self._places is None:  # sorted CRC-32 of the names, and the row of each
            sums = np.fromiter((zlib.crc32(each) for each in self.names.each()), np.uint32, len(self))
            order = np.argsort(sums, kind="stable").astype(np.int32)
            self._places = sums[order], order
        sums, order = self._places
        data = name.encode(errors="replace")
        for place in range(int(np.searchsorted(sums, np.uint32(checksum := zlib.crc32(data)))), len(sums)):
            if sums[place] != checksum:
                break
            if self.names.raw(int(order[place])) == data:
                return int(order[place])
        raise KeyError(name)


class _Texts:
    """Strings as one block of bytes."""

    def __init__(self) -> None:
        self.data, self.ends = bytearray(), array("q")

    def append(self, text: str) -> None:
        self.data += text.encode()
        self.ends.append(len(self.data))

    def __getitem__(self, row: int) -> str:
        return self.raw(row).decode()

    def raw(self, row: int) -> bytes:
        return bytes(self.data[self.ends[row - 1] if row else 0 : self.ends[row]])

    def each(self) -> Iterator[bytes]:
        begin = 0
        for end in self.ends:
            yield bytes(self.data[begin:end])
            begin = end


class _ByName(Mapping[str, V], Generic[V]):
    """A column of a table: name of a shard -> value."""

    def __init__(self, table: ShardTable, values: Any) -> None:
        self._table, self._values = table, values

    def __getitem__(self, name: str) -> V:
        value: V = self._values[self._table.row_of(name)]
        return value

    def __iter__(self) -> Iterator[str]:
        return (name.decode() for name in self._table.names.each())

    def __len__(self) -> int:
        return len(self._table)


@dataclass(frozen=True)
class Manifest:
    """A folder of shards. Sample i is the i-th in the order of the shards."""

    source: str
    shards: ShardTable
    origin: dict[str, Any] = field(default_factory=dict)
    """How the shards came to be, e.g. generator and arguments; compared before they are used again."""
    etags: Mapping[str, str] = field(default_factory=dict)
    """ETags of the shards in the object store where they were indexed; not part of the content."""

    @property
    def num_samples(self) -> int:
        return sum(self.shards.samples)

    @property
    def sizes(self) -> Mapping[str, int]:
        """Name of a shard -> its bytes."""
        return _ByName(self.shards, self.shards.sizes)

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) of all shards' content, in order."""
        digest = hashlib.sha256()
        for line in self.shards.lines():
            digest.update(line)
        return digest.hexdigest()

    def shard_starts(self) -> np.ndarray:
        """int64 [shards + 1]: number of the first sample of each shard, and the total."""
        return np.concatenate([[0], np.cumsum(self.shards.samples, dtype=np.int64)]).astype(np.int64)

    def save(self, folder: Path) -> None:
        write_atomic(folder / MANIFEST, self.to_bytes())

    def to_bytes(self) -> bytes:
        """The content of manifest.json."""
        content = {
            "version": MANIFEST_VERSION,
            "source": self.source,
            "fingerprint": self.fingerprint,
            "samples": self.num_samples,
            "bytes": sum(self.shards.sizes),
            "origin": self.origin,
            "columns": ["name", "samples", "size", "sha256"],
        }
        head = json.dumps(content, indent=1)[:-2]
        body = ",\n  ".join(json.dumps([each.name, each.samples, each.size, each.sha256]) for each in self.shards)
        return f'{head},\n "shards": [\n  {body}\n ]\n}}\n'.encode(errors="backslashreplace")

    def etags_bytes(self, url: str) -> bytes:
        """The content of etags.json, for the folder of this URL."""
        content = {"url": mask(url), "manifest": self.fingerprint, "etags": dict(self.etags)}
        return json.dumps(content, indent=0).encode()


def load_manifest(storage: Storage) -> Manifest:
    """The manifest of a folder. Raises DataError when it is missing, damaged, or of another version."""
    place = index_storage(storage)
    path, url = f"{mask(place.url)}/{MANIFEST}", mask(storage.url)
    if not place.exists(MANIFEST):
        raise LoadError(
            f"{url}: no {MANIFEST}{searched(storage)}; run `alignvlm data index {url}` on a folder of tar shards"
        )
    data = place.read(MANIFEST)
    if data.lstrip(b"\xef\xbb\xbf \r\n\t").startswith(b"<"):
        raise DataError(f"{path} is a page of HTML or XML: {NO_STORE}")
    try:
        content, rows = _content(data)
        if has_shape(content, {"version": int}) and content["version"] != MANIFEST_VERSION:
            raise DataError(f"{path} has version {content['version']}, this code reads {MANIFEST_VERSION}; index again")
        if not has_shape(content, _MANIFEST_SHAPE):
            raise ValueError("it does not hold what it should")
        shards = ShardTable()
        for row in rows:
            if not _is_row(row):
                raise ValueError("it does not hold what it should")
            shards.add(check_name(row[0]), *row[1:])
        etags = _etags(place, shards, content["fingerprint"])
        manifest = Manifest(content["source"], shards, content.get("origin") or {}, etags)
        is_whole = manifest.fingerprint == content["fingerprint"]
    except (ValueError, OverflowError, RecursionError) as error:
        raise DataError(f"{path} is damaged ({reason(error)}); run `alignvlm data index {url}`") from error
    if not is_whole:
        raise DataError(f"{path} was edited: its fingerprint does not match its shards; index the folder again")
    return manifest


def _content(data: bytes) -> tuple[Any, Iterable[Any]]:
    """What a manifest says of all shards, and its rows, one at a time where the file was written here."""
    if (parts := _parts(data, *_ROWS)) is not None:
        return parts[0], map(json.loads, parts[1])
    content = json.loads(data.decode())
    rows = content.pop("shards", None) if isinstance(content, dict) else None
    if not isinstance(rows, list):
        raise ValueError("it lists no shards")
    return content, rows


def _parts(data: bytes, before: bytes, behind: bytes) -> tuple[Any, Iterator[bytes]] | None:
    """The JSON without its long part, and the lines of that; None where it does not stand on lines of its own."""
    begin, end = data.find(before), len(data) - len(behind)
    if begin < 0 or not data.endswith(behind):
        return None
    file = io.BytesIO(data)
    file.seek(begin + len(before))
    lines = iter(lambda: file.readline().rstrip(b",\n") if file.tell() < end else None, None)
    return json.loads(data[:begin] + b"}"), (line for line in lines if line.strip())


def _etags(place: Storage, shards: ShardTable, fingerprint: str) -> Mapping[str, str]:
    """The ETags beside a manifest, where they belong to it and to this URL: a copy has others."""
    if not isinstance(place, CachedFolder) or not place.exists(ETAGS):
        return {}
    data = place.read(ETAGS) or b"{}"
    parts = _parts(data, *_ETAGS)
    found = parts[0] if parts else json.loads(data)
    if not has_shape(found, _ETAGS_SHAPE) or (found["url"], found["manifest"]) != (mask(place.url), fingerprint):
        return {}
    etags = _Texts()
    for row, line in enumerate(parts[1] if parts else ()):
        [(name, etag)] = json.loads(b"{%s}" % line).items()
        if row == len(shards) or name != shards.names[row] or not isinstance(etag, str):
            break
        etags.append(etag)
    if len(etags.ends) == len(shards):
        return _ByName(shards, etags)
    known = json.loads(data).get("etags")  # of some shards only
    if not has_shape(known, {str: str}):
        return {}
    names = {name.decode() for name in shards.names.each()}
    return {name: etag for name, etag in known.items() if name in names}
