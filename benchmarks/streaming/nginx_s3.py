"""nginx as an S3 server at a distance (nginx.conf): Debian's packages nginx and libnginx-mod-http-lua."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlencode
from urllib.request import urlopen

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.stores.processes import free_ports, program, running

MODULES = Path("/usr/lib/nginx/modules")
DISTANCE = {"latency", "bandwidth", "tail", "tail_seconds"}
INSTALL = "apt-get install nginx libnginx-mod-http-lua"


@contextmanager
def nginx_s3() -> Iterator[str]:
    """The endpoint of a server without objects, which ends with the block. Raises RuntimeError when it is missing."""
    binary, (port,) = program("nginx", INSTALL, Path("/usr/sbin")), free_ports(1)
    modules = [MODULES / name for name in ("ndk_http_module.so", "ngx_http_lua_module.so")]
    if not all(path.exists() for path in modules):
        raise RuntimeError(f"{modules[-1]} is missing: {INSTALL}")
    text = Path(__file__).with_name("nginx.conf").read_text(encoding="utf-8")
    text = text.replace("{modules}", "\n".join(f"load_module {path};" for path in modules))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        folder.chmod(0o755)
        (folder / "files").mkdir(mode=0o777)
        (folder / "conf").write_text(text.replace("{port}", str(port)), encoding="utf-8")
        with running([binary, "-e", "stderr", "-p", str(folder), "-c", "conf"], folder, port):
            yield f"http://127.0.0.1:{port}"


def move(endpoint: str, faults: Mapping[str, float]) -> dict[str, int]:
    """Set the server's distance; what was asked since the last time. Raises ValueError for faults that it has not."""
    distance = {name: float(value) for name, value in faults.items() if value}
    if unknown := sorted(set(distance) - DISTANCE):
        raise ValueError(f"nginx has no {', '.join(unknown)}")
    with urlopen(f"{endpoint}/-/move?{urlencode(distance)}", timeout=30) as answer:
        counts: dict[str, int] = json.loads(answer.read())
    return counts
