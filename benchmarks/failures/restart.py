"""How long a job stands still when one of its ranks is killed: until the next attempt, its start, its first step.

    python benchmarks/failures/restart.py
    python benchmarks/failures/restart.py --against ../before   in turn with the code of another checkout
    python benchmarks/failures/restart.py --tiny                the same code in seconds; nothing is written to results

`launch/local.sh` trains the quickstart's models on few samples. Its last rank is killed (SIGKILL) behind a checkpoint,
and the next line of metrics.jsonl is waited for. The parts are sections of timeline.jsonl, as rank 0 went through them;
CPU seconds are those of all processes of the new attempt until then. Medians of the rounds.
Prints a table and writes benchmarks/results/restart.json.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from itertools import dropwhile, pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from _common import write

from alignvlm.config import load_recipe
from data_pipeline.files import read_json_lines
from tests.jobs import processes

ROOT = Path(__file__).resolve().parents[2]
WAIT_SECONDS = 600.0
SAVE_STEPS = 5
FEW = 400
"""Samples of each source: what they show is the same, and they are soon made."""
PARTS = ("next attempt", "imports", "prepare", "rendezvous", "evaluation", "engine", "load", "first step")
"""Where the time goes, in this order; `evaluation` sees that the initial model is measured already."""
TINY = [str(ROOT / "tests" / "recipes" / "tiny.yaml"), "train.processes=1", "stages.connector.max_steps=99"]
TINY += ["evaluation.tasks.test=null"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="kills of each code")
    parser.add_argument("--against", type=Path, help="another checkout, whose code has its turn before this one's")
    parser.add_argument("--tiny", action="store_true", help="all code, a tiny model on one process, one round")
    args = parser.parse_args()
    recipe = TINY if args.tiny else shortened("quickstart")
    codes = ({"before": args.against.resolve()} if args.against else {}) | {"now": ROOT}
    with tempfile.TemporaryDirectory(prefix="restart-benchmark-") as scratch:
        jobs = {name: Job(root, Path(scratch) / name, recipe) for name, root in codes.items()}
        rounds = [{name: job.restart() for name, job in jobs.items()} for _ in range(1 if args.tiny else args.rounds)]
    median = {
        name: {part: statistics.median(each[name][part] for each in rounds) for part in rounds[0][name]}
        for name in codes
    }
    print(table(median))
    if not args.tiny:
        print("\nwritten:", write("restart", {"recipe": recipe, "rounds": rounds, "median": median}))


def shortened(name: str) -> list[str]:
    """A built-in recipe with few samples, without tasks, long enough for all rounds."""
    recipe = load_recipe(name)
    made = [source for source, config in recipe.data.sources.items() if config.generator]
    return [
        name, f"checkpoint.every_steps={SAVE_STEPS}",
        *(f"data.sources.{source}.generator_args.num_samples={FEW}" for source in made),
        *(f"evaluation.tasks.{task}=null" for task in recipe.evaluation.tasks),
    ]  # fmt: skip


class Job:
    """A run in a folder of its own, trained by the code of one checkout."""

    def __init__(self, root: Path, folder: Path, recipe: list[str]) -> None:
        folder.mkdir()
        self._root, self._folder, self._recipe = root, folder, recipe
        self._run = folder / "runs" / load_recipe(recipe[0]).name

    def restart(self) -> dict[str, float]:
        """Start it, kill its last rank behind the next checkpoint; seconds of each part up to the next step."""
        environment = os.environ | {
            "PYTHONPATH": str(self._root), "ALIGNVLM_PYTHON": sys.executable, "ALIGNVLM_MAX_CRASHES": "9",
            "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        began = time.time()
        with (self._folder / "log").open("a") as log:
            process = subprocess.Popen(
                ["bash", str(self._root / "launch" / "local.sh"), *self._recipe], cwd=self._folder, env=environment,
                stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
        try:
            self._wait(process, lambda: len(self._since(began, "metrics.jsonl")) > 2 * SAVE_STEPS)
            killed, ticks = time.time(), ticks_now()
            os.kill(ranks_of(process.pid)[-1], signal.SIGKILL)
            parts = self._wait(process, lambda: self._parts(killed))
            return parts | {"CPU seconds": cpu_seconds(process.pid, ticks)}
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def _wait(self, process: subprocess.Popen[bytes], found: Callable[[], Any]) -> Any:
        deadline = time.monotonic() + WAIT_SECONDS
        while not (answer := found()):
            if process.poll() is not None or time.monotonic() > deadline:
                sys.exit(f"the job did not get that far:\n{(self._folder / 'log').read_text()[-3000:]}")
            time.sleep(0.02)
        return answer

    def _since(self, moment: float, name: str) -> list[dict[str, Any]]:
        """Lines of a file of the run that tell of later times."""
        path = self._run / name
        return [line for line in read_json_lines(path) if line["time"] > moment] if path.exists() else []

    def _parts(self, killed: float) -> dict[str, float]:
        """Seconds of every part; empty until the next attempt has taken a step."""
        marks = [(mark["section"], mark["time"]) for mark in self._since(killed, "timeline.jsonl")]
        marks = list(dropwhile(lambda mark: mark[0] != "imports", marks))  # what the killed attempt still noted
        sections = [section for section, _ in marks]
        if "steps" not in sections:
            return {}
        marks = marks[: sections.index("steps") + 1]
        began, trained = marks[0][1], marks[-1][1]
        taken = self._since(trained, "metrics.jsonl")
        if not taken:
            return {}
        found: Counter[str] = Counter({"next attempt": began - killed})
        for (section, start), (_, end) in pairwise(marks):
            found[section] += end - start
        found["first step"] = taken[0]["time"] - trained
        return {part: found[part] for part in PARTS} | {"kill to next step": taken[0]["time"] - killed}


def ranks_of(session: int) -> list[int]:
    """Process ids of the ranks in a session: those that `alignvlm train` has started, or itself."""
    parents = {pid: int(fields[1]) for pid, fields in processes(session) if b"\0train\0" in read(pid, "cmdline")}
    ranks = {pid for pid in parents if b"\0RANK=" in b"\0" + read(pid, "environ")}
    return sorted(pid for pid in ranks if parents[pid] not in ranks) or [
        pid for pid, parent in parents.items() if parent == session
    ]


def cpu_seconds(session: int, since: int) -> float:
    """CPU seconds of a session's processes that have started since those ticks, their ended children included."""
    ours = [fields for _, fields in processes(session) if int(fields[19]) >= since]
    return sum(int(each) for fields in ours for each in fields[11:15]) / os.sysconf("SC_CLK_TCK")


def ticks_now() -> int:
    """The time in which Linux counts starts of processes."""
    return int(time.clock_gettime(time.CLOCK_BOOTTIME) * os.sysconf("SC_CLK_TCK"))


def read(pid: int, name: str) -> bytes:
    """A file of /proc/PID; empty for a process that has ended."""
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError:
        return b""


def table(median: dict[str, dict[str, float]]) -> str:
    """Seconds of every part, a column for each code."""
    rows = next(iter(median.values()))
    lines = ["| seconds | " + " | ".join(median) + " |", "|---|" + "---:|" * len(median)]
    lines += [f"| {part} | " + " | ".join(f"{found[part]:.2f}" for found in median.values()) + " |" for part in rows]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
