"""The quickstart trained from S3, 30 ms away, and through an outage of the store: its losses and its waiting for data.

A shortened quickstart (fewer samples and steps, no evaluation) trains from disk, from nginx, which leaves it the cores
of a small machine, and once more from a real S3 server (SeaweedFS) behind the proxy of the tests, which is gone for a
minute. Losses and gradient norms must be those from disk, bit for bit, and the steps behind the first of each stage
wait for data at most 1 % of their time.

Run alone, for minutes: `python benchmarks/streaming/quickstart.py`.
Writes benchmarks/results/streaming-quickstart.json.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from _common import write
from server import Kind, Server, store

from data_pipeline.shards.storage import open_storage
from data_pipeline.stores import helper
from tests.jobs import curve, metrics, run, start, wait_for_step

SOURCES = ("digits_read", "numbers_read", "columns_read", "tables_read", "charts_read")
"""Of the first two stages, here without those with questions."""
MOST_WAIT = 0.01
URL = "s3://bucket/quickstart"


def recipe(samples: int, steps: int) -> list[str]:
    """The words that make the quickstart short."""
    words = [f"data.sources.{name}.generator_args.num_samples={samples}" for name in SOURCES]
    words += [f"stages.{name}.max_steps={steps}" for name in ("connector", "joint")]
    left_out = ", ".join(f"{name}: null" for name in ("fields_ask", "prices_ask", "numbers_printed"))
    mixture = f"{{numbers_read: 2, columns_read: 1, tables_read: 1, charts_read: 1, {left_out}}}"
    more = ["stages.instruct=null", f"stages.joint.mixture={mixture}", "stages.connector.epochs=10"]
    return [*words, *more, "stages.joint.epochs=10", "evaluation.tasks={}"]


def train(folder: Path, name: str, words: list[str]) -> list[dict[str, Any]]:
    """The steps of a run."""
    run("train", "quickstart", *words, f"name={name}", cwd=folder, timeout=900)
    return metrics(folder / "runs" / name)


def train_through_outage(folder: Path, name: str, words: list[str], server: Server, seconds: float) -> float:
    """The longest step, in seconds, of a run whose store is gone for some time from the first steps on.

    All of it, not what rank 0 waited for data: it may have its own, and wait for those that have not.
    """
    process = start("train", "quickstart", *words, f"name={name}", cwd=folder)
    wait_for_step(folder / "runs" / name, "connector", 2, process)
    server.move("gone")
    time.sleep(seconds)
    server.move("near")
    output, _ = process.communicate(timeout=900)
    assert process.returncode == 0, output[-4000:]
    return max(row["seconds"] for row in metrics(folder / "runs" / name))


def waited(rows: list[dict[str, Any]]) -> float:
    """Share of the steps' time in which rank 0 waited for data, without the first step of each stage."""
    later = [row for row in rows if row["step"] > 1]
    return sum(row["data_wait"] for row in later) / sum(row["seconds"] for row in later)


def put(server: Server, folder: Path, words: list[str]) -> None:
    """Write the quickstart's shards into an empty store, which is then 30 ms away."""
    server.move("here")
    open_storage("s3://bucket").write("made", b"")  # SeaweedFS makes a bucket with the first object
    helper.stop()
    run("data", "write", "quickstart", *words, cwd=folder)
    server.move("near")


def measure(samples: int, steps: int, outage: float, kind: Kind = "nginx") -> dict[str, Any]:
    """All three runs; `kind` is the store that stays."""
    words = recipe(samples, steps)
    far = [*words, f"data.root={URL}"]
    ranges = [f"data.sources.{name}.read=ranges" for name in SOURCES]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        os.environ["ALIGNVLM_CACHE"] = str(folder / "cache")
        near = train(folder, "near", words)
        with store(kind) as server:
            put(server, folder, far)
            there = train(folder, "far", far)
            requests = server.move("near")["requests"]
        print(
            f"{len(near)} steps, {requests} requests; waited {waited(near):.2%} from disk, {waited(there):.2%} from S3"
        )
        results = {
            "steps": len(near), "requests": requests, "wait_local": waited(near), "wait_far": waited(there),
            "first_step_local": [row["data_wait"] for row in near if row["step"] == 1],
            "first_step_far": [row["data_wait"] for row in there if row["step"] == 1],
            "same_far": curve(folder / "runs" / "far") == curve(folder / "runs" / "near"),
        }  # fmt: skip
        if outage:
            os.environ["ALIGNVLM_CACHE"] = str(folder / "cache of the outage")
            with store("seaweed") as server:
                put(server, folder, far)
                longest = train_through_outage(folder, "outage", [*far, *ranges], server, outage)
            same = curve(folder / "runs" / "outage") == curve(folder / "runs" / "near")
            results |= {"outage_seconds": outage, "longest_step": longest, "same_outage": same}
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=600, help="of each source (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=120, help="of each stage (default: %(default)s)")
    parser.add_argument("--outage", type=float, default=60, help="seconds; 0: none (default: %(default)s)")
    arguments = parser.parse_args()
    results = measure(arguments.samples, arguments.steps, arguments.outage)
    targets = {
        "losses from S3 are those from disk": results["same_far"],
        f"waiting for data <= {MOST_WAIT:.0%}": results["wait_far"] <= MOST_WAIT,
    }
    if arguments.outage:
        targets["losses through the outage are those from disk"] = results["same_outage"]
        targets["the outage was felt"] = results["longest_step"] > arguments.outage / 2
    path = write(
        "streaming-quickstart", {"server": "nginx, SeaweedFS for the outage", "results": results, "targets": targets}
    )
    print(path.read_text())
    return 0 if all(targets.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
