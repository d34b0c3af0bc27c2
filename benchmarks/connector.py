"""The ALIGN operator against the ways people compute it, and against two floors of matrix products.

    python benchmarks/connector.py                    the default shapes of this device
    python benchmarks/connector.py --tokens 1024 --repeats 9
    python benchmarks/connector.py --blocks 8192 8448 16384 --tokens 16384 8192

One floor is the operator's own products, swept as it sweeps them, the other seven plain products of 2 N D V FLOPs each.
All methods run in turn on the same inputs, so a busy machine slows them alike; times are medians. Errors are those of
the output and of all gradients, against float64. Prints a table and writes benchmarks/results/connector-<device>.json
after every shape. With --blocks only the operator runs, with these numbers of rows of the vocabulary per block,
beside the plain products.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from _common import TENSORS, Problem, Shape, exact_solution, largest_difference, write
from softmax.floors import Floor, PlainFloor, TokenChunksFloor, VocabBlocksFloor
from softmax.table import PLAIN, SWEPT, Result, show

from alignvlm.kernels import Moments, vocab_moments, vocab_softmax
from alignvlm.kernels.align import vocab_softmax_reference

ACTIVE = 3400
"""Tokens that carry the mass in the paper."""
CHUNK = 1024
"""Tokens per chunk of the checkpointed eager version."""


SHAPES = {
    "cpu": [Shape(n, v, 576, "float32") for n, v in ((256, 49152), (1024, 12288), (1024, 49152), (2048, 49152))],
    "cuda": [
        *(Shape(n, 128_256, 2048, "bfloat16") for n in (16384, 4096, 8193, 65536)),
        *(Shape(16384, v, 2048, "bfloat16") for v in (32_768, 65_536)),
        Shape(16384, 128_256, 4096, "bfloat16"),
    ],
}
BLOCKS = (8192, 8448, 12_672, 12_826, 14_272, 16_032, 16_384)
"""Rows per block to compare on a GPU. With tiles of 256 x 128, blocks of 8,448 and 12,672 rows fill whole waves of an
H100's 132 multiprocessors; 12,826, 14,272 and 16,032 leave no small last block of Llama 3's vocabulary."""
MAIN = {"cpu": Shape(1024, 49152, 576, "float32"), "cuda": Shape(16384, 128_256, 2048, "bfloat16")}
"""The shape whose ratios are printed."""


Method = Callable[..., Tensor]
Clock = Callable[[], float]


def eager_in_chunks(h: Tensor, w2: Tensor, e: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    from torch.utils.checkpoint import checkpoint

    parts = [
        checkpoint(vocab_softmax_reference, part, w2, e, gamma, beta, use_reentrant=False) for part in h.split(CHUNK)
    ]
    return torch.cat(parts)  # type: ignore[arg-type]


class ActiveSubset:
    """A connector restricted to `ACTIVE` tokens: its own W2, gamma and beta rows, E gathered in every step."""

    def __init__(self, problem: Problem) -> None:
        self.ids = torch.arange(0, problem.shape.vocab, max(problem.shape.vocab // ACTIVE, 1), device=problem.device)
        self.ids = self.ids[:ACTIVE]
        whole = vocab_moments(problem.w2)
        self.moments = Moments(whole.mean, whole.covariance, constant=True)
        self.rows = [t[self.ids] for t in (problem.w2, problem.gamma, problem.beta)]

    def __call__(self, h: Tensor, w2: Tensor, e: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        del w2, gamma, beta
        w2, gamma, beta = (t.detach().requires_grad_() for t in self.rows)
        return vocab_softmax(h, w2, e[self.ids], gamma, beta, moments=self.moments)


def methods(problem: Problem, *, compiled: bool, blocks: Sequence[int] = ()) -> dict[str, Method]:
    if blocks:
        implementation = None if problem.device == "cuda" else "vocab_blocks"  # a CPU's own has no such blocks
        ours = partial(vocab_softmax, implementation=implementation)
        return {"ours": ours} | {f"ours, blocks of {rows:,}": partial(ours, block=rows) for rows in blocks}
    chosen: dict[str, Method] = {"eager": vocab_softmax_reference}
    if compiled:
        torch._dynamo.reset()
        chosen["eager + compile"] = torch.compile(vocab_softmax_reference, dynamic=False)
    chosen["eager, chunks + checkpoint"] = eager_in_chunks
    chosen["ours"] = vocab_softmax
    if problem.device == "cuda":
        for name, gib in (("1.5 GiB of", 1.5), ("all", 1024.0)):
            chosen[f"ours, {name} logits kept"] = partial(vocab_softmax, kept_bytes=int(gib * 2**30))
        chosen["ours, blocks of 16,384"] = partial(vocab_softmax, block=16_384)
    chosen["ours, active subset"] = ActiveSubset(problem)
    return chosen


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def timed(problem: Problem, method: Method | Floor, clock: Clock = time.perf_counter) -> tuple[float, float]:
    """(forward, forward + backward) of one run in ms."""
    inputs = problem.inputs()
    synchronize(problem.device)
    start = clock()
    out = None if isinstance(method, Floor) else method(*inputs)
    if isinstance(method, Floor):
        method.forward()
    synchronize(problem.device)
    forward = clock() - start
    if isinstance(method, Floor):
        method.backward()
    elif out is not None:
        out.backward(problem.upstream)
    synchronize(problem.device)
    return forward * 1e3, (clock() - start) * 1e3


def extra_memory(problem: Problem, method: Method) -> float:
    """Peak MiB of one forward + backward beyond inputs, output and gradients."""
    inputs = problem.inputs()
    if problem.device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out = method(*inputs)
        out.backward(problem.upstream)
        peak = torch.cuda.max_memory_allocated() - before
    else:
        cpu = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=cpu, profile_memory=True, acc_events=True) as profile:
            out = method(*inputs)
            out.backward(problem.upstream)
        events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
        live = peak = 0
        for event in sorted(events, key=lambda e: e.start_ns()):
            live += event.nbytes()
            peak = max(peak, live)
    results = [out, *(t.grad for t in inputs if t.grad is not None)]
    return (peak - sum(t.nbytes for t in results)) / 2**20


def errors(problem: Problem, method: Method, exact: dict[str, Tensor]) -> dict[str, float]:
    """Largest error of the output and of each gradient, relative to the largest float64 value."""
    inputs = problem.inputs()
    out = method(*inputs)
    out.backward(problem.upstream)
    found = dict(zip(TENSORS, (out.detach(), *(t.grad for t in inputs)), strict=True))
    return {name: largest_difference(found[name], value) for name, value in exact.items()}


def fits(shape: Shape, device: str) -> bool:
    """Whether eager's N x V tensors have a chance in memory; asked before, since a CPU would swap or die."""
    if device == "cuda":
        return True
    import psutil

    return 8 * shape.tokens * shape.vocab * 4 < 0.6 * psutil.virtual_memory().available


def measure(
    shape: Shape, device: str, repeats: int, *, compiled: bool, clock: Clock, blocks: Sequence[int] = ()
) -> list[Result]:
    problem = Problem(shape, device)
    exact = {} if blocks else exact_solution(problem)
    swept = VocabBlocksFloor if device == "cuda" else TokenChunksFloor
    candidates: dict[str, Method | Floor] = dict(methods(problem, compiled=compiled, blocks=blocks))
    candidates |= {PLAIN: PlainFloor(problem)} if blocks else {SWEPT: swept(problem), PLAIN: PlainFloor(problem)}
    results = {name: Result(name) for name in candidates}
    for name, method in list(candidates.items()):
        try:
            if name in ("eager", "eager + compile", PLAIN) and not fits(shape, device):
                raise torch.OutOfMemoryError
            timed(problem, method)  # warm up: compilation
            if not isinstance(method, Floor):
                results[name].extra_mib = extra_memory(problem, method)
                if exact and "subset" not in name:
                    results[name].errors = errors(problem, method, exact)
        except torch.OutOfMemoryError:
            results[name].note = "does not fit"
            del candidates[name]
        if device == "cuda":
            torch.cuda.empty_cache()
    del exact
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in candidates}
    for _ in range(repeats):
        for name, method in candidates.items():
            times[name].append(timed(problem, method, clock))
    for name, values in times.items():
        results[name].forward_ms = statistics.median(v[0] for v in values)
        results[name].total_ms = statistics.median(v[1] for v in values)
    return list(results.values())


def kernels(problem: Problem) -> dict[str, tuple[int, float]]:
    """Kernel (on a CPU: operator) -> (launches, ms) in one forward and backward of ours, the longest first."""
    cuda = problem.device == "cuda"
    inputs = problem.inputs()
    activities = [torch.profiler.ProfilerActivity.CUDA if cuda else torch.profiler.ProfilerActivity.CPU]
    synchronize(problem.device)
    with torch.profiler.profile(activities=activities, acc_events=True) as profile:
        vocab_softmax(*inputs).backward(problem.upstream)
        synchronize(problem.device)
    microseconds = "self_device_time_total" if cuda else "self_cpu_time_total"
    found = {e.key: (e.count, getattr(e, microseconds) / 1e3) for e in profile.key_averages()}
    return dict(sorted(found.items(), key=lambda item: -item[1][1]))


def show_kernels(found: dict[str, tuple[int, float]]) -> None:
    print(f"\nours, forward and backward: {sum(ms for _, ms in found.values()):,.1f} ms in kernels")
    for name, (count, ms) in list(found.items())[:24]:
        print(f"{ms:10.2f} ms{count:6}  {name[:100]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tokens", type=int, nargs="+", help="visual tokens N instead of the default shapes")
    parser.add_argument("--vocab", type=int, help="vocabulary V with --tokens")
    parser.add_argument("--width", type=int, help="hidden width D with --tokens")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="with --tokens")
    parser.add_argument(
        "--blocks", type=int, nargs="*", metavar="ROWS", help=f"compare sizes of blocks; without a number {BLOCKS}"
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cpu-time", action="store_true", help="one thread, CPU time: fair on a shared CPU")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--profile", action="store_true", help="ours, kernel by kernel, at the first shape")
    parser.add_argument("--name", help="name of the result files (default connector-<device>)")
    arguments = parser.parse_args()
    if arguments.cpu_time:
        torch.set_num_threads(1)
    shapes = SHAPES[arguments.device]
    if arguments.tokens:
        stated = {k: v for k in ("vocab", "width", "dtype") if (v := getattr(arguments, k)) is not None}
        base = asdict(MAIN[arguments.device]) | stated
        shapes = [Shape(**(base | {"tokens": tokens})) for tokens in arguments.tokens]
    measured, profiled = [], {}
    name = arguments.name or f"connector-{arguments.device}" + ("" if arguments.blocks is None else "-blocks")
    for shape in shapes:
        results = measure(
            shape,
            arguments.device,
            arguments.repeats,
            compiled=not arguments.no_compile,
            clock=time.process_time if arguments.cpu_time else time.perf_counter,
            blocks=() if arguments.blocks is None else arguments.blocks or BLOCKS,
        )
        show(shape, results)
        measured.append((shape, results))
        if arguments.profile and not profiled:
            show_kernels(profiled := kernels(Problem(shape, arguments.device)))
        content = {
            "threads": torch.get_num_threads(),
            "clock": "cpu time" if arguments.cpu_time else "wall",
            "repeats": arguments.repeats,
            "kernels": profiled,
            "measurements": [asdict(shape) | {"results": [asdict(r) for r in results]} for shape, results in measured],
        }
        path = write(name, content, arguments.device)
    print(f"\nwrote {path}")


if __name__ == "__main__":
    main()
