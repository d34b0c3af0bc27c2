"""All cells of one seed see the same samples in the same steps: this makes it so, and proves it by the cells' plans.

The order of the data depends on the seed and on the lengths of the samples, not on the model. Connectors that make as
many visual tokens of a tile share one plan. Where they make fewer or more, packs of the same length would hold other
numbers of samples: the length of the packs is fitted, so that a step holds as many samples as the reference's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from alignvlm.errors import UserError
from alignvlm.stage_data import prepare, stage_plan
from alignvlm.studies.cells.grid import Cell, Grid

if TYPE_CHECKING:
    from alignvlm.config.schema import Recipe, StageConfig
    from alignvlm.model import AlignVLMProcessor
    from data_pipeline.order.plan import Plan
    from data_pipeline.progress import Progress

FITS = 5
"""Plans that are tried for the length of a stage's packs; the third is within a part in a thousand as a rule."""


@dataclass(frozen=True)
class StageBatches:
    """What one stage of a cell reads."""

    plan: str
    """Fingerprint of the plan: equal ones give the same samples in the same packs at every step."""
    steps: int
    samples: int
    sequence_length: int

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


Batches = dict[str, StageBatches]
"""Stage -> what it reads."""


def match_samples(grid: Grid, progress: Progress | None = None) -> tuple[Grid, dict[str, Batches]]:
    """Prepare the data and give all cells of a seed the same samples per step; returns also what each cell reads.

    Raises:
        UserError: a variant's batches differ although it makes as many visual tokens; DataError: data is missing.
    """
    processors = {cell.variant.name: prepare(cell.recipe, progress=progress) for cell in grid.of_seed(grid.seeds[0])}
    read = _Reader()
    reference = read.of(_reference_cell(grid, grid.seeds[0]), processors[grid.reference.name])
    fitted: dict[str, list[str]] = {}
    for cell in grid.of_seed(grid.seeds[0]):
        processor = processors[cell.variant.name]
        if read.of(cell, processor) == reference:
            continue
        tokens = [processors[name].spec.tokens_per_tile for name in (grid.reference.name, cell.variant.name)]
        if tokens[0] == tokens[1] or list(cell.recipe.stages) != list(reference):
            raise UserError(
                f"variant {cell.variant.name} of study {grid.study} sees other batches than "
                f"{grid.reference.name}: a variant must not change sources, stages or steps"
            )
        fitted[cell.variant.name] = [
            f"stages.{stage.name}.sequence_length={_fit(cell.recipe, stage, processor, reference[stage.name], read)}"
            for stage in cell.recipe.stages.values()
        ]
    if fitted:
        grid = grid.with_settings(fitted)
    return grid, {cell.name: read.of(cell, processors[cell.variant.name]) for cell in grid.cells}


def _reference_cell(grid: Grid, seed: int) -> Cell:
    return next(cell for cell in grid.of_seed(seed) if cell.variant == grid.reference)


class _Reader:
    """Reads plans; those with the same fingerprint and length once."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, int, int | None], tuple[int, int]] = {}

    def of(self, cell: Cell, processor: AlignVLMProcessor) -> Batches:
        """What a cell reads."""
        return {
            stage.name: self.stage(stage_plan(cell.recipe, stage, processor)) for stage in cell.recipe.stages.values()
        }

    def stage(self, plan: Plan) -> StageBatches:
        """Steps and samples of a plan."""
        key = (plan.fingerprint, plan.settings.epochs, plan.settings.max_steps)
        if key not in self._known:
            self._known[key] = _count(plan)
        return StageBatches(plan.fingerprint, *self._known[key], plan.settings.sequence_length)


def _count(plan: Plan) -> tuple[int, int]:
    """(steps, samples)."""
    steps = plan.num_steps
    if plan.settings.max_steps is None:
        return steps, plan.samples_per_epoch * plan.settings.epochs
    return steps, sum(len(batch.packs.index) for batch in plan.batches())


def _fit(recipe: Recipe, stage: StageConfig, processor: AlignVLMProcessor, wanted: StageBatches, read: _Reader) -> int:
    """Tokens per pack with which a step of the stage holds about as many samples as the reference's."""
    target = wanted.samples / wanted.steps
    plan_of: Callable[[int], Plan] = lambda length: stage_plan(
        recipe, replace(stage, sequence_length=length), processor
    )
    length = stage.sequence_length
    longest = max(int(source.measures[:, 0].max()) for source in plan_of(length).sources.values())
    found: dict[int, float] = {}
    for _ in range(FITS):
        if length in found:
            break
        batches = read.stage(plan_of(length))
        found[length] = batches.samples / batches.steps
        length = max(longest, round(length * target / found[length]))
    return min(found, key=lambda each: (abs(found[each] - target), each))
