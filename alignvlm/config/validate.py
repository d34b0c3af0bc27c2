"""Checks across values: names that must exist elsewhere in the recipe, sizes that must fit each other."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence

from alignvlm.config.schema import PARTS, Part, Recipe, StageConfig
from alignvlm.errors import UserError
from alignvlm.metrics import find_metric
from data_pipeline.errors import nearest


def trainable_parts(stage: StageConfig) -> list[Part]:
    """Parts of the model of which at least one parameter is trained in this stage."""
    return [part for part in PARTS if any(fnmatch.fnmatchcase(part, _head(glob)) for glob in stage.trainable)]


def check_recipe(recipe: Recipe, origins: Mapping[str, str]) -> None:
    """Raise UserError at the first contradiction; `origins` says where each dotted key was written."""
    _check_model(recipe, origins)
    _check_sources(recipe, origins)
    if not recipe.stages:
        raise _error(origins, "stages", "a recipe needs at least one stage")
    for name, stage in recipe.stages.items():
        _check_stage(recipe, f"stages.{name}", stage, origins)
    _check_tasks(recipe, origins)


def ignored_settings(recipe: Recipe, origins: Mapping[str, str]) -> list[str]:
    """Settings that are stated but have no effect, one warning each."""
    warnings = []
    for name, stage in recipe.stages.items():
        trained = trainable_parts(stage)
        for part in stage.lr:
            if part in PARTS and part not in trained:
                key = f"stages.{name}.lr.{part}"
                warnings.append(f"{_place(origins, key)}: {key} is ignored: no parameter of {part} is trainable")
    return warnings


def _check_model(recipe: Recipe, origins: Mapping[str, str]) -> None:
    for part in ("vision", "language"):
        section = getattr(recipe.model, part)
        key = f"model.{part}"
        if section.path is None and "model_type" not in section.config:
            raise _error(
                origins,
                f"{key}.config",
                f"{key} has no weights and no shape: state {key}.path (a folder or hub id) or {key}.config with its "
                "model_type (to start from scratch)",
            )
    language = recipe.model.language
    if language.path is None and language.tokenizer is None:
        raise _error(
            origins,
            "model.language",
            "model.language has no tokenizer: state model.language.path, or model.language.tokenizer to train one",
        )
    if language.path is not None and language.tokenizer is not None:
        raise _error(
            origins,
            "model.language.tokenizer",
            f"model.language.tokenizer would train a tokenizer unknown to the weights at {language.path!r}; remove it",
        )


def _check_sources(recipe: Recipe, origins: Mapping[str, str]) -> None:
    for name, source in recipe.data.sources.items():
        if source.generator_args and source.generator is None:
            raise _error(
                origins,
                f"data.sources.{name}.generator_args",
                f"data.sources.{name}.generator_args are stated, but data.sources.{name}.generator is not",
            )


def _check_stage(recipe: Recipe, key: str, stage: StageConfig, origins: Mapping[str, str]) -> None:
    if not stage.mixture:
        raise _error(origins, f"{key}.mixture", f"{key}.mixture is empty: name at least one source and its weight")
    for source in stage.mixture:
        if source not in recipe.data.sources:
            hint = nearest(source, recipe.data.sources)
            raise _error(
                origins, f"{key}.mixture.{source}", f"{key}.mixture names the unknown source {source!r}: {hint}"
            )
    if not stage.trainable:
        raise _error(
            origins, f"{key}.trainable", f"{key}.trainable is empty: a stage must train something ('*' is everything)"
        )
    for index, glob in enumerate(stage.trainable):
        _check_glob(f"{key}.trainable[{index}]", glob, origins)
    for part in stage.lr:
        if part not in (*PARTS, "default"):
            hint = nearest(part, (*PARTS, "default"))
            raise _error(origins, f"{key}.lr.{part}", f"{key}.lr names the unknown part {part!r}: {hint}")
    for part in trainable_parts(stage):
        if part not in stage.lr and "default" not in stage.lr:
            raise _error(
                origins,
                f"{key}.lr",
                f"{key}.lr has no entry for {part!r}, which is trainable: add {part} or default to it",
            )
    if stage.max_text_tokens is not None and stage.max_text_tokens > stage.sequence_length:
        raise _error(
            origins,
            f"{key}.max_text_tokens",
            f"{key}.max_text_tokens is {stage.max_text_tokens}, more than the sequence_length {stage.sequence_length}",
        )
    if stage.global_batch_packs % stage.micro_batch_packs:
        raise _error(
            origins,
            f"{key}.global_batch_packs",
            f"{key}.global_batch_packs is {stage.global_batch_packs}, but must be a multiple of micro_batch_packs "
            f"({stage.micro_batch_packs})",
        )


def _check_glob(key: str, glob: str, origins: Mapping[str, str]) -> None:
    head = _head(glob)
    if not any(fnmatch.fnmatchcase(part, head) for part in PARTS):
        raise _error(
            origins, key, f"{key} is {glob!r}, but no part of the model is called {head!r}: {nearest(head, PARTS)}"
        )
    if glob in PARTS:
        raise _error(origins, key, f"{key} is {glob!r}, which matches no parameter; write '{glob}.*'")


def _check_tasks(recipe: Recipe, origins: Mapping[str, str]) -> None:
    trained = {source: stage for stage, config in recipe.stages.items() for source in config.mixture}
    for name, task in recipe.evaluation.tasks.items():
        key, source = f"evaluation.tasks.{name}.source", task.source
        if source not in recipe.data.sources:
            hint = nearest(source, recipe.data.sources)
            raise _error(origins, key, f"{key} is the unknown source {source!r}: {hint}")
        if source in trained:
            stage = trained[source]
            raise _error(
                origins, key, f"{key} is {source!r}, which stage {stage!r} trains on: a task needs held-out data"
            )
        _check_metrics(f"evaluation.tasks.{name}.metrics", task.metrics, origins)


def _check_metrics(key: str, names: Sequence[str], origins: Mapping[str, str]) -> None:
    if not names:
        raise _error(origins, key, f"{key} is empty: name at least one metric")
    for index, name in enumerate(names):
        try:
            find_metric(name)
        except UserError as error:
            raise _error(origins, f"{key}[{index}]", f"{key}[{index}]: {error}") from error


def _head(glob: str) -> str:
    return glob.partition(".")[0]


def _place(origins: Mapping[str, str], key: str) -> str:
    while key and key not in origins:
        key = key.rpartition(".")[0]
    return origins.get(key, "recipe")


def _error(origins: Mapping[str, str], key: str, message: str) -> UserError:
    return UserError(f"{_place(origins, key)}: {message}")
