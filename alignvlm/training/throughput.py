"""Speed of a step: tokens and samples per second, time waiting for data, memory, model FLOPs utilisation."""

from __future__ import annotations

from typing import Any

import psutil
import torch

from alignvlm.training.distributed import World


class Throughput:
    """Adds what a step's record says about speed."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._process = psutil.Process()

    def measure(self, record: dict[str, Any], data_wait: float) -> dict[str, Any]:
        """Of rank 0's step: the waiting for data counts as time of the step."""
        wall = record["seconds"] + data_wait
        return {
            "seconds": wall,
            "tokens_per_second": record["tokens"] / wall,
            "samples_per_second": record["samples"] / wall,
            "data_wait": data_wait,
            "memory_gib": self._memory() / 2**30,
        }

    def _memory(self) -> float:
        if self._world.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._world.device)
        return self._process.memory_info().rss
