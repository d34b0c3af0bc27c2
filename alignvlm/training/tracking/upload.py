"""`alignvlm track`: one delivery in this process, which ends with a line when MLflow does not take it."""

from __future__ import annotations

import os
import sys

from alignvlm.errors import UserError
from alignvlm.run_folder import Run
from alignvlm.training.tracking.client import CALL_SECONDS, TimeLimit
from alignvlm.training.tracking.failures import explain, too_late
from alignvlm.training.tracking.mirror import Mirror
from alignvlm.training.tracking.target import Target
from data_pipeline.errors import DataError

CONSEQUENCE = "the files keep everything, track again later"


def upload(run: Run) -> str:
    """Deliver what MLflow lacks; returns where the run is found there.

    Ends the process with code 2 when a call takes longer than `CALL_SECONDS`.

    Raises:
        UserError: there is no such run, or MLflow does not take it; says why. DataError: the run's files are damaged.
    """
    if not run.folder.config.exists():
        raise UserError(f"{run.folder.path}: no such run; start it with `alignvlm train`")
    target = Target.of(run)

    def give_up() -> None:
        print(f"alignvlm: {too_late(target, CALL_SECONDS, CONSEQUENCE)}", file=sys.stderr, flush=True)
        os._exit(2)

    try:
        mirror = Mirror(target, TimeLimit(give_up, CALL_SECONDS))
        mirror.sync()
    except DataError:
        raise
    except Exception as error:  # MLflow hands on whatever its drivers, its plugins and its server's texts raise
        raise UserError(explain(target, error, CONSEQUENCE)) from error
    for line in mirror.notes:
        print(line, file=sys.stderr)
    return f"{target.shown_uri}, run {mirror.state['parent']}"
