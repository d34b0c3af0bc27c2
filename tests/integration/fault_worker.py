"""What is planted in a rank before its program begins: faults of test_faults.py, or that nothing tracks it."""

from __future__ import annotations

import errno
import os
import time
from dataclasses import replace

FAULT_STEP = 12


def plant(faults: list[str]) -> None:
    """Wrap functions of this rank's program."""

    from alignvlm.training import run, stage

    if "untracked" in faults:
        run.Tracker = Untracked
    rank, step_of = int(os.environ["RANK"]), stage.train_step

    def faulty(trainer, batches, *arguments):
        number = batches[0].step + 1 if batches else 0
        handle = None
        if "nan" in faults and number in (3, 4) and rank == 1:
            handle = trainer.model.model.connector.register_forward_hook(lambda m, i, out: out * float("nan"))
        if "nan-forever" in faults and number >= 3:
            handle = trainer.model.model.connector.register_forward_hook(lambda m, i, out: out * float("inf"))
        if "hang" in faults and number == 24 and rank == 1:
            time.sleep(600)
        result = step_of(trainer, batches, *arguments)
        if handle is not None:
            handle.remove()
        if "spike" in faults and number == FAULT_STEP:
            result = replace(result, loss=100 * result.loss)
        return result

    stage.train_step = faulty
    if "storage" in faults and rank == 1:
        break_storage_after(20)
    if "disk" in faults or "slow-disk" in faults:
        sync = os.fsync

        def bad(descriptor: int) -> None:
            path = os.readlink(f"/proc/self/fd/{descriptor}")
            if "disk" in faults and "step-00000004.partial" in path and rank == 1:
                raise OSError(errno.ENOSPC, "No space left on device", path)
            if "slow-disk" in faults and path.endswith("/step-00000010.partial"):  # the save of step 10 outlasts 12
                time.sleep(2)
            sync(descriptor)

        os.fsync = bad


class Untracked:
    """A tracker that has delivered everything: for jobs that are not about MLflow, whose client is slow to import."""

    def __init__(self, run: object) -> None:
        pass

    def notify(self) -> None:
        pass

    def close(self) -> bool:
        return True


def break_storage_after(reads: int) -> None:
    """The file system of this host answers with input/output errors from then on."""
    from data_pipeline.shards import storage

    storage.RETRY_SECONDS = (0.1, 0.1)
    pread, left = os.pread, [reads]

    def failing(descriptor: int, size: int, offset: int) -> bytes:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return pread(descriptor, size, offset)

    storage.os.pread = failing
