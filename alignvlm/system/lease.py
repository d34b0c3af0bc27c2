"""One job per run folder: a small file says who trains there, and its time stamp keeps moving while that job lives.

It works on any shared file system: hosts compare neither their clocks nor locks. A lease is a numbered file that is
created exclusively; who takes over a dead job's lease creates the next number, so two can never win. The holder looks
at its file with every beat and stops when another job has taken it over.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path

from alignvlm.errors import UserError
from alignvlm.progress import say
from alignvlm.system.holder import Holder
from data_pipeline.files import must_write

BEAT_SECONDS = 10.0
"""How often the holder renews the file."""
STALE_SECONDS = 45.0
"""How long a job watches a lease that does not move before it takes it over."""
ENDING_SECONDS = 2.0
"""How long a holder on this host that was just killed may still be seen."""
ENDING = b"ending\n"
"""Stands behind the holder when its job is about to end: the next job waits for it instead of giving up."""
SAVE_SECONDS = 600.0
"""How long a job that is about to end is waited for."""
MAX_BYTES = 4096
NAME = re.compile(r"lease-(\d{6,})\.json")


class Lease:
    """`with Lease(folder):` trains alone in the run folder, or not at all."""

    def __init__(self, folder: Path, beat: float = BEAT_SECONDS, stale: float = STALE_SECONDS) -> None:
        self.folder, self._beat, self._stale = folder, beat, stale
        self._number, self._path = 0, folder
        self._descriptor, self._content = -1, b""
        self.last_beat: float | None = None
        """When the job that held the run before, and died, last renewed its lease, in seconds since 1970."""
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Lease:
        """Become the holder, at once when the folder has none or its holder is known to be dead.

        Raises:
            UserError: another job trains here. DataError: the folder cannot be written.
        """
        with must_write(self.folder, "make it writable, or give another folder for all runs: runs=FOLDER"):
            self.folder.mkdir(parents=True, exist_ok=True)
            me = Holder.this_process()
            while not self._take(me):
                time.sleep(0.2)
        # It lives while loader processes are forked, so it takes no lock that they could wait for.
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.release()
        if self._thread is not None:
            self._thread.join()
        os.close(self._descriptor)

    def announce_end(self) -> None:
        """Let the next job wait for the end of this one, which only saves; safe in a signal handler."""
        if self._number and not self._content.endswith(ENDING):
            self._content += ENDING
            with contextlib.suppress(OSError):  # the next beat tries again
                self._renew()

    def release(self) -> None:
        """Let the next job in at once; safe in a signal handler, and when nothing is held."""
        self._ended.set()
        if self._number and self._is_ours():
            self._path.unlink(missing_ok=True)

    def _take(self, me: Holder) -> bool:
        """One try: wait for the holder there is, and create the next lease; False when another job was faster."""
        seen = self._leases()
        newest = max(seen, default=0)
        if newest:
            self._wait_for(seen[newest], me)
        number = newest + 1
        path = self.folder / f"lease-{number:06d}.json"
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            return False
        self._number, self._path, self._descriptor = number, path, descriptor
        self._content = json.dumps(asdict(me)).encode() + b"\n"
        taken = False
        try:
            with contextlib.suppress(OSError):  # a file system without locks; see `_is_locked`
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._renew()
            # A new file makes NFS list the folder anew: a lease that an old list had hidden is seen now.
            taken = self._leases().keys() - seen.keys() == {number}
        finally:
            if not taken:
                path.unlink(missing_ok=True)
                os.close(descriptor)
        for old in seen.values():
            with contextlib.suppress(OSError):  # another user's, in a folder where only owners remove
                self.last_beat = max(self.last_beat or 0.0, old.stat().st_mtime)
                old.unlink()
        return taken

    def _leases(self) -> dict[int, Path]:
        """Number -> file; the highest number is the one in force."""
        found = [(NAME.fullmatch(name), name) for name in os.listdir(self.folder)]
        return {int(match[1]): self.folder / name for match, name in found if match}

    def _wait_for(self, lease: Path, me: Holder) -> None:
        """Return when the lease may be taken over, because it is gone or its job is dead.

        Raises:
            UserError: its job is alive.
        """
        first = _look_at(lease)
        if first is None:
            return
        holder = Holder.parse(first[0])
        name = str(holder or "a process that it does not name")
        held = UserError(
            f"{lease}: another job trains here: {name}. Wait until it ends, stop it, or give this run another name "
            f"(name={self.folder.name}-2)"
        )
        if holder and holder.gives_way_to(me):
            return
        if holder and self._ends_here(lease, holder, me, held):
            return
        say(f"{lease}: held by {name}; waiting up to {self._stale:.0f} s for a sign of life")
        deadline = time.monotonic() + self._stale
        while time.monotonic() < deadline:
            time.sleep(min(1.0, self._stale / 10))
            now = _look_at(lease)
            if now is None:
                return
            if now != first and not now[0].endswith(ENDING):
                raise held
            if now != first:  # it saves: as long as it moves
                first, deadline = now, time.monotonic() + self._stale
        say(f"{lease}: no sign of life, taking over")

    def _ends_here(self, lease: Path, holder: Holder, me: Holder, held: UserError) -> bool:
        """Whether a holder whose process can be seen from here has ended; a job that is about to end is waited for.

        Raises:
            UserError: `held`, when the process stays.
        """
        began = released = time.monotonic()
        is_told = False
        while (alive := holder.is_alive(me, lease)) is not None:
            now = _look_at(lease)
            if not alive or (now is None and time.monotonic() > released + ENDING_SECONDS):
                return True
            is_ending = now is None or now[0].endswith(ENDING)
            if now is not None:
                released = time.monotonic()
            if time.monotonic() > began + (SAVE_SECONDS if is_ending else ENDING_SECONDS):
                raise held
            if is_ending and not is_told:
                say(f"{lease}: held by {holder}, which is about to end; waiting for it")
                is_told = True
            time.sleep(0.1)
        return False

    def _keep(self) -> None:
        """Renew the lease until it ends. When another job has it, end this process: it must write nothing more."""
        while not self._ended.wait(self._beat):
            with contextlib.suppress(OSError):  # the next beat tries again; `_is_ours` finds out what matters
                self._renew()
            if not self._is_ours() and not self._ended.is_set():
                with contextlib.suppress(OSError):
                    line = f"alignvlm: {self._path}: {self._loss()}; this job ends and saves nothing more"
                    print(line, file=sys.stderr, flush=True)
                os._exit(2)

    def _loss(self) -> str:
        """What became of this job's lease."""
        with contextlib.suppress(OSError):
            leases = self._leases()
            newest = _look_at(leases[max(leases)]) if leases else None
            holder = Holder.parse(newest[0]) if newest else None
            if holder is not None:
                return f"{holder} has taken this run over"
        return "the lease of this job was removed"

    def _renew(self) -> None:
        """Write the same bytes once more: that moves the file's time stamp, and repairs what others did to it."""
        os.pwrite(self._descriptor, self._content, 0)
        os.ftruncate(self._descriptor, len(self._content))
        os.fsync(self._descriptor)

    def _is_ours(self) -> bool:
        """Whether the lease in force is the one that this process created; True when the disk does not answer."""
        try:
            if max(self._leases(), default=0) > self._number:
                return False
            found = os.open(self._path, os.O_RDONLY | os.O_NONBLOCK)  # NFS asks the server, not its cache
            try:
                return os.path.sameopenfile(found, self._descriptor) or os.read(found, MAX_BYTES) == self._content
            finally:
                os.close(found)
        except OSError as error:
            return error.errno not in (errno.ENOENT, errno.ESTALE)


def _look_at(lease: Path) -> tuple[bytes, int] | None:
    """(content, time stamp) of a lease, which differ once its holder has renewed it; None when it is gone.

    Opening it also makes NFS ask the server instead of its cache.
    """
    try:
        try:
            descriptor = os.open(lease, os.O_RDONLY | os.O_NONBLOCK)
        except PermissionError:  # another user's, who lets nobody read: the time stamp shows that it lives
            return b"", os.stat(lease).st_mtime_ns
        try:
            return os.read(descriptor, MAX_BYTES), os.fstat(descriptor).st_mtime_ns
        finally:
            os.close(descriptor)
    except OSError as error:
        return None if error.errno in (errno.ENOENT, errno.ESTALE) else (b"", 0)
