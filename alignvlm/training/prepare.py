"""What must exist before the first step: shards, tokenizer, sample lengths, and the initial model's export."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from alignvlm import stage_data
from alignvlm.checks import check_data, check_files, check_model
from alignvlm.config.places import recipe_error
from alignvlm.evaluation.benchmarks.job import jobs_of_recipe
from alignvlm.evaluation.perplexity import text_identity
from alignvlm.exports import check_export, save_export
from alignvlm.model import AlignVLMProcessor
from alignvlm.model.build import build_model
from alignvlm.progress import data_progress
from alignvlm.run_folder import Run
from data_pipeline.errors import DataError


def check(run: Run) -> None:
    """Find what cannot work before anything of the run is written. One process only.

    Raises:
        UserError: with the key to change.
    """
    check_files(run.recipe)
    check_data(run.recipe)
    jobs_of_recipe(run.recipe)
    for name, text in run.recipe.evaluation.text.items():
        try:
            text_identity(text)
        except DataError as error:
            key = f"evaluation.text.{name}.path"
            raise recipe_error(run.recipe, key, f"{key}: {error}") from error
    if not run.initial.has_export:
        check_model(run.recipe, for_training=True)


def prepare(run: Run, beat: Callable[[], None] = lambda: None) -> None:
    """Make what is missing; a second call does nothing. The process that holds the run's lease calls it after `check`.

    `beat` is called as it goes on.

    Raises:
        UserError: the run folder belongs to another recipe, shards are missing, a setting cannot work.
    """
    recipe = run.recipe
    run.open()
    processor = stage_data.prepare(recipe, progress=partial(data_progress, beat=beat))
    if not run.initial.has_export:
        model = build_model(recipe, processor)
        save_export(model, model.state_dict(), processor, run.initial.export)


def run_processor(run: Run) -> AlignVLMProcessor:
    """The processor that the run was prepared with. Raises DataError when the initial model is damaged."""
    check_export(run.initial.export)
    return AlignVLMProcessor.from_pretrained(run.initial.export)
