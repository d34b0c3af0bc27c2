"""Streams of a device that a CPU stands in for: accesses to memory that no wait orders, and memory let go too early.

Every operator runs at once, in ordinary memory; what is kept is only what CUDA would promise. Each stream has a vector
clock: the last operator of every stream that is known to be over before its next one begins. A storage remembers its
last accesses, and an access that is not ordered after a conflicting one is a race. The rules are PyTorch 2.11's:

- The host orders nothing, except where it waits: `synchronize`, and `item` and `tolist` of what the device holds. The
  host holds what no operator made (a batch, `torch.tensor`), and what is computed of nothing else. `Event.query` says
  that nothing is over yet, the worst for who asks.
- Memory belongs to the stream that is current when it is allocated, and allocating it is a write there: what had the
  memory before may still run. Once the last reference is gone, the next allocation of that stream may get it. By then
  that stream has waited for the use by any other, or the memory was recorded for a stream that is behind that use
  (`Tensor.record_stream`).
- Collectives behave as NCCL's: a synchronous one runs on the current stream; an asynchronous one on its own, which
  waits for the current stream at the call. `wait` lets the current stream wait for it, and until then it keeps its
  tensors alive.
- Autograd runs the backward pass of an operator on the stream of its forward pass. This is not modelled but demanded:
  a graph may grow on the default stream only. Then all of a backward pass is there, hooks included.
"""

from __future__ import annotations

import functools
import inspect
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import CodeType
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

Clock = dict["Stream", int]
COLLECTIVES = (
    "all_reduce", "broadcast", "all_gather_into_tensor", "reduce_scatter_tensor", "all_gather", "reduce_scatter",
)  # fmt: skip
"""Of `torch.distributed`; each writes its first argument."""


def _join(clock: Clock, other: Clock) -> None:
    for stream, number in other.items():
        clock[stream] = max(clock.get(stream, 0), number)


class Stream:
    """A queue of a device; its methods are those of `torch.cuda.Stream`."""

    def __init__(self, device: Device, name: str = "") -> None:
        self.device = device
        self.name = name or f"stream {next(device.names)}"
        self.clock: Clock = {}

    def wait_stream(self, other: Stream) -> None:
        _join(self.clock, other.clock)

    def wait_event(self, event: Event) -> None:
        _join(self.clock, event.clock)

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event(self.device)
        event.record(self)
        return event

    def synchronize(self) -> None:
        _join(self.device.host, self.clock)


class Event:
    """A place in a queue; its methods are those of `torch.cuda.Event`."""

    def __init__(self, device: Device, **_: Any) -> None:
        self.device = device
        self.clock: Clock = {}

    def record(self, stream: Stream | None = None) -> None:
        self.clock = dict((stream or self.device.current).clock)

    def wait(self, stream: Stream | None = None) -> None:
        (stream or self.device.current).wait_event(self)

    def query(self) -> bool:
        return False

    def synchronize(self) -> None:
        _join(self.device.host, self.clock)

    def elapsed_time(self, other: Event) -> float:
        return 0.0


class Access(NamedTuple):
    """An operator on a piece of memory."""

    stream: Stream
    number: int
    """Operators are numbered through, over all streams."""
    operator: str
    calls: list[tuple[CodeType, int]]
    """The four innermost functions that led to it, and their lines."""

    def __str__(self) -> str:
        calls = (f"{code.co_name} ({code.co_filename.rpartition('/')[2]}:{line})" for code, line in self.calls)
        return f"{self.operator} on {self.stream.name}, by {' < '.join(calls)}"


class Operator(NamedTuple):
    """What an operator does to each of its arguments: "reads" or "writes"; None for a view or its shape only."""

    name: str
    positions: list[str | None]
    names: dict[str, str | None]

    @classmethod
    @functools.cache
    def of(cls, function: Any) -> Operator:
        name = str(function)
        is_factory = any(part in name for part in (".new_", ".empty", "_like."))
        names: dict[str, str | None] = {}
        for argument in function._schema.arguments:
            alias = argument.alias_info
            names[argument.name] = None if is_factory else "reads"
            if alias is not None:
                names[argument.name] = "writes" if alias.is_write else None
        return cls(name, list(names.values()), names)


@dataclass
class Memory:
    """What is known of a storage."""

    owner: Stream
    is_host: bool
    write: Access | None = None
    reads: dict[Stream, Access] = field(default_factory=dict)
    """Since the last write, the last one of each stream."""
    uses: dict[Stream, Access] = field(default_factory=dict)
    """The last one of each stream."""
    recorded: set[Stream] = field(default_factory=set)


class Work:
    """An asynchronous collective."""

    def __init__(self, device: Device, event: Event, tensors: list[torch.Tensor]) -> None:
        self._device, self._event, self._tensors = device, event, tensors
        device.unfinished.add(self)  # NCCL's watchdog keeps what nobody waits for until it is over

    def wait(self, *_: Any) -> bool:
        self._device.current.wait_event(self._event)
        self._tensors = []
        self._device.unfinished.discard(self)
        return True


class Device(TorchDispatchMode):
    """Looks on while it is entered; `races` holds a text for each race, by the places in the code, once."""

    def __init__(self) -> None:
        super().__init__()
        self.names = iter(range(1, sys.maxsize))
        self.default = self.current = Stream(self, "the default stream")
        self.host: Clock = {}
        self.unfinished: set[Work] = set()
        self.races: dict[str, None] = {}
        self.operators: dict[Stream, int] = {}
        """How many have run."""
        self.num_waits = 0
        """How often the host has waited for the whole device."""
        self._memory: dict[int, Memory] = {}
        self._let_go: dict[Stream, list[Access]] = {}
        """Stream -> uses by others of memory that its next allocation may get."""
        self._communicators: dict[Any, Stream] = {}
        self._number = 0
        self._in_collective = False

    # What the accelerator offers.

    @contextmanager
    def stream(self, stream: Stream | None) -> Iterator[None]:
        """Make a stream the current one while this is open."""
        before, self.current = self.current, stream or self.current
        try:
            yield
        finally:
            self.current = before

    def synchronize(self) -> None:
        """The host waits for all streams."""
        self.num_waits += 1
        for stream in self.operators:
            stream.synchronize()

    def record_stream(self, tensor: torch.Tensor, stream: Stream) -> None:
        """`Tensor.record_stream`."""
        self._of(tensor).recorded.add(stream)

    # What runs.

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._in_collective or func is torch.ops.aten.record_stream.default:
            return func(*args, **kwargs)
        operator = Operator.of(func)
        read, written, seen = [], [], []
        for effect, value in [
            *zip(operator.positions, args, strict=False),
            *((operator.names[name], value) for name, value in kwargs.items()),
        ]:
            for tensor in _tensors(value):
                memory = self._of(tensor)
                seen.append(tensor)
                if effect is not None:
                    (written if effect == "writes" else read).append(memory)
        if self.current is not self.default and torch.is_grad_enabled() and any(t.requires_grad for t in seen):
            raise NotImplementedError(f"{func} grows a graph on {self.current.name}")
        result = func(*args, **kwargs)
        for tensor in _tensors(result):
            if tensor.untyped_storage()._cdata not in self._memory:
                written.append(self._allocated(tensor, is_host=bool(seen) and all(self._of(t).is_host for t in seen)))
        if read or written:
            self._launch(operator.name, read, written)
        if func is torch.ops.aten._local_scalar_dense.default:
            self.look_at(args[0])
        return result

    def look_at(self, tensor: torch.Tensor) -> None:
        """The host reads a tensor."""
        if not self._of(tensor).is_host:
            self.current.synchronize()

    def collective(self, name: str) -> Callable[..., Any]:
        """The function of `torch.distributed` as NCCL would run it."""
        function = getattr(torch.distributed, name)
        signature = inspect.signature(function)

        def run(*args: Any, **kwargs: Any) -> Work | None:
            bound = signature.bind(*args, **kwargs)
            is_asynchronous = bound.arguments.pop("async_op", False)
            written, read = list(_tensors(bound.args[0])), list(_tensors(bound.args[1:]))
            stream = self.current
            if is_asynchronous:
                stream = self._communicators.setdefault(bound.arguments.get("group"), Stream(self, "NCCL's stream"))
                stream.wait_stream(self.current)
            with self.stream(stream):
                self._launch(name, [self._of(t) for t in read], [self._of(t) for t in written])
            self._in_collective = True
            try:
                function(*bound.args, **bound.kwargs)
            finally:
                self._in_collective = False
            return Work(self, stream.record_event(), [*read, *written]) if is_asynchronous else None

        return run

    # What is known of it.

    def _of(self, tensor: torch.Tensor) -> Memory:
        known = self._memory.get(tensor.untyped_storage()._cdata)
        return known or self._new(tensor, self.default, is_host=True)

    def _new(self, tensor: torch.Tensor, owner: Stream, is_host: bool) -> Memory:
        storage = tensor.untyped_storage()
        memory = self._memory[storage._cdata] = Memory(owner, is_host)
        weakref.finalize(storage, self._free, storage._cdata, memory)
        return memory

    def _allocated(self, tensor: torch.Tensor, is_host: bool) -> Memory:
        for use in self._let_go.pop(self.current, ()):
            if not self._is_over(use):
                self._report(f"let go while in use, for the next allocation of {self.current.name}: {use}")
        return self._new(tensor, self.current, is_host)

    def _free(self, key: int, memory: Memory) -> None:
        if self._memory.get(key) is memory:
            del self._memory[key]
        known: Clock = {memory.owner: sys.maxsize}
        for stream in memory.recorded:  # the allocator waits for what each has been given until now
            _join(known, stream.clock)
        others = [use for stream, use in memory.uses.items() if use.number > known.get(stream, 0)]
        self._let_go.setdefault(memory.owner, []).extend(others)

    def _is_over(self, access: Access) -> bool:
        """Whether it is, before anything that the current stream begins now."""
        known = max(self.current.clock.get(access.stream, 0), self.host.get(access.stream, 0))
        return access.stream is self.current or access.number <= known

    def _launch(self, operator: str, read: list[Memory], written: list[Memory]) -> None:
        stream = self.current
        _join(stream.clock, self.host)
        self._number += 1
        self.operators[stream] = self.operators.get(stream, 0) + 1
        access = Access(stream, self._number, operator, _calls())
        for memory in [*read, *written]:
            self._check("write", memory.write, access)
        for memory in written:
            for other in memory.reads.values():
                self._check("read", other, access)
            memory.write, memory.reads = access, {}
        for memory in read:
            memory.reads[stream] = access
        for memory in [*read, *written]:
            memory.uses[stream] = access
        stream.clock[stream] = self._number

    def _check(self, kind: str, before: Access | None, access: Access) -> None:
        if before is not None and before is not access and not self._is_over(before):
            self._report(f"{access}, not after the {kind} by {before}")

    def _report(self, race: str) -> None:
        self.races[race] = None


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _tensors(each)


def _calls() -> list[tuple[CodeType, int]]:
    found: list[tuple[CodeType, int]] = []
    frame = sys._getframe(2)
    while frame is not None and len(found) < 4:
        if _is_told(frame.f_code):
            found.append((frame.f_code, frame.f_lineno))
        frame = frame.f_back  # type: ignore[assignment]
    return found


@functools.cache
def _is_told(code: CodeType) -> bool:
    """Whether it is neither PyTorch, nor this module, nor one of DeepSpeed's wrappers."""
    untold = (
        "/torch/",
        "/contextlib.py",
        "/deepspeed/comm/",
        "/nvtx.py",
        "/logical_streams.py",
        "/typing_extensions.py",
    )
    return not any(part in code.co_filename for part in untold)
