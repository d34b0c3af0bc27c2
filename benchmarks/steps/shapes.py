"""Kernels of a profile by the operator that launched them and the shapes it was given; products against the peak."""

from __future__ import annotations

from collections import defaultdict
from math import prod
from typing import Any

import torch
from _common import timed

SHOWN_SHAPES = 48
SIDE = {"cuda": 8192, "cpu": 256}
"""Rows and columns of the product that says what a device reaches."""
PRODUCTS = {"mm": 0, "addmm": 1, "_addmm_activation": 1, "bmm": 0, "baddbmm": 1}
"""Operator -> which of its arguments is the left matrix; the right one follows."""

Launch = tuple[Any, list[tuple[str, float]]]
"""An operator's event, and the kernels that it launched itself: name and microseconds."""


def measured_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of large products one after the other, which leave a device as warm as a step does."""
    side = SIDE[device.type]
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return 2 * side**3 / timed(lambda: torch.mm(left, right), device.type) * 1e3


def operator_table(launches: list[Launch], peak: float) -> dict[str, Any]:
    """Milliseconds by operator, and by operator and shapes; of products also what they reach and lose.

    `lost_ms` is what the products of a shape take beyond their FLOPs at `peak`, in FLOP/s.
    """
    operators: dict[str, list[float]] = defaultdict(list)
    shapes: dict[tuple[str, str], dict[str, Any]] = {}
    for event, kernels in launches:
        microseconds = sum(duration for _, duration in kernels)
        operators[event.name].append(microseconds)
        row = shapes.setdefault(
            (event.name, shape_text(event)), {"us": 0.0, "count": 0, "kernels": {}, "flop": product_flops(event)}
        )
        row["us"] += microseconds
        row["count"] += 1
        for name, duration in kernels:
            row["kernels"][name] = row["kernels"].get(name, 0.0) + duration
    rows = [_shape_row(operator, text, row, peak) for (operator, text), row in shapes.items()]
    rows.sort(key=lambda row: -row["ms"])
    products = [row for row in rows if "tflops" in row]
    tflop = sum(row["tflop"] for row in products)
    product_ms = sum(row["ms"] for row in products)
    return {
        "products": {
            "ms": product_ms,
            "tflop": tflop,
            "tflops": tflop / product_ms * 1e3 if product_ms else None,
            "peak_tflops": peak / 1e12,
            "lost_ms": product_ms - tflop * 1e15 / peak,
        },
        "operators": {
            name: {"ms": sum(times) / 1e3, "count": len(times)}
            for name, times in sorted(operators.items(), key=lambda item: -sum(item[1]))[:SHOWN_SHAPES]
        },
        "shapes": rows[:SHOWN_SHAPES],
    }


def shape_text(event: Any) -> str:
    """Shapes of an operator's tensors: "18432x2048 2048x8192"."""
    return " ".join("x".join(map(str, shape)) for shape in event.input_shapes or () if shape)[:120]


def product_flops(event: Any) -> int | None:
    """FLOPs of an operator that is a matrix product, None for any other."""
    first = PRODUCTS.get(event.name.removeprefix("aten::"))
    if first is None or len(event.input_shapes or ()) < first + 2:
        return None
    left, right = event.input_shapes[first : first + 2]
    if not left or not right:
        return None
    return int(2 * prod(left) * right[-1])


def _shape_row(operator: str, text: str, row: dict[str, Any], peak: float) -> dict[str, Any]:
    milliseconds = row["us"] / 1e3
    found = {"operator": operator, "shapes": text, "ms": milliseconds, "count": row["count"]}
    if row["flop"] and milliseconds:
        tflop = row["flop"] * row["count"] / 1e12
        found |= {"tflop": tflop, "tflops": tflop / milliseconds * 1e3, "lost_ms": milliseconds - tflop * 1e15 / peak}
    found["kernel"] = max(row["kernels"], key=row["kernels"].get)[:120]
    return found
