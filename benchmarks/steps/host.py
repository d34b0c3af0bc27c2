"""What the host is at during a step: samples of Python's stacks, in the main thread and in autograd's.

A sampling thread, since a profiler that is called at every function would change what it measures, and sees one
thread only: on a GPU the backward pass runs in a thread of autograd's, DeepSpeed's hooks with it.
"""

from __future__ import annotations

import sys
import sysconfig
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

EVERY = 5e-4
"""Seconds between samples."""
SWITCH = 1e-4
"""Seconds after which a thread that runs Python hands over, so that the sampling thread gets its turn."""
SHOWN = 30
ROOT = Path(__file__).resolve().parents[2]
STANDARD = Path(sysconfig.get_path("stdlib"))
PLAIN = ("torch", "python")
"""Packages that act for a caller."""


def sample_host(run: Callable[[], object], micro_batches: int) -> dict[str, Any]:
    """Call `run`, which takes so many micro-batches, and say where its time went.

    Returns:
        `self`: shares by the package whose code runs or waits; `caller`: by the innermost package that is neither torch
        nor Python itself; `functions`: ms per micro-batch of single functions, `callers` of those that are neither.
    """
    main, stop = threading.get_ident(), threading.Event()
    others = set(sys._current_frames()) - {main}  # autograd's thread runs no Python yet, and is not among them
    stacks: list[list[tuple[str, str]]] = []

    def watch() -> None:
        own = threading.get_ident()
        while not stop.wait(EVERY):
            frames = sys._current_frames()
            backward = [frame for ident, frame in frames.items() if ident not in others and ident not in (main, own)]
            stacks.append(_places(backward[0] if backward else frames[main]))
            del frames, backward

    thread, before = threading.Thread(target=watch, daemon=True), sys.getswitchinterval()
    sys.setswitchinterval(SWITCH)
    thread.start()
    began = time.perf_counter()
    try:
        run()
        seconds = time.perf_counter() - began
    finally:
        stop.set()
        thread.join()
        sys.setswitchinterval(before)
    callers = [next((place for place in stack if place[0] not in PLAIN), stack[0]) for stack in stacks]
    per_sample = 1e3 * seconds / micro_batches / max(len(stacks), 1)
    return {
        "samples": len(stacks),
        "ms_per_micro_batch": 1e3 * seconds / micro_batches,
        "self": _shares(package for (package, _), *_ in stacks),
        "caller": _shares(package for package, _ in callers),
        "functions": _longest((name for (_, name), *_ in stacks), per_sample),
        "callers": _longest((name for _, name in callers), per_sample),
    }


def _places(frame: FrameType | None) -> list[tuple[str, str]]:
    """(package, function) from the innermost frame outwards."""
    places = []
    while frame is not None:
        code = frame.f_code
        package, file = _package(code.co_filename)
        places.append((package, f"{file}:{code.co_name}"))
        frame = frame.f_back
    return places


def _package(filename: str) -> tuple[str, str]:
    """A source file's package, and its path from there; "python" is Python's own library."""
    path = Path(filename)
    if path.is_relative_to(ROOT) and ".venv" not in path.parts:
        inside = path.relative_to(ROOT)
        return inside.parts[0], str(inside)
    # Packages may lie in any folder of the search path, as where `pip install --target` puts them.
    folders = [folder for folder in map(Path, sys.path) if folder != STANDARD and path.is_relative_to(folder)]
    if not folders:
        return "python", path.name
    inside = path.relative_to(max(folders, key=lambda folder: len(folder.parts)))
    return inside.parts[0], str(inside)


def _shares(names: Any) -> dict[str, float]:
    counts = Counter(names)
    return {name: count / counts.total() for name, count in counts.most_common()}


def _longest(names: Any, per_sample: float) -> dict[str, float]:
    return {name: count * per_sample for name, count in Counter(names).most_common(SHOWN)}
