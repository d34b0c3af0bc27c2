"""Fixtures that tests of several packages share."""

import atexit
import gc
import os

import pytest

gc.disable()  # until the tests are collected: 17 instead of 23 s of CPU time, in every process of pytest-xdist
os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1,localhost"  # servers of tests are on loopback

pytest_plugins = [
    "tests.fixtures.browser", "tests.fixtures.buckets", "tests.fixtures.command", "tests.fixtures.gpu",
    "tests.fixtures.hub", "tests.fixtures.jobs", "tests.fixtures.letters", "tests.fixtures.made_up_run",
]  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with long tests come first: what is left at the end, for one process of several, is short."""
    markers = ("slow", "integration", "cluster")
    long = {item.path for item in items if any(map(item.get_closest_marker, markers))}
    items.sort(key=lambda item: item.path not in long)


def pytest_collection_finish() -> None:
    gc.freeze()  # modules and tests stay: no collection walks through them
    atexit.register(gc.unfreeze)  # extension modules complain of what is still there at the end of the process
    gc.enable()
