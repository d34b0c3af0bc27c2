"""Export to a Hugging Face folder (weights, config, processor): at the end of a stage, or from a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from alignvlm.errors import UserError
from alignvlm.exports import check_export, save_export
from alignvlm.model import AlignVLMForConditionalGeneration, AlignVLMProcessor
from alignvlm.run_folder import INITIAL, run_of_checkpoint
from alignvlm.training.checkpoints.store import MANIFEST, TAG, first_difference
from alignvlm.training.distributed import World


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
    """Consolidate a model in training and save it; every rank calls it, rank 0 writes."""
    weights = consolidate(model, world)
    if weights is not None:
        save_export(model, weights, processor, folder)
    world.barrier()


def export_checkpoint(checkpoint: Path, output: Path) -> None:
    """Write a Hugging Face folder from a checkpoint in the middle of a stage, in one process; weights in fp32.

    Raises:
        UserError: the folder is not a checkpoint of a run, or a file of it is damaged.
    """
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    if not (checkpoint / MANIFEST).exists():
        raise UserError(f"{checkpoint}: not a finished checkpoint ({MANIFEST} is missing)")
    problem = first_difference(checkpoint)
    if problem is not None:
        raise UserError(f"{checkpoint} is not valid ({problem}); give another checkpoint of its stage")
    initial = run_of_checkpoint(checkpoint).stage(0, INITIAL).export
    if not initial.is_dir():
        raise UserError(f"{checkpoint}: its run has no {initial}, which holds the config and the processor")
    check_export(initial)
    weights = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint), tag=TAG)
    model = AlignVLMForConditionalGeneration.from_pretrained(initial, dtype=torch.float32)
    model.load_state_dict(weights)
    save_export(model, model.state_dict(), AlignVLMProcessor.from_pretrained(initial), output)
