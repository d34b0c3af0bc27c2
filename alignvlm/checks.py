"""Whether a recipe can run, found out before anything is written: its files, its data and its model.

What the recipe says by itself is checked when it is loaded (config/validate.py); here is what needs the machine.
"""

from __future__ import annotations

import importlib.util
import itertools
import logging
import os
import re
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

from alignvlm.config.deepspeed import experimental_settings, read_strategy
from alignvlm.config.places import place, recipe_error
from alignvlm.config.schema import PARTS
from alignvlm.config.validate import canonical, share_samples
from alignvlm.errors import UserError, shown
from alignvlm.parts import public_name
from data_pipeline.errors import ArgumentError, DataError

if TYPE_CHECKING:
    from alignvlm.config.schema import Recipe
    from alignvlm.model.network import Network

log = logging.getLogger(__name__)

MAX_PARAMETERS = 10**13


def check_files(recipe: Recipe) -> None:
    """Folders, DeepSpeed strategies, weights and trackers that the recipe names, and the arguments of its generators.

    Raises:
        UserError: for the first that cannot be used, with its file and line.
    """
    from data_pipeline.shards.storage import open_storage

    _check_folder(recipe, "runs", recipe.runs)
    _check_folder(recipe, "name", str(Path(recipe.runs) / recipe.name))
    if "://" not in recipe.data.root:
        _check_folder(recipe, "data.root", recipe.data.root)
    for name, source in recipe.data.sources.items():
        key = f"data.sources.{name}.path"
        try:
            open_storage(source.folder)
        except DataError as error:
            raise recipe_error(recipe, key, f"{key}: {error}") from error
        if "://" not in source.folder:
            _check_folder(recipe, key, source.folder)
    experimental: dict[str, None] = {}
    for stage in recipe.stages.values():
        key = f"stages.{stage.name}.deepspeed"
        key = key if key in recipe.places else "train.deepspeed"
        try:
            strategy = read_strategy(stage)
        except UserError as error:
            raise recipe_error(recipe, key, f"{key}: {error}") from error
        for what in experimental_settings(strategy):
            experimental[f"{place(recipe, key)}: {key} {stage.deepspeed!r} is experimental: {what}"] = None
    for line in experimental:  # stages that share a strategy say it once
        log.warning("%s", line)
    _check_trackers(recipe)
    _check_weights(recipe)
    _check_generators(recipe)


def check_data(recipe: Recipe) -> None:
    """Raises UserError for the first source in a folder here that has no shards, and no generator either."""
    for name, message in missing_data(recipe).items():
        raise recipe_error(recipe, f"data.sources.{name}", message)


def missing_data(recipe: Recipe) -> dict[str, str]:
    """Sources of stages and evaluation without shards, and what to do about each. Buckets are not asked."""
    from data_pipeline.shards.sidecars import is_indexed
    from data_pipeline.shards.storage import open_storage

    names = [name for stage in recipe.stages.values() for name in stage.mixture]
    names += [*recipe.evaluation.held_out, *(task.source for task in recipe.evaluation.tasks.values())]
    missing = {}
    for name in dict.fromkeys(names):
        source = recipe.data.sources[name]
        if source.generator is not None or "://" in source.folder:
            continue
        storage = open_storage(source.folder)
        if not is_indexed(storage) and not any(storage.list(".tar")):
            missing[name] = (
                f"data.sources.{name}: {source.folder} has no tar shards; put them there, or write your own data with "
                f"`alignvlm data write {source.folder} --from FILE`"
            )
    return missing


def check_model(recipe: Recipe, *, for_training: bool) -> list[str]:
    """Chat template, tokenizer, and the model: built, and shown a tile, on the meta device, where it takes no memory.

    Args:
        for_training: this machine trains it. Its attention and fused layers must run here, and the hub is asked for
            configs and the tokenizer that are not here.

    Returns:
        What could not be checked for want of a file, in words.

    Raises:
        UserError: the model cannot be built, or its parts do not fit, with file and line.
    """
    import torch

    from alignvlm.kernels.fused_layers import choose_fused_layers
    from alignvlm.model.attention import choose_attention
    from alignvlm.model.backbones import Backbone, is_hub_id
    from alignvlm.model.build import chat_template, load_processor, position_weights, tiling_of
    from alignvlm.model.network import ElsewhereError, backbone_config, build_network

    chat_template(recipe)
    if for_training:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        choices: dict[str, Callable[[], object]] = {
            "attention": lambda: choose_attention(recipe.model.attention, device, recipe.train.precision),
            "fused_layers": lambda: choose_fused_layers(recipe.model.fused_layers, device),
        }
        for key, choose in choices.items():
            try:
                choose()
            except ValueError as error:
                raise recipe_error(recipe, f"model.{key}", str(error)) from error
    elsewhere: list[str] = []
    parts: tuple[Backbone, Backbone] = ("vision", "language")
    for part in parts:
        try:
            backbone_config(recipe, part, download=for_training)
        except ElsewhereError as error:
            elsewhere.append(str(error))
    if elsewhere:
        return elsewhere
    tiling_of(recipe)
    network = build_network(recipe, download=for_training)
    if recipe.model.vision.position_std is not None and recipe.model.vision.path is None:
        position_weights(recipe, network.part("vision"))
    _check_network(recipe, network)
    path = recipe.model.language.path
    if path is not None and (for_training or not is_hub_id(path)):
        load_processor(recipe)
    return []


def check_held_out(recipe: Recipe) -> None:
    """Compare the shards of every task and of the held-out loss with those of every stage, by their content.

    Folders without an index are passed over: `data_pipeline` indexes them before they are read.

    Raises:
        UserError: a task or the loss reads a shard that a stage trains on, and does not say `allow_leak`.
    """
    from data_pipeline.shards.overlap import common_shard

    sources, loss = recipe.data.sources, recipe.evaluation.loss
    tasks = {f"evaluation.tasks.{name}": task for name, task in recipe.evaluation.tasks.items()}
    held_out = [
        (f"{key}.source", task.source, f"{key}.allow_leak") for key, task in tasks.items() if not task.allow_leak
    ]
    if loss is not None and not loss.allow_leak:
        keys = [(f"evaluation.loss.sources[{number}]", name) for number, name in enumerate(loss.sources)]
        held_out += [(key, name, "evaluation.loss.allow_leak") for key, name in keys]
    for (key, name, allow_leak), stage in itertools.product(held_out, recipe.stages.values()):
        for trained in stage.mixture:
            if canonical(sources[name].folder) == canonical(sources[trained].folder) and not share_samples(
                sources[name], sources[trained]
            ):
                continue  # their filters tell them apart
            if common := common_shard(sources[name].folder, sources[trained].folder):
                raise recipe_error(
                    recipe,
                    key,
                    f"{key} is {name!r}, whose shard {common[0]} holds the samples of {common[1]} of {trained!r}, "
                    f"which stage {stage.name!r} trains on: it needs held-out data, or {allow_leak}: true",
                )


def _check_folder(recipe: Recipe, key: str, folder: str) -> None:
    """A folder that may still have to be made: nothing else may stand in its way."""
    path = Path(folder)
    if any(len(os.fsencode(part)) > 255 for part in path.parts):
        raise recipe_error(recipe, key, f"{key} is {shown(folder)}, which has a name of more than 255 bytes in it")
    for parent in (path, *path.parents):
        if os.path.isdir(parent):
            return
        if os.path.lexists(parent):
            what = "is a file" if os.path.exists(parent) else "is a link to nothing"
            raise recipe_error(recipe, key, f"{key} needs the folder {shown(folder)}, but {str(parent)!r} {what}")


def _check_trackers(recipe: Recipe) -> None:
    for package in recipe.tracking.also:
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:  # a folder of that name is no package
            why = f"tracking.also: {package} is not installed here: pip install {package}, or leave it out"
            raise recipe_error(recipe, "tracking.also", why)


def _check_weights(recipe: Recipe) -> None:
    """Pretrained folders hold a config and weights; ids of the hub are left to transformers."""
    for part in ("vision", "language"):
        key, path = f"model.{part}.path", getattr(recipe.model, part).path
        if path is None:
            continue
        if os.path.isdir(path):
            names = os.listdir(path)
            if "config.json" not in names or not any(name.endswith((".safetensors", ".bin")) for name in names):
                raise recipe_error(
                    recipe, key, f"{key} is {shown(path)}, a folder without config.json and weights (*.safetensors)"
                )
        elif os.path.exists(path) or not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", path):
            raise recipe_error(recipe, key, f"{key} is {shown(path)}, which is no folder, nor an id of the hub")


def _check_generators(recipe: Recipe) -> None:
    from data_pipeline.generators import check_arguments

    for name, source in recipe.data.sources.items():
        if source.generator is not None:
            key = f"data.sources.{name}.generator"
            try:
                check_arguments(source.generator, source.generator_args)
            except DataError as error:
                wrong = f"_args.{error.argument}".rstrip(".") if isinstance(error, ArgumentError) else ""
                raise recipe_error(
                    recipe, key + wrong, f"{key}{wrong}: {str(error).removeprefix(f'generator {source.generator!r}: ')}"
                ) from error


def _check_adapters(recipe: Recipe, network: Network) -> None:
    """Stages' adapters: where they go, and that the layers that have them are called."""
    from alignvlm.model.lora import LoraError, check_peft, find_targets

    for stage in recipe.stages.values():
        if stage.lora is None:
            continue
        try:
            check_peft(stage)
            layers = find_targets(network.model, stage)
        except LoraError as error:
            raise recipe_error(recipe, error.key, str(error)) from error
        try:
            uncalled = network.uncalled(layers)
        except Exception as error:  # as below
            if "meta" not in str(error).lower():
                raise
            continue
        if uncalled:
            key = f"stages.{stage.name}.lora.targets"
            raise recipe_error(
                recipe,
                key,
                f"{key}: {public_name(uncalled[0] + '.')[:-1]} is never called, so an adapter would have no effect; "
                "leave it out",
            )


def _check_network(recipe: Recipe, network: Network) -> None:
    """Its size, what it makes of a tile, and that every stage trains what it names."""
    from alignvlm.model.backbones import model_error

    total = network.total()
    if total > MAX_PARAMETERS:
        raise recipe_error(recipe, "model", f"model: it has {total:,} parameters, more than {MAX_PARAMETERS:,}")
    names = [public_name(name) for name, _ in network.model.named_parameters()]
    for stage in recipe.stages.values():
        for number, glob in enumerate(stage.trainable):
            if not any(fnmatchcase(name, glob) for name in names):
                key = f"stages.{stage.name}.trainable[{number}]"
                message = f"{key} is {glob!r}, which matches no parameter; parts are {', '.join(PARTS)}"
                raise recipe_error(recipe, key, message)
    _check_adapters(recipe, network)
    try:
        network.try_out()
    except Exception as error:  # layers of any model type: whatever they raise is about their sizes
        if "meta" not in str(error).lower():  # what looks at values cannot run without any
            raise model_error(recipe, error) from error
