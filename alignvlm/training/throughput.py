"""Speed of a step: tokens and samples per second, time waiting for data, memory, model FLOPs utilisation."""

from __future__ import annotations

import json
import logging
import time
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil
import torch
import transformers

from alignvlm import __version__
from alignvlm.config.schema import PARTS, Recipe, StageConfig
from alignvlm.model import AlignVLMConfig
from alignvlm.model.flops import TrainingFlops, Work, count_flops
from alignvlm.model.network import network_of
from alignvlm.training.distributed import World
from alignvlm.training.step import StepCounts
from data_pipeline.files import read_or_make, reason, to_json, write_atomic

log = logging.getLogger(__name__)
PEAK_TFLOPS = {
    "H100": 989,
    "H200": 989,
    "H800": 989,
    "B200": 2250,
    "GB200": 2250,
    "A100": 312,
    "A800": 312,
    "L40S": 362,
}
"""TFLOPS of dense bf16 matrix products, from data sheets; the key is part of the device's name."""


class Speed(NamedTuple):
    """The fields of `record.StepRecord` that say how fast a step was."""

    seconds: float
    tokens_per_second: float
    samples_per_second: float
    mfu: float
    data_wait: float
    memory_gib: float


class Throughput:
    """Computes the speed of steps."""

    def __init__(self, recipe: Recipe, stage: StageConfig, config: AlignVLMConfig, world: World, cache: Path) -> None:
        """Every rank calls it; `cache` keeps the FLOPs of the stage for the next start."""
        self._world = world
        self._process = psutil.Process()
        self._flops = world.of_main(counted_flops, cache, config, stage)
        self._peak = peak_flops(world.device, recipe.train.precision) * world.size

    def measure(self, counts: StepCounts, seconds: float, data_wait: float) -> Speed:
        """Speed of a step that computed for `seconds`; waiting for data counts as part of the step."""
        wall = seconds + data_wait
        work = Work(counts.tokens, counts.tiles, counts.supervised, counts.attended)
        flops = sum(part.model for part in self._flops.of(work).values())
        return Speed(
            seconds=wall,
            tokens_per_second=counts.tokens / wall,
            samples_per_second=counts.samples / wall,
            mfu=flops / wall / self._peak,
            data_wait=data_wait,
            memory_gib=self._memory() / 2**30,
        )

    def _memory(self) -> float:
        if self._world.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._world.device)
        return self._process.memory_info().rss


def counted_flops(cache: Path, config: AlignVLMConfig, stage: StageConfig) -> TrainingFlops:
    """`count_flops` of a stage, from the cache where that holds them: counting takes 1.5 s of CPU time.

    A disk that does not take the cache is a warning.
    """
    versions = {"alignvlm": __version__, "torch": str(torch.__version__), "transformers": transformers.__version__}
    trained = {"trainable": stage.trained} | ({"lora": asdict(stage.lora)} if stage.lora else {})
    made_from = {**versions, **trained, "model": json.loads(config.to_json_string())}

    def read(path: Path) -> TrainingFlops | None:
        found = json.loads(path.read_bytes())
        if found["made_from"] != made_from:
            return None
        rates: dict[str, np.ndarray] = {part: np.array(found["rates"][part], dtype=float) for part in PARTS}
        if any(each.shape != (3, 4) for each in rates.values()):
            raise ValueError("it does not hold the rates of all parts")
        return TrainingFlops(rates)

    def make() -> TrainingFlops:
        flops = count_flops(network_of(config).of_stage(stage), stage.trained)
        rates = {part: rates.tolist() for part, rates in flops.rates.items()}
        try:
            cache.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(cache, to_json({"made_from": made_from, "rates": rates}) + "\n")
        except OSError as error:
            log.warning("%s cannot be written, the next start counts again (%s)", cache, reason(error))
        return flops

    return read_or_make(cache, read, make)


def peak_flops(device: torch.device, precision: str) -> float:
    """Peak operations per second of one rank: by data sheet where the GPU is known, else the best measured GEMM."""
    if device.type == "cuda" and precision == "bf16":
        name = torch.cuda.get_device_name(device)
        for key, tflops in PEAK_TFLOPS.items():
            if key in name:
                return tflops * 1e12
    size = 8192 if device.type == "cuda" else 1024
    a = torch.ones(size, size, device=device, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    best = float("inf")
    for _ in range(4):
        began = time.perf_counter()
        product = a @ a
        float(product[0, 0])  # waits for the device
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best
