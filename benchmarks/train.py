"""A training step on one GPU at the paper's shapes: speed, use of the hardware, memory, host time, kernels.

    python benchmarks/train.py                                    the recipe as it stands, 1B
    python benchmarks/train.py --variants all --profile 1 --budget 480
    python benchmarks/train.py --model 8b --variants default,connector-mlp
    python benchmarks/train.py --tiny                             the same code on a CPU in seconds

Random weights and synthetic packs go through the engine and the step of `alignvlm train`; nothing is downloaded. One
process, one device: what several GPUs add is not in it. A variant that cannot run here (no memory, no package) is noted
with its reason. Writes benchmarks/results/train-<device>.json after every variant.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from _common import RESULTS, write
from steps.variants import ALL, MODELS, VARIANTS, find_variant

from alignvlm.system.imports import importing
from alignvlm.system.leaving import leave

SHORT = {"tiny": (2, 1, 2), "1b": (5, 2, 4), "3b": (3, 1, 4), "8b": (3, 1, 4)}
"""Model -> default steps, warm-up steps, micro-batches per step."""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--model", choices=[name for name in MODELS if name != "tiny"], default="1b")
    size.add_argument("--tiny", dest="model", action="store_const", const="tiny", help="all code, small shapes")
    parser.add_argument(
        "--variants", default="default", metavar="A,B", help=f"all, or of {', '.join(VARIANTS)}; A+B is both"
    )
    parser.add_argument("--steps", type=int, help="steps measured")
    parser.add_argument("--warmup", type=int, help="steps before them")
    parser.add_argument("--micro-batches", type=int, help="packs per step")
    extent = parser.add_mutually_exclusive_group()
    extent.add_argument(
        "--profile", type=int, nargs="?", const=sys.maxsize, default=0, metavar="N",
        help="where the device's and the host's time goes, in the first N variants; in all without N",
    )  # fmt: skip
    extent.add_argument("--brief", action="store_true", help="leave the host's time out: more variants in a short time")
    parser.add_argument("--budget", type=float, default=float("inf"), metavar="SECONDS", help="then start no variant")
    parser.add_argument("--name", help="added to the name of the result file")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the result file")
    arguments = parser.parse_args()
    names = list(ALL) if arguments.variants == "all" else arguments.variants.split(",")
    unknown = [part for name in names for part in name.split("+") if part not in VARIANTS]
    if unknown:
        parser.error(f"--variants: no {', '.join(unknown)}; there are {', '.join(VARIANTS)}")
    arguments.variants = names
    for key, default in zip(("steps", "warmup", "micro_batches"), SHORT[arguments.model], strict=True):
        if getattr(arguments, key) is None:
            setattr(arguments, key, default)
        if getattr(arguments, key) < 1:
            parser.error(f"--{key.replace('_', '-')} must be at least 1")
    return arguments


def main() -> int:
    began, arguments = time.perf_counter(), parse()
    with importing():
        from steps.bench import Bench  # noqa: F401  (torch, transformers and DeepSpeed, without collections)
        from transformers.utils.logging import disable_progress_bar

        from alignvlm.training import distributed

    disable_progress_bar()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the random weights are removed
    world = distributed.start(timeout_minutes=5)
    try:
        return compare(arguments, world, began)
    finally:
        distributed.stop()


def compare(arguments: argparse.Namespace, world: Any, began: float) -> int:
    """Measure the variants; 1 where one of them failed for no reason that is expected."""
    from steps.bench import Bench

    model, device = MODELS[arguments.model], world.device.type
    name = "-".join(filter(None, ["train", device, arguments.name]))
    facts = {key: getattr(arguments, key) for key in ("model", "steps", "warmup", "micro_batches")}
    rows: list[dict[str, Any]] = []
    code, path = 0, None
    with Bench(model, world, arguments.steps, arguments.warmup, arguments.micro_batches, arguments.brief) as bench:
        for number, variant in enumerate(arguments.variants):
            row: dict[str, Any] = {"variant": variant}
            rows.append(row)
            if time.perf_counter() - began > arguments.budget:
                row["failed"] = "not started: --budget is spent"
            else:
                code = max(code, attempt(bench, variant, row, number < arguments.profile))
            print(line(row), flush=True)
            path = write(name, facts | {"rows": rows}, device, arguments.output)
    show(rows)
    print(f"\nwritten: {path}")
    return code


def attempt(bench: Any, variant: str, row: dict[str, Any], profiled: bool) -> int:
    """Measure one variant into `row`; 0, or 1 for an error that nobody expects."""
    import torch

    from alignvlm.errors import UserError

    code, began = 0, time.perf_counter()
    try:
        bench.measure(find_variant(variant), row, profiled=profiled)
    except (torch.OutOfMemoryError, ImportError, UserError) as error:
        row["failed"] = reason(error)
    except Exception as error:  # the other variants are measured all the same
        traceback.print_exc()
        row["failed"], code = reason(error), 1
    bench.release(row)
    row["took_s"] = time.perf_counter() - began
    return code


def reason(error: Exception) -> str:
    """An error in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"


SHAPES = 24
"""That are shown of a profile; the results have more."""
COLUMNS = {
    "s/step": ("step_s", "{:.3f}", 1.0),
    "tokens/s": ("tokens_per_s", "{:,.0f}", 1.0),
    "MFU %": ("mfu", "{:.1f}", 100.0),
    "HFU %": ("hfu", "{:.1f}", 100.0),
    "peak GiB": ("peak_gib", "{:.1f}", 1.0),
    "host ms": ("host_micro_batch_s", "{:.0f}", 1e3),
    "busy %": ("busy", "{:.0f}", 100.0),
    "connector %": ("connector_share", "{:.1f}", 100.0),
}
"""Heading -> key, format, factor."""


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    flat = {**row, **row.get("profile", {})}
    cells = [
        f"{pattern.format(flat[key] * factor) if flat.get(key) is not None else '-':>{max(9, len(head))}}"
        for head, (key, pattern, factor) in COLUMNS.items()
    ]
    return f"{row['variant']:47}" + " ".join(cells) + (f"  {row['failed']}" if "failed" in row else "")


def show(rows: list[dict[str, Any]]) -> None:
    """The table, and where the time of the profiled variants goes."""
    print("\n" + " " * 47 + " ".join(f"{head:>{max(9, len(head))}}" for head in COLUMNS))
    for row in rows:
        print(line(row))
    for row in rows:
        if "profile" in row:
            show_profile(row["variant"], row["profile"])
        if "host_profile" in row:
            show_host(row["host_profile"])


def show_profile(variant: str, found: dict[str, Any]) -> None:
    """Kernels by kind, part and shape: what keeps a step from the speed of a large product."""
    for title in ("kinds", "parts"):
        print(f"\n{variant}, {title}: " + ", ".join(f"{k} {100 * v['share']:.1f} %" for k, v in found[title].items()))
    products, waits = found["products"], found["waits"]
    if products["tflops"]:
        print(
            f"products: {products['ms']:.1f} of {found['total_ms']:.1f} ms, {products['tflops']:.3g} TFLOP/s; a large "
            f"one reaches {products['peak_tflops']:.3g} here, which would save {products['lost_ms']:.1f} ms"
        )
    print("the host waits: " + (", ".join(f"{v['count']} x {k}, {v['ms']:.1f} ms" for k, v in waits.items()) or "-"))
    print(f"{'ms':>9}{'count':>7}{'TFLOP/s':>9}{'lost ms':>9}  operator, shapes, kernel")
    for shape in found["shapes"][:SHAPES]:
        reached = [format(shape[key], ".4g") if key in shape else "-" for key in ("tflops", "lost_ms")]
        print(
            f"{shape['ms']:9.2f}{shape['count']:7}{reached[0]:>9}{reached[1]:>9}  "
            f"{shape['operator']} {shape['shapes'][:60]}  {shape['kernel'][:70]}"
        )


def show_host(found: dict[str, Any]) -> None:
    """Where the host's time of a micro-batch goes."""
    print(f"\nhost: {found['ms_per_micro_batch']:.1f} ms per micro-batch, {found['samples']} samples")
    for title in ("self", "caller"):
        print(f"{title}: " + ", ".join(f"{name} {100 * share:.0f} %" for name, share in found[title].items()))
    for name, milliseconds in list(found["callers"].items())[:SHAPES]:
        print(f"{milliseconds:9.2f} ms  {name}")


if __name__ == "__main__":
    leave(main())
