"""What reading from an object store costs in memory: a loader process above local disk, and a source of 100,000 shards.

Run alone: `python benchmarks/streaming/scale.py`. Each measurement is made by a process of its own; memory is what the
process has for itself (private pages), the largest value seen. Writes benchmarks/results/streaming-scale.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from _common import write
from loader import SIZES, PageEncoder, pages
from run import cache, children, pass_over, plan_of, upload
from server import store

from data_pipeline.shards.manifest import Manifest, ShardInfo, ShardTable
from data_pipeline.shards.sources import measure_source
from data_pipeline.shards.storage import open_storage
from data_pipeline.shards.writer import write_shards
from data_pipeline.stores import helper
from data_pipeline.stores.folders import ETAGS, MANIFEST

MIB = 2**20


def private_bytes(process: int | str = "self") -> int:
    """Bytes that a process shares with no other."""
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Private_"))


@contextmanager
def watched(most: list[int], processes: Any) -> Iterator[None]:
    """Note in `most` the largest private memory of one of `processes()` while the block runs."""
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.05):  # looking costs the process that is looked at some milliseconds
            for process in processes():
                try:
                    most.append(private_bytes(process))
                except OSError:  # it ended
                    continue

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def loader_process(folder: str, read: str) -> dict[str, float]:
    """Largest private memory of one loader process during a pass, bytes."""
    torch.set_num_threads(1)
    encoder, most = PageEncoder(), [0]
    with watched(most, children):
        pass_over(plan_of(folder, encoder), encoder, 1, read)  # type: ignore[arg-type]
    return {"private": max(most)}


def open_shards(url: str) -> dict[str, float]:
    """Seconds and private memory of opening a source, its manifest being in the node's cache."""
    from data_pipeline.shards.reader import SourceReader

    before, most = private_bytes(), [0]
    cpu, began = time.process_time(), time.perf_counter()
    with watched(most, lambda: ["self"]):
        reader = SourceReader(url)
    result = {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - cpu}
    return {**result, "peak": max(most) - before, "kept": private_bytes() - before, "samples": len(reader)}


def publish_shards(url: str, count: int) -> None:
    """The manifest of a folder of so many shards, which are not there."""
    rng = np.random.default_rng(0)
    shards = ShardTable(
        ShardInfo(f"{number // 1000:03d}/{number:06d}.tar", 1000, 500_000_000 + number, rng.bytes(32).hex())
        for number in range(count)
    )
    etags = {each.name: f'"{each.sha256[:32]}"' for each in shards}
    manifest, storage = Manifest("many", shards, etags=etags), open_storage(url)
    storage.write(ETAGS, manifest.etags_bytes(url))
    storage.write(MANIFEST, manifest.to_bytes())


def alone(*arguments: str) -> dict[str, float]:
    """The result of one measurement, made by a process of its own."""
    done = subprocess.run([sys.executable, __file__, *arguments], check=True, stdout=subprocess.PIPE, text=True)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def measure(count: int, samples: dict[str, int]) -> dict[str, Any]:
    """All measurements, against a store in memory."""
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary, store("memory") as server, cache():
        encoder = PageEncoder()
        for image, number in samples.items():
            here, url = Path(temporary) / image, f"s3://bucket/{image}"
            write_shards(pages(number, SIZES[image]), here, samples_per_shard=100)
            upload(here, url)
            for folder in (str(here), url):
                measure_source(folder, encoder, num_processes=1)
            local = alone("loader", str(here), "ranges")["private"]
            for place in ("near", "far"):
                server.move(place)
                for read in ("ranges", "shards"):
                    with cache():
                        above = alone("loader", url, read)["private"] - local
                    results[f"{image} {place} {read}: MiB of a loader process above local"] = above / MIB
            server.move("here")
        publish_shards("s3://bucket/many", count)
        alone("open", "s3://bucket/many")  # fetches the manifest
        opened = alone("open", "s3://bucket/many")
        results |= {"shards": count, "open_seconds": opened["seconds"], "open_cpu_seconds": opened["cpu_seconds"]}
        results |= {"open_peak_mib": opened["peak"] / MIB, "open_kept_mib": opened["kept"] / MIB}
        helper.stop()
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=100_000)
    parser.add_argument("--pages", type=int, default=100)
    parser.add_argument("--crops", type=int, default=1000)
    parser.add_argument("one", nargs="*", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        what = {"loader": loader_process, "open": open_shards}[arguments.one[0]]
        print(json.dumps(what(*arguments.one[1:])))  # type: ignore[operator]
        helper.stop()
        return 0
    results = measure(arguments.shards, {"page": arguments.pages, "crop": arguments.crops})
    targets = {
        "loader process <= 80 MB above local": max(v for k, v in results.items() if "above local" in k) * MIB <= 80e6,
        "open_cpu_seconds <= 3": results["open_cpu_seconds"] <= 3,
        "open_peak <= 50 MB": results["open_peak_mib"] * MIB <= 50e6,
    }
    path = write("streaming-scale", {"results": results, "targets": targets})
    print(path.read_text())
    return 0 if all(targets.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
