"""The cells of a study: every variant with every seed, as the recipe and the settings of an ordinary run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from alignvlm.config import load_recipe
from alignvlm.config.schema import Recipe
from alignvlm.errors import UserError
from alignvlm.run_folder import Run, StageFolder
from alignvlm.studies.study import Study, Variant


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

    study: Study
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


def make_grid(
    study: Study,
    recipe_name: str,
    overrides: Sequence[str] = (),
    num_seeds: int = 1,
    more: Mapping[str, Sequence[str]] | None = None,
) -> Grid:
    """All cells of a study, their recipes checked.

    Args:
        num_seeds: seeds are the recipe's own and the ones after it.
        more: variant -> settings that follow those of the variant.

    Raises:
        UserError: a recipe cannot be read, or the study cannot vary it.
    """
    base = load_recipe(recipe_name, overrides)
    variants = study.variants(base)
    seeds = [base.seed + number for number in range(num_seeds)]
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
    return Grid(study, recipe_name, tuple(overrides), base, variants, seeds, cells)


def _identity(base: Recipe, variant: Variant, seed: int) -> tuple[str, ...]:
    """The cell's own name and seed; all cells are runs of one MLflow experiment."""
    name = f"{base.name}-{variant.name}-seed{seed}"
    return f"name={name}", f"seed={seed}", f"tracking.experiment={base.tracking.experiment}"
