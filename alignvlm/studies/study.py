"""What a study is: a question, the variants of a recipe that answer it, and what is measured on each trained one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from alignvlm.config import load_recipe
from alignvlm.config.schema import Recipe
from alignvlm.studies.cells.grid import Cell, Grid, Variant, make_cells
from alignvlm.studies.results.records import Results
from alignvlm.studies.results.tables import Section


class Study:
    """One file of this package each, with a line in `registry.py`."""

    name: ClassVar[str]
    title: ClassVar[str]
    question: ClassVar[str]
    """One or two sentences for the head of the page."""

    def variants(self, recipe: Recipe) -> list[Variant]:
        """What is compared; the first is the reference of all differences.

        Raises:
            UserError: the recipe is none that the study can vary.
        """
        raise NotImplementedError

    def analyse(self, cell: Cell) -> dict[str, Any]:
        """What the study measures on the last export of a finished cell, as JSON; kept beside the export."""
        return {}

    def sections(self, results: Results) -> list[Section]:
        """What the page shows besides the common table and curves."""
        return []

    def grid(self, recipe_name: str, overrides: Sequence[str] = (), num_seeds: int = 1) -> Grid:
        """All cells, their recipes checked; seeds are the recipe's own and the ones after it.

        Raises:
            UserError: a recipe cannot be read, or the study cannot vary it.
        """
        base = load_recipe(recipe_name, overrides)
        variants = self.variants(base)
        seeds = [base.seed + number for number in range(num_seeds)]
        cells = make_cells(base, recipe_name, overrides, variants, seeds)
        return Grid(self.name, recipe_name, tuple(overrides), base, variants, seeds, cells)
