"""Ranks wait while rank 0 prepares, as long as it shows that it lives: hours, with collectives limited to minutes.

Rank 0 serves a small store at MASTER_ADDR:MASTER_PORT (under torchrun the agent does) and beats there; the others look.
Nothing else of the job exists yet. The process group is made at the same address afterwards, while the store is open.

On a fixed port the store found may be that of the job before, which still ends. A store lets each rank in once, and
only from the same job of the scheduler: whoever is refused leaves it, and looks again until the other store is gone.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import threading
import time
import uuid
from collections.abc import Mapping
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING

from alignvlm.errors import UserError
from alignvlm.progress import say
from data_pipeline.errors import DataError

if TYPE_CHECKING:
    from torch.distributed import TCPStore

BEAT_SECONDS = 2.0
STALE_SECONDS = 60.0
"""How long rank 0 may go without a beat before it counts as lost."""
FIRST_SECONDS = 1800.0
"""How long rank 0's first beat may take: it may have to wait for the job before, which may be saving."""
ANSWER_SECONDS = 10.0
"""How long one answer of the store may take."""
LAST_WORD_SECONDS = 10.0
"""How long after rank 0's end another rank speaks: rank 0 has said why, and a launcher ends the others first."""
POLL_SECONDS = 0.2
UNNAMED = "unnamed"
"""Name of the job where no scheduler has given it one."""
FAILED = (RuntimeError, OSError)
"""What a store raises when its server is gone, silent or no store (DistError is a RuntimeError)."""


class Waiting:
    """`with Waiting() as waiting:` around preparing and the start of the process group, on every rank.

    Rank 0 calls `go_on` when it has prepared, the others `wait`. A lone process waits for nobody.
    """

    def __init__(self, environment: Mapping[str, str] = os.environ, stale: float = STALE_SECONDS) -> None:
        self._rank, self._size = int(environment.get("RANK", "0")), int(environment.get("WORLD_SIZE", "1"))
        self._address = environment.get("MASTER_ADDR", ""), int(environment.get("MASTER_PORT") or 0)
        self._is_agents = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        job = environment.get("SLURM_JOB_ID", "")
        self._job = f"{job}/{environment.get('SLURM_RESTART_COUNT', '0')}" if job else ""
        self._prefix = f"alignvlm/{environment.get('TORCHELASTIC_RESTART_COUNT', '0')}/"
        self._me = uuid.uuid4().hex
        self._stale = stale
        self._store: TCPStore | None = None
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._told = False

    def __enter__(self) -> Waiting:
        """On rank 0, open the store and begin to beat.

        Raises:
            UserError: the launcher has not said where rank 0 is.
        """
        if self._size > 1 and not all(self._address):
            raise UserError(
                f"WORLD_SIZE is {self._size}, but MASTER_ADDR or MASTER_PORT is not set: let a launcher set them"
            )
        if self._size > 1 and self._rank == 0:
            self._store = self._open()
            self._store.set(self._prefix + "job", self._job or UNNAMED)
            # It lives while other processes are forked, which never touch the store.
            self._thread = threading.Thread(target=self._beat, args=(self._store,), name="waiting", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        if self._thread is not None and self._rank == 0:
            self._thread.join()
        self._store = None

    def go_on(self) -> None:
        """Rank 0 has prepared."""
        if self._store is not None:
            self._store.set(self._prefix + "prepared", "yes")

    def wait(self) -> None:
        """Return when rank 0 has prepared.

        Raises:
            DataError: rank 0 has ended, gives no sign of life, or was never there.
        """
        last = _Sign()
        # In a thread: the store's timeouts do not cover every wait for a process that is stopped.
        self._thread = threading.Thread(target=self._look, args=(last,), name="waiting", daemon=True)
        self._thread.start()
        while not last.prepared:
            time.sleep(POLL_SECONDS)
            silent = time.monotonic() - last.time
            if last.lost or silent > (self._stale if last.seen else FIRST_SECONDS):
                raise self._failure(last, silent)

    def _failure(self, last: _Sign, silent: float) -> DataError:
        host, port = self._address
        if last.lost:
            time.sleep(LAST_WORD_SECONDS)
            problem, kind = "has ended while it prepared, and says why", errno.ECONNRESET
        elif last.seen:
            problem, kind = f"has given no sign of life for {silent:.0f} s while it prepared", errno.ETIMEDOUT
        else:
            problem, kind = f"has not come up at {host}:{port} within {silent / 60:.0f} minutes", errno.ETIMEDOUT
        failure = DataError(f"rank 0 {problem}; the same command starts again")
        failure.__cause__ = OSError(kind, os.strerror(kind))
        return failure

    def _open(self) -> TCPStore:
        """Rank 0's store; the server of a job that is ending may hold the port a little longer."""
        from torch.distributed import TCPStore

        host, port = self._address
        if self._is_agents:
            return self._connect()
        deadline = time.monotonic() + self._stale
        while True:
            try:  # shared with the process group, which makes its own at the same port
                return TCPStore(host, port, None, True, wait_for_workers=False, multi_tenant=True)
            except FAILED as error:
                if time.monotonic() > deadline:
                    raise OSError(errno.EADDRINUSE, f"{host}:{port} is taken ({error})") from error
            self._tell()
            time.sleep(POLL_SECONDS)

    def _connect(self) -> TCPStore:
        from torch.distributed import TCPStore

        timeout = timedelta(seconds=ANSWER_SECONDS)
        return TCPStore(*self._address, None, False, timeout=timeout, wait_for_workers=False)

    def _beat(self, store: TCPStore) -> None:
        with contextlib.suppress(*FAILED):  # the agent of torchrun has ended, and ends this process
            while not self._ended.is_set():
                store.add(self._prefix + "beat", 1)
                self._ended.wait(BEAT_SECONDS)

    def _look(self, last: _Sign) -> None:
        """Keep `last` up to date until rank 0 has prepared or is lost."""
        store = None
        while store is None and not self._ended.is_set():
            store = self._enter()
            if store is None:
                time.sleep(POLL_SECONDS)
        beat = -1
        try:
            while store is not None and not self._ended.is_set():
                found = store.add(self._prefix + "beat", 0)
                if found != beat:
                    beat, last.time, last.seen = found, time.monotonic(), True
                if store.check([self._prefix + "prepared"]):
                    last.prepared = True
                    return
                time.sleep(POLL_SECONDS)
        except FAILED:
            last.lost = True

    def _enter(self) -> TCPStore | None:
        """This job's store; None when there is none yet, or only another job's."""
        try:
            socket.create_connection(self._address, ANSWER_SECONDS).close()  # torch would warn at every try
            store = self._connect()
            if not store.check([self._prefix + "job"]):
                return None
            job = store.get(self._prefix + "job").decode()
            # The first process of a rank stays in, also when the store's answer to it was lost and it asks again.
            is_first = store.compare_set(f"{self._prefix}arrived/{self._rank}", "", self._me) == self._me.encode()
        except FAILED:
            return None
        if self._is_agents or (is_first and (self._job in ("", job) or job == UNNAMED)):
            return store
        self._tell()
        return None

    def _tell(self) -> None:
        if not self._told:
            self._told = True
            host, port = self._address
            say(f"rank {self._rank}: the job before still answers at {host}:{port}; waiting for its end")


class _Sign:
    """What a rank has seen of rank 0."""

    def __init__(self) -> None:
        self.time = time.monotonic()
        self.seen = self.prepared = self.lost = False
