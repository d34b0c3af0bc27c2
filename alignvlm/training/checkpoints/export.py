"""Export to a Hugging Face folder (weights, config, processor): at the end of a stage, or from checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from alignvlm.errors import UserError
from alignvlm.exports import check_export, save_export
from alignvlm.model import AlignVLMForConditionalGeneration, AlignVLMProcessor
from alignvlm.progress import Progress
from alignvlm.run_folder import INITIAL, run_of_checkpoint
from alignvlm.training.checkpoints.store import MANIFEST, TAG, first_difference
from alignvlm.training.checkpoints.weights import CheckpointWeights
from alignvlm.training.distributed import World
from data_pipeline.files import reason


def consolidate(model: torch.nn.Module, world: World) -> dict[str, torch.Tensor] | None:
    """All weights on rank 0's CPU, gathered one by one where ZeRO-3 partitions them; None on other ranks.

    Every rank must call it. Tied weights appear under each of their names.
    """
    import deepspeed

    weights: dict[str, torch.Tensor] = {}
    tied = dict(model.named_parameters(remove_duplicate=False))
    copies: dict[int, torch.Tensor] = {}
    for name, parameter in tied.items():
        if id(parameter) not in copies:
            partitioned = [parameter] if hasattr(parameter, "ds_id") else []
            with deepspeed.zero.GatheredParameters(partitioned):
                copies[id(parameter)] = parameter.detach().cpu().clone() if world.is_main else parameter
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


def export_stage(model: Any, processor: AlignVLMProcessor, folder: Path, world: World) -> None:
    """Consolidate a model in training and save it; every rank calls it, rank 0 writes.

    Raises:
        DataError: on all ranks, when rank 0 cannot write.
    """
    weights = consolidate(model, world) or {}  # on rank 0
    world.of_main(lambda: save_export(model, weights, processor, folder))


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
        sources = [CheckpointWeights(checkpoint / TAG) for checkpoint in checkpoints]
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
    save_export(model, weights, AlignVLMProcessor.from_pretrained(initial), output)


def _mean(sources: Sequence[CheckpointWeights], name: str) -> torch.Tensor:
    """In fp32; one more tensor of this size is in memory meanwhile."""
    *others, last = sources
    total = last[name]
    if others and total.is_floating_point():
        for source in others:
            total += source[name]
        total /= len(sources)
    return total


def _check(checkpoint: Path) -> None:
    if not (checkpoint / MANIFEST).exists():
        raise UserError(f"{checkpoint}: not a finished checkpoint ({MANIFEST} is missing)")
    problem = first_difference(checkpoint)
    if problem is not None:
        raise UserError(f"{checkpoint} is not valid ({problem}); give another checkpoint of its stage")
