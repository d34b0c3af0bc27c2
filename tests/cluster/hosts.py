"""Hosts on this machine for tests: each has its own network, host name, processes and /etc/hosts; they share the disk.

Needs root and the packages of tests/cluster/install.sh. A host is a set of Linux namespaces that ends, with all that
runs in it, when its first process does. Nothing of it is visible outside: no named network namespace, no file in /etc.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import ClassVar

from tests.jobs import job_environment

SETUP = """
mount --make-rprivate /
mount --bind {folder}/hosts /etc/hosts
mount --bind {folder}/ssh_config /etc/ssh/ssh_config
mount -t tmpfs tmpfs /run
mkdir /run/sshd
hostname {name}
ip link set lo up
exec sleep infinity
"""

SSH_CLIENT = """\
Host *
    IdentityFile {folder}/key
    StrictHostKeyChecking no
    UserKnownHostsFile {folder}/known_hosts
    LogLevel ERROR
"""

SSH_SERVER = """\
HostKey {folder}/key
AuthorizedKeysFile {folder}/key.pub
PermitRootLogin yes
StrictModes no
UsePAM no
PidFile none
"""


class Host:
    """One host; `address` is its place in the network of its pair."""

    def __init__(self, name: str, address: str, folder: Path) -> None:
        self.name, self.address = name, address
        namespaces = ["--net", "--uts", "--ipc", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child"]
        script = SETUP.format(name=name, folder=folder)
        self._holder = subprocess.Popen(["unshare", *namespaces, "sh", "-ec", script], stdin=subprocess.DEVNULL)
        self.first = self._first_process()

    def start(self, command: Sequence[str], cwd: Path, **environment: str) -> subprocess.Popen[str]:
        """A process on this host, output captured."""
        return subprocess.Popen(
            [*self._enter(cwd), *command], env=job_environment(**environment), text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def run(self, *command: str) -> str:
        """A short command's output; its failure is an error."""
        done = subprocess.run([*self._enter(Path("/")), *command], text=True, capture_output=True)
        assert done.returncode == 0, f"{self.name}: {command}: {done.stdout}{done.stderr}"
        return done.stdout

    @staticmethod
    def signal(process: subprocess.Popen[str], number: signal.Signals) -> None:
        """Send a signal to a process that `start` returned (which is itself only the door to the host)."""
        (child,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(child), number)

    def end(self) -> None:
        """Switch the host off."""
        self._holder.kill()
        self._holder.wait()

    def _enter(self, folder: Path) -> list[str]:
        return ["nsenter", "--all", f"--target={self.first}", f"--wdns={folder}"]

    def _first_process(self) -> int:
        children = Path(f"/proc/{self._holder.pid}/task/{self._holder.pid}/children")
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            for child in children.read_text().split():
                if (Path("/proc") / child / "comm").read_text().strip() == "sleep":
                    return int(child)
            time.sleep(0.05)
        raise AssertionError(f"host {self.name} did not come up")


class TwoHosts:
    """Two hosts joined by a cable, `eth0` on both: `with TwoHosts(folder) as (a, b)`."""

    ADDRESSES: ClassVar = {"host-a": "10.77.0.1", "host-b": "10.77.0.2"}

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.hosts: list[Host] = []

    def __enter__(self) -> tuple[Host, Host]:
        lines = ["127.0.0.1 localhost", *(f"{address} {name}" for name, address in self.ADDRESSES.items())]
        (self.folder / "hosts").write_text("\n".join(lines) + "\n")
        (self.folder / "ssh_config").write_text(SSH_CLIENT.format(folder=self.folder))
        (self.folder / "sshd_config").write_text(SSH_SERVER.format(folder=self.folder))
        key = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / "key")]
        subprocess.run(key, check=True)
        for name, address in self.ADDRESSES.items():
            self.hosts.append(Host(name, address, self.folder))
        a, b = self.hosts
        cable = ["ip", "link", "add", "eth0", "netns", str(a.first), "type", "veth"]
        subprocess.run([*cable, "peer", "name", "eth0", "netns", str(b.first)], check=True)
        for host in (a, b):
            host.run("ip", "addr", "add", f"{host.address}/24", "dev", "eth0")
            host.run("ip", "link", "set", "eth0", "up")
            host.run("/usr/sbin/sshd", "-f", str(self.folder / "sshd_config"))
        return a, b

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for host in self.hosts:
            host.end()
