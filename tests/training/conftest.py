"""The recipe that the tests of callbacks change."""

from __future__ import annotations

import pytest

from alignvlm.config import load_recipe
from alignvlm.config.schema import Recipe
from tests.jobs import TINY


@pytest.fixture
def recipe() -> Recipe:
    return load_recipe(str(TINY), ["resilience.spike_factor=3", "resilience.max_bad_steps=3"])
