"""`alignvlm track`: one delivery in this process, which ends with a line when a tracker does not take it."""

from __future__ import annotations

import os
import sys

from alignvlm.errors import UserError
from alignvlm.run_folder import Run
from alignvlm.training.tracking.client import CALL_SECONDS, TimeLimit
from alignvlm.training.tracking.failures import explain, too_late
from alignvlm.training.tracking.mirrors import MIRRORS
from alignvlm.training.tracking.target import Target
from data_pipeline.errors import DataError

CONSEQUENCE = "the files keep everything, track again later"


def upload(run: Run) -> list[str]:
    """Deliver what MLflow and the recipe's other trackers lack; returns where the run is found in each.

    Ends the process with code 2 when a call takes longer than `CALL_SECONDS`.

    Raises:
        UserError: there is no such run, or a tracker does not take it; says why. DataError: the run's files are
            damaged.
    """
    if not run.folder.config.exists():
        raise UserError(f"{run.folder.path}: no such run; start it with `alignvlm train`")
    return [_deliver(target) for target in Target.all_of(run)]


def _deliver(target: Target) -> str:
    def give_up() -> None:
        print(f"alignvlm: {too_late(target, CALL_SECONDS, CONSEQUENCE)}", file=sys.stderr, flush=True)
        os._exit(2)

    limit = TimeLimit(give_up, CALL_SECONDS)
    try:
        mirror = MIRRORS[target.tracker](target, limit)
        mirror.sync()
        with limit():
            mirror.close()
    except DataError:
        raise
    except Exception as error:  # trackers hand on whatever their drivers, plugins and servers' texts raise
        raise UserError(explain(target, error, CONSEQUENCE)) from error
    for line in mirror.notes:
        print(line, file=sys.stderr)
    return mirror.place
