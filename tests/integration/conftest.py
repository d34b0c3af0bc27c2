"""The marker of tests that start jobs, and the uninterrupted run that jobs on clusters are compared with."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_pipeline.files import locked
from tests.cluster.watch import RECIPE
from tests.jobs import run

FOLDER = Path(__file__).resolve().parent
COLLECTED = (FOLDER, FOLDER.parent / "benchmarks")
"""By `make test-cluster`."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Every test here starts jobs: `make test-fast` leaves them out."""
    for item in items:
        if item.path.is_relative_to(FOLDER):
            item.add_marker(pytest.mark.integration)
        elif not any(item.path.is_relative_to(folder) for folder in COLLECTED):
            assert not item.get_closest_marker("cluster"), f"move {item.nodeid} here: make test-cluster misses it"


@pytest.fixture(scope="session")
def uninterrupted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which tests/recipes/cluster.yaml ran on this machine, with two processes and nothing in its way.

    One process of pytest-xdist runs it, the others wait.
    """
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if hasattr(request.config, "workerinput") else own) / "uninterrupted"
    ended = folder / "ended"
    with locked(folder.with_name(f"{folder.name}.lock"), "make room"):
        if not ended.exists():  # a second start would write into the run folder while another process copies it
            folder.mkdir(exist_ok=True)
            run("train", str(RECIPE), cwd=folder)
            ended.touch()
    return folder
