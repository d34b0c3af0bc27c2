"""One job per run folder: who gets the lease, who is refused, who takes over, and what a job does that has lost it."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from threading import Thread

import pytest

from alignvlm.errors import UserError
from alignvlm.system import lease as lease_module
from alignvlm.system.holder import Holder
from alignvlm.system.lease import Lease
from data_pipeline.errors import DataError
from tests.checkout import ROOT
from tests.waiting import until

PROGRAM = """
import sys
from pathlib import Path
from alignvlm.errors import UserError
from alignvlm.system.lease import Lease
try:
    with Lease(Path(sys.argv[1]), beat=0.1, stale=0.5):
        print("held", flush=True)
        sys.stdin.read()
except UserError as error:
    print(error, flush=True)
"""


@pytest.fixture(autouse=True)
def _no_waiting_for_killed_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_module, "ENDING_SECONDS", 0.0)


@pytest.fixture
def jobs() -> Iterator[list[subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []
    yield started
    for job in started:
        job.kill()
        job.communicate()


def start(folder: Path, jobs: list[subprocess.Popen[str]]) -> subprocess.Popen[str]:
    """A job that holds the lease until its input is closed; it has printed nothing yet."""
    pipe = subprocess.PIPE
    words = [sys.executable, "-c", PROGRAM, str(folder)]
    jobs.append(subprocess.Popen(words, stdin=pipe, stdout=pipe, stderr=pipe, text=True, cwd=ROOT))
    return jobs[-1]


def hold(folder: Path, jobs: list[subprocess.Popen[str]]) -> subprocess.Popen[str]:
    """A job that holds the lease now."""
    job = start(folder, jobs)
    assert job.stdout is not None
    assert job.stdout.readline() == "held\n"
    return job


def leave(folder: Path, holder: Holder | bytes, number: int = 1) -> Path:
    """The lease of another job."""
    path = folder / f"lease-{number:06d}.json"
    path.write_bytes(holder if isinstance(holder, bytes) else json.dumps(asdict(holder)).encode())
    return path


def elsewhere() -> Holder:
    return replace(Holder.this_process(), host="node7", boot="another", token="other")


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_second_job_is_refused_while_the_first_one_lives_and_let_in_when_it_ends(
    tmp_path: Path, jobs: list[subprocess.Popen[str]]
) -> None:
    folder = tmp_path / "tiny"
    job = hold(folder, jobs)
    wanted = rf"tiny/lease-000001.json: another job trains here: process {job.pid} on .*, since 20.*\(name=tiny-2\)$"
    with pytest.raises(UserError, match=wanted) as refused, Lease(folder):
        pass
    assert "\n" not in str(refused.value)
    job.send_signal(signal.SIGSTOP)  # it will go on
    with pytest.raises(UserError, match=wanted), Lease(folder):
        pass
    job.send_signal(signal.SIGCONT)
    job.communicate()
    assert files(folder) == []
    with Lease(folder):
        assert files(folder) == ["lease-000001.json"]
    assert files(folder) == []


def test_a_killed_job_delays_the_next_one_by_nothing(tmp_path: Path, jobs: list[subprocess.Popen[str]]) -> None:
    job = hold(tmp_path, jobs)
    job.kill()
    os.waitid(os.P_PID, job.pid, os.WEXITED | os.WNOWAIT)  # dead, but still in the list of processes
    began = time.monotonic()
    with Lease(tmp_path, stale=60):
        assert time.monotonic() - began < 1
        assert files(tmp_path) == ["lease-000002.json"]


def test_of_many_that_find_a_dead_job_one_wins(tmp_path: Path, jobs: list[subprocess.Popen[str]]) -> None:
    leave(tmp_path, replace(Holder.this_process(), started=1), number=7)  # its process number is another's now
    rivals = [start(tmp_path, jobs) for _ in range(5)]
    said = [rival.stdout.readline() for rival in rivals if rival.stdout is not None]
    assert said.count("held\n") == 1
    assert sum("another job trains here" in line for line in said) == 4
    assert files(tmp_path) == ["lease-000008.json"]


def test_a_job_on_another_host_is_watched_for_a_sign_of_life(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = leave(tmp_path, elsewhere())
    with Lease(tmp_path, stale=0.5):
        assert files(tmp_path) == ["lease-000002.json"]
    said = capsys.readouterr().out
    assert f"held by process {os.getpid()} on node7, since 20" in said
    assert "no sign of life, taking over" in said

    path = leave(tmp_path, elsewhere())
    beating = Thread(target=lambda: (time.sleep(0.3), os.utime(path)))
    beating.start()
    began = time.monotonic()
    with pytest.raises(UserError, match="on node7"), Lease(tmp_path, stale=60):
        pass
    assert time.monotonic() - began < 5, "refused with the first sign of life"
    beating.join()


def test_a_job_that_ends_while_it_is_watched_lets_the_next_one_in(tmp_path: Path) -> None:
    path = leave(tmp_path, elsewhere())
    ending = Thread(target=lambda: (time.sleep(0.3), path.unlink()))
    ending.start()
    began = time.monotonic()
    with Lease(tmp_path, stale=60):
        assert time.monotonic() - began < 5
    ending.join()


@pytest.mark.parametrize(
    "content",
    [b"", b'{"host": "a', b"\0" * 300, b"[" * 5000, b"[1]", b'{"pid": 1}', b"\xff\xfe"],
    ids=["empty", "cut", "zeros", "deep", "list", "incomplete", "binary"],
)
def test_a_damaged_lease_is_watched_and_taken_over(content: bytes, tmp_path: Path) -> None:
    leave(tmp_path, content)
    with Lease(tmp_path, stale=0.1):
        assert files(tmp_path) == ["lease-000002.json"]


def test_values_of_another_type_are_no_holder() -> None:
    values = asdict(Holder.this_process())
    assert Holder.parse(json.dumps(values).encode()) == Holder(**values)
    for name in values:
        assert Holder.parse(json.dumps(values | {name: [1]}).encode()) is None


def test_a_requeued_slurm_job_takes_over_from_its_last_attempt_only(tmp_path: Path) -> None:
    first = Holder.this_process({"SLURM_JOB_ID": "12"})
    again = Holder.this_process({"SLURM_JOB_ID": "12", "SLURM_RESTART_COUNT": "1"})
    other = Holder.this_process({"SLURM_JOB_ID": "13", "SLURM_RESTART_COUNT": "1"})
    lone = Holder.this_process({"SLURM_RESTART_COUNT": "1"})
    assert Holder.this_process({"SLURM_JOB_ID": "12", "SLURM_RESTART_COUNT": ""}).attempt == 0
    assert "job slurm/12" in str(first)
    assert first.gives_way_to(again)
    assert not any(first.gives_way_to(holder) for holder in (first, other, lone))
    assert not any(holder.gives_way_to(lone) for holder in (first, again, lone, replace(lone, attempt=0)))


def test_a_container_on_the_same_machine_is_known_by_its_lock(tmp_path: Path) -> None:
    me = Holder.this_process()
    path = leave(tmp_path, replace(me, processes="pid:[1]", pid=7))
    holder = Holder.parse(path.read_bytes())
    assert holder is not None
    with path.open("r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert holder.is_alive(me, path)
        with pytest.raises(UserError, match="process 7"), Lease(tmp_path):
            pass
    assert holder.is_alive(me, path) is False
    began = time.monotonic()
    with Lease(tmp_path, stale=60):
        assert time.monotonic() - began < 1


def test_a_copy_of_a_run_that_trains_is_watched_and_taken_over(
    tmp_path: Path, jobs: list[subprocess.Popen[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    hold(tmp_path / "run", jobs)
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    with Lease(tmp_path / "copy", stale=0.3):
        assert files(tmp_path / "copy") == ["lease-000002.json"]
    assert "no sign of life, taking over" in capsys.readouterr().out


def test_a_lease_that_cannot_be_read_shows_its_life_by_its_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = leave(tmp_path, elsewhere())
    opened = os.open

    def refuse(name: str | Path, flags: int, *mode: int) -> int:
        if name == path:
            raise PermissionError(errno.EACCES, "Permission denied")
        return opened(name, flags, *mode)

    monkeypatch.setattr(os, "open", refuse)
    beating = Thread(target=lambda: (time.sleep(0.3), os.utime(path)))
    beating.start()
    with pytest.raises(UserError, match="a process that it does not name"), Lease(tmp_path, stale=60):
        pass
    beating.join()


def test_numbers_of_leases_have_no_end(tmp_path: Path) -> None:
    leave(tmp_path, b"", number=999_999)
    with Lease(tmp_path, stale=0.1):
        assert files(tmp_path) == ["lease-1000000.json"]


def test_a_job_that_lost_its_lease_ends_at_once(tmp_path: Path, jobs: list[subprocess.Popen[str]]) -> None:
    job = hold(tmp_path, jobs)
    leave(tmp_path, elsewhere(), number=2)
    assert job.wait(20) == 2
    assert job.stderr is not None
    errors = job.stderr.read()
    assert "on node7, since 20" in errors
    assert "has taken this run over; this job ends and saves nothing more" in errors
    assert files(tmp_path) == ["lease-000001.json", "lease-000002.json"]


def test_removed_leases_end_the_job_and_damaged_ones_are_repaired(
    tmp_path: Path, jobs: list[subprocess.Popen[str]]
) -> None:
    job = hold(tmp_path, jobs)
    path = tmp_path / "lease-000001.json"
    content = path.read_bytes()
    path.write_bytes(b"x" * 1000)
    until(lambda: path.read_bytes() == content)
    path.unlink()
    assert job.wait(20) == 2
    assert job.stderr is not None
    errors = job.stderr.read()
    assert "the lease of this job was removed" in errors


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(
        DataError, match=r"^\S*runs/tiny cannot be written \(.*\); make it writable, or .* runs=FOLDER$"
    ):
        Lease(tmp_path / "runs" / "tiny").__enter__()


def test_a_job_that_is_about_to_end_is_waited_for(tmp_path: Path, jobs: list[subprocess.Popen[str]]) -> None:
    with Lease(tmp_path) as first:
        first.announce_end()
        second = start(tmp_path, jobs)
        assert second.stdout is not None
        assert "which is about to end; waiting for it" in second.stdout.readline()
        time.sleep(0.3)
        assert second.poll() is None
    assert second.stdout.readline() == "held\n"


def test_a_job_of_another_host_that_is_about_to_end_is_waited_for_as_long_as_it_moves(tmp_path: Path) -> None:
    other = replace(Holder.this_process(), boot="another kernel", host="node7")
    path = tmp_path / "lease-000001.json"

    def save() -> None:
        for _ in range(8):
            os.utime(path)
            time.sleep(0.1)
        path.unlink()

    save_thread = Thread(target=save)
    path.write_bytes(json.dumps(asdict(other)).encode() + b"\nending\n")
    save_thread.start()
    with Lease(tmp_path, stale=0.4):
        assert not path.exists()
    save_thread.join()
