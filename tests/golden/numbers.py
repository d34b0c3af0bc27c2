"""What the golden record holds, computed anew: losses of two recipes, first batches of three plans, kernel outputs.

`python -m tests.golden.numbers` writes the record; that is done only by a change that means to change numbers, which
says so in its commit message and in CHANGELOG.md.
"""

from __future__ import annotations

import json
import platform
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from alignvlm.config import load_recipe
from alignvlm.kernels import linear_cross_entropy
from data_pipeline.order.hashing import counter_hash, hash_key
from data_pipeline.order.plan import Plan
from data_pipeline.order.settings import PlanSettings
from data_pipeline.order.summary import summarise
from tests.faults import Jobs
from tests.jobs import TINY, metrics
from tests.kernels.align.cases import problem, solve

RECORD = Path(__file__).with_name("record.json")
STEPS = 20
PICKED = 6
"""Elements of a tensor that the record names besides its norm."""


def losses(jobs: Jobs) -> dict[str, list[dict[str, float]]]:
    """Loss and gradient norm of 20 steps of the tiny recipe and of the quickstart's first stage, two ranks each."""
    tiny = [f"stages.connector.max_steps={STEPS}", "stages.instruct=null", "evaluation.tasks.test=null"]
    quickstart = [
        f"stages.connector.max_steps={STEPS}",
        "stages.joint=null",
        "stages.instruct=null",
        "evaluation.tasks={}",
    ]
    found = {}
    for name, recipe, overrides in (("tiny", str(TINY), tiny), ("quickstart", "quickstart", quickstart)):
        with tempfile.TemporaryDirectory() as folder:
            jobs.at(Path(folder)).finish(recipe, *overrides)
            lines = metrics(Path(folder) / "runs" / name)
        found[name] = [{"loss": line["loss"], "grad_norm": line["grad_norm"]} for line in lines]
    return found


@dataclass(frozen=True)
class MadeUpSource:
    """Sample lengths without samples, the same on every machine."""

    fingerprint: str
    measures: np.ndarray
    shard_starts: np.ndarray


def made_up_source(name: str) -> MadeUpSource:
    """Lengths of 40 to 2,087 tokens and 0 to 3 tiles."""
    num_samples = 5000
    numbers = counter_hash(hash_key("golden", name), np.arange(num_samples, dtype=np.uint64))
    tokens, tiles = 40 + numbers % np.uint64(2048), (numbers >> np.uint64(32)) % np.uint64(4)
    starts = np.append(np.arange(0, num_samples, 400), num_samples).astype(np.int64)
    return MadeUpSource(f"golden {name}", np.stack([tokens, tiles], axis=1).astype(np.uint32), starts)


def plans() -> dict[str, dict[str, Any]]:
    """The plan of one stage of three recipes over made-up sources: steps, a hash of the order, the first batches."""
    found = {}
    for recipe_name, stage_name in (
        ("quickstart", "joint"),
        ("paper_llama32_1b", "documents"),
        (str(TINY), "connector"),
    ):
        recipe = load_recipe(recipe_name)
        stage = recipe.stages[stage_name]
        plan = Plan(
            {name: made_up_source(name) for name in stage.mixture},
            stage.mixture,
            PlanSettings(
                seed=recipe.seed,
                sequence_length=max(stage.sequence_length, 2100),
                global_batch_packs=stage.global_batch_packs,
                window_shards=recipe.data.window_shards,
                mix_block=recipe.data.mix_block,
                pack_window=min(recipe.data.pack_window, 4096),
                epochs=stage.epochs,
                max_steps=stage.max_steps,
            ),
        )
        summary = summarise(plan, 2)
        kept = ("version", "fingerprint", "order", "steps", "samples_per_epoch", "tokens_per_epoch", "first_batches")
        found[f"{recipe.name}.{stage_name}"] = {key: summary[key] for key in kept}
    return found


def kernels() -> dict[str, dict[str, list[float]]]:
    """Outputs and gradients of the ALIGN operator, both ways, and of the token loss: norm and some elements each."""
    torch.set_num_threads(1)
    found = {}
    for implementation in ("reference", "token_chunks", "vocab_blocks"):
        inputs = problem(70, 500, 48, dtype=torch.float32, scale=3.0)
        found[f"vocab_softmax {implementation}"] = _described(solve(inputs, implementation=implementation))
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(90, 48, generator=generator).requires_grad_()
    weight = torch.randn(500, 48, generator=generator).requires_grad_()
    loss = linear_cross_entropy(hidden, weight, torch.arange(90) * 5, None, chunk=32)
    loss.backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    tensors = {"loss": loss.detach(), "hidden": hidden.grad, "weight": weight.grad}
    return found | {"linear_cross_entropy": _described(tensors)}


def machine() -> dict[str, str]:
    """What decides the last bits: the same machine must find the same bits, another one nearly the same numbers."""
    cpu = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), "")
    return {
        "cpu": cpu.partition(":")[2].strip(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__.partition("+")[0],
        "architecture": platform.machine(),
    }


def numbers() -> dict[str, Any]:
    """Everything."""
    with tempfile.TemporaryDirectory() as folder, Jobs(Path(folder)) as jobs:
        return {"machine": machine(), "plans": plans(), "kernels": kernels(), "losses": losses(jobs)}


def _described(tensors: Mapping[str, torch.Tensor]) -> dict[str, list[float]]:
    rows = {}
    for name, tensor in tensors.items():
        flat = tensor.flatten()
        picked = flat[torch.linspace(0, len(flat) - 1, min(PICKED, len(flat))).long()]
        rows[name] = [float(flat.double().norm()), *picked.tolist()]
    return rows


if __name__ == "__main__":
    RECORD.write_text(json.dumps(numbers(), indent=1) + "\n")
    print(f"wrote {RECORD}")
