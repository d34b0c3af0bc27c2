"""Signals: remembered while there are steps to save, the end of the process outside them, as before in the end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from alignvlm.system.signals import HANDLED, REQUEUE, Signals
from tests.checkout import ROOT


def test_between_steps_the_first_signal_is_remembered() -> None:
    with Signals() as signals:
        assert signals.received is None
        signals.stepping = True
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            os.kill(os.getpid(), number)
        assert signals.received == "SIGUSR1"


def test_the_handlers_that_were_there_come_back() -> None:
    before = [signal.getsignal(number) for number in HANDLED]
    with Signals():
        assert [signal.getsignal(number) for number in HANDLED] != before
    assert [signal.getsignal(number) for number in HANDLED] == before


def test_under_nohup_a_hangup_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Signals() as signals:
            signals.stepping = True
            os.kill(os.getpid(), signal.SIGHUP)
            assert signals.received is None
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def ended_by(program: str) -> tuple[int, str]:
    """Exit code and errors of a process that runs `program` under the handlers."""
    code = (
        "import os, signal\nfrom alignvlm.system.signals import Signals\n"
        f"with Signals(lambda: print('released', flush=True)) as signals:\n    {program}\nprint('went on')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.stdout == "released\n"
    return done.returncode, done.stderr


def test_outside_the_steps_a_signal_ends_the_process_with_the_code_for_another_start() -> None:
    code, errors = ended_by("os.kill(os.getpid(), signal.SIGTERM)")
    assert code == REQUEUE
    assert "SIGTERM: ending at once; the same command resumes" in errors


def test_a_second_interrupt_ends_the_process_at_once() -> None:
    """Also when the launcher has passed the first one on as SIGTERM before."""
    interrupt, term = (f"os.kill(os.getpid(), signal.{name})" for name in ("SIGINT", "SIGTERM"))
    assert ended_by(f"signals.stepping = True; {term}; {interrupt}; {interrupt}")[0] == REQUEUE


def test_a_process_that_is_ending_ends_at_once_at_a_second_interrupt_only() -> None:
    with Signals() as signals:
        signals.ending = True
        for number in HANDLED:
            os.kill(os.getpid(), number)
        assert signals.received is None
    interrupt, term = (f"os.kill(os.getpid(), signal.{name})" for name in ("SIGINT", "SIGTERM"))
    assert ended_by(f"signals.ending = True; {term}; {term}; {interrupt}; {interrupt}")[0] == REQUEUE


def test_a_terminal_that_is_gone_does_not_end_the_last_delivery(monkeypatch: pytest.MonkeyPatch) -> None:
    with Signals() as signals, Path("/dev/full").open("w", encoding="utf-8") as gone:
        signals.ending = True
        monkeypatch.setattr(sys, "stderr", gone)
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.received is None
        monkeypatch.undo()
        with suppress(OSError):  # what was said is still to be written
            gone.close()


def test_forked_helpers_end_silently_and_release_nothing() -> None:
    with Signals(lambda: os._exit(1)):
        helper = os.fork()
        if helper == 0:
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(2)
        assert os.waitstatus_to_exitcode(os.waitpid(helper, 0)[1]) == REQUEUE
