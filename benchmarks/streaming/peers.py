"""Other libraries' loaders beside ours: the same images, from disk and from the same store through the same proxy.

Each library reads its own format, written by its own writer, with one loader process and the settings that its
documentation recommends (readers/, one short script each). All decode by PIL and hand over the same tiles, which is
checked. Their passes alternate. Called by run.py --peers; writes benchmarks/results/streaming-peers.json.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _common import write
from environments import Unavailable, python_of, run
from loader import SIZES, pages
from server import Kind, Server, store

from data_pipeline.shards.storage import open_storage
from data_pipeline.stores import helper

READERS = Path(__file__).parent / "readers"
OURS = "alignvlm"
REQUIREMENTS: dict[str, list[str]] = {
    "webdataset": ["webdataset==1.0.2"],
    "litdata": ["litdata==0.2.76"],
    "mosaic": ["mosaicml-streaming==0.13.0", "torch==2.14.1", "torchvision==0.29.1"],
    "energon": ["megatron-energon[s3]==7.4.0"],
}
"""Library -> what its environment has. MosaicML streaming imports torchvision, which fits no torch without CUDA."""
PLACES = ("disk", "near", "far")
SECONDS = 300.0
"""For one pass, or for writing the images."""
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MALLOC_TRIM_THRESHOLD_": str(2**30),
    "MALLOC_MMAP_THRESHOLD_": str(2**25),
    "NO_PROXY": "127.0.0.1,localhost",
    "no_proxy": "127.0.0.1,localhost",
    "AWS_DEFAULT_REGION": "us-east-1",
    "LITDATA_DISABLE_VERSION_CHECK": "1",
}
"""Of every reader. The allocator keeps memory, as our loader processes make theirs do."""
Pass = dict[str, Any]
"""What a reader says (readers/_reading.py), what the proxy counted, and the machine's load then."""


@dataclass
class Library:
    """One that is compared."""

    name: str
    python: Path = Path(sys.executable)
    failed: str = ""
    """Why it takes no further part."""

    def write(self, images: Path, folder: Path) -> None:
        """Fill a folder with the images in the library's format. Raises Unavailable."""
        self._run("write", str(images), str(folder))

    def read(self, place: str) -> Pass:
        """One epoch from a folder or URL, with nothing in the cache. Raises Unavailable."""
        with tempfile.TemporaryDirectory() as cache:
            found: Pass = json.loads(self._run("read", place, cache).splitlines()[-1])
            return found

    def _run(self, *words: str) -> str:
        script = str(READERS / f"read_{self.name}.py")
        return run([str(self.python), script, *words], SECONDS, {**os.environ, **ENVIRONMENT})


@contextmanager
def unless_failed(library: Library) -> Iterator[None]:
    """Note why a library cannot go on; ours must."""
    try:
        yield
    except Unavailable as error:
        if library.name == OURS:
            raise
        library.failed = str(error)
        print(f"{library.name} is left out: {error}", flush=True)


def installed(names: Sequence[str], work: Path) -> list[Library]:
    """Ours, and these with an environment of their own each."""
    found = [Library(OURS), *map(Library, names)]
    for library in found[1:]:
        with unless_failed(library):
            library.python = python_of(library.name, REQUIREMENTS[library.name], work)
    return found


def write_images(folder: Path, count: int, size: tuple[int, int]) -> int:
    """JPEG files and their conversations. Returns the bytes of the images."""
    folder.mkdir()
    total = 0
    for record in pages(count, size):
        (jpeg,) = record["images"]
        (folder / f"{record['key']}.jpg").write_bytes(jpeg)
        (folder / f"{record['key']}.json").write_text(json.dumps(record["messages"]))
        total += len(jpeg)
    return total


def upload(folder: Path, url: str) -> None:
    """Every file of a folder."""
    storage = open_storage(url)
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            storage.write(path.relative_to(folder).as_posix(), path.read_bytes())


def compare(
    image: str, count: int, repeats: int, libraries: Sequence[Library], server: Server, places: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """Rows for one kind of image: every library at every place."""
    with tempfile.TemporaryDirectory() as temporary:
        size = write_images(Path(temporary) / "images", count, SIZES[image])
        sources: dict[tuple[str, bool], str] = {}
        server.move("here")
        for library in libraries:
            here, url = Path(temporary) / library.name, f"s3://bucket/{image}-{library.name}"
            sources |= {(library.name, True): str(here), (library.name, False): url}
            if not library.failed:
                with unless_failed(library):
                    library.write(Path(temporary) / "images", here)
                    upload(here, url)
        for place in places:
            passes: dict[str, list[Pass]] = {library.name: [] for library in libraries}
            for _ in range(repeats):
                for library in libraries:
                    if not library.failed:
                        server.move("here" if place == "disk" else place)
                        with unless_failed(library):
                            found = library.read(sources[library.name, place == "disk"])
                            more = {"counts": server.move("here"), "load": round(os.getloadavg()[0], 1)}
                            passes[library.name].append({**found, **more})
            for library in libraries:
                summary = summarize(passes[library.name], passes[OURS], count, size) if not library.failed else {}
                yield {"image": image, "place": place, "library": library.name, "failed": library.failed, **summary}


def summarize(passes: Sequence[Pass], ours: Sequence[Pass], count: int, size: int) -> dict[str, Any]:
    """Medians of a library's passes, and ours over its, pass by pass.

    Args:
        count: images of a pass.
        size: bytes of these.
    """
    for each in passes:
        if (each["images"], each["pixels"]) != (count, ours[0]["pixels"]):
            return {"failed": f"gave {each['images']} images for {count}, or other pixels"}
    pairs = list(zip(ours, passes, strict=True))
    return {
        "images_per_second": statistics.median(each["rate"] for each in passes),
        "seconds_to_first_batch": statistics.median(each["start"] for each in passes),
        "images_per_cpu_second": statistics.median(count / each["cpu"] for each in passes),
        "ours_over_its_speed": statistics.median(a["rate"] / b["rate"] for a, b in pairs),
        "ours_over_its_cpu_speed": statistics.median(b["cpu"] / a["cpu"] for a, b in pairs),
        "requests_per_image": statistics.median(each["counts"].get("requests", 0) / count for each in passes),
        "bytes_per_byte": statistics.median(each["counts"].get("bytes", 0) / size for each in passes),
        "passes": [{key: each[key] for key in ("rate", "start", "cpu", "build", "load")} for each in passes],
        "versions": passes[0]["versions"],
        "settings": passes[0]["settings"],
    }


COLUMNS = {
    "images/s": "images_per_second",
    "first batch, s": "seconds_to_first_batch",
    "images/CPU s": "images_per_cpu_second",
    "ours/its images/s": "ours_over_its_speed",
    "ours/its images/CPU s": "ours_over_its_cpu_speed",
    "GETs/image": "requests_per_image",
    "bytes/byte": "bytes_per_byte",
}
"""Of the table -> key of a row."""


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows in Markdown; a library that is missing is there, with the reason."""
    lines = [["image", "place", "library", *COLUMNS], ["---"] * (3 + len(COLUMNS))]
    for row in rows:
        values = [f"{row[key]:.3g}" for key in COLUMNS.values() if key in row]
        rest = values if not row["failed"] else [row["failed"], *[""] * (len(COLUMNS) - 1)]
        lines.append([row["image"], row["place"], row["library"], *rest])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def judge(rows: Sequence[Mapping[str, Any]]) -> dict[str, bool]:
    """What was aimed at -> whether it was reached: from disk, ours gives more images per CPU second than each."""
    return {
        f"{row['image']} disk: images per CPU second > {row['library']}": row["ours_over_its_cpu_speed"] > 1
        for row in rows
        if row["place"] == "disk" and row["library"] != OURS and not row["failed"]
    }


def compare_peers(
    counts: Mapping[str, int],
    repeats: int,
    names: Sequence[str],
    work: Path,
    places: Sequence[str],
    kind: Kind,
    result: str,
) -> int:
    """Compare, print a table, and write after every row, so that a command that is cut short has lost nothing else.

    Args:
        counts: images by kind.
        names: of REQUIREMENTS.
        work: where environments are kept.
        places: of PLACES.
        kind: of the store.
        result: name of the result; empty: none is written.

    Returns:
        The exit code: 0 when ours takes the least CPU time from disk.
    """
    libraries, rows = installed(names, work), []
    facts = {"environment": ENVIRONMENT, "repeats": repeats, "images": dict(counts)}
    with store(kind) as server:
        for image, count in counts.items():
            for row in compare(image, count, repeats, libraries, server, places):
                rows.append(row)
                print(table([row]).splitlines()[-1], flush=True)
                if result:
                    write(result, {**facts, "results": rows, "targets": judge(rows)})
        helper.stop()
    print(table(rows))
    print(judge(rows))
    return 0 if all(judge(rows).values()) else 1
