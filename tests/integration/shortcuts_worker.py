"""A few steps of two ranks with the shortcuts through ZeRO-3 and without, bit for bit. Run by zero3_worker.py.

And once more with them on logical streams (tests/training/logical_streams.py), to find races.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from deepspeed.utils import get_z3_leaf_modules, safe_get_full_grad

from alignvlm.config.deepspeed import find_deepspeed_config
from alignvlm.training.engine import Trainer
from alignvlm.training.step import inputs_of
from alignvlm.training.zero3 import shortcuts
from tests.one_rank import differing, masters, micro_batches, take_bad_step, take_step, trainer_of
from tests.tiny import tiny_model
from tests.training.on_streams import logical_streams

ACCUMULATION = 4
RECOMPUTED, FROZEN = "train.gradient_checkpointing=true", "stages.connector.trainable=[connector.*, language.*]"
CASES: dict[str, tuple[str, tuple[str, ...], dict[str, Any]]] = {
    "vectors stay, a whole connector": ("zero3", (), {
        "stage3_param_persistence_threshold": 100, "leaf_module": {"names": ["model.connector"]},
    }),
    "recomputed, small buckets": ("zero3", (RECOMPUTED, "train.precision=fp32"), {
        "stage3_param_persistence_threshold": 100, "reduce_bucket_size": 20_000, "stage3_prefetch_bucket_size": 9_000,
    }),
    "vision frozen": ("zero3", (RECOMPUTED, FROZEN), {
        "stage3_param_persistence_threshold": 100, "reduce_bucket_size": 20_000, "contiguous_gradients": True,
    }),
    "on a CPU": ("cpu_zero3", (), {}),
}  # fmt: skip
"""Strategy, settings of the recipe, changes of the strategy's `zero_optimization`."""


def observed(trainer: Trainer, world: Any) -> tuple[dict[str, torch.Tensor], list[Any]]:
    """Gradients and weights of some steps, and their losses, norms and the loss in a pass without gradients."""
    batches = micro_batches(ACCUMULATION)[world.rank :: world.size]
    gradients: dict[str, torch.Tensor] = {}
    step: Callable[[], None] = trainer.engine.step

    def look() -> None:
        if trainer.engine.is_gradient_accumulation_boundary():
            learns = [(name, p) for name, p in trainer.model.named_parameters() if p.requires_grad]
            gradients.update((f"gradient of {name}", safe_get_full_grad(p).clone()) for name, p in learns)
        step()

    trainer.engine.step = look
    steps = [take_step(trainer, batches, world) for _ in range(2)]
    seen: list[Any] = [take_bad_step(trainer, batches, world)]
    trainer.engine.eval()
    with torch.no_grad():
        seen += [trainer.engine(**inputs_of(b), num_items_in_batch=1).loss.item() for b in batches[:2]]
    trainer.engine.train()
    steps.append(take_step(trainer, batches, world))
    seen += [(each.loss, each.grad_norm) for each in steps]
    return gradients | masters(trainer), seen


def trainer_by(version: str, case: str, model: Path, world: Any) -> Trainer:
    """A trainer of a case, with the shortcuts where `version` is that of the DeepSpeed they know, else without."""
    strategy, settings, changes = CASES[case]
    zero = json.loads(find_deepspeed_config(strategy).read_text())["zero_optimization"] | changes
    with patch.object(shortcuts, "VERSION", version):
        return trainer_of(model, strategy, world, *settings, accumulation=ACCUMULATION, zero_optimization=zero)


def compared(folder: Path, world: Any) -> dict[str, Any]:
    """What differs with the shortcuts and without, and between a device with streams and none, and more, by case."""
    if world.is_main:
        tiny_model()[0].save_pretrained(folder / "model")
    world.barrier()
    results = {}
    for case, (strategy, *_) in CASES.items():
        found, named = [], []
        ways = [(shortcuts.VERSION, False), ("another", False), (shortcuts.VERSION, True)]
        for version, has_streams in ways if strategy == "zero3" else ways[:2]:
            with logical_streams() if has_streams else nullcontext() as device:
                trainer = trainer_by(version, case, folder / "model", world)
                found.append(observed(trainer, world))
                named.append(len(list(get_z3_leaf_modules(trainer.model)[0].parameters())))
                trainer.close()
        (ours, seen), (theirs, seen_by_them), *others = found
        results[case] = {
            "tensors": len(ours), "differing": differing(ours, theirs), "seen": [seen, seen_by_them],
            "named": named[:2],
        }  # fmt: skip
        for on_streams, seen_on_streams in others:
            assert device is not None
            results[case] |= {
                "streams": list(device.operators.values()), "races": world.all_gather(list(device.races)),
                "differing on streams": differing(ours, on_streams), "same on streams": seen == seen_on_streams,
            }  # fmt: skip
    return results
