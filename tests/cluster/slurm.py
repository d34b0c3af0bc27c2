"""A real Slurm on this machine for tests: munge, one slurmctld and several slurmd, all on loopback, without systemd.

Needs root and the packages of tests/cluster/install.sh. `with SlurmCluster(folder) as cluster:` ends every process.
"""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import time
from pathlib import Path
from types import TracebackType

from alignvlm.launch.local import free_port
from tests.waiting import until

CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdSpoolDir={folder}/spool-%n
StateSaveLocation={folder}/state
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0
SlurmdParameters=config_overrides
ReturnToService=1
JobRequeue=1
KillWait=20
MinJobAge=3600
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
PropagateResourceLimits=NONE
"""


class SlurmCluster:
    """A scheduler with nodes n1, n2, …; `folder` (a short path: it holds sockets) keeps its logs."""

    def __init__(self, folder: Path, nodes: int = 2, cpus: int = 2) -> None:
        self.folder = folder
        self.nodes = [f"n{i}" for i in range(1, nodes + 1)]
        self.environment = {"SLURM_CONF": str(folder / "slurm.conf")}
        text = CONFIGURATION.format(host=os.uname().nodename, port=free_port(), folder=folder)
        here = f"NodeHostname={os.uname().nodename} NodeAddr=127.0.0.1"
        for node in self.nodes:
            text += f"NodeName={node} {here} Port={free_port()} CPUs={cpus}\n"
        text += f"PartitionName=test Nodes={','.join(self.nodes)} Default=YES MaxTime=INFINITE State=UP\n"
        (folder / "slurm.conf").write_text(text)
        key = folder / "munge.key"
        key.write_bytes(secrets.token_bytes(1024))
        key.chmod(0o400)
        self._daemons: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> SlurmCluster:
        socket = self.folder / "munge.socket"
        files = {name: self.folder / f"munge.{name}" for name in ("pid", "log", "seed")}
        self._start(
            "munged", "--foreground", "--force", f"--socket={socket}", f"--key-file={self.folder / 'munge.key'}",
            f"--pid-file={files['pid']}", f"--log-file={files['log']}", f"--seed-file={files['seed']}",
        )  # fmt: skip
        until(socket.exists, "munged opens its socket", 120)
        self._start("slurmctld", "-D", "-c")
        for node in self.nodes:
            self._start("slurmd", "-D", "-N", node)
        until(lambda: self.node_states() == {"idle"}, "the nodes are idle", 120)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        subprocess.run(["scancel", "--full", "--signal=KILL", "--state=RUNNING"], env=self._environment())
        for daemon in self._daemons:
            daemon.kill()
            daemon.wait()
        for process in self._processes():
            os.kill(process, signal.SIGKILL)

    def run(self, *command: str) -> str:
        """A Slurm command's output; its failure is an error with what it printed."""
        done = subprocess.run(command, env=self._environment(), text=True, capture_output=True)
        assert done.returncode == 0, f"{command}: exit code {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout.strip()

    def node_states(self) -> set[str]:
        done = subprocess.run(
            ["sinfo", "-h", "-N", "-o", "%T"], env=self._environment(), text=True, capture_output=True
        )
        return set(done.stdout.split())

    def job(self, number: str) -> dict[str, str]:
        """`scontrol show job` as a dictionary."""
        words = self.run("scontrol", "-o", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def start_now(self, number: str, timeout: float = 60) -> None:
        """A requeued job waits two minutes, which Slurm has fixed: end that once the job is pending.

        Not in the same second: a node refuses credentials that are as old as those it revoked, and the job fails.
        """
        until(lambda: self.job(number)["JobState"] == "PENDING", f"job {number} is pending", timeout)
        time.sleep(2)
        self.run("scontrol", "update", f"JobId={number}", "StartTime=now")

    def limit_time(self, number: str, minutes: int) -> None:
        """Move the running job's time limit to between `minutes - 1` and `minutes` from now."""
        hours, past, _ = (int(part) for part in self.job(number)["RunTime"].split(":"))
        self.run("scontrol", "update", f"JobId={number}", f"TimeLimit={hours * 60 + past + minutes}")

    def _environment(self) -> dict[str, str]:
        return {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")} | self.environment

    def _start(self, *command: str) -> None:
        with (self.folder / f"{command[0]}.out").open("ab") as output:
            self._daemons.append(
                subprocess.Popen(
                    command, env=self._environment(), stdout=output, stderr=output, stdin=subprocess.DEVNULL
                )
            )

    def _processes(self) -> list[int]:
        """What daemons and jobs of this cluster left behind, known by their environment."""
        mark = f"SLURM_CONF={self.environment['SLURM_CONF']}".encode()
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            try:
                if mark in (process / "environ").read_bytes().split(b"\0") and int(process.name) != os.getpid():
                    found.append(int(process.name))
            except OSError:  # it ended meanwhile
                continue
        return found
