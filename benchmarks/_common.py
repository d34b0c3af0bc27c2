"""What benchmarks share: where a measurement was made, where its result goes, and the ALIGN operator's problems.

Importing it is cheap, for one benchmark measures its own memory: torch comes with the functions that need it.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignvlm.system.environment import processor_name

if TYPE_CHECKING:
    from torch import Tensor

TRIALS, LAUNCHES = 3, 12
"""Of a call that is timed on a GPU."""
RESULTS = Path(os.environ.get("BENCHMARK_RESULTS") or Path(__file__).parent / "results")
PACKAGES = (
    "torch", "triton", "transformers", "deepspeed", "liger-kernel", "flash-attn", "numpy", "webdataset", "pillow",
)  # fmt: skip
NARROW = [
    "train.precision=fp32", "train.gradient_checkpointing=true",
    "model.vision.config.hidden_size=32", "model.vision.config.intermediate_size=64",
    "model.vision.config.num_attention_heads=2", "model.vision.config.image_size=28",
    "model.language.config.hidden_size=32", "model.language.config.intermediate_size=64",
    "model.language.config.num_attention_heads=4", "model.language.config.num_key_value_heads=2",
    "model.language.config.head_dim=8", "model.language.config.vocab_size=512",
]  # fmt: skip
"""The paper's recipe with matrices that cost nothing: 4 visual tokens per tile."""


def environment(device: str = "cpu") -> dict[str, Any]:
    """Date, device, cores, load, versions and commit of this measurement."""
    facts: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": processor_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "versions": {name: version for name in PACKAGES if (version := _version(name))},
        "commit": _commit(),
    }
    if device == "cuda":
        import torch

        facts |= {"device": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    return facts


def write(name: str, content: dict[str, Any], device: str = "cpu", folder: Path = RESULTS) -> Path:
    """Write `content` with the environment to <name>.json in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(environment(device) | content, indent=1) + "\n")
    return path


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    try:
        head = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    except OSError:  # no git
        return "unknown"
    return head.stdout.strip() or "unknown"


@dataclass(frozen=True)
class Shape:
    """N visual tokens, V rows of the vocabulary, D hidden width."""

    tokens: int
    vocab: int
    width: int
    dtype: str


class Problem:
    """Inputs of one shape, as at the start of a training: W2 like an LM head, gamma 1, beta 0."""

    def __init__(self, shape: Shape, device: str) -> None:
        import torch

        generator = torch.Generator(device).manual_seed(0)
        dtype = getattr(torch, shape.dtype)

        def values(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator, device=device).to(dtype)

        self.shape, self.device = shape, device
        self.h = values(shape.tokens, shape.width)
        self.w2, self.e = values(shape.vocab, shape.width) * 0.02, values(shape.vocab, shape.width) * 0.02
        self.gamma, self.beta = torch.ones_like(self.w2[:, 0]), torch.zeros_like(self.w2[:, 0])
        self.upstream = values(shape.tokens, shape.width)

    def inputs(self) -> list[Tensor]:
        """h, w2, e, gamma and beta as fresh leaves that require gradients."""
        leaves = (self.h, self.w2, self.e, self.gamma, self.beta)
        return [t.detach().requires_grad_() for t in leaves]


def timed(run: Callable[[], Any], device: str) -> float:
    """ms of one call: the best of a few trials of several launches."""
    import torch

    run()
    if device == "cpu":
        start = time.perf_counter()
        run()
        return (time.perf_counter() - start) * 1e3
    best = float("inf")
    for _ in range(TRIALS):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(LAUNCHES):
            run()
        stop.record()
        stop.synchronize()
        best = min(best, start.elapsed_time(stop) / LAUNCHES)
    return best


TENSORS = ("out", "h", "w2", "e", "gamma", "beta")
"""What is compared with float64: the output and the gradients."""
EXACT_CHUNK = 512
"""Tokens per chunk of the float64 solution."""


def exact_solution(problem: Problem) -> dict[str, Tensor]:
    """Output and gradients in float64, by the plain form on chunks of tokens."""
    import torch

    from alignvlm.kernels.align import vocab_softmax_reference

    leaves = [t.detach().double().requires_grad_() for t in problem.inputs()[1:]]
    found, grads_h = [], []
    for h, upstream in zip(problem.h.split(EXACT_CHUNK), problem.upstream.split(EXACT_CHUNK), strict=True):
        leaf = h.double().requires_grad_()
        out = vocab_softmax_reference(leaf, *leaves)
        out.backward(upstream.double())
        found.append(out.detach())
        grads_h.append(leaf.grad)
    return dict(zip(TENSORS, (torch.cat(found), torch.cat(grads_h), *(t.grad for t in leaves)), strict=True))


def largest_difference(found: Tensor, exact: Tensor) -> float:
    """Relative to the largest exact value; in pieces, for a float64 copy of a table is large."""
    import torch

    pieces = zip(found.split(8192), exact.split(8192), strict=True)
    return float(torch.stack([(a.double() - b).abs().max() for a, b in pieces]).max() / exact.abs().max())
