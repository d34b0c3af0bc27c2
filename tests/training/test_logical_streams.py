"""The stand-in for streams: what it calls a race, and what not."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist

from tests.training.logical_streams import Device, Stream
from tests.training.on_streams import logical_streams


@pytest.fixture
def group() -> Iterator[None]:
    """Of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def written_and_read(device: Device, side: Stream, *, waits: bool) -> None:
    x = torch.ones(4)
    if waits:
        side.wait_stream(device.current)
    with device.stream(side):
        x.add(1)
    device.synchronize()


def read_and_overwritten(device: Device, side: Stream, *, waits: bool) -> None:
    x = torch.ones(4)
    side.wait_stream(device.current)
    with device.stream(side):
        x.add(1)
        event = side.record_event()
    if waits:
        event.wait()
    x.zero_()


def views_overlap(device: Device, side: Stream, *, waits: bool) -> None:
    x = torch.ones(4)
    side.wait_stream(device.current)
    with device.stream(side):
        x[:2].add_(1)
    if waits:
        side.synchronize()
    torch._foreach_add_([x[2:]], 1)


def memory_let_go(device: Device, side: Stream, *, waits: bool) -> None:
    x = torch.ones(4)
    side.wait_stream(device.current)
    with device.stream(side):
        x.sum()
    if waits:
        x.record_stream(side)  # type: ignore[arg-type]
    del x
    torch.ones(4)


def memory_let_go_before_a_wait(device: Device, side: Stream, *, waits: bool) -> None:
    x = torch.ones(4)
    side.wait_stream(device.current)
    with device.stream(side):
        x.sum()
    del x
    if waits:
        device.current.wait_stream(side)
    torch.ones(4)


def memory_from_another_stream(device: Device, side: Stream, *, waits: bool) -> None:
    """Whose memory it was may still write to it."""
    x = torch.empty(4)
    if waits:
        side.wait_stream(device.current)
    with device.stream(side):
        x.zero_()
    device.synchronize()


def looked_at(device: Device, side: Stream, *, waits: bool) -> None:
    with device.stream(side):
        x = torch.ones(1)
        if waits:
            x.item()
    x.add(1)


def a_gradient_on_another_stream(device: Device, side: Stream, *, waits: bool) -> None:
    x = torch.ones(4, requires_grad=True)

    def hook(parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        if waits:
            side.wait_stream(device.current)
        with torch.no_grad(), device.stream(side):
            parameter.grad.mul_(2)

    x.register_post_accumulate_grad_hook(hook)
    (x * 2).sum().backward()


def a_collective(device: Device, side: Stream, *, waits: bool) -> None:
    x = torch.ones(4)
    work = dist.all_reduce(x, async_op=True)
    if waits:
        work.wait()
    x.add(1)


def a_collective_waited_for_elsewhere(device: Device, side: Stream, *, waits: bool) -> None:
    x = torch.ones(4)
    with device.stream(device.current if waits else side):
        dist.all_reduce(x, async_op=True).wait()
    x.add(1)


@pytest.mark.parametrize(
    "program",
    [
        written_and_read, read_and_overwritten, views_overlap, memory_let_go, memory_let_go_before_a_wait,
        memory_from_another_stream, looked_at, a_gradient_on_another_stream, a_collective,
        a_collective_waited_for_elsewhere,
    ],
)  # fmt: skip
def test_a_race_is_one_only_without_the_wait(program: Callable[..., None], group: None) -> None:
    for waits in (True, False):
        with logical_streams() as device:
            program(device, Stream(device), waits=waits)
        assert (device.races == {}) == waits, device.races


def test_a_synchronous_collective_runs_on_the_current_stream(group: None) -> None:
    with logical_streams() as device:
        x = torch.ones(4)
        dist.all_reduce(x)
        x.add(1)
    assert not device.races
    assert list(device.operators) == [device.default]


def test_a_graph_grows_on_the_default_stream_only() -> None:
    with logical_streams() as device, device.stream(Stream(device)), pytest.raises(NotImplementedError, match="graph"):
        torch.ones(4, requires_grad=True).add(1)
