"""The program of a monitor: it looks at one rank until that ends, and ends it when it stands still.

Started by `start.py` without site-packages. Its time stands still with the machine: a job that is suspended as a whole
(SIGSTOP to all of it, a paused container) has not hung.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import time

from alignvlm.system.monitor.heart import Pulse
from alignvlm.system.monitor.peers import Peers, State, host
from alignvlm.system.monitor.processes import STATES, is_traced, moved_bytes, state

TICK_SECONDS = 1.0
BYTES_PER_SECOND = 1 << 20
"""What a section other than the steps must move, by files and connections, to count as progress."""
STACK_SECONDS = 1.5
"""Time for the rank to print its stacks."""
STOPPED_SECONDS = 0.5
"""The same for a stopped one, which goes on for so long."""
PY_SPY_SECONDS = 20
HUB_SECONDS = 6.0
"""How long the monitor of rank 0 still answers the others before it ends its rank and so itself."""
REPORT_SECONDS = 60
"""Time for the report; after it the rank is ended, whatever the report still waits for."""
MARGIN_SECONDS = 10.0
"""How much later a rank gives up that waits for others: the monitor of the one that hangs speaks first."""
STACKS = signal.SIGUSR2
"""On this signal a rank prints the stacks of all its threads (`start.py`)."""


class Watch:
    """One rank, seen from outside."""

    def __init__(self, pid: int, file: int, rank: int, size: int, listens: int) -> None:
        self._pid, self._rank = pid, rank
        self._pulse = Pulse(file)
        self._peers = Peers(self._pulse, rank, size, listens)
        self._age = 0.0
        self._beats = -1
        self._bytes: tuple[float, int] | None = None
        """Age at which the moved bytes were counted, and how many there were."""

    def run(self) -> None:
        """Watch the rank until it has ended."""
        end = _end_of(self._pid)
        before = time.monotonic()
        while os.getppid() == self._pid:
            limit = self._pulse.limit
            tick = min(TICK_SECONDS, limit / 8) if limit else TICK_SECONDS
            mine = self._state()
            if not self._peers.exchange(mine, tick, end):
                return
            now = time.monotonic()
            self._age += min(now - before, 2 * tick)
            before = now
            self._look(limit, mine["traced"] or self._peers.is_traced)
            if self._is_hung():
                self._give_up()
                return

    def _look(self, limit: float, in_debugger: bool) -> None:
        """Has anything changed? Bytes are counted only when nothing else has for half of the limit.

        While a debugger holds any rank, nobody hangs: that one stands still, and the others wait for it.
        """
        beats = self._pulse.beats
        if beats != self._beats or in_debugger:
            self._beats, self._age, self._bytes = beats, 0.0, None
        elif limit and self._age > limit / 2 and self._pulse.text[0] != "steps":
            moved = moved_bytes(self._pid)
            if self._bytes is None:
                self._bytes = self._age, moved
            elif self._age - self._bytes[0] >= limit / 8:
                grown, seconds = moved - self._bytes[1], self._age - self._bytes[0]
                self._bytes = self._age, moved
                if grown >= BYTES_PER_SECOND * seconds:
                    self._age, self._bytes = 0.0, None

    def _is_hung(self) -> bool:
        limit = self._pulse.limit
        if not limit or self._age <= limit:
            return False
        if self._pulse.waiting and self._pulse.text[0] != "steps":
            still = self._peers.still
            return still is not None and still > limit + min(MARGIN_SECONDS, limit / 4)
        return True

    def _state(self) -> State:
        section, text = self._pulse.text
        return {
            "rank": self._rank, "host": host(), "section": section, "text": text, "age": self._age, "silent": 0.0,
            "waiting": self._pulse.waiting, "state": state(self._pid), "traced": is_traced(self._pid),
        }  # fmt: skip

    def _give_up(self) -> None:
        """Say what there is to say, and end the rank, also when nothing can be said."""
        signal.signal(signal.SIGALRM, lambda number, frame: self._end())
        signal.alarm(REPORT_SECONDS)
        try:
            self._report()
        finally:
            self._end()

    def _report(self) -> None:
        mine = self._state()
        what = f"{mine['section']}, {mine['text']}" if mine["text"] else mine["section"]
        kind = STATES.get(mine["state"], "in a state that this system does not tell")
        _print(
            f"alignvlm: rank {mine['rank']} on {mine['host']} hangs in {what}: no progress for {mine['age']:.0f} s, "
            f"the limit is {self._pulse.limit:.0f} s ({self._pulse.setting}; raise it if this is no hang); "
            f"its process {self._pid} is {kind} and is ended now\n"
            f"{self._peers.lag(mine)}".rstrip()
        )
        os.kill(self._pid, STACKS)
        if mine["state"] == "T":
            os.kill(self._pid, signal.SIGCONT)  # a stopped process prints nothing
            time.sleep(STOPPED_SECONDS)
            os.kill(self._pid, signal.SIGSTOP)  # it would train on, and might be ended in anything
        time.sleep(STACK_SECONDS)
        program = shutil.which("py-spy")
        if program is not None:
            import subprocess

            subprocess.run(
                [program, "dump", "--nonblocking", "--pid", str(self._pid)],
                stdin=subprocess.DEVNULL, stdout=sys.stderr, stderr=sys.stderr, timeout=PY_SPY_SECONDS, check=False,
            )  # fmt: skip
        if self._rank == 0 and self._peers.are_met:
            deadline = time.monotonic() + HUB_SECONDS
            while time.monotonic() < deadline:
                self._peers.exchange(mine, 0.2)

    def _end(self) -> None:
        try:
            if os.getppid() == self._pid:  # else it has ended by itself
                os.kill(self._pid, signal.SIGKILL)
        finally:
            os._exit(0)


def _end_of(pid: int) -> int | None:
    """A descriptor that becomes readable when a process ends; None where there are none: `getppid` tells later."""
    try:
        return os.pidfd_open(pid)
    except (AttributeError, OSError):
        return None


def _print(text: str) -> None:
    with contextlib.suppress(OSError):  # a full disk, a terminal that is gone
        os.write(2, f"{text}\n".encode(errors="replace"))


def main() -> None:
    """`… PID FILE RANK SIZE SOCKET`, from `start.py`."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGQUIT):
        signal.signal(number, signal.SIG_IGN)  # meant for the rank, which it ends with
    Watch(*map(int, sys.argv[1:6])).run()
