"""What ZeRO-3's bookkeeping costs the host: a step with the paper's numbers of layers, at tiny widths.

At these widths the arithmetic is nothing, and what remains is what the host does for every module: on a GPU this is the
time that must fit beside the kernels. Run alone: `python benchmarks/step_overhead.py`. Writes
benchmarks/results/step_overhead.json.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from _common import NARROW, write

TILES, TEXT = 24, 100
VARIANTS: dict[str, tuple[bool, dict[str, Any]]] = {
    "reuse distance 2e9": (False, {}),
    "reuse distance 0": (False, {"stage3_max_reuse_distance": 0}),
    "whole layers": (True, {}),
    "whole layers, reuse distance 0": (True, {"stage3_max_reuse_distance": 0}),
}
"""Name -> whether layers are gathered whole, and what changes in ds_configs/zero3.json."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[16, 32], help="layers of the language model")
    parser.add_argument("--repeats", type=int, default=7, help="micro-batches measured, after two others")
    args = parser.parse_args()

    from alignvlm.training import distributed

    world = distributed.start(timeout_minutes=5)
    rows = []
    for layers in args.layers:
        print(f"\n27 SigLIP and {layers} Llama layers, ms per micro-batch (forward and backward)")
        print(f"{'':34}{'first':>9}{'second':>9}{'later':>9}")
        with tempfile.TemporaryDirectory() as folder:
            export = save_model(layers, Path(folder))
            rows += [run("no DeepSpeed", layers, measure_plain(export, args.repeats))]
            for name, (whole, changes) in VARIANTS.items():
                rows += [run(name, layers, measure_zero3(layers, export, world, whole, changes, args.repeats))]
    distributed.stop()
    print("\nwritten:", write("step_overhead", {"rows": rows}))


def recipe_of(layers: int) -> Any:
    """The paper's recipe with this many language layers, narrow."""
    from alignvlm.config.load import load_recipe

    return load_recipe("paper_llama32_1b", [*NARROW, f"model.language.config.num_hidden_layers={layers}"])


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
    return [timed(lambda: model(**batch).loss.backward()) for _ in range(repeats + 2)]


def measure_zero3(
    layers: int, export: Path, world: Any, whole: bool, changes: dict[str, Any], repeats: int
) -> list[float]:
    """Seconds of micro-batches through the engine, none of which ends an optimizer step."""
    from alignvlm.config.deepspeed import read_strategy
    from alignvlm.training.engine import build_trainer

    recipe = recipe_of(layers)
    stage = recipe.stages["alignment"]
    zero = {**read_strategy(stage)["zero_optimization"], **changes}
    trainer = build_trainer(recipe, stage, export, world, {"zero_optimization": zero}, whole_layers=whole)
    batch = inputs(trainer.config.image_token_id)

    def micro_batch() -> None:
        trainer.engine.backward(trainer.engine(**batch).loss)
        trainer.engine.step()

    seconds = [timed(micro_batch) for _ in range(repeats + 2)]
    trainer.close()
    return seconds


def timed(function: Any) -> float:
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def run(name: str, layers: int, seconds: list[float]) -> dict[str, Any]:
    """Print and return a row of the table."""
    first, second, later = (1e3 * x for x in (seconds[0], seconds[1], statistics.median(seconds[2:])))
    print(f"{name:34}{first:9.0f}{second:9.0f}{later:9.0f}", flush=True)
    return {"variant": name, "language_layers": layers, "first_ms": first, "second_ms": second, "later_ms": later}


if __name__ == "__main__":
    main()
