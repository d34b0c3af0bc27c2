"""Two hosts without a scheduler: torchrun and DeepSpeed's hostfile across them, then one host after a cut cable."""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.hosts import Host, TwoHosts
from tests.cluster.watch import RECIPE, attempts, copy_until, step
from tests.jobs import ROOT, curve
from tests.waiting import until

pytestmark = pytest.mark.cluster

START = 200
"""The runs begin in the middle: with this checkpoint of the uninterrupted run."""
ENVIRONMENT = {"ALIGNVLM_PYTHON": sys.executable, "ALIGNVLM_INTERFACE": "eth0", "ALIGNVLM_MAX_CRASHES": "0"}


@pytest.fixture
def hosts() -> Iterator[tuple[Host, Host]]:
    with tempfile.TemporaryDirectory(prefix="hosts-") as folder, TwoHosts(Path(folder)) as pair:
        yield pair


@pytest.fixture
def work(uninterrupted: Path, tmp_path: Path) -> Path:
    """A folder with a run that has made START steps."""
    copy_until(uninterrupted, tmp_path, START)
    return tmp_path


def launch(host: Host, script: str, *arguments: str, cwd: Path, **environment: str) -> subprocess.Popen[str]:
    """A script of launch/ on a host."""
    return host.start(["bash", str(ROOT / "launch" / script), *arguments], cwd, **ENVIRONMENT, **environment)


def wait_for_step(folder: Path, number: int, *processes: subprocess.Popen[str]) -> None:
    """Until the run in `folder` has made that step; none of the processes may end before."""

    def reached() -> bool:
        ended = [process for process in processes if process.poll() is not None]
        assert not ended, f"ended early: {ended[0].communicate()[0][-4000:]}"
        return bool(attempts(folder)) and step(folder) >= number

    until(reached, f"step {number}", 180)


def finish(process: subprocess.Popen[str], code: int, timeout: float = 240) -> str:
    """Wait for the end, check the exit code, return the output."""
    output, _ = process.communicate(timeout=timeout)
    assert process.returncode == code, f"exit code {process.returncode}, expected {code}:\n{output[-4000:]}"
    return output


def test_a_cut_cable_and_on_with_one_host(uninterrupted: Path, work: Path, hosts: tuple[Host, Host]) -> None:
    """torchrun on two hosts; when they no longer hear each other, the job ends, and one of them takes it over."""
    both = {"ALIGNVLM_NODES": "2", "ALIGNVLM_RENDEZVOUS": "host-a:29400"}
    arguments = [str(RECIPE), "train.timeout_minutes=0.5"]
    ranks = [launch(host, "torchrun.sh", *arguments, cwd=work, **both) for host in hosts]
    wait_for_step(work, START + 8, *ranks)
    hosts[1].run("ip", "link", "set", "eth0", "down")
    finish(ranks[0], code=1)
    hosts[1].end()
    cut = step(work)
    reference = curve(uninterrupted / "runs" / "cluster")
    assert curve(work / "runs" / "cluster") == reference[:cut]

    finish(launch(hosts[0], "local.sh", *arguments, "train.processes=1", cwd=work), code=0)
    assert [a["world_size"] for a in attempts(work)] == [2, 1]
    ours = curve(work / "runs" / "cluster")
    assert [entry[:2] for entry in ours] == [entry[:2] for entry in reference]
    for (_, number, loss, norm), (_, _, expected, expected_norm) in zip(ours, reference, strict=True):
        assert loss == pytest.approx(expected, abs=1e-5), f"step {number}"
        assert norm == pytest.approx(expected_norm, rel=1e-3), f"step {number}"


def test_hostfile_with_and_without_ssh(uninterrupted: Path, work: Path, hosts: tuple[Host, Host]) -> None:
    """Started over ssh and stopped by a signal, then to the end without ssh: the same bits as on one machine."""
    hostfile = work / "hostfile"
    hostfile.write_text("# two hosts\nhost-a slots=1\nhost-b slots=1\n")
    job = launch(hosts[0], "deepspeed_hosts.sh", str(hostfile), str(RECIPE), cwd=work)
    wait_for_step(work, START + 5, job)
    hosts[0].signal(job, signal.SIGTERM)
    finish(job, code=75)
    # Over ssh the script may be back before the ranks have ended: those of the next job wait for them.
    stopped_at = step(work)
    assert START + 5 <= stopped_at < 240

    ranks = [
        launch(host, "deepspeed_hosts.sh", str(hostfile), str(RECIPE), cwd=work, ALIGNVLM_NODE_RANK=str(rank))
        for rank, host in enumerate(hosts)
    ]
    for rank in ranks:
        finish(rank, code=0)
    assert [(a["resumed_at"], a["world_size"]) for a in attempts(work)] == [(START, 2), (stopped_at, 2)]
    assert curve(work / "runs" / "cluster") == curve(uninterrupted / "runs" / "cluster")
