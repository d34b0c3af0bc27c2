"""What DeepSpeed's bookkeeping costs the host: a step with the paper's numbers of layers, at tiny widths.

At these widths the arithmetic is nothing, and what remains is what the host does for every module and parameter: on a
GPU this is the time that must fit beside the kernels. What DeepSpeed gathers, prefetches, keeps and reduces at once is
the share of the model that it is at the real widths. CPU time, so that a busy machine disturbs little:

    python benchmarks/step_overhead.py
    python benchmarks/step_overhead.py --layers 16 --variants whole-layers,recipe,zero1 --rounds 3

Writes benchmarks/results/step_overhead.json. A GPU adds events and streams: benchmarks/train.py has its host time.
"""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
import time
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from _common import NARROW, write

TILES, TEXT = 24, 100
SIZES = (
    "reduce_bucket_size", "allgather_bucket_size", "sub_group_size", "stage3_prefetch_bucket_size",
    "stage3_max_live_parameters", "stage3_max_reuse_distance",
)  # fmt: skip
"""Numbers of elements in DeepSpeed's configuration."""
PERSISTENT = 256
"""At the real widths vectors stay gathered, matrices and the connector's vectors over the vocabulary do not."""

IN_BUCKET = {"contiguous_gradients": True}
"""Gradients are copied one by one into one tensor before they are reduced."""
AIM_MS, AIM_LAYERS = 150, 16
"""Of a later micro-batch, for the 1B recipe."""


@dataclass(frozen=True)
class Variant:
    """What differs from the recipe."""

    strategy: str = "zero3"
    whole_layers: bool = True
    shortcuts: bool = True
    """Of `alignvlm/training/zero3/shortcuts.py`."""
    zero: dict[str, Any] = field(default_factory=dict)
    """Changes of its `zero_optimization`, sizes as at the real widths."""
    recomputed: bool = True
    """Layers recompute their activations in the backward pass, as in the recipe."""


VARIANTS = {
    "modules": Variant(whole_layers=False, shortcuts=False, zero=IN_BUCKET),
    "whole-layers": Variant(shortcuts=False, zero=IN_BUCKET),
    "recipe": Variant(),
    "reuse-2e9": Variant(zero={"stage3_max_reuse_distance": 2_000_000_000}),
    "reuse-0": Variant(zero={"stage3_max_reuse_distance": 0}),
    "gradients-in-bucket": Variant(zero=IN_BUCKET),
    "all-persistent": Variant(zero={"stage3_param_persistence_threshold": 2_000_000_000}),
    "none-persistent": Variant(zero={"stage3_param_persistence_threshold": 0}),
    "no-prefetch": Variant(zero={"stage3_prefetch_bucket_size": 0}),
    "nothing-recomputed": Variant(recomputed=False),
    "whole-layers-nothing-recomputed": Variant(recomputed=False, shortcuts=False, zero=IN_BUCKET),
    "zero2": Variant("zero2"),
    "zero1": Variant("zero1"),
    "zero1-nothing-recomputed": Variant("zero1", recomputed=False),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[16, 32], help="layers of the language model")
    parser.add_argument("--variants", default=",".join(VARIANTS), metavar="A,B", help="of " + ", ".join(VARIANTS))
    parser.add_argument("--repeats", type=int, default=7, help="micro-batches measured, after two others")
    parser.add_argument("--rounds", type=int, default=2, help="how often each variant has its turn")
    args = parser.parse_args()
    names = args.variants.split(",")
    if unknown := [name for name in names if name not in VARIANTS]:
        parser.error(f"--variants: no {', '.join(unknown)}; there are {', '.join(VARIANTS)}")

    import torch

    from alignvlm.training import distributed

    torch.set_num_threads(1)  # a second one waits for its share of so little by spinning, which counts as CPU time
    world = distributed.start(timeout_minutes=5)
    rows = []
    for layers in args.layers:
        print(f"\n27 SigLIP and {layers} Llama layers, least CPU ms per micro-batch (forward, backward)")
        print(f"{'':32}{'first':>9}{'second':>9}{'later':>9}")
        with tempfile.TemporaryDirectory() as folder:
            export = save_model(layers, Path(folder))
            taken: dict[str, list[list[float]]] = {name: [] for name in ("no-deepspeed", *names)}
            for _ in range(args.rounds):
                for name, turns in taken.items():
                    if name == "no-deepspeed":
                        turns.append(measure_plain(export, args.repeats))
                    else:
                        turns.append(measure_engine(layers, export, world, VARIANTS[name], args.repeats))
        rows += [row(name, layers, turns) for name, turns in taken.items()]
    distributed.stop()
    targets = judge(rows)
    print("\nwritten:", write("step_overhead", {"rows": rows, "targets": targets}))
    print(targets)
    return 0 if all(targets.values()) else 1


def judge(rows: list[dict[str, Any]]) -> dict[str, bool]:
    """Whether the variants that were measured reach the aim, with all layers recomputed and with none."""
    aims = {"recipe": "all layers recomputed", "nothing-recomputed": "nothing recomputed"}
    return {
        f"{AIM_LAYERS} layers under ZeRO-3, {aims[row['variant']]} <= {AIM_MS} ms": row["later_ms"] <= AIM_MS
        for row in rows
        if row["variant"] in aims and row["language_layers"] == AIM_LAYERS
    }


def recipe_of(layers: int, variant: Variant = VARIANTS["recipe"], narrow: bool = True) -> Any:
    """The paper's recipe with this many language layers, narrow or as it is."""
    from alignvlm.config.load import load_recipe

    changes = [f"model.language.config.num_hidden_layers={layers}", f"train.deepspeed={variant.strategy}"]
    recomputation = f"train.gradient_checkpointing={str(variant.recomputed).lower()}"
    return load_recipe("paper_llama32_1b", [*(NARROW if narrow else []), *changes, recomputation])


@cache
def share_of_parameters(layers: int) -> float:
    """Parameters of the narrow model over those of the real one."""
    from alignvlm.model.network import build_network

    models = (build_network(recipe_of(layers, narrow=narrow)).model for narrow in (True, False))
    narrow, real = (sum(parameter.numel() for parameter in model.parameters()) for model in models)
    return narrow / real


def save_model(layers: int, folder: Path) -> Path:
    """An export with random weights."""
    from alignvlm.model import AlignVLMForConditionalGeneration
    from alignvlm.model.network import build_network

    AlignVLMForConditionalGeneration(build_network(recipe_of(layers)).model.config).save_pretrained(folder)
    return folder


def inputs(image_token: int) -> dict[str, Any]:
    """A packed micro-batch of one document."""
    import torch

    visual = 4 * TILES
    length = visual + TEXT
    ids = torch.full((1, length), 7)
    ids[0, :visual] = image_token
    return {
        "input_ids": ids,
        "pixel_values": torch.zeros(TILES, 3, 28, 28, dtype=torch.uint8),
        "position_ids": torch.arange(length)[None],
        "cu_seqlens": torch.tensor([0, length], dtype=torch.int32),
        "max_seqlen": length,
        "visual_positions": torch.arange(visual),
        "target_positions": torch.arange(visual, length - 1),
        "targets": torch.full((TEXT - 1,), 7),
        "num_items_in_batch": TEXT - 1,
    }


def measure_plain(export: Path, repeats: int) -> list[float]:
    """Seconds of micro-batches without DeepSpeed."""
    import torch

    from alignvlm.model import AlignVLMForConditionalGeneration
    from alignvlm.model.attention import SDPA

    attention = {"text_config": SDPA, "vision_config": "sdpa"}
    model = AlignVLMForConditionalGeneration.from_pretrained(export, attn_implementation=attention).train()
    model.to(torch.float32)
    model.activation_checkpointing_enable({"use_reentrant": False})
    batch = inputs(model.config.image_token_id)
    return timed(lambda: model(**batch).loss.backward(), repeats)


def measure_engine(layers: int, export: Path, world: Any, variant: Variant, repeats: int) -> list[float]:
    """Seconds of micro-batches through the engine, none of which ends an optimizer step."""
    from alignvlm.config.deepspeed import deepspeed_config
    from alignvlm.training.engine import build_trainer

    recipe = recipe_of(layers, variant)
    stage = recipe.stages["alignment"]
    zero = deepspeed_config(recipe, stage, world.size)["zero_optimization"]
    zero |= {"stage3_param_persistence_threshold": PERSISTENT, **variant.zero}
    zero |= {key: 16 * round(zero[key] * share_of_parameters(layers) / 16) for key in SIZES if key in zero}
    extra = {"zero_optimization": zero}
    trainer = build_trainer(
        recipe, stage, export, world, extra, whole_layers=variant.whole_layers, shortcuts=variant.shortcuts
    )
    batch = inputs(trainer.config.image_token_id)

    def micro_batch() -> None:
        trainer.engine.backward(trainer.engine(**batch).loss)
        trainer.engine.step()

    seconds = timed(micro_batch, repeats)
    trainer.close()
    return seconds


def timed(micro_batch: Any, repeats: int) -> list[float]:
    """CPU seconds of this process for each of two micro-batches and `repeats` more."""
    gc.collect()
    gc.freeze()  # as training does
    seconds = []
    for _ in range(repeats + 2):
        began = time.process_time()
        micro_batch()
        seconds.append(time.process_time() - began)
    gc.unfreeze()
    return seconds


def row(name: str, layers: int, turns: list[list[float]]) -> dict[str, Any]:
    """Print and return a row of the table: the least of each column, for what disturbs only adds."""
    first, second = (1e3 * min(turn[number] for turn in turns) for number in (0, 1))
    later = 1e3 * min(seconds for turn in turns for seconds in turn[2:])
    print(f"{name:32}{first:9.0f}{second:9.0f}{later:9.0f}", flush=True)
    return {"variant": name, "language_layers": layers, "first_ms": first, "second_ms": second, "later_ms": later}


if __name__ == "__main__":
    raise SystemExit(main())
