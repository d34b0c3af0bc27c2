"""The uninterrupted run that jobs on clusters are compared with."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cluster.watch import RECIPE
from tests.jobs import run


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which tests/recipes/cluster.yaml ran on this machine, with two processes and nothing in its way."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    run("train", str(RECIPE), cwd=folder)
    return folder
