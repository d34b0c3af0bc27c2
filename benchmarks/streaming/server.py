"""The store of the benchmark in a process of its own, so that it shares no interpreter with what is measured.

The process (`python server.py KIND`) is nginx, the proxy of tests/stores before SeaweedFS, or a store in memory. nginx
costs least CPU time, but has no faults and looks at no signatures. It prints its endpoint, and answers each line of
JSON, {name of a fault: value}, by what happened since the line before. It is a session of its own: where Linux shares
the cores among sessions, a busy machine takes none of the loader's share for it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from nginx_s3 import move, nginx_s3

from tests.jobs import processes
from tests.stores.faults import Faults
from tests.stores.seaweed import seaweed
from tests.stores.servers import CREDENTIALS, MemoryS3, proxy, serve_memory

Kind = Literal["nginx", "seaweed", "memory"]
NAMES: dict[Kind, str] = {
    "nginx": "nginx",
    "seaweed": "SeaweedFS behind the proxy of the tests",
    "memory": "a store in the memory of the proxy",
}
SETTABLE = ("latency", "bandwidth", "tail", "tail_seconds", "busy", "reset", "cut", "stall", "down")
PLACES: dict[str, dict[str, float]] = {
    "here": {},
    "gone": {"down": True},
    "near": {"latency": 0.03, "bandwidth": 60e6, "tail": 0.001, "tail_seconds": 1.5},
    "far": {"latency": 0.12, "bandwidth": 60e6, "tail": 0.002, "tail_seconds": 3.0},
    "faults": {
        "latency": 0.03, "bandwidth": 60e6, "busy": 0.05, "reset": 0.01, "cut": 0.01, "stall": 0.005,
    },
}  # fmt: skip


class Server:
    """A running store, whose distance can be changed."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        self._process = process
        self.endpoint = process.stdout.readline().strip()

    def move(self, place: str) -> dict[str, float]:
        """Put the store at a place of PLACES. Returns what happened since it was put where it was.

        `requests` and `bytes`, `cpu` (seconds of the store and what stands before it), and how often each fault came.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        faults = {name: getattr(Faults(), name) for name in SETTABLE} | PLACES[place]
        self._process.stdin.write(json.dumps(faults) + "\n")
        self._process.stdin.flush()
        counts: dict[str, float] = json.loads(self._process.stdout.readline())
        return counts


@contextmanager
def store(kind: Kind) -> Iterator[Server]:
    """A store, and the environment that finds it."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "start_new_session": True}
    with subprocess.Popen([sys.executable, __file__, kind], **pipes) as process:  # ends when its input does
        server = Server(process)
        os.environ.update(CREDENTIALS, AWS_ENDPOINT_URL=server.endpoint, ALIGNVLM_READ_TIMEOUT="5")
        yield server


def cpu_seconds() -> float:
    """CPU time of this session: of this process and of the servers that it started."""
    ticks = sum(int(ticks) for _, fields in processes(os.getsid(0)) for ticks in fields[11:13])
    return ticks / os.sysconf("SC_CLK_TCK")


def main() -> int:
    """Serve until the input ends."""
    kind, faults = sys.argv[1], Faults()
    with ExitStack() as stack:
        if kind == "nginx":
            endpoint = stack.enter_context(nginx_s3())
        elif kind == "memory":
            endpoint = stack.enter_context(serve_memory(MemoryS3(), faults))
        else:
            endpoint = stack.enter_context(proxy(stack.enter_context(seaweed()), faults))
        print(endpoint, flush=True)
        before = cpu_seconds()
        for line in sys.stdin:
            settings = json.loads(line)
            if kind == "nginx":
                counts: dict[str, float] = dict(move(endpoint, settings))
            else:
                counts = dict(faults.counts)
                faults.counts.clear()
                for name, value in settings.items():
                    setattr(faults, name, value)
            now = cpu_seconds()
            print(json.dumps({**counts, "cpu": now - before}), flush=True)
            before = now
    return 0


if __name__ == "__main__":
    sys.exit(main())
