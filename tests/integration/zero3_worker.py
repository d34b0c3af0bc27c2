"""A rank of the ZeRO-3 comparison: trains a few steps and lets rank 0 write losses, gradients and weights.

Arguments: output file, "tied" or "untied", "checkpointing" or "plain". With checkpointing the linear layers are ours,
as on a GPU, without it DeepSpeed's. Started by test_zero3.py.
"""

from __future__ import annotations

import sys
import weakref
from pathlib import Path

import torch
from deepspeed.utils import safe_get_full_grad

from alignvlm.kernels.linear import keep_parameters
from alignvlm.model import AlignVLMForConditionalGeneration
from alignvlm.training import distributed
from alignvlm.training.checkpoints.export import consolidate
from alignvlm.training.engine import Trainer, gather_whole_layers, share_embeddings, zero3_construction
from tests.tiny import pack, samples, tiny_model

STEPS = 3
LR = {"lr": 1e-3, "betas": (0.9, 0.95), "weight_decay": 0.1}


def micro_batches() -> list[dict]:
    """Text only, images only, mixed: also at the same time on different ranks."""
    documents = [tiny_model()[1].encode(s) for s in samples()]
    return [pack([documents[i] for i in chosen]) for chosen in ([0], [1, 2], [2, 0], [0, 0])]


def main(output: Path, tied: bool, checkpointing: bool) -> None:
    world = distributed.start(timeout_minutes=2)
    folder = output.with_suffix(".model")
    if world.is_main:
        tiny_model(text={"tie_word_embeddings": tied})[0].save_pretrained(folder)
    world.barrier()
    batches = micro_batches()
    mine = batches[world.rank :: world.size]
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": len(mine),
        "gradient_clipping": 0.0,
        "zero_optimization": {
            "stage": 3, "overlap_comm": False, "stage3_param_persistence_threshold": 0,
            "memory_efficient_linear": not checkpointing,
        },
        "optimizer": {"type": "AdamW", "params": {"torch_adam": True}},
    }  # fmt: skip
    linear = torch.nn.functional.linear
    with zero3_construction(config):
        model = AlignVLMForConditionalGeneration.from_pretrained(
            folder, dtype=torch.float32, attn_implementation={"text_config": "alignvlm_sdpa", "vision_config": "sdpa"}
        )
    model.train()
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
        keep_parameters(model)
    import deepspeed

    gather_whole_layers(model)
    groups = [{"params": list(model.parameters()), **LR}]
    engine, *_ = deepspeed.initialize(model=model, model_parameters=groups, config=config, dist_init_required=False)
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
    assert (torch.nn.functional.linear is linear) == checkpointing
    trainer.close()
    assert torch.nn.functional.linear is linear
    alive = sum(reference() is not None for reference in moments)
    if world.is_main:
        found = {"losses": losses, "gradients": gradients, "weights": weights, "alive": alive, "moments": len(moments)}
        torch.save(found, output)
    distributed.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2] == "tied", sys.argv[3] == "checkpointing")
