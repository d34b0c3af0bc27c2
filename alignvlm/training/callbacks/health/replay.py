"""Compute one micro-batch twice every so many steps (`resilience.replay_every`): a bit that differs is a broken device.

Compared are the loss and the norm of its gradient at the first places of each backbone that have one: the whole forward
pass, and of the backward pass all but the products that give gradients of weights. Under ZeRO-3 it is the forward pass
alone: DeepSpeed 0.19.8 reduces gradients in hooks of the backward pass, whoever began it (`reduce_leaf_module_grads`).
Nothing of the training is touched: no weight, gradient or random number.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from alignvlm.model.network import largest_list
from alignvlm.training.callbacks.base import Callback, StageState
from alignvlm.training.engine import Trainer
from alignvlm.training.step import inputs_of
from data_pipeline.errors import DataError
from data_pipeline.loading.collate import MicroBatch


class Replay(Callback):
    """Looks before a step; ends the run on all ranks when one of them has computed two different results."""

    def before_step(self, state: StageState, batches: Sequence[MicroBatch]) -> None:
        every = state.recipe.resilience.replay_every
        if every is None or (state.step + 1) % every or not batches:
            return
        first, second = (loss_and_norm(state.trainer, batches[0], state.world.device) for _ in range(2))
        mine = None
        if struct.pack("<2d", *first) != struct.pack("<2d", *second):
            mine = (
                f"rank {state.world.rank} on {socket.gethostname()} computes wrongly: the same micro-batch of step "
                f"{state.step + 1} of stage {state.stage.name} had loss {first[0]!r} and gradient norm {first[1]!r}, "
                f"then {second[0]!r} and {second[1]!r}"
            )
        found = [said for said in state.world.all_gather(mine) if said is not None]
        if found:
            # Exit code 1: a scheduler may start the job elsewhere, and gives up after a few times.
            raise DataError(
                f"{'; '.join(found)}. Take that device out of the job; it resumes from the last checkpoint, and steps "
                f"before it may be wrong too, at most since the replay {every} steps ago"
            ) from OSError(errno.EIO, os.strerror(errno.EIO))


def loss_and_norm(trainer: Trainer, batch: MicroBatch, device: torch.device) -> tuple[float, float]:
    """Loss per supervised token of a micro-batch and norm of its gradient (0 under ZeRO-3); every rank calls it."""
    tokens = max(1, batch.num_supervised)
    if trainer.engine.zero_optimization_partition_weights():
        trainer.engine.eval()
        try:
            with torch.no_grad(), _deterministic(), trainer.same_weights():
                return trainer.engine(**inputs_of(batch.to(device)), num_items_in_batch=tokens).loss.item(), 0.0
        finally:
            trainer.engine.train()
    with torch.random.fork_rng([device] if device.type == "cuda" else []), _deterministic(), trainer.same_weights():
        torch.manual_seed(0)
        with _first_places(trainer.model) as places:
            inputs = inputs_of(batch.to(device))
            loss = trainer.model(**inputs, num_items_in_batch=tokens).loss
        gradients = torch.autograd.grad(loss, list(places.values()), allow_unused=True) if places else ()
        norms = [gradient.double().norm() for gradient in gradients if gradient is not None]
        total = torch.stack([loss.detach().double(), *norms]).tolist()
    return total[0], sum(norm**2 for norm in total[1:]) ** 0.5


@contextmanager
def _first_places(model: Any) -> Iterator[dict[str, torch.Tensor]]:
    """Part of the model -> the first output in it, during the forward pass in here, that has a gradient."""
    places: dict[str, torch.Tensor] = {}

    def look(part: str, module: nn.Module, output: Any) -> None:
        tensor = output if isinstance(output, torch.Tensor) else output[0]
        if tensor.requires_grad and part not in places:
            places[part] = tensor

    with ExitStack() as hooks:
        for part in ("vision", "language"):
            backbone = model.model.part(part)
            for module in (backbone.get_input_embeddings(), *largest_list(backbone)[2]):
                handle = module.register_forward_hook(lambda m, i, output, part=part: look(part, m, output))
                hooks.callback(handle.remove)
        yield places


@contextmanager
def _deterministic() -> Iterator[None]:
    """PyTorch's kernels that can add in one order do so meanwhile."""
    before, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warns)
