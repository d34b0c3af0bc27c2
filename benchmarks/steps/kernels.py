"""Where the time of a training step goes: kernels by name, kind, part of the model, operator and shape."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from steps.shapes import operator_table
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

WAITS = r"^cu(da)?(Stream|Device|Event|Ctx)Synchronize"
"""Calls in which the host waits for the device."""
RANGE = "alignvlm "
"""Before a part's name: its forward pass among the profiler's events."""
REST = "loss, optimizer and the rest"
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


def profile_step(parts: dict[str, nn.Module], step: Callable[[], object], peak: float, *, cuda: bool) -> dict[str, Any]:
    """Run a step under the profiler, with the times of `time_table`.

    Args:
        parts: of the model, by name; one is "connector".
        peak: FLOP/s that a large product reaches here.
    """
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with ExitStack() as stack:
        for name, part in parts.items():
            stack.enter_context(_named(part, RANGE + name))
        profiler = stack.enter_context(profile(activities=activities, record_shapes=True, acc_events=True))
        step()
        if cuda:
            torch.cuda.synchronize()
    return time_table(list(profiler.events()), peak, cuda=cuda)


def time_table(events: list[Any], peak: float, *, cuda: bool) -> dict[str, Any]:
    """Milliseconds by kind, kernel, part, operator and shape; on a CPU the operators' own time is counted.

    Kernels of a part are those that operators launched in its forward pass, and in the backward nodes that these
    operators have made: autograd gives both the same number.
    """
    rows = _row_kernels()
    part_of = _Parts(events)
    kernels: dict[str, list[float]] = defaultdict(list)
    parts: dict[str, float] = defaultdict(float)
    waits: dict[str, list[float]] = defaultdict(list)
    launches: list[tuple[Any, list[tuple[str, float]]]] = []
    for event in events:
        if cuda and event.device_type == DeviceType.CUDA and not event.is_user_annotation:
            kernels[event.name].append(event.time_range.elapsed_us())
        if event.device_type != DeviceType.CPU:
            continue
        if re.match(WAITS, event.name):
            waits[event.name].append(event.time_range.elapsed_us())
        if cuda:
            launched = [(k.name, k.duration) for k in event.kernels if not k.name.startswith(RANGE)]
        else:
            launched = [] if event.is_user_annotation else [(event.name, event.self_cpu_time_total)]
            for name, duration in launched:
                kernels[name].append(duration)
        if launched:
            parts[part_of(event)] += sum(duration for _, duration in launched)
            launches.append((event, launched))
    total = sum(map(sum, kernels.values()))
    kinds: dict[str, list[float]] = defaultdict(list)
    for name, times in kernels.items():
        kinds["row kernels" if name in rows else kind_of(name)] += times
    longest = sorted(kernels, key=lambda name: -sum(kernels[name]))[:SHOWN]
    connector = parts.get("connector", 0.0)
    return {
        "total_ms": total / 1e3,
        "launches": sum(map(len, kernels.values())),
        "connector_ms": connector / 1e3,
        "connector_share": connector / total if total else None,
        "kinds": {k: _row(kinds[k], total) for k in sorted(kinds, key=lambda k: -sum(kinds[k]))},
        "parts": {k: {"ms": v / 1e3, "share": v / total} for k, v in sorted(parts.items(), key=lambda item: -item[1])},
        "waits": {name: {"ms": sum(times) / 1e3, "count": len(times)} for name, times in waits.items()},
        **operator_table(launches, peak),
        "kernels": [{"name": name[:160], **_row(kernels[name], total)} for name in longest],
    }


class _Parts:
    """To which part of the model the events of a profile belong."""

    def __init__(self, events: list[Any]) -> None:
        self._nodes: dict[tuple[int, int], str] = {}
        for event in events:
            if event.sequence_nr >= 0 and (name := _in_a_range(event)):
                self._nodes[event.thread, event.sequence_nr] = name

    def __call__(self, event: Any) -> str:
        """The part whose forward pass, or a backward node of which, the event lies in."""
        found, outer = _in_a_range(event), event
        while found is None and outer is not None:
            if outer.scope == BACKWARD:
                found = self._nodes.get((outer.fwd_thread, outer.sequence_nr))
            outer = outer.cpu_parent
        return found or REST


def _in_a_range(event: Any) -> str | None:
    while event is not None and not event.name.startswith(RANGE):
        event = event.cpu_parent
    return None if event is None else str(event.name.removeprefix(RANGE))


def kind_of(name: str) -> str:
    """Kind of a kernel or operator of this name."""
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name, re.IGNORECASE)), "other")


@contextmanager
def _named(part: nn.Module, name: str) -> Iterator[None]:
    """Name the part's forward pass in the profile."""
    forward, own = part.forward, vars(part).get("forward")

    def named(*args: Any, **kwargs: Any) -> Any:
        with record_function(name):
            return forward(*args, **kwargs)

    part.forward = named
    try:
        yield
    finally:
        del part.forward
        if own is not None:
            part.forward = own


def _row_kernels() -> set[str]:
    """Names of the ALIGN operator's own kernels."""
    try:
        from alignvlm.kernels.align import rows_triton
    except ImportError:  # no triton
        return set()
    return {name for name in vars(rows_triton) if name.endswith("_kernel")}


def _row(times: list[float], total: float) -> dict[str, Any]:
    return {"ms": sum(times) / 1e3, "share": sum(times) / total if total else 0.0, "count": len(times)}
