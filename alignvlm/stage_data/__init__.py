"""Where a recipe meets data_pipeline: its sources as shards, the tokenizer, the plan and the loader of a stage.

Order of use: `ensure_shards`, `ensure_processor` (which may train a tokenizer on them), `ensure_lengths`, each by one
process while the others wait (`prepare` calls all three); then `stage_plan` and `stage_loader` on every rank.
"""

from alignvlm.stage_data.held_out import HeldOutPacks, held_out_packs
from alignvlm.stage_data.plan import ensure_lengths, prepare, read_choices, stage_loader, stage_plan
from alignvlm.stage_data.processor import MADE_FROM, ensure_processor, stage_encoder
from alignvlm.stage_data.sources import ensure_shards, find_stage, open_reader, stage_sources, used_sources
from alignvlm.stage_data.views import (
    batch_page,
    measurings,
    plan_summaries,
    saved_or_new_plans,
    shard_folders,
    training_readings,
    trains_tokenizer,
)

__all__ = [
    "MADE_FROM",
    "HeldOutPacks",
    "batch_page",
    "ensure_lengths",
    "ensure_processor",
    "ensure_shards",
    "find_stage",
    "held_out_packs",
    "measurings",
    "open_reader",
    "plan_summaries",
    "prepare",
    "read_choices",
    "saved_or_new_plans",
    "shard_folders",
    "stage_encoder",
    "stage_loader",
    "stage_plan",
    "stage_sources",
    "training_readings",
    "trains_tokenizer",
    "used_sources",
]
