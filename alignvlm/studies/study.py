"""What a study is: a question, the variants of a recipe that answer it, and what is measured on each trained one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from alignvlm.config.schema import Recipe
    from alignvlm.studies.cells.grid import Cell
    from alignvlm.studies.results.records import Results
    from alignvlm.studies.results.tables import Section


@dataclass(frozen=True)
class Variant:
    """One row of a study: the recipe with some settings of its own."""

    name: str
    """Part of the runs' names, so a name of a file; studies that share a variant share its runs."""
    overrides: tuple[str, ...] = ()
    """Settings, `dotted.key=value`."""
    note: str = ""
    """What it is, in a few words for the page."""


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
