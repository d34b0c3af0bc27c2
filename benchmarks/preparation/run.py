"""Indexing and measuring shards in one pass, against reading and hashing the same bytes in the same process.

`python benchmarks/preparation/run.py`: CPU time and wall time of A4 pages and of crops, alternating; ratios are those
of the least CPU times, which other programs on the machine change least. Beside it, what writing these shards from
parquet takes, their indexes included. Writes benchmarks/results/preparation.json.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pyarrow
import pyarrow.parquet
from _common import write
from loader import SHARDS, SIZES, PageEncoder, pages

from data_pipeline import checksums
from data_pipeline.importers.records import open_dataset
from data_pipeline.preparation.engines import Local
from data_pipeline.preparation.index import Measuring, index_shard
from data_pipeline.preparation.write import plan_folder, write_missing
from data_pipeline.shards.storage import LocalStorage


def read_and_hash(tars: list[Path], crc32: Callable[[bytes, int], int]) -> None:
    """What no index can do without: every byte read once, its SHA-256 and its CRC-32."""
    for tar in tars:
        digest, checksum = hashlib.sha256(), 0
        with tar.open("rb") as file:
            while block := file.read(1 << 18):
                digest.update(block)
                checksum = crc32(block, checksum)


def prepare(tars: list[Path]) -> None:
    """Index and sample lengths of every shard, into a folder of their own."""
    with tempfile.TemporaryDirectory() as place:
        for tar in tars:
            index_shard(LocalStorage(str(tar.parent)), Path(place), [Measuring(PageEncoder())], tar.name)


def write_parquet(path: Path, samples: int, size: tuple[int, int], rows: int) -> None:
    """The same images as `loader.py` has them, in row groups of `rows`."""
    records = [
        {"images": [{"bytes": record["images"][0]}], "messages": record["messages"]} for record in pages(samples, size)
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path, row_group_size=rows)


def compare(folder: Path, name: str, samples: int, repeats: int) -> dict[str, object]:
    """Seconds and ratios on `samples` images of one size; `hash` takes zlib's CRC-32, `hash_isal` the index's."""
    source = folder / f"{name}.parquet"
    write_parquet(source, samples, SIZES[name], SHARDS[name])
    dataset = open_dataset(source)

    def write_new() -> list[Path]:
        target = Path(tempfile.mkdtemp(dir=folder)) / name
        write_missing(plan_folder(dataset, target, SHARDS[name], num_processes=1), target, engine=Local(1))
        return sorted(target.with_name(f"{name}.partial").glob("*.tar"))

    tars = write_new()
    works: dict[str, Callable[[], object]] = {
        "hash": lambda: read_and_hash(tars, zlib.crc32),
        "hash_isal": lambda: read_and_hash(tars, checksums.crc32),
        "prepare": lambda: prepare(tars),
        "write": write_new,
    }
    cpu: dict[str, list[float]] = {work: [] for work in works}
    wall: dict[str, list[float]] = {work: [] for work in works}
    for _ in range(repeats + 1):  # the first round warms the page cache
        for work, run in works.items():
            began, began_cpu = time.perf_counter(), time.process_time()
            run()
            wall[work].append(time.perf_counter() - began)
            cpu[work].append(time.process_time() - began_cpu)
    least = {work: min(values[1:]) for work, values in cpu.items()}
    return {
        "samples": samples,
        "megabytes": sum(tar.stat().st_size for tar in tars) / 1e6,
        "cpu_seconds": least,
        "wall_seconds": {work: min(values[1:]) for work, values in wall.items()},
        "prepare_over_hash": least["hash"] / least["prepare"],
        "prepare_over_hash_isal": least["hash_isal"] / least["prepare"],
        "write_over_hash": least["hash"] / least["write"],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pages", type=int, default=200)
    parser.add_argument("--crops", type=int, default=3000)
    parser.add_argument("--repeats", type=int, default=15)
    arguments = parser.parse_args()
    counts = {"page": arguments.pages, "crop": arguments.crops}
    with tempfile.TemporaryDirectory() as folder:
        results = {name: compare(Path(folder), name, counts[name], arguments.repeats) for name in SIZES}
    targets = {f"preparation/hashing, {name}s >= 0.9": results[name]["prepare_over_hash"] >= 0.9 for name in SIZES}
    path = write("preparation", {"results": results, "targets": targets})
    for name, result in results.items():
        print(name, result)
    print(targets)
    print(f"wrote {path}")
    return 0 if all(targets.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
