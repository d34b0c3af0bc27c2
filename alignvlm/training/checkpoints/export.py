"""Export to a Hugging Face folder (weights, config, processor): at the end of a stage, or from checkpoints."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from alignvlm.config.schema import StageConfig
from alignvlm.config.sections.stages import LoraConfig
from alignvlm.errors import UserError
from alignvlm.exports import check_export, save_export
from alignvlm.model import AlignVLMForConditionalGeneration, AlignVLMProcessor
from alignvlm.model.lora import Adapters
from alignvlm.progress import Progress
from alignvlm.run_folder import INITIAL, RunFolder, run_of_checkpoint, stages_at
from alignvlm.training.checkpoints.files.manifest import MANIFEST, first_difference
from alignvlm.training.checkpoints.gathering import whole
from alignvlm.training.checkpoints.store import TAG
from alignvlm.training.checkpoints.weights import CheckpointWeights
from alignvlm.training.distributed import World
from data_pipeline.files import reason


def consolidate(
    model: torch.nn.Module, world: World, adapters: Adapters | None = None
) -> dict[str, torch.Tensor] | None:
    """All weights on rank 0's CPU, gathered one by one where ZeRO-3 partitions them; None on other ranks.

    Every rank must call it. Tied weights appear under each of their names, weights with adapters merged.
    """
    weights: dict[str, torch.Tensor] = {}
    tied = dict(model.named_parameters(remove_duplicate=False))
    copies: dict[int, torch.Tensor] = {}
    for name, parameter in tied.items():
        if id(parameter) not in copies:
            copy = whole(parameter)
            if world.is_main and adapters is not None:
                copy = adapters.merge(name, copy).to(copy.dtype)
            copies[id(parameter)] = copy if world.is_main else parameter
        weights[name] = copies[id(parameter)]
    for name, buffer in persistent_buffers(model):
        weights[name] = buffer.detach().cpu().clone()
    return weights if world.is_main else None


def persistent_buffers(model: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    """(name, buffer) of the buffers that belong to the model's state dict."""
    found = []
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                found.append((f"{prefix}.{name}" if prefix else name, buffer))
    return found


def export_stage(
    model: Any, processor: AlignVLMProcessor, folder: Path, world: World, adapters: Adapters | None = None
) -> None:
    """Consolidate a model in training and save it; every rank calls it, rank 0 writes.

    Args:
        adapters: of the stage (`gather_adapters`); they are merged into the weights, and lie in a folder of their own.

    Raises:
        DataError: on all ranks, when rank 0 cannot write.
    """
    weights = consolidate(model, world, adapters) or {}  # on rank 0
    world.of_main(lambda: save_export(model, weights, processor, folder, adapters))


def export_checkpoints(checkpoints: Sequence[Path], output: Path, dtype: str | None = None) -> None:
    """Write a Hugging Face folder with the mean of checkpoints' weights, in one process; that of one is itself.

    The mean is taken in fp32, of the fp32 masters, tensor by tensor: the memory is that of one model.

    Args:
        checkpoints: of one stage, saved by any numbers of ranks; the last one says what is no mean (integer buffers).
        dtype: torch's name of the dtype of the exported weights; None is that of the run's other exports.

    Raises:
        UserError: a folder is not a checkpoint of a run, or a file of it is damaged.
    """
    for checkpoint in checkpoints:
        _check(checkpoint)
    run = run_of_checkpoint(checkpoints[-1])
    initial = run.stage(0, INITIAL).export
    if not initial.is_dir():
        raise UserError(f"{checkpoints[-1]}: its run has no {initial}, which holds the config and the processor")
    check_export(initial)
    model = AlignVLMForConditionalGeneration.from_pretrained(initial, dtype=getattr(torch, dtype) if dtype else "auto")
    weights = model.state_dict()
    try:
        split_off = _adapters_of(run, checkpoints[-1])
        sources = [CheckpointWeights(checkpoint / TAG, split_off) for checkpoint in checkpoints]
    except ValueError as error:
        raise UserError(f"{checkpoints[-1]}: not laid out as this version's checkpoints ({reason(error)})") from error
    for checkpoint, source in zip(checkpoints, sources, strict=True):
        differing = sorted(source.names ^ weights.keys())
        if differing:
            raise UserError(
                f"{checkpoint} and {initial} are not of the same model: {differing[0]} is in one of them only"
            )
    with torch.no_grad(), Progress(f"export {output.name}", len(weights)) as bar:
        for name, weight in weights.items():
            weight.copy_(_mean(sources, name))
            bar.advance()
    adapters = sources[-1].adapters if len(sources) == 1 else None  # a mean of merged weights has no such factors
    save_export(model, weights, AlignVLMProcessor.from_pretrained(initial), output, adapters)


def _adapters_of(run: RunFolder, checkpoint: Path) -> Callable[[dict[str, Any], Any], Adapters] | None:
    """What takes the adapters out of a checkpoint's weights; None where the run's recipe says of none."""
    if not run.config.exists():
        return None
    stages = run.read_config().get("stages", {})
    folders = [run.stage(number, name) for number, name in enumerate([INITIAL, *stages])]
    for before, folder in itertools.pairwise(folders):
        if folder.path.name == checkpoint.absolute().parents[1].name and stages[folder.name].get("lora"):
            said = stages[folder.name]
            stage = StageConfig(name=folder.name, trainable=said["trainable"], lora=LoraConfig(**said["lora"]))
            return functools.partial(Adapters.split_off, stage, before.export)
    return None


def _mean(sources: Sequence[CheckpointWeights], name: str) -> torch.Tensor:
    """The mean of a tensor over the checkpoints, in fp32. Meanwhile one more tensor of this size is in memory."""
    *others, last = sources
    total = last[name]
    if others and total.is_floating_point():
        for source in others:
            total += source[name]
        total /= len(sources)
    return total


def _check(checkpoint: Path) -> None:
    if not (checkpoint / MANIFEST).exists():
        raise UserError(f"{checkpoint}: not a finished checkpoint ({MANIFEST} is missing); {_near(checkpoint)}")
    problem = first_difference(checkpoint)
    if problem is not None:
        raise UserError(f"{checkpoint} is not valid ({problem}); give another checkpoint of its stage")


def _near(path: Path) -> str:
    """What to give instead: the newest checkpoint of the stage or run that a path stands for."""
    try:
        found = [folder for stage in stages_at(path)[1] for folder in stage.checkpoint_folders()]
    except UserError:
        found = []
    return f"give {found[-1] if found else 'runs/<name>/<n>-<stage>/checkpoints/step-…'}"
