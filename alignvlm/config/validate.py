"""Checks across values: names that must exist elsewhere in the recipe, sizes that must fit each other."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from alignvlm.config.names import HELD_OUT, LOSS, TASK
from alignvlm.config.places import place, recipe_error
from alignvlm.config.schema import PARTS, Recipe, SourceConfig
from alignvlm.config.validate_stages import check_stage, trainable_parts
from alignvlm.errors import UserError, shown
from alignvlm.metrics import find_metric
from data_pipeline.errors import DataError, nearest
from data_pipeline.samples.selection import Selection

MAX_NAME = 100
"""Characters of a name that becomes a file or a folder."""


def check_recipe(recipe: Recipe) -> None:
    """Raise UserError at the first contradiction."""
    _check_names(recipe)
    _check_model(recipe)
    _check_sources(recipe)
    if not recipe.stages:
        raise recipe_error(recipe, "stages", "a recipe needs at least one stage")
    for stage in recipe.stages.values():
        check_stage(recipe, stage)
    _check_tasks(recipe)
    _check_best(recipe)
    _check_patience(recipe)
    _check_held_out_loss(recipe)


def ignored_settings(recipe: Recipe) -> list[str]:
    """Settings that are stated but have no effect, one warning each."""
    warnings = []
    for name, stage in recipe.stages.items():
        trained = trainable_parts(stage)
        for part in stage.lr:
            if part in PARTS and part not in trained:
                key = f"stages.{name}.lr.{part}"
                warnings.append(f"{place(recipe, key)}: {key} is ignored: no parameter of {part} is trainable")
    return warnings


def _check_names(recipe: Recipe) -> None:
    """Names of runs, stages, sources, tasks and texts become names of files and folders."""
    sections: dict[str, Iterable[str]] = {
        "stages": recipe.stages,
        "data.sources": recipe.data.sources,
        "evaluation.tasks": recipe.evaluation.tasks,
        "evaluation.text": recipe.evaluation.text,
    }
    keys = {f"{section}.{name}": name for section, entries in sections.items() for name in entries}
    for key, name in {"name": recipe.name, **keys}.items():
        short = (
            0 < len(name) <= MAX_NAME and len(name.encode(errors="surrogatepass")) <= 2 * MAX_NAME
        )  # a file name has 255 bytes at most
        if not short or name.startswith(".") or "/" in name or not name.isprintable():
            raise recipe_error(
                recipe,
                key,
                f"{key.removesuffix(name).rstrip('.') or 'name'}: the name {shown(name)} must be that of a file: "
                f"1 to {MAX_NAME} printable characters, no '/', and no '.' in front",
            )


def _check_model(recipe: Recipe) -> None:
    for part in ("vision", "language"):
        section = getattr(recipe.model, part)
        key = f"model.{part}"
        if section.path is None and "model_type" not in section.config:
            raise recipe_error(
                recipe,
                f"{key}.config",
                f"{key} has no weights and no shape: state {key}.path (a folder or hub id) or {key}.config with its "
                "model_type (to start from scratch)",
            )
    language = recipe.model.language
    if language.path is None and language.tokenizer is None:
        raise recipe_error(
            recipe,
            "model.language",
            "model.language has no tokenizer: state model.language.path, or model.language.tokenizer to train one",
        )
    if language.path is not None and language.tokenizer is not None:
        raise recipe_error(
            recipe,
            "model.language.tokenizer",
            f"model.language.tokenizer would train a tokenizer unknown to the weights at {language.path!r}; remove it",
        )


def _check_sources(recipe: Recipe) -> None:
    for name, source in recipe.data.sources.items():
        if source.generator_args and source.generator is None:
            raise recipe_error(
                recipe,
                f"data.sources.{name}.generator_args",
                f"data.sources.{name}.generator_args are stated, but data.sources.{name}.generator is not",
            )
        try:
            Selection(source.sample, source.filter)
        except DataError as error:
            raise recipe_error(recipe, f"data.sources.{name}.filter", f"data.sources.{name}: {error}") from error


def _check_tasks(recipe: Recipe) -> None:
    sources = recipe.data.sources
    trained = {
        canonical(sources[name].folder): (stage, name)
        for stage in recipe.stages
        for name in recipe.stages[stage].mixture
    }
    for name, task in recipe.evaluation.tasks.items():
        key, source = f"evaluation.tasks.{name}.source", task.source
        if source not in sources:
            raise recipe_error(recipe, key, f"{key} is the unknown source {source!r}: {nearest(source, sources)}")
        if sources[source].filter or sources[source].sample < 1:
            raise recipe_error(
                recipe,
                key,
                f"{key} is {source!r}, of which training uses a part (sample, filter); an evaluation takes whole "
                "sources: name its folder as a source of its own",
            )
        stage, other = trained.get(canonical(sources[source].folder), ("", ""))
        if other and not task.allow_leak:
            same = "" if other == source else f" as {other!r}, from the same folder"
            raise recipe_error(
                recipe,
                key,
                f"{key} is {source!r}, which stage {stage!r} trains on{same}: a task needs held-out data, or "
                f"evaluation.tasks.{name}.allow_leak: true",
            )
        _check_metrics(recipe, f"evaluation.tasks.{name}.metrics", task.metrics)


def _check_held_out_loss(recipe: Recipe) -> None:
    loss, sources = recipe.evaluation.loss, recipe.data.sources
    if loss is None:
        return
    key = "evaluation.loss.sources"
    if not loss.sources:
        raise recipe_error(
            recipe, key, f"{key} is empty: name held-out sources of data.sources, or state evaluation.loss: null"
        )
    for index, name in enumerate(loss.sources):
        here = f"{key}[{index}]"
        if name not in sources:
            raise recipe_error(recipe, here, f"{here} is the unknown source {name!r}: {nearest(name, sources)}")
        if f"{LOSS}{name}" == HELD_OUT or name in loss.sources[:index]:
            why = "it is named twice" if name in loss.sources[:index] else f"{HELD_OUT} is the loss of all sources"
            raise recipe_error(recipe, here, f"{here} is {name!r}: {why}; give it another name in data.sources")
        leaks = [
            (stage, trained)
            for stage in recipe.stages
            for trained in recipe.stages[stage].mixture
            if share_samples(sources[name], sources[trained]) and not loss.allow_leak
        ]
        if leaks:
            stage, trained = leaks[0]
            raise recipe_error(
                recipe,
                here,
                f"{here} is {name!r}, of which stage {stage!r} trains on samples (source {trained!r}): it needs "
                "held-out data: a folder of its own, filters that tell them apart (filter: {split: train} there, "
                "filter: {split: validation} here), or evaluation.loss.allow_leak: true",
            )


def share_samples(one: SourceConfig, other: SourceConfig) -> bool:
    """Whether two sources may have samples in common, by what the recipe says."""
    return canonical(one.folder) == canonical(other.folder) and not _filters_exclude(one, other)


def _filters_exclude(one: SourceConfig, other: SourceConfig) -> bool:
    """Whether no sample passes the filters of both: some field may have no value in common."""
    for name in one.filter.keys() & other.filter.keys():
        (some, without), (others, without_others) = _values(one.filter[name]), _values(other.filter[name])
        if some is not None and others is not None and not [value for value in some if value in others]:
            return True
        if some is not None and all(value in without_others for value in some):
            return True
        if others is not None and all(value in without for value in others):
            return True
    return False


def _values(condition: Any) -> tuple[list[Any] | None, list[Any]]:
    """(the values that a condition of a filter takes, None where it does not list them; those that it refuses)."""
    as_list = lambda values: values if isinstance(values, list) else [values]
    if isinstance(condition, Mapping):
        return None, as_list(condition.get("not", []))
    return as_list(condition), []


def _check_metrics(recipe: Recipe, key: str, names: Sequence[str]) -> None:
    if not names:
        raise recipe_error(recipe, key, f"{key} is empty: name at least one metric")
    for index, name in enumerate(names):
        try:
            find_metric(name)
        except UserError as error:
            raise recipe_error(recipe, f"{key}[{index}]", f"{key}[{index}]: {error}") from error


def _check_best(recipe: Recipe) -> None:
    """The score that chooses the best checkpoint is one that is taken."""
    name = recipe.checkpoint.keep_best
    scores = [f"{TASK}{task}" for task in recipe.evaluation.tasks]
    if recipe.evaluation.loss is not None:
        scores += [HELD_OUT, *(f"{LOSS}{source}" for source in recipe.evaluation.held_out)]
    if name is not None and name not in scores:
        key = "checkpoint.keep_best"
        raise recipe_error(recipe, key, f"{key} is {shown(name)}, which no evaluation gives: {nearest(name, scores)}")


def _check_patience(recipe: Recipe) -> None:
    """Patience waits for a loss that is measured while a stage trains; tasks are scored after it."""
    settings = recipe.checkpoint
    if settings.patience is not None and not (settings.keep_best or "").startswith(LOSS):
        key = "checkpoint.patience"
        raise recipe_error(
            recipe,
            key,
            f"{key} is {settings.patience}, but checkpoint.keep_best is {shown(settings.keep_best)}: it waits for a "
            f"loss that is measured within a stage, such as {HELD_OUT}",
        )


def canonical(folder: str) -> str:
    """A folder or URL as one and the same text, however it is written."""
    return folder.rstrip("/") if "://" in folder else os.path.realpath(folder)
