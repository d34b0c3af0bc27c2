"""DeepSpeed and PyTorch on the logical streams of logical_streams.py, in place of a CPU that has none."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from deepspeed.accelerator import real_accelerator
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
from deepspeed.comm import comm

from tests.training.logical_streams import COLLECTIVES, Device, Event, Stream


class Accelerator(CPU_Accelerator):
    """DeepSpeed's view of a device with logical streams: the answers of its CUDA accelerator where streams matter."""

    def __init__(self, device: Device) -> None:
        super().__init__()
        self._device = device

    def is_synchronized_device(self) -> bool:
        return False

    def synchronize(self, device_index: int | None = None) -> None:
        self._device.synchronize()

    @property
    def Stream(self) -> Callable[..., Stream]:
        return lambda *_, **__: Stream(self._device)

    @property
    def Event(self) -> Callable[..., Event]:
        return lambda **settings: Event(self._device, **settings)

    def stream(self, stream: Stream) -> Any:
        return self._device.stream(stream)

    def current_stream(self, device_index: int | None = None) -> Stream:
        return self._device.current

    def default_stream(self, device_index: int | None = None) -> Stream:
        return self._device.default


@contextmanager
def logical_streams() -> Iterator[Device]:
    """Let PyTorch and DeepSpeed run on a device with logical streams while this is open."""
    device = Device()
    to_list = torch.Tensor.tolist

    def read_list(tensor: torch.Tensor) -> Any:
        device.look_at(tensor)
        return to_list(tensor)

    with ExitStack() as stack:
        stack.enter_context(patch.object(real_accelerator, "ds_accelerator", Accelerator(device)))
        stack.enter_context(patch.object(torch.Tensor, "record_stream", lambda t, s: device.record_stream(t, s)))
        stack.enter_context(patch.object(torch.Tensor, "tolist", read_list))
        for name in COLLECTIVES:
            stack.enter_context(patch.object(torch.distributed, name, device.collective(name)))
        if comm.cdb is not None:  # it has looked these two up before
            gather, scatter = torch.distributed.all_gather_into_tensor, torch.distributed.reduce_scatter_tensor
            stack.enter_context(patch.object(comm.cdb, "all_gather_function", gather))
            stack.enter_context(patch.object(comm.cdb, "reduce_scatter_function", scatter))
        stack.enter_context(device)
        yield device
