"""A rank of the ZeRO-3 comparison: trains a few steps per case; rank 0 writes losses, gradients and weights.

Then both ranks compare ZeRO-3 with and without our shortcuts (shortcuts_worker.py), look for races between streams
(streams_worker.py) and train a LoRA stage (lora_worker.py), rank 0 once more alone. Argument: the output file. Started
by test_zero3.py.
"""

from __future__ import annotations

import gc
import os
import sys
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from deepspeed.utils import safe_get_full_grad

from alignvlm.kernels.linear import keep_parameters
from alignvlm.model import AlignVLMForConditionalGeneration, AlignVLMProcessor
from alignvlm.training import distributed
from alignvlm.training.checkpoints.export import consolidate
from alignvlm.training.engine import Trainer, share_embeddings, zero3_construction
from alignvlm.training.zero3.layers import gather_whole_layers
from alignvlm.training.zero3.shortcuts import take_shortcuts
from tests.integration.lora_worker import on_one_rank, on_two_ranks
from tests.integration.shortcuts_worker import compared
from tests.integration.streams_worker import mutants
from tests.tiny import CONNECTORS, pack, samples, tiny_model

STEPS = 3
LR = {"lr": 1e-3, "betas": (0.9, 0.95), "weight_decay": 0.1}


@dataclass(frozen=True)
class Case:
    """A model to train."""

    connector: dict[str, Any]
    tied: bool = True
    checkpointing: bool = False
    """Recomputes its layers. Its linear layers are ours, its sums of gradients and its optimizer those of
    ds_configs/cpu_zero3.json; else they are DeepSpeed's defaults."""

    def model(self) -> AlignVLMForConditionalGeneration:
        return self._made()[0]

    def micro_batches(self) -> list[dict[str, Any]]:
        """Text only, images only, mixed: also at the same time on different ranks."""
        processor = self._made()[1]
        documents = [processor.encode(sample) for sample in samples()]
        return [pack([documents[i] for i in chosen]) for chosen in ([0], [1, 2], [2, 0], [0, 0])]

    def _made(self) -> tuple[AlignVLMForConditionalGeneration, AlignVLMProcessor]:
        return tiny_model(self.connector, {"tie_word_embeddings": self.tied})


CASES = {
    "align": Case(CONNECTORS["align"]),
    "align, checkpointing": Case(CONNECTORS["align"], tied=False, checkpointing=True),
    "align as released": Case(CONNECTORS["align as released"], checkpointing=True),
    "ovis": Case(CONNECTORS["ovis"], checkpointing=True),
    "perceiver": Case(CONNECTORS["perceiver"], tied=False),
    "h_reducer": Case(CONNECTORS["h_reducer"], checkpointing=True),
    "c_abstractor": Case(CONNECTORS["c_abstractor"]),
}


def main(output: Path) -> None:
    world = distributed.start(timeout_minutes=2)
    gc.freeze()  # each engine that closes collects: not what was imported
    found: dict[str, Any] = {}
    for number, (name, case) in enumerate(CASES.items()):
        folder = output.with_suffix(f".model{number}")
        if world.is_main:
            case.model().save_pretrained(folder)
        world.barrier()
        found[name] = train(case, folder, world)
    found["shortcuts"] = compared(output.with_suffix(".shortcuts"), world)
    found["mutants"] = mutants(output.with_suffix(".shortcuts") / "model", world)
    lora = on_two_ranks(output.with_suffix(".lora"), world)
    distributed.stop()
    if world.is_main:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            os.environ.pop(name)
        on_one_rank(output.with_suffix(".lora"), distributed.start(timeout_minutes=2), lora)
        distributed.stop()
        torch.save(found | {"lora": lora}, output)
    gc.unfreeze()  # or Triton complains of leaks


def train(case: Case, folder: Path, world: distributed.World) -> dict[str, Any]:
    """Losses, first gradients, last weights, and how many tensors of the optimizer there were and are left."""
    batches = case.micro_batches()
    mine = batches[world.rank :: world.size]
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": len(mine),
        "gradient_clipping": 0.0,
        "zero_optimization": {
            "stage": 3, "overlap_comm": False, "stage3_param_persistence_threshold": 0,
            "memory_efficient_linear": not case.checkpointing, "reduce_scatter": not case.checkpointing,
            "contiguous_gradients": case.checkpointing,
        },
        "prescale_gradients": case.checkpointing,
        "optimizer": {"type": "AdamW", "params": {"torch_adam": True, "fused": case.checkpointing}},
    }  # fmt: skip
    linear = torch.nn.functional.linear
    with zero3_construction(config):
        model = AlignVLMForConditionalGeneration.from_pretrained(
            folder, dtype=torch.float32, attn_implementation={"text_config": "alignvlm_sdpa", "vision_config": "sdpa"}
        )
    model.train()
    if case.checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
        keep_parameters(model)
    import deepspeed

    gather_whole_layers(model)
    groups = [{"params": list(model.parameters()), **LR}]
    engine, *_ = deepspeed.initialize(model=model, model_parameters=groups, config=config, dist_init_required=False)
    assert take_shortcuts(engine)
    share_embeddings(model)
    tokens = sum(int((b["labels"] != -100).sum()) for b in batches)
    losses, gradients = [], {}
    for _ in range(STEPS):
        total = 0.0
        for batch in mine:
            loss = engine(**batch, num_items_in_batch=tokens / len(batches)).loss
            engine.backward(loss)
            if engine.is_gradient_accumulation_boundary() and not gradients:
                gradients = {name: safe_get_full_grad(p).clone() for name, p in model.named_parameters()}
            engine.step()
            total += loss.item()
        losses.append(world.all_reduce_sum(total)[0] / len(batches))
    weights = consolidate(model, world)
    moments = [weakref.ref(value) for state in engine.optimizer.optimizer.state.values() for value in state.values()]
    trainer = Trainer(engine, [], "alignvlm_sdpa")
    del engine, model, loss, groups
    assert (torch.nn.functional.linear is linear) == case.checkpointing
    trainer.close()
    assert torch.nn.functional.linear is linear
    alive = sum(reference() is not None for reference in moments)
    return {"losses": losses, "gradients": gradients, "weights": weights, "alive": alive, "moments": len(moments)}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
