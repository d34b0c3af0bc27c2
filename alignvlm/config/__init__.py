"""The single truth of a run: the schema of recipes and what reads them. Nothing heavy is imported here."""

from __future__ import annotations

from alignvlm.config.deepspeed import deepspeed_config, find_deepspeed_config, list_deepspeed_configs
from alignvlm.config.load import diff_recipes, find_recipe, list_recipes, load_recipe, recipe_to_dict, recipe_to_yaml
from alignvlm.config.names import with_names
from alignvlm.config.schema import (
    PARTS,
    CheckpointConfig,
    DataConfig,
    LanguageConfig,
    ModelConfig,
    Recipe,
    SourceConfig,
    StageConfig,
    TilesConfig,
    TokenizerConfig,
    TrackingConfig,
    TrainConfig,
    VisionConfig,
)
from alignvlm.config.sections.evaluation import BenchmarkConfig, EvaluationConfig, TaskConfig
from alignvlm.config.validate_stages import trainable_parts

__all__ = [
    "PARTS",
    "BenchmarkConfig",
    "CheckpointConfig",
    "DataConfig",
    "EvaluationConfig",
    "LanguageConfig",
    "ModelConfig",
    "Recipe",
    "SourceConfig",
    "StageConfig",
    "TaskConfig",
    "TilesConfig",
    "TokenizerConfig",
    "TrackingConfig",
    "TrainConfig",
    "VisionConfig",
    "deepspeed_config",
    "diff_recipes",
    "find_deepspeed_config",
    "find_recipe",
    "list_deepspeed_configs",
    "list_recipes",
    "load_recipe",
    "recipe_to_dict",
    "recipe_to_yaml",
    "trainable_parts",
    "with_names",
]
