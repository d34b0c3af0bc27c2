"""The launcher of one machine, with stand-ins for ranks: no process outlives it, and stopped ones end too."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from alignvlm.errors import UserError
from alignvlm.launch.local import run_local
from tests.checkout import ROOT
from tests.launch.test_files import start_local
from tests.waiting import runs, until

LAUNCHER = """
import sys
from alignvlm.launch.local import run_local
sys.exit(run_local([sys.executable, "-c", sys.argv[1]], 2))
"""
SHORT = "from alignvlm.launch import local\nlocal.RANK_0_SECONDS, local.KILLED_SECONDS = 0.1, 0.3\n"
GRACE = "local.GRACE_SECONDS = 0.3\n"
SAVES = """
import os, signal, sys, time
def save(number, frame):
    time.sleep(0.2)
    open(f"saved-{os.environ['RANK']}", "w").write(signal.Signals(number).name)
    sys.exit(75)
for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
    if signal.getsignal(number) is not signal.SIG_IGN:
        signal.signal(number, save)
open(f"rank-{os.getpid()}", "w").close()
time.sleep(60)
"""
IGNORES = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen(["sleep", "60"])
os.kill(child.pid, signal.SIGSTOP)
open(f"rank-{child.pid}", "w").close()
open(f"rank-{os.getpid()}", "w").close()
time.sleep(60)
"""
STAYS = """
import os, signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
open(f"rank-{os.getpid()}", "w").close()
time.sleep(60)
"""
STOPS = """
import os, sys, time
from glob import glob
if os.environ["RANK"] == "0":
    open(f"rank-{os.getpid()}", "w").close()
    while len(glob("rank-*")) < 2:
        time.sleep(0.01)
    sys.exit(75)
"""
EXPLAINS = """
import os, sys, time
open(f"rank-{os.getpid()}", "w").close()
if os.environ["RANK"] == "0":
    time.sleep(0.7)
    print("rank 0 says why", file=sys.stderr)
sys.exit(2)
"""
DELIVERS = """
import os, signal, sys, time
from alignvlm.system.signals import Signals
with Signals() as signals:
    signals.ending = True
    open(f"rank-{os.getpid()}", "w").close()
    if os.environ["RANK"] == "0":
        time.sleep(1)
        print("all is delivered", file=sys.stderr)
sys.exit(75)
"""

Start = Callable[..., tuple[subprocess.Popen[str], list[int]]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start a launcher of two ranks; returns it and the processes that they have announced."""
    launchers = []

    def start(program: str, announced: int = 2, before: str = "", **environment: str) -> tuple:
        command = [sys.executable, "-c", before + LAUNCHER, program]
        variables = os.environ | {"PYTHONPATH": str(ROOT)} | environment
        launchers.append(
            subprocess.Popen(
                command, cwd=tmp_path, env=variables, text=True, stderr=subprocess.PIPE, start_new_session=True
            )
        )
        until(lambda: len(list(tmp_path.glob("rank-*"))) == announced)
        return launchers[-1], [int(path.name.removeprefix("rank-")) for path in tmp_path.glob("rank-*")]

    yield start
    for launcher in launchers:
        launcher.kill()
        launcher.communicate()


def test_no_rank_outlives_a_killed_launcher(start: Start) -> None:
    launcher, ranks = start(SAVES)
    os.kill(ranks[0], signal.SIGSTOP)
    launcher.kill()
    until(lambda: not any(map(runs, ranks)), seconds=5)


@pytest.mark.parametrize(
    ("number", "reaches"), [("SIGTERM", "SIGTERM"), ("SIGHUP", "SIGHUP"), ("SIGUSR1", "SIGUSR1"), ("SIGINT", "SIGTERM")]
)
def test_a_signal_lets_all_ranks_save_stopped_ones_too(number: str, reaches: str, start: Start, tmp_path: Path) -> None:
    launcher, ranks = start(SAVES)
    os.kill(ranks[0], signal.SIGSTOP)
    launcher.send_signal(signal.Signals[number])
    assert launcher.wait(20) == 75
    assert {(tmp_path / f"saved-{rank}").read_text() for rank in range(2)} == {reaches}


def test_after_the_grace_period_everything_is_killed(start: Start) -> None:
    launcher, processes = start(IGNORES, announced=4, ALIGNVLM_GRACE="0.5")
    launcher.terminate()
    _, errors = launcher.communicate(timeout=20)
    assert launcher.returncode == 128 + signal.SIGKILL
    assert errors == "alignvlm: killing 2 of 2 processes that did not end after SIGTERM\n"
    until(lambda: not any(map(runs, processes)), seconds=5)


def test_what_waits_for_a_killed_rank_is_killed_soon(start: Start) -> None:
    launcher, ranks = start(STAYS, before=SHORT)
    os.kill(ranks[0], signal.SIGKILL)
    _, errors = launcher.communicate(timeout=20)
    assert launcher.returncode == 128 + signal.SIGKILL
    assert errors == "alignvlm: killing 1 of 2 processes that did not end after exit code 137 of another\n"
    assert not runs(ranks[1])


def test_rank_0_says_why_the_job_ends_when_another_rank_ends_first(start: Start) -> None:
    launcher, _ = start(EXPLAINS)
    assert launcher.communicate(timeout=20)[1] == "rank 0 says why\n"
    assert launcher.returncode == 2


def test_rank_0_makes_its_last_delivery_when_the_others_have_stopped(start: Start) -> None:
    launcher, _ = start(DELIVERS, before=SHORT + GRACE)
    assert launcher.communicate(timeout=20)[1] == "all is delivered\n"
    assert launcher.returncode == 75


def test_nobody_waits_for_a_delivery_of_rank_0_that_has_ended(start: Start) -> None:
    launcher, _ = start(STOPS + STAYS, before=SHORT + GRACE)
    assert launcher.communicate(timeout=20)[1].startswith("alignvlm: killing 1 of 2 processes")
    assert launcher.returncode == 75


def test_under_nohup_a_hangup_changes_nothing(start: Start, tmp_path: Path) -> None:
    ignored = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
    launcher, ranks = start(SAVES, before=ignored)
    os.killpg(launcher.pid, signal.SIGHUP)
    time.sleep(0.5)
    assert launcher.poll() is None
    assert all(map(runs, ranks))
    launcher.terminate()
    assert launcher.wait(20) == 75


def test_a_grace_period_that_is_no_number_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALIGNVLM_GRACE", "5m")
    with pytest.raises(UserError, match="ALIGNVLM_GRACE is '5m'"):
        run_local(["true"], 1)


def test_a_rank_saves_when_its_launcher_is_gone(tmp_path: Path) -> None:
    rank = f"from alignvlm.launch.local import end_with_launcher; end_with_launcher()\n{SAVES}"
    launcher = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "RANK": "0", "ALIGNVLM_END_WITH_PARENT": "1"}
    started = subprocess.Popen([sys.executable, "-c", launcher, rank], cwd=tmp_path, env=environment)
    until(lambda: bool(list(tmp_path.glob("rank-*"))))
    started.kill()
    started.wait()
    until(lambda: (tmp_path / "saved-0").exists() and (tmp_path / "saved-0").read_text() == "SIGTERM", seconds=5)


def test_a_job_ends_with_the_script_that_started_it(tmp_path: Path) -> None:
    program = "from alignvlm.launch.local import *; end_with_launcher(); open('job', 'w').write(str(os.getpid()))"
    program += "; print(run_local(['sleep', '60'], 1))"
    script = start_local(tmp_path, f'exec {sys.executable} -c "{program}"', PYTHONPATH=str(ROOT))
    job = tmp_path / "job"
    until(lambda: job.exists() and job.read_text() != "")
    until(lambda: Path(f"/proc/{job.read_text()}/task/{job.read_text()}/children").read_text() != "")
    children = Path(f"/proc/{job.read_text()}/task/{job.read_text()}/children").read_text().split()
    script.kill()
    script.wait()
    until(lambda: not any(map(runs, map(int, [job.read_text(), *children]))), seconds=5)
