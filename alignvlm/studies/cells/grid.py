"""The cells of a study: every variant with every seed, as the recipe and the settings of an ordinary run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from alignvlm.config import load_recipe
from alignvlm.config.schema import Recipe
from alignvlm.errors import UserError
from alignvlm.run_folder import Run, StageFolder


@dataclass(frozen=True)
class Variant:
    """One row of a study: the recipe with some settings of its own."""

    name: str
    """Part of the runs' names, so a name of a file; studies that share a variant share its runs."""
    overrides: tuple[str, ...] = ()
    """Settings, `dotted.key=value`."""
    note: str = ""
    """What it is, in a few words for the page."""


@dataclass(frozen=True)
class Cell:
    """One variant with one seed."""

    variant: Variant
    seed: int
    recipe_name: str
    """The recipe as the user wrote it."""
    overrides: tuple[str, ...]
    """All settings: with them `alignvlm train` trains this cell."""
    recipe: Recipe

    @property
    def name(self) -> str:
        """Name of the run."""
        return self.recipe.name

    @property
    def run(self) -> Run:
        return Run(self.recipe)

    @property
    def last_stage(self) -> StageFolder:
        """Folder of the last stage, whose export and scores stand for the cell."""
        return self.run.stage_folders()[-1]

    @property
    def is_trained(self) -> bool:
        """Whether there is the export of the last stage."""
        return self.last_stage.has_export


@dataclass(frozen=True)
class Grid:
    """A study of a recipe."""

    study: str
    """Name of the study."""
    recipe_name: str
    overrides: tuple[str, ...]
    """Settings for all cells."""
    base: Recipe
    variants: list[Variant]
    seeds: list[int]
    cells: list[Cell]
    """Seed by seed, so that the first comparison is whole as early as possible."""

    @property
    def reference(self) -> Variant:
        return self.variants[0]

    def of_seed(self, seed: int) -> list[Cell]:
        """The cells that see the same batches."""
        return [cell for cell in self.cells if cell.seed == seed]

    def with_settings(self, more: Mapping[str, Sequence[str]]) -> Grid:
        """The same with settings for some variants, by their names, behind their own. Raises UserError."""
        cells = make_cells(self.base, self.recipe_name, self.overrides, self.variants, self.seeds, more)
        return replace(self, cells=cells)


def make_cells(
    base: Recipe,
    recipe_name: str,
    overrides: Sequence[str],
    variants: Sequence[Variant],
    seeds: Sequence[int],
    more: Mapping[str, Sequence[str]] | None = None,
) -> list[Cell]:
    """Every variant with every seed, their recipes checked.

    Args:
        more: variant -> settings that follow those of the variant.

    Raises:
        UserError: a variant's recipe cannot be read.
    """
    cells = []
    for seed in seeds:
        for variant in variants:
            added = (more or {}).get(variant.name, ())
            words = (*overrides, *variant.overrides, *added, *_identity(base, variant, seed))
            try:
                recipe = load_recipe(recipe_name, words)
            except UserError as error:
                raise UserError(f"variant {variant.name}: {error}") from error
            cells.append(Cell(variant, seed, recipe_name, words, recipe))
    return cells


def _identity(base: Recipe, variant: Variant, seed: int) -> tuple[str, ...]:
    """The cell's own name and seed; all cells are runs of one MLflow experiment."""
    name = f"{base.name}-{variant.name}-seed{seed}"
    return f"name={name}", f"seed={seed}", f"tracking.experiment={base.tracking.experiment}"
