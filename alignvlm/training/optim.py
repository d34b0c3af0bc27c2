"""What is trained and how fast: trainable globs, parameter groups, the learning rate as a function of the step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from alignvlm.config.schema import PARTS, StageConfig
from alignvlm.errors import UserError
from alignvlm.parts import public_name


@dataclass(frozen=True)
class Group:
    """One parameter group of the optimizer."""

    part: str
    lr: float
    """Peak learning rate."""
    weight_decay: float
    names: tuple[str, ...]
    """Public names of its parameters."""


def set_trainable(model: nn.Module, stage: StageConfig) -> None:
    """Freeze everything but the parameters that the stage's globs name, and its adapters.

    Raises:
        UserError: when a glob names nothing, or nothing is left to train.
    """
    names = [public_name(name) for name, _ in model.named_parameters()]
    for glob in stage.trainable:
        if not any(fnmatchcase(name, glob) for name in names):
            raise UserError(
                f"stages.{stage.name}.trainable: {glob!r} matches no parameter; parts are {', '.join(PARTS)}"
            )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(fnmatchcase(public_name(name), glob) for glob in stage.trained))


def parameter_groups(model: nn.Module, stage: StageConfig) -> list[Group]:
    """Group trainable parameters by part and by whether they take weight decay (vectors, norms, embeddings do not)."""
    no_decay = {
        public_name(f"{name}.weight")
        for name, module in model.named_modules()
        if isinstance(module, (nn.Embedding, nn.LayerNorm))
    }
    trained = [(public_name(n), p) for n, p in model.named_parameters() if p.requires_grad]
    groups = []
    for part in PARTS:
        lr = stage.lr.get(part, stage.lr.get("default"))
        mine = [(n, p) for n, p in trained if n.startswith(part + ".")]
        if not mine:
            continue
        if lr is None:
            raise UserError(f"stages.{stage.name}.lr has no entry for {part!r} (nor 'default'), which is trainable")
        decayed = [n for n, p in mine if _dimensions(p) >= 2 and n not in no_decay]
        rest = [n for n, _ in mine if n not in set(decayed)]
        for names, decay in ((decayed, stage.weight_decay), (rest, 0.0)):
            if names:
                groups.append(Group(part, lr, decay, tuple(names)))
    return groups


def optimizer_groups(model: nn.Module, groups: list[Group]) -> list[dict[str, Any]]:
    """The groups in the form that torch optimizers take."""
    parameters = {public_name(name): parameter for name, parameter in model.named_parameters()}
    return [
        {"params": [parameters[n] for n in g.names], "lr": g.lr, "weight_decay": g.weight_decay, "name": g.part}
        for g in groups
    ]


def lr_factor(stage: StageConfig, step: int, num_steps: int) -> float:
    """Learning rate of optimizer step `step` (0-based) of `num_steps`, as a fraction of the peak.

    A pure function of the step: a resumed run needs no scheduler state. Warm-up is linear and ends at the peak.
    """
    if step < stage.warmup_steps:
        return (step + 1) / stage.warmup_steps
    done = (step - stage.warmup_steps) / max(1, num_steps - stage.warmup_steps)
    shape = {
        "cosine": 0.5 * (1 + math.cos(math.pi * min(1.0, done))),
        "linear": max(0.0, 1 - done),
        "constant": 1.0,
    }[stage.schedule]
    return stage.min_lr_ratio + (1 - stage.min_lr_ratio) * shape


def set_lr(optimizer: Any, groups: list[Group], factor: float) -> dict[str, float]:
    """Give each group its peak rate times `factor`; returns part -> rate."""
    for target, group in zip(optimizer.param_groups, groups, strict=True):
        target["lr"] = group.lr * factor
    return {group.part: group.lr * factor for group in groups}


def _dimensions(parameter: nn.Parameter) -> int:
    """Number of dimensions, also where ZeRO-3 has partitioned the parameter (its own shape is then flat and empty)."""
    return len(getattr(parameter, "ds_shape", parameter.shape))
