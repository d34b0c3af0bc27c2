"""The plan at scale: 10M samples in 100K shards. Exact steps, memory, resume, and 4,096 simulated ranks.

Run alone: `python benchmarks/plan_scale.py`. Writes benchmarks/results/plan_scale.json.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from _common import write

from data_pipeline.order.plan import Plan, Position
from data_pipeline.order.settings import PlanSettings

SOURCES = {"documents": 8_000_000, "charts": 1_500_000, "tables": 500_000}
PER_SHARD = 100
SEQUENCE_LENGTH = 8192
WORLD_SIZE = 4096


def write_measures(folder: Path) -> None:
    """Lengths like DocVQA's pages at up to nine tiles: 196 visual tokens per tile and a lognormal text."""
    for number, (name, count) in enumerate(SOURCES.items()):
        rng = np.random.default_rng(number)
        measures = np.lib.format.open_memmap(folder / f"{name}.npy", mode="w+", dtype=np.uint32, shape=(count, 2))
        for begin in range(0, count, 500_000):
            tiles = rng.integers(2, 11, min(500_000, count - begin))
            text = rng.lognormal(5, 0.6, len(tiles)).astype(np.int64)
            measures[begin : begin + len(tiles)] = np.stack([np.minimum(text + tiles * 196, 9000), tiles], axis=1)
        measures.flush()


def make_plan(folder: Path) -> Plan:
    """A fresh plan, as any process of a run makes it."""
    sources = {}
    for name, count in SOURCES.items():
        starts = np.arange(0, count + PER_SHARD, PER_SHARD, dtype=np.int64)
        measures = np.load(folder / f"{name}.npy", mmap_mode="r")
        sources[name] = SimpleNamespace(fingerprint=name, measures=measures, shard_starts=starts)
    mixture = {name: float(count) for name, count in SOURCES.items()}
    return Plan(sources, mixture, PlanSettings(seed=1, sequence_length=SEQUENCE_LENGTH, global_batch_packs=WORLD_SIZE))


def count_steps(folder: Path) -> dict[str, float]:
    """In a process of its own: seconds and peak memory of the exact number of steps, and of resuming anywhere."""
    began = time.perf_counter()
    plan = make_plan(folder)
    built = time.perf_counter()
    steps = plan.num_steps
    counted = time.perf_counter()
    packs, tokens, _ = plan.counts.totals(0)
    positions = [plan.position(step).to_json() for step in np.linspace(0, steps - 1, 9).astype(int).tolist()]
    resumes = []
    for text in positions:
        start = time.perf_counter()
        next(plan.batches(Position.from_json(text)))
        resumes.append(time.perf_counter() - start)
    return {
        "steps": steps,
        "packs": packs,
        "fill": tokens / (packs * SEQUENCE_LENGTH),
        "build_seconds": built - began,
        "count_seconds": counted - built,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "resume_seconds_worst": max(resumes),
        "resume_seconds_median": float(np.median(resumes)),
        "position_bytes": max(len(text) for text in positions),
    }


def cover_epoch(folder: Path) -> dict[str, float]:
    """Every rank takes its packs of every batch: each usable sample must be taken exactly once by exactly one rank."""
    plan = make_plan(folder)
    seen = {name: np.zeros(count, dtype=np.uint8) for name, count in SOURCES.items()}
    began = time.perf_counter()
    for batch in plan.batches(0):
        dealt = batch.micro_batches(WORLD_SIZE, 1)  # [1, ranks, 1]
        by_rank = batch.packs.take(dealt.reshape(-1))
        assert len(by_rank) == WORLD_SIZE
        for number, name in enumerate(plan.names):
            np.add.at(seen[name], by_rank.index[by_rank.source == number], 1)
    exact = all(
        bool(
            (
                count
                == ((plan.sources[name].measures[:, 0] <= SEQUENCE_LENGTH) & (plan.sources[name].measures[:, 0] > 0))
            ).all()
        )
        for name, count in seen.items()
    )
    return {"ranks": WORLD_SIZE, "exactly_once": exact, "walk_seconds": time.perf_counter() - began}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.folder is not None:
        print(json.dumps(count_steps(arguments.folder)))
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_measures(folder)
        alone = subprocess.run(
            [sys.executable, __file__, "--folder", str(folder)], check=True, capture_output=True, text=True
        )
        results = {**json.loads(alone.stdout), **cover_epoch(folder)}
    results |= {"samples": sum(SOURCES.values()), "shards": sum(SOURCES.values()) // PER_SHARD}
    targets = {
        "count_seconds <= 60": results["count_seconds"] <= 60,
        "peak_mib <= 200": results["peak_mib"] <= 200,
        "resume_seconds_worst <= 0.2": results["resume_seconds_worst"] <= 0.2,
        "exactly_once": results["exactly_once"],
        "fill >= 0.99": results["fill"] >= 0.99,
    }
    path = write("plan_scale", {"results": results, "targets": targets})
    print(path.read_text())
    return 0 if all(targets.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
