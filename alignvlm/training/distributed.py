"""The processes of a job: start and end of the process group, and the few collectives that training needs."""

from __future__ import annotations

import logging
import os
import secrets
import socket
import warnings
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from alignvlm.errors import UserError
from alignvlm.launch.local import free_port, is_launched
from alignvlm.system.monitor.heart import Heart
from alignvlm.system.ranks import Ranks
from data_pipeline.loading.malloc import keep_memory

SLOW_WORK = timedelta(hours=24)
"""How long ranks wait for rank 0 where it works alone (preparing data, writing exports)."""


@dataclass(frozen=True)
class World(Ranks):
    """This process among all processes of the job."""

    rank: int
    size: int
    local_rank: int
    device: torch.device
    host_group: Any
    """A gloo group over all ranks with the job's timeout, for what the host knows; None is the default group."""
    cpu_group: Any
    """The same with the timeout `SLOW_WORK`."""
    heart: Heart = field(default_factory=Heart)
    """Tells this rank's monitor that it makes progress, or waits for the others."""

    def beat(self) -> None:
        """This rank has made progress."""
        self.heart.beat()

    def seed(self, number: int) -> None:
        """Seed what this rank draws random numbers from: its host's generator and its GPU's.

        `torch.manual_seed` also leaves word for all kinds of devices that are not there, with a stack trace each.
        """
        torch.default_generator.manual_seed(number)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(number)

    def barrier(self) -> None:
        """Wait until all ranks are here, at most `SLOW_WORK`."""
        with self.heart.waiting():
            dist.barrier(group=self.cpu_group)

    def all_reduce_sum(self, *values: float) -> list[float]:
        """Each value summed over the ranks, in float64, by one collective of the hosts; no GPU takes part."""
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total, group=self.host_group)
        return total.tolist()

    def all_reduce(self, tensor: torch.Tensor) -> None:
        """Sum a tensor on `device` over the ranks, in place; the host does not wait for the result."""
        dist.all_reduce(tensor)

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, on all ranks."""
        box = [value]
        with self.heart.waiting():
            dist.broadcast_object_list(box, src=0, group=self.cpu_group)
        return box[0]

    def all_gather(self, value: Any) -> list[Any]:
        """All ranks' values, in rank order, on all ranks."""
        values: list[Any] = [None] * self.size
        with self.heart.waiting():
            dist.all_gather_object(values, value, group=self.cpu_group)
        return values


def start(timeout_minutes: float, heart: Heart | None = None) -> World:
    """Join the process group that the launcher's environment describes; a lone process makes its own.

    Raises:
        UserError: this host has fewer GPUs than processes.
    """
    _quiet()
    if not is_launched():
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
        os.environ["MASTER_PORT"] = str(free_port())
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    # T and N differ in every micro-batch: blocks of fixed sizes would leave gaps. Read when CUDA is first used.
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    if torch.cuda.is_available():
        local_rank = choose_gpu(local_rank, torch.cuda.device_count(), "CUDA_VISIBLE_DEVICES" in os.environ)
        os.environ["LOCAL_RANK"] = str(local_rank)  # DeepSpeed reads it too
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        # DeepSpeed asks for it at every reduction of gradients; where nobody says it, it starts `numactl` each time.
        os.environ.setdefault("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", "1"))
        keep_memory()
    import deepspeed

    if device.type == "cpu":
        import deepspeed.ops

        # Its shared-memory collectives would be compiled for a minute at every first start; gloo serves as well. And to
        # know what it could compile, it would run a compiler at every start.
        deepspeed.ops.__compatible_ops__ = {}
    backend = "nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(minutes=timeout_minutes)
    heart = heart or Heart()
    with heart.waiting():  # nodes may come late: how long they are waited for is `timeout_minutes`
        deepspeed.init_distributed(dist_backend=backend, timeout=timeout, verbose=False, auto_mpi_discovery=False)
        host_group = dist.new_group(backend="gloo", timeout=timeout) if backend == "nccl" else None
        cpu_group = dist.new_group(backend="gloo", timeout=SLOW_WORK)
    world = World(dist.get_rank(), dist.get_world_size(), local_rank, device, host_group, cpu_group, heart)
    meet(world)
    return world


def meet(world: World) -> None:
    """Tell this rank's monitor where that of rank 0 is, if it runs; every rank calls it."""
    port, token = world.broadcast((world.heart.port, secrets.token_hex(8)))
    if port:
        host = socket.getaddrinfo(os.environ["MASTER_ADDR"], port, type=socket.SOCK_DGRAM)[0][4][0]
        world.heart.join(str(host), port, token)


def choose_gpu(local_rank: int, num_gpus: int, is_chosen: bool) -> int:
    """Number of the GPU of a process, among those that it sees.

    Args:
        is_chosen: a launcher or the user says which GPUs are seen: then a single one is this process's own.

    Raises:
        UserError: this host has fewer GPUs than processes.
    """
    if local_rank < num_gpus:
        return local_rank
    if num_gpus == 1 and is_chosen:
        return 0
    raise UserError(
        f"process {local_rank + 1} of this host has no GPU: {num_gpus} seen here. Start one process per GPU "
        f"(train.processes={num_gpus}, or the launcher's number of processes)"
    )


def gpu_bytes(device: torch.device) -> int:
    """Memory of a device; 0 where it is no GPU."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0


def stop() -> None:
    """Leave the process group, so that this process can join another one."""
    if dist.is_initialized():
        import deepspeed.comm

        deepspeed.comm.destroy_process_group()  # torch's own would leave DeepSpeed with groups that are gone


def _quiet() -> None:
    """Libraries' progress notes and known warnings stay out of the job's output; their errors do not."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch|deepspeed")
    warnings.filterwarnings("ignore", message=".*torch.distributed.*", category=FutureWarning)
    # DeepSpeed's barriers: each process has chosen its GPU by then.
    warnings.filterwarnings("ignore", message=r"barrier\(\): using the device under current context")
    os.environ.setdefault("DS_LOG_LEVEL", "error")
    for name in ("DeepSpeed", "torch.distributed", "accelerate"):
        logging.getLogger(name).setLevel(logging.ERROR)
