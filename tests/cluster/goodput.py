"""What the failures of a run cost, scaled from tiny steps to one failure every 20 minutes."""

from __future__ import annotations

from pathlib import Path

from alignvlm.report.failures import project
from alignvlm.report.goodput import read_goodput, table

EVERY = 20 * 60.0


def kept_of_failures(folder: Path, with_waiting: bool = True) -> float:
    """The share of its time that a run folder would keep with a failure every 20 minutes; its parts are printed.

    What a failure costs is the run's own: start-up, steps taken again, the time until the next attempt. What costs time
    without failures too (waits, saves, exports, scores) is printed only: beside a test's steps of 40 ms it weighs far
    more than beside those of a recipe.

    Args:
        with_waiting: count the time between two attempts, which may be that of a queue.
    """
    found = read_goodput(folder)
    costs = project(found, EVERY).costs
    lost = sum(costs.values()) - (0.0 if with_waiting else costs["waiting"])
    print(f"{table(found)}\n\nseconds per failure: {costs}")
    print(f"kept with a failure every 20 minutes: {1 - lost / EVERY:.3f}", flush=True)
    return 1 - lost / EVERY
