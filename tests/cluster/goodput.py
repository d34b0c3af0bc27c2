"""What the failures of a run cost, scaled from tiny steps to one failure every 20 minutes."""

from __future__ import annotations

from pathlib import Path

from alignvlm.config.schema import CheckpointConfig
from alignvlm.report.failures import project
from alignvlm.report.goodput import read_goodput, table
from tests.jobs import metrics

EVERY = 20 * 60.0


def scaled_ettr(folder: Path, save_steps: int, with_waiting: bool = True) -> float:
    """The effective training time ratio of a run folder with a failure every 20 minutes; its parts are printed.

    Steps, their waits and what a failure costs are those of the run; saves, one every `save_steps` steps there, come as
    often as a recipe has them by default. Exports and scores are left out: they come once, however long a run is.

    Args:
        with_waiting: count the time between two attempts, which may be that of a queue.
    """
    found, steps = read_goodput(folder), len(metrics(folder))
    costs = project(found, EVERY).costs
    lost = sum(costs.values()) - (0.0 if with_waiting else costs["waiting"])
    each = {part: found.parts[part] / steps for part in ("steps", "data_wait", "unknown")}
    save = found.parts["save"] / (steps / save_steps)
    training = each["steps"] / (sum(each.values()) + save / CheckpointConfig().every_steps)
    ettr = training * (1 - lost / EVERY)
    print(f"{table(found)}\n\nseconds per failure: {costs}\nseconds per step: {each}\nseconds per save: {save}")
    print(f"ETTR with a failure every 20 minutes: {ettr:.3f}", flush=True)
    return ettr
