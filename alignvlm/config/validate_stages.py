"""Checks across the values of one stage, and between it and the rest of its recipe."""

from __future__ import annotations

import fnmatch

from alignvlm.config.deepspeed import find_deepspeed_config, is_strategy_file
from alignvlm.config.places import recipe_error
from alignvlm.config.schema import PARTS, Part, Recipe, StageConfig
from alignvlm.config.sections.stages import LoraConfig
from alignvlm.errors import UserError
from data_pipeline.errors import nearest

MAX_RATIO = 1_000_000
"""Largest allowed ratio of the largest to the smallest weight of a mixture."""
INITS = ("kaiming", "gaussian")
DATA_DEPENDENT = ("pissa", "olora", "corda", "eva", "loftq", "lora_ga", "mica")
"""Initialisations of PEFT that are refused."""


def trainable_parts(stage: StageConfig) -> list[Part]:
    """Parts of the model of which at least one parameter is trained in this stage."""
    return [part for part in PARTS if any(fnmatch.fnmatchcase(part, _head(glob)) for glob in stage.trained)]


def check_stage(recipe: Recipe, stage: StageConfig) -> None:
    """Raise UserError at the first contradiction of a stage, in itself or with the recipe."""
    key = f"stages.{stage.name}"
    if not stage.mixture:
        raise recipe_error(recipe, f"{key}.mixture", f"{key}.mixture is empty: name at least one source and its weight")
    for source in stage.mixture:
        if source not in recipe.data.sources:
            hint = nearest(source, recipe.data.sources)
            raise recipe_error(
                recipe, f"{key}.mixture.{source}", f"{key}.mixture names the unknown source {source!r}: {hint}"
            )
    if max(stage.mixture.values()) > MAX_RATIO * min(stage.mixture.values()):
        raise recipe_error(
            recipe,
            f"{key}.mixture",
            f"{key}.mixture has weights from {min(stage.mixture.values()):g} to {max(stage.mixture.values()):g}: an "
            f"epoch would draw some samples more than {MAX_RATIO:,} times as often as others",
        )
    if stage.lora is not None:
        _check_lora(recipe, stage, stage.lora)
    elif not stage.trainable:
        raise recipe_error(
            recipe, f"{key}.trainable", f"{key}.trainable is empty: a stage must train something ('*' is everything)"
        )
    for index, glob in enumerate(stage.trainable):
        _check_glob(recipe, f"{key}.trainable[{index}]", glob)
    for part in stage.lr:
        if part not in (*PARTS, "default"):
            hint = nearest(part, (*PARTS, "default"))
            raise recipe_error(recipe, f"{key}.lr.{part}", f"{key}.lr names the unknown part {part!r}: {hint}")
    for part in trainable_parts(stage):
        if part not in stage.lr and "default" not in stage.lr:
            raise recipe_error(
                recipe,
                f"{key}.lr",
                f"{key}.lr has no entry for {part!r}, which is trainable: add {part} or default to it",
            )
    if stage.max_text_tokens is not None and stage.max_text_tokens > stage.sequence_length:
        raise recipe_error(
            recipe,
            f"{key}.max_text_tokens",
            f"{key}.max_text_tokens is {stage.max_text_tokens}, more than the sequence_length {stage.sequence_length}",
        )
    if stage.global_batch_packs % stage.micro_batch_packs:
        raise recipe_error(
            recipe,
            f"{key}.global_batch_packs",
            f"{key}.global_batch_packs is {stage.global_batch_packs}, but must be a multiple of micro_batch_packs "
            f"({stage.micro_batch_packs})",
        )
    _check_strategy(recipe, stage)


def _check_lora(recipe: Recipe, stage: StageConfig, lora: LoraConfig) -> None:
    """What needs no model to be seen; `model/lora.py` finds the rest."""
    key = f"stages.{stage.name}.lora"
    if not lora.targets:
        raise recipe_error(recipe, f"{key}.targets", f"{key}.targets is empty: name layers, such as 'language.*'")
    for index, glob in enumerate(lora.targets):
        here, head = f"{key}.targets[{index}]", _head(glob)
        if head == "connector":
            raise recipe_error(
                recipe, here, f"{here} is {glob!r}: a connector is small and is trained in full; add it to trainable"
            )
        if head not in PARTS:
            hint = nearest(head, [part for part in PARTS if part != "connector"])
            raise recipe_error(recipe, here, f"{here} is {glob!r}, which begins with no part that has adapters: {hint}")
        for trained in stage.trainable:
            if fnmatch.fnmatchcase(glob, trained):
                raise recipe_error(
                    recipe,
                    f"stages.{stage.name}.trainable",
                    f"stages.{stage.name}.trainable has {trained!r}, which are the weights that {key} leaves as they "
                    "are: state what is trained in full beside the adapters, [connector.*] or []",
                )
    if any(lora.init.startswith(name) for name in DATA_DEPENDENT):
        raise recipe_error(
            recipe,
            f"{key}.init",
            f"{key}.init is {lora.init!r}, which computes adapters from weights or data and changes the weights: "
            "no rank has them whole under ZeRO-3, and the adapters would not fit the export before them; take "
            + " or ".join(INITS),
        )
    if lora.init not in INITS:
        raise recipe_error(recipe, f"{key}.init", f"{key}.init is {lora.init!r}: {nearest(lora.init, INITS)}")


def _check_strategy(recipe: Recipe, stage: StageConfig) -> None:
    """A strategy of ours exists; a file of the user's is read when it is needed (checks.py)."""
    key = f"stages.{stage.name}.deepspeed"
    key = key if key in recipe.places else "train.deepspeed"
    if not is_strategy_file(stage.deepspeed):
        try:
            find_deepspeed_config(stage.deepspeed)
        except UserError as error:
            raise recipe_error(recipe, key, f"{key}: {error}") from error


def _check_glob(recipe: Recipe, key: str, glob: str) -> None:
    head = _head(glob)
    if not any(fnmatch.fnmatchcase(part, head) for part in PARTS):
        raise recipe_error(
            recipe, key, f"{key} is {glob!r}, but no part of the model is called {head!r}: {nearest(head, PARTS)}"
        )
    if glob in PARTS:
        raise recipe_error(recipe, key, f"{key} is {glob!r}, which matches no parameter; write '{glob}.*'")


def _head(glob: str) -> str:
    return glob.partition(".")[0]
