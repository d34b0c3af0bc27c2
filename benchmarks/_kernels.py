"""Where the time of a training step goes: kernels by name and by kind, and the connector's share of them."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

RANGE = "alignvlm connector"
"""Name of the connector's forward pass among the profiler's events."""
BACKWARD = 1
"""Scope of a backward node among the profiler's events."""
SHOWN = 25
"""Kernels that are named one by one."""
KINDS = {
    "NCCL": r"nccl",
    "attention": r"flash|fmha|attention|sdpa|_scaled_dot",
    "GEMM": r"gemm|cutlass|nvjet|xmma|cublas|splitk|aten::(addmm|mm|bmm|baddbmm|convolution|mkldnn_convolution)\b",
    "fused layers": r"liger|rms_norm|swiglu|_rope",
    "optimizer": r"multi_tensor|adam",
    "memory": r"memcpy|memset",
    "elementwise": r"elementwise|CatArray|index|scatter|gather|fill|copy|aten::(add|sub|mul|div|exp|gelu|silu|cat)",
    "reductions": r"reduce|norm|softmax|scan|aten::(sum|mean|max|logsumexp)",
}
"""Kind of kernel -> what its name contains; the first that fits, "other" where none does."""


def profile_step(connector: nn.Module, step: Callable[[], object], *, cuda: bool) -> dict[str, Any]:
    """Run a step under the profiler, with the times of `time_table`."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with _named(connector), profile(activities=activities, acc_events=True) as profiler:
        step()
        if cuda:
            torch.cuda.synchronize()
    return time_table(list(profiler.events()), cuda=cuda)


def time_table(events: list[Any], *, cuda: bool) -> dict[str, Any]:
    """Milliseconds by kind and by kernel, and the connector's share; on a CPU the operators' own time is counted.

    Kernels of the connector are those that operators launched in its forward pass, and in the backward nodes that these
    operators have made: autograd gives both the same number.
    """
    rows = _row_kernels()
    nodes = {(e.thread, e.sequence_nr) for e in events if e.sequence_nr >= 0 and _inside(e, _is_range)}
    is_ours = lambda e: _is_range(e) or (e.scope == BACKWARD and (e.fwd_thread, e.sequence_nr) in nodes)
    kernels: dict[str, list[float]] = defaultdict(list)
    connector = 0.0
    for event in events:
        if cuda and event.device_type == DeviceType.CUDA and not event.is_user_annotation:
            kernels[event.name].append(event.time_range.elapsed_us())
        if event.device_type != DeviceType.CPU:
            continue
        launched = [k.duration for k in event.kernels if k.name != RANGE] if cuda else [event.self_cpu_time_total]
        connector += sum(launched) if launched and _inside(event, is_ours) else 0.0
        if not cuda and not event.is_user_annotation:
            kernels[event.name] += launched
    total = sum(map(sum, kernels.values()))
    kinds: dict[str, list[float]] = defaultdict(list)
    for name, times in kernels.items():
        kinds["row kernels" if name in rows else kind_of(name)] += times
    longest = sorted(kernels, key=lambda name: -sum(kernels[name]))[:SHOWN]
    return {
        "total_ms": total / 1e3,
        "launches": sum(map(len, kernels.values())),
        "connector_ms": connector / 1e3,
        "connector_share": connector / total if total else None,
        "kinds": {k: _row(kinds[k], total) for k in sorted(kinds, key=lambda k: -sum(kinds[k]))},
        "kernels": [{"name": name[:160], **_row(kernels[name], total)} for name in longest],
    }


def kind_of(name: str) -> str:
    """Kind of a kernel or operator of this name."""
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name, re.IGNORECASE)), "other")


@contextmanager
def _named(connector: nn.Module) -> Iterator[None]:
    """Name the connector's forward pass in the profile."""
    forward = connector.forward

    def named(*args: Any, **kwargs: Any) -> Any:
        with record_function(RANGE):
            return forward(*args, **kwargs)

    connector.forward = named
    try:
        yield
    finally:
        del connector.forward


def _is_range(event: Any) -> bool:
    return event.name == RANGE


def _inside(event: Any, is_outer: Callable[[Any], bool]) -> bool:
    """Whether the event or one that it lies in is such an outer one."""
    while event is not None and not is_outer(event):
        event = event.cpu_parent
    return event is not None


def _row_kernels() -> set[str]:
    """Names of the ALIGN operator's own kernels."""
    try:
        from alignvlm.kernels.align import rows_triton
    except ImportError:  # no triton
        return set()
    return {name for name in vars(rows_triton) if name.endswith("_kernel")}


def _row(times: list[float], total: float) -> dict[str, Any]:
    return {"ms": sum(times) / 1e3, "share": sum(times) / total if total else 0.0, "count": len(times)}
