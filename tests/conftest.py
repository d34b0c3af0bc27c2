"""Fixtures that tests of several packages share."""

import atexit
import gc
import os
from collections.abc import Generator

import pytest

from alignvlm.system.leaving import leave

gc.disable()  # until the tests are collected: 17 instead of 23 s of CPU time, in every process of pytest-xdist
os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1,localhost"  # servers of tests are on loopback

pytest_plugins = [
    "tests.fixtures.browser", "tests.fixtures.buckets", "tests.fixtures.command", "tests.fixtures.gpu",
    "tests.fixtures.hub", "tests.fixtures.jobs", "tests.fixtures.letters", "tests.fixtures.made_up_run",
]  # fmt: skip


LONGEST = [f"tests/{name}.py" for name in (
    "integration/test_slurm", "integration/test_hosts", "integration/test_run", "integration/test_faults",
    "integration/test_elastic", "test_gpu_check",
)]  # fmt: skip
"""Files that take minutes, the longest first."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with long tests come first: what is left at the end, for one process of several, is short."""
    markers = ("slow", "integration", "cluster")
    long = {item.path for item in items if any(map(item.get_closest_marker, markers))}
    place = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: (place.get(item.nodeid.partition("::")[0], len(LONGEST)), item.path not in long))


def pytest_unconfigure(config: pytest.Config) -> None:
    """A process of pytest-xdist, which has said all by now, ends without freeing its objects: 2.5 s of CPU time."""
    if hasattr(config, "workerinput"):
        atexit.register(end)


def end() -> None:
    """Called before all other functions of `atexit`, which `leave` calls."""
    atexit.unregister(end)
    leave(0)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Also of pytest-xdist's first process, which collects nothing."""
    try:
        return (yield)
    finally:
        gc.freeze()  # modules and tests stay: no collection walks through them
        atexit.register(gc.unfreeze)  # extension modules complain of what is still there at the end of the process
        gc.enable()
