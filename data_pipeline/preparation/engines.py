"""Who runs the tasks: processes of this machine, one of several machines that share them, or a Ray cluster.

A task is a picklable value. Its function is a module's, may run again at any time, and leaves what is done alone.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from data_pipeline.errors import DataError
from data_pipeline.parallel import pool, usable_cores
from data_pipeline.progress import Progress, silent

T = TypeVar("T")
_CHUNK = 16
"""Most tasks that go to a process at once: the function, which may hold a tokenizer, goes with them."""


class Engine(Protocol):
    """Calls a function with each task; results in any order."""

    def __call__(self, function: Callable[[Any], Any], tasks: Sequence[Any]) -> Iterator[Any]: ...


@dataclass(frozen=True)
class Local:
    """Processes of this machine; None: `per_core` for each core."""

    processes: int | None = None
    per_core: int = 1

    def __call__(self, function: Callable[[Any], Any], tasks: Sequence[Any]) -> Iterator[Any]:
        processes = self.processes or self.per_core * usable_cores()
        with pool(processes, len(tasks)) as executor:
            if executor is None:
                yield from map(function, tasks)
                return
            size = max(1, min(_CHUNK, len(tasks) // (_CHUNK * processes)))
            chunks = [tasks[begin : begin + size] for begin in range(0, len(tasks), size)]
            try:
                for future in as_completed([executor.submit(_each, function, chunk) for chunk in chunks]):
                    yield from future.result()
            except BrokenProcessPool as error:
                raise DataError(
                    "a process was killed, perhaps for its memory; what is done is kept: run the command again, "
                    "with fewer --processes"
                ) from error
            finally:
                executor.shutdown(wait=True, cancel_futures=True)


@dataclass(frozen=True)
class Ray:
    """Tasks of a Ray cluster: `address` is that of a running one, "auto" this machine's, "local" starts one here.

    Its machines need this package, and the inputs and outputs under the same paths.
    """

    address: str = "local"
    retries: int = 3
    """How often a task is tried again after its worker was lost."""

    def __call__(self, function: Callable[[Any], Any], tasks: Sequence[Any]) -> Iterator[Any]:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # else Ray reports to its makers
        try:
            import ray
        except ImportError as error:
            raise DataError("--ray needs Ray: pip install 'alignvlm[ray]'") from error
        started = not ray.is_initialized()
        if started:
            options: dict[str, Any] = {"include_dashboard": False} if self.address == "local" else {}
            try:
                ray.init(address=self.address, log_to_driver=False, **options)
            except (ConnectionError, ValueError, RuntimeError) as error:
                raise DataError(f"no Ray cluster at {self.address}: {error}") from error
        try:
            yield from _ray_results(ray, function, tasks, self.retries)
        finally:
            if started:
                ray.shutdown()


def _each(function: Callable[[Any], Any], tasks: Sequence[Any]) -> list[Any]:
    return [function(task) for task in tasks]


def _ray_results(ray: Any, function: Callable[[Any], Any], tasks: Sequence[Any], retries: int) -> Iterator[Any]:
    """Results as they come; at most four tasks per CPU wait at a time."""
    remote = ray.remote(max_retries=retries, num_cpus=1)(lambda task: function(task))  # Ray takes functions only
    left, waiting = list(reversed(tasks)), list[Any]()
    while left or waiting:
        bound = 4 * max(1, int(ray.cluster_resources().get("CPU", 1)))
        while left and len(waiting) < bound:
            waiting.append(remote.remote(left.pop()))
        done, waiting = ray.wait(waiting, num_returns=1)
        try:
            yield from ray.get(done)
        except ray.exceptions.RayError as error:
            raise DataError(
                f"a task of Ray failed {retries + 1} times ({type(error).__name__}): run it again"
            ) from error


def share(tasks: Sequence[T], task: int, count: int) -> list[T]:
    """Part `task` (from 0) of `count`, every `count`-th: neighbours, which are alike, go to different ones."""
    if not 0 <= task < count:
        raise DataError(f"--task {task}: with --tasks {count} tasks are 0 to {count - 1}")
    return list(tasks[task::count])


@dataclass(frozen=True)
class _Guarded:
    """The function with a DataError as its result: one input that is damaged does not stop the others."""

    function: Callable[[Any], Any]

    def __call__(self, task: Any) -> Any:
        try:
            return self.function(task)
        except DataError as error:
            return error


def run(
    function: Callable[[T], Any],
    tasks: Sequence[T],
    engine: Engine,
    *,
    title: str,
    progress: Progress = silent,
) -> list[Any]:
    """Results of all tasks, in any order.

    Raises:
        DataError: some could not be done; the others were, and stay done.
    """
    results, failures = [], Counter[str]()
    with progress(title, len(tasks)) as advance:
        for result in engine(_Guarded(function), tasks):
            if isinstance(result, DataError):
                failures[str(result)] += 1
            else:
                results.append(result)
            advance(1)
    if failures:
        first = next(iter(failures))
        more = f" ({failures.total()} of {len(tasks)} tasks failed; the others are done and kept)"
        raise DataError(first + (more if len(tasks) > 1 else ""))
    return results
