"""A training step on one device, random weights and synthetic packs, through the engine and the step of training."""

from __future__ import annotations

import gc
import math
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from steps.host import sample_host
from steps.kernels import profile_step
from steps.shapes import measured_peak
from steps.variants import Model, Pack, Variant, merged

from alignvlm.config.deepspeed import deepspeed_config
from alignvlm.config.load import load_recipe
from alignvlm.config.schema import Recipe
from alignvlm.errors import UserError
from alignvlm.kernels.fused_layers import choose_fused_layers
from alignvlm.model import AlignVLMConfig, AlignVLMForConditionalGeneration
from alignvlm.model.attention import choose_attention
from alignvlm.model.flops import Work, count_flops
from alignvlm.model.modeling import head
from alignvlm.model.network import build_network, largest_list, network_of
from alignvlm.training.distributed import World
from alignvlm.training.engine import Trainer, build_trainer, free_memory, release_modules
from alignvlm.training.step import StepCounts, StepResult, Votes, train_step
from alignvlm.training.throughput import peak_flops
from data_pipeline.loading.collate import MicroBatch, collate
from data_pipeline.samples.schema import IGNORE_INDEX, Encoded

STAGE = "alignment"
HOST_PACK = Pack(tokens=64, tiles=0, documents=1, supervised=8)
"""So little work that the time of a step with it is what the host takes to launch it."""
HOST_STEPS = 4
GIB = 2**30


class Exports:
    """Folders with random weights, one for each config that a variant asks for; they are gone after `close`."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._folders = device, dict[str, Path]()
        self._scratch = tempfile.TemporaryDirectory(dir=_roomy_folder())

    def of(self, recipe: Recipe) -> Path:
        """An export of the recipe's model."""
        config = build_network(recipe).model.config
        key = config.to_json_string()
        if key not in self._folders:
            folder = Path(self._scratch.name) / str(len(self._folders))
            save_random(config, recipe.train.precision, self._device, folder)
            self._folders[key] = folder
        return self._folders[key]

    def close(self) -> None:
        self._scratch.cleanup()


def _roomy_folder() -> str | None:
    """Memory where there is a lot of it, else the usual place for temporary files."""
    memory = Path("/dev/shm")
    return str(memory) if memory.is_dir() and shutil.disk_usage(memory).free > 48 * GIB else None


def save_random(config: AlignVLMConfig, precision: str, device: torch.device, folder: Path) -> None:
    """Initialise a model of this config on the device, in fp32, and save it in the precision of training."""
    with torch.device(device):
        model = AlignVLMForConditionalGeneration(config)
    model.to(torch.bfloat16 if precision == "bf16" else torch.float32)
    model.save_pretrained(folder)
    del model
    free_memory()


def make_pack(pack: Pack, config: AlignVLMConfig, seed: int) -> MicroBatch:
    """Random tiles and tokens, laid out as the loader would."""
    random = np.random.default_rng(seed)
    per_tile, side = config.tiling.tokens_per_tile, config.vision_config.image_size
    documents = []
    shares = (_shares(total, pack.documents) for total in (pack.tokens, pack.tiles, pack.supervised))
    for tokens, tiles, supervised in zip(*shares, strict=True):
        visual = tiles * per_tile
        if visual + supervised >= tokens:
            raise UserError(f"{pack} does not hold {per_tile} visual tokens per tile and its supervised tokens")
        ids = random.integers(1, config.text_config.vocab_size, tokens)
        ids[:visual] = config.image_token_id
        labels = np.where(np.arange(tokens) >= tokens - supervised, ids, IGNORE_INDEX)
        pixels = random.integers(0, 256, (tiles, 3, side, side), np.uint8)
        documents.append(Encoded(ids, labels, pixels, np.arange(visual)))
    return collate(documents, [f"random/0/{i}" for i in range(pack.documents)], step=0, epoch=0)


def _shares(total: int, parts: int) -> list[int]:
    """A total in almost equal whole parts."""
    return [after - before for before, after in pairwise(total * i // parts for i in range(parts + 1))]


class Bench:
    """Measures variants of a model, one after the other in this process."""

    def __init__(self, model: Model, world: World, steps: int, warmup: int, micro_batches: int, brief: bool) -> None:
        self.model, self.world, self.steps, self.warmup, self.brief = model, world, steps, warmup, brief
        self.micro_batches, self.exports = micro_batches, Exports(world.device)
        self._cuda = world.device.type == "cuda"

    def measure(self, variant: Variant, row: dict[str, Any], *, profiled: bool) -> None:
        """Fill a row of the results; what was measured stays in it when something raises.

        Its seconds are wall time until the device has done all its work; `busy` is the part of a step in which kernels
        run on a GPU, should none overlap.
        """
        recipe = load_recipe(self.model.recipe, [*self.model.overrides, *self._batch(), *variant.overrides])
        try:
            choose_attention(recipe.model.attention, self.world.device, recipe.train.precision)
            choose_fused_layers(recipe.model.fused_layers, self.world.device)
        except ValueError as error:
            raise UserError(str(error)) from error
        with self._phase("weights"):
            export = self.exports.of(recipe)
        trainer = None
        try:
            with use_loss(variant.loss):
                began = time.perf_counter()
                with self._phase("engine"):
                    trainer = self._build(recipe, variant, export)
                row["build_s"] = self._since(began)
                gc.freeze()  # as training does: no collection walks through the engine
                self._measure_steps(recipe, trainer, self.model.packs[variant.pack], row, profiled)
        finally:
            if trainer is not None:
                trainer.close()

    def release(self, row: dict[str, Any]) -> None:
        """After a variant, and outside of the handler of its error: free its memory and note what it has left."""
        gc.unfreeze()
        release_modules()
        free_memory()
        if self._cuda:
            row["left_gib"] = torch.cuda.memory_allocated() / GIB

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *_: object) -> None:
        self.exports.close()

    def _batch(self) -> list[str]:
        return [f"stages.{STAGE}.global_batch_packs={self.micro_batches}", f"stages.{STAGE}.micro_batch_packs=1"]

    def _build(self, recipe: Recipe, variant: Variant, export: Path) -> Trainer:
        stage = recipe.stages[STAGE]
        config = deepspeed_config(recipe, stage, self.world.size)
        changes = merged(config, variant.deepspeed)
        trainer = build_trainer(recipe, stage, export, self.world, changes, variant.whole_layers, variant.shortcuts)
        for part in variant.compiled:
            compile_layers(trainer.model.model.part(part), "inductor" if self._cuda else "aot_eager")
        return trainer

    def _measure_steps(self, recipe: Recipe, trainer: Trainer, pack: Pack, row: dict[str, Any], profiled: bool) -> None:
        row |= {"attention": trainer.attention, "fused_layers": trainer.fused_layers}
        row["trainable"] = recipe.stages[STAGE].trainable
        with self._phase("packs"):
            batches = self._packs(pack, trainer)
        if self._cuda:
            row["built_gib"] = torch.cuda.memory_allocated() / GIB
            torch.cuda.reset_peak_memory_stats()
        with self._phase("warm-up"):
            row["warmup_s"] = [self._step(trainer, batches)[1] for _ in range(self.warmup)]
        with self._phase("steps"):
            taken = [self._step(trainer, batches) for _ in range(self.steps)]
        result, times = taken[-1][0], [seconds for _, seconds in taken]
        row |= {"step_s": statistics.median(times), "steps_s": times, "loss": _finite(result.loss)}
        row |= {"grad_norm": _finite(result.grad_norm), "skipped": result.skipped, **result.counts._asdict()}
        row |= self._memory()
        with self._phase("FLOPs"):
            row |= self._speed(recipe, trainer, result.counts, row["step_s"])
        if not self.brief:
            with self._phase("host time"):
                row |= self._host_seconds(trainer)
        if profiled:
            with self._phase("profile"):
                row["profile"] = found = self._profile(recipe, trainer, batches)
                row["host_profile"] = self._host_profile(trainer)
            if self._cuda:
                row["busy"] = found["total_ms"] / 1e3 / row["step_s"]

    def _profile(self, recipe: Recipe, trainer: Trainer, batches: list[MicroBatch]) -> dict[str, Any]:
        """Where the device's time goes in one more step."""
        base, dtype = trainer.model.model, torch.bfloat16 if recipe.train.precision == "bf16" else torch.float32
        peak = measured_peak(self.world.device, dtype)
        parts = {"connector": base.connector, "vision": base.vision_tower, "language": base.language_model}
        return profile_step(parts, lambda: self._run(trainer, batches), peak, cuda=self._cuda)

    def _host_profile(self, trainer: Trainer) -> dict[str, Any]:
        """Where the host's time goes in steps that leave a GPU next to nothing to do."""
        batches = self._packs(HOST_PACK, trainer)

        def run() -> None:
            for _ in range(HOST_STEPS):
                self._step(trainer, batches)

        return sample_host(run, HOST_STEPS * len(batches))

    def _packs(self, pack: Pack, trainer: Trainer) -> list[MicroBatch]:
        batches = [make_pack(pack, trainer.config, seed) for seed in range(self.micro_batches)]
        return [batch.pin_memory() for batch in batches] if self._cuda else batches

    def _run(self, trainer: Trainer, batches: list[MicroBatch]) -> StepResult:
        return train_step(trainer, batches, self.world, 1.0, Votes())

    def _step(self, trainer: Trainer, batches: list[MicroBatch]) -> tuple[StepResult, float]:
        began = time.perf_counter()
        return self._run(trainer, batches), self._since(began)

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        """Show how far a variant is: weights and engine of a large model take longer than its steps."""
        began = time.perf_counter()
        print(f"  {name} ... ", end="", file=sys.stderr, flush=True)
        yield
        print(f"{self._since(began):.1f} s", file=sys.stderr, flush=True)

    def _since(self, began: float) -> float:
        """Seconds, all work of the device done."""
        if self._cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - began

    def _speed(self, recipe: Recipe, trainer: Trainer, counts: StepCounts, seconds: float) -> dict[str, Any]:
        """Tokens per second; FLOPs of the model, and of the hardware with what is computed twice, of the peak's."""
        work = Work(counts.tokens, counts.tiles, counts.supervised, counts.attended)
        network, trainable = network_of(trainer.config), recipe.stages[STAGE].trainable
        parts = count_flops(network, trainable, recipe.train.recompute).of(work)
        model = sum(part.model for part in parts.values())
        hardware = model + sum(part.recomputed for part in parts.values())
        peak = peak_flops(self.world.device, recipe.train.precision)
        return {
            "tokens_per_s": counts.tokens / seconds,
            "mfu": model / seconds / peak,
            "hfu": hardware / seconds / peak,
            "model_tflop": model / 1e12,
            "hardware_tflop": hardware / 1e12,
            "connector_tflop_share": (parts["connector"].model + parts["connector"].recomputed) / hardware,
            "peak_tflops": peak / 1e12,
        }

    def _memory(self) -> dict[str, float]:
        if not self._cuda:
            import psutil

            return {"peak_gib": psutil.Process().memory_info().rss / GIB}
        allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        return {"peak_gib": allocated / GIB, "reserved_gib": reserved / GIB}

    def _host_seconds(self, trainer: Trainer) -> dict[str, float | None]:
        """Seconds of steps that leave a GPU next to nothing to do.

        The median of micro-batches that end no optimizer step, and of whole steps.
        """
        batches = self._packs(HOST_PACK, trainer)
        self._step(trainer, batches)
        engine: Any = trainer.engine
        original, gaps, steps = engine.step, [], []
        for _ in range(HOST_STEPS):
            ends = [time.perf_counter()]

            def marked(ends: list[float] = ends) -> None:
                original()
                ends.append(time.perf_counter())

            engine.step = marked
            try:
                steps.append(self._step(trainer, batches)[1])
            finally:
                del engine.step
            gaps += [after - before for before, after in pairwise(ends[:-1])]
        micro_batch = statistics.median(gaps) if gaps else None
        return {"host_micro_batch_s": micro_batch, "host_step_s": statistics.median(steps)}


def compile_layers(part: torch.nn.Module, backend: str) -> None:
    """Let torch.compile compute what is inside each layer; ZeRO-3's hooks and recomputation stay around it.

    On a CPU `aot_eager` traces and differentiates as `inductor` does, without a minute of compiling C++.
    """
    for layer in largest_list(part)[2]:
        layer.forward = torch.compile(layer.forward, backend=backend, dynamic=True)


@contextmanager
def use_loss(implementation: str | None) -> Iterator[None]:
    """Let the model take this implementation of the loss."""
    original = head.linear_cross_entropy
    if implementation is not None:
        head.linear_cross_entropy = partial(original, implementation=implementation)
    try:
        yield
    finally:
        head.linear_cross_entropy = original


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None
