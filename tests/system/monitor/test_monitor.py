"""The monitor of a process: what hangs is ended and described, however it hangs; what works or is suspended is not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.jobs import ROOT
from tests.waiting import until

LIMIT = 0.8
WRITE = "open('/dev/null', 'wb').write(bytes(1 << 20)); time.sleep(0.05)"
PROGRAM = f"""
import ctypes, os, signal, sys, time
from alignvlm.system.monitor.heart import Limit
from alignvlm.system.monitor.start import Monitor
limit = Limit({LIMIT}, "resilience.step_minutes is 0.5")
def kill():
    os.kill(int(open(f"/proc/self/task/{{os.getpid()}}/children").read()), signal.SIGKILL)
    time.sleep(0.3); heart.beat()
with Monitor({{"imports": limit, "steps": limit}}) as heart:
    heart.enter("steps")
    heart.note("step 3, samples fields/0.tar/7")
    BODY
print("alive")
"""
HANGS = {
    "sleeps": "time.sleep(60)",
    "holds the GIL": "while True: ctypes.PyDLL(None).sleep(60)",
    "computes": "while True: pass",
    "is stopped": "os.kill(os.getpid(), signal.SIGSTOP); time.sleep(60)",
    "ignores signals": "[signal.signal(n, signal.SIG_IGN) for n in (15, 2, 1)]; time.sleep(60)",
    "moves bytes in a step": "while True: WRITE",
    "lost its monitor": "kill(); time.sleep(60)",
}
LIVES = {
    "beats": "for _ in range(20): heart.beat(); time.sleep(0.1)",
    "moves bytes": "heart.enter('imports')\n    for _ in range(40): WRITE",
    "waits alone": "heart.enter('imports')\n    with heart.waiting(): time.sleep(2)",
    "has no limit": "heart.enter('unknown'); time.sleep(2)",
    "is in a debugger": (  # a process that it forks traces it for a while (PTRACE_SEIZE)
        "libc = ctypes.CDLL(None); libc.prctl(0x59616D61, ctypes.c_ulong(-1))\n"
        "    if os.fork() == 0: libc.ptrace(0x4206, os.getppid(), None, None); time.sleep(2); os._exit(0)\n"
        "    os.wait()"
    ),
    "is suspended": "for _ in range(3): time.sleep(0.2); heart.beat()",
}
STATE = {"computes": "computing", "is stopped": "stopped (SIGSTOP, Ctrl-Z)", "sleeps": "sleeping or waiting"}


def start(folder: Path, name: str, body: str, stderr: str | None = None, **more: str) -> subprocess.Popen[str]:
    file = folder / f"{name}.py"
    file.write_text(PROGRAM.replace("BODY", body).replace("WRITE", WRITE))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "RANK": "5", "WORLD_SIZE": "8"} | more
    with file.with_suffix(".out").open("w") as output, Path(stderr or os.devnull).open("w") as errors:
        return subprocess.Popen(
            [sys.executable, str(file)], env=environment, start_new_session=True,
            stdout=output, stderr=errors if stderr else subprocess.STDOUT,
        )  # fmt: skip


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str, float]]:
    """What became of every program, all of which ran at once: exit code, output, seconds."""
    folder, began = tmp_path_factory.mktemp("monitored"), time.monotonic()
    running = {name: start(folder, name, body) for name, body in (HANGS | LIVES).items()}
    running["cannot speak"] = start(folder, "cannot speak", "time.sleep(60)", stderr="/dev/full")
    lost = "[kill() for _ in range(2)]; time.sleep(1); heart.beat(); time.sleep(0.3); kill()"
    running["loses three"] = start(folder, "loses three", f"{lost}; time.sleep(2); heart.beat(); time.sleep(60)")
    running["has none"] = start(folder, "has none", "time.sleep(2)", ALIGNVLM_NO_MONITOR="1")
    found: dict[str, tuple[int, str, float]] = {}
    suspended = running["is suspended"]
    until(lambda: children(suspended.pid) != [], "its monitor")
    os.killpg(suspended.pid, signal.SIGSTOP)
    time.sleep(2.5 * LIMIT)
    os.killpg(suspended.pid, signal.SIGCONT)
    for name, process in running.items():
        try:
            code = process.wait(timeout=30)
        finally:
            process.kill()
        found[name] = code, (folder / f"{name}.out").read_text(), time.monotonic() - began
    return found


@pytest.mark.parametrize("name", HANGS)
def test_whatever_hangs_is_ended_and_shows_where(ended: dict[str, tuple[int, str, float]], name: str) -> None:
    code, output, _ = ended[name]
    assert code == -signal.SIGKILL, output
    assert "alive" not in output
    said = next(line for line in output.splitlines() if line.startswith("alignvlm: "))
    place = f"rank 5 on {os.uname().nodename} hangs in steps, step 3, samples fields/0.tar/7"
    assert said.startswith(f"alignvlm: {place}: no progress for")
    assert STATE.get(name, "") in said
    assert f"the limit is {LIMIT:.0f} s (resilience.step_minutes is 0.5; raise it if this is no hang)" in said
    assert f'{name}.py", line 12' in output  # the stack


@pytest.mark.parametrize("name", LIVES)
def test_what_makes_progress_waits_or_is_suspended_as_a_whole_is_left_alone(
    ended: dict[str, tuple[int, str, float]], name: str
) -> None:
    code, output, _ = ended[name]
    assert (code, output) == (0, "alive\n")


def test_a_process_that_loses_its_monitor_gets_another_one_but_not_all_the_time(
    ended: dict[str, tuple[int, str, float]],
) -> None:
    lost = f"the monitor of rank 5 on {os.uname().nodename} has ended (killed by signal 9); another one is started"
    assert ended["lost its monitor"][1].startswith(f"{lost}\n")
    code, output, _ = ended["loses three"]
    later = "; a hang of it would go unnoticed until then"
    assert output.startswith(f"{lost}\n{lost} in 1 s{later}\n{lost} in 2 s{later}\n")
    assert code == -signal.SIGKILL  # the fourth one sees that it hangs


def test_a_process_may_go_without_a_monitor(ended: dict[str, tuple[int, str, float]]) -> None:
    assert ended["has none"][:2] == (0, "alive\n")


def test_a_report_that_cannot_be_written_keeps_no_process_alive(ended: dict[str, tuple[int, str, float]]) -> None:
    code, output, seconds = ended["cannot speak"]
    assert (code, output) == (-signal.SIGKILL, "")
    assert seconds < 30


def test_a_monitor_ends_with_its_process_and_ignores_signals_for_it(tmp_path: Path) -> None:
    process = start(tmp_path, "victim", "heart.enter('unknown'); time.sleep(60)")
    until(lambda: children(process.pid) != [], "its monitor")
    (monitor,) = children(process.pid)
    until(lambda: ignores(monitor, signal.SIGTERM), "its handlers")
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        os.kill(monitor, number)
    assert children(process.pid) == [monitor]
    process.kill()
    process.wait()
    until(lambda: not Path(f"/proc/{monitor}").exists(), "the monitor's end")


def children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def ignores(pid: int, number: int) -> bool:
    lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return bool(int(lines["SigIgn"], 16) >> (number - 1) & 1)
