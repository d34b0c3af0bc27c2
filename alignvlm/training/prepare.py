"""What must exist before the first step: shards, tokenizer, measured lengths, and the initial model's export."""

from __future__ import annotations

from alignvlm import stage_data
from alignvlm.model import AlignVLMProcessor
from alignvlm.model.build import build_model, load_processor
from alignvlm.progress import data_progress
from alignvlm.run_folder import Run
from alignvlm.training.export import save_export


def prepare(run: Run) -> None:
    """Make whatever is missing; a second call finds everything and does nothing. One process only.

    Raises:
        UserError: the run folder belongs to another recipe, shards are missing, a setting cannot work.
    """
    run.open()
    stage_data.ensure_shards(run.recipe, progress=data_progress)
    processor = load_processor(run.recipe)
    stage_data.ensure_measures(run.recipe, processor, data_progress)
    if not run.has_export(0):
        model = build_model(run.recipe, processor)
        save_export(model, model.state_dict(), processor, run.export(0))


def run_processor(run: Run) -> AlignVLMProcessor:
    """The processor that the run was prepared with."""
    return AlignVLMProcessor.from_pretrained(run.export(0))
