"""A PostgreSQL server of Debian's, on loopback and in a folder of its own; never as root, which it refuses."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from alignvlm.launch.local import free_port


def program(name: str) -> str:
    """Its path; Debian keeps it outside of PATH."""
    found = [str(path) for path in sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))]
    path = found[-1] if found else shutil.which(name)
    assert path, f"no {name}: tests/cluster/install.sh installs PostgreSQL"
    return path


def as_postgres(*command: str) -> Sequence[str]:
    """The command, for root as the user `postgres` that Debian's package makes."""
    return ["runuser", "-u", "postgres", "--", *command] if os.geteuid() == 0 else command


@contextmanager
def postgres(password: str) -> Iterator[str]:
    """`127.0.0.1:port` of a server whose only account `mlflow` has this password and a database of its name."""
    folder = Path(tempfile.mkdtemp(prefix="alignvlm-postgres-"))
    data, secret, port = folder / "data", folder / "password", free_port()
    secret.write_text(password)
    if os.geteuid() == 0:
        for path in (folder, secret):
            shutil.chown(path, "postgres")
    account = ["--username", "mlflow", "--pwfile", str(secret), "--auth", "scram-sha-256"]
    options = f"-h 127.0.0.1 -p {port} -k {folder} -c fsync=off"
    control = [program("pg_ctl"), "--silent", "--wait", "--pgdata", str(data)]
    try:
        subprocess.run(
            as_postgres(program("initdb"), "--pgdata", str(data), "--encoding", "UTF8", "--locale", "C", *account),
            check=True, cwd="/", stdout=subprocess.DEVNULL,
        )  # fmt: skip
        log = str(folder / "log")
        subprocess.run(as_postgres(*control, "--log", log, "--options", options, "start"), check=True, cwd="/")
        try:
            login = ["--host", "127.0.0.1", "--port", str(port), "--username", "mlflow"]
            subprocess.run(
                [program("createdb"), *login, "mlflow"], env=os.environ | {"PGPASSWORD": password}, check=True, cwd="/"
            )
            yield f"127.0.0.1:{port}"
        finally:
            subprocess.run(as_postgres(*control, "--mode", "immediate", "stop"), check=True, cwd="/")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def dump(address: str, password: str) -> str:
    """Everything that the database `mlflow` holds, as SQL."""
    host, port = address.split(":")
    command = [program("pg_dump"), "--host", host, "--port", port, "--username", "mlflow", "--inserts", "mlflow"]
    environment = os.environ | {"PGPASSWORD": password}
    return subprocess.run(command, env=environment, check=True, cwd="/", capture_output=True, text=True).stdout
