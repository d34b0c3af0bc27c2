"""What a checkpoint costs: how long training stands still, until it is valid, and to load it.

    python benchmarks/checkpoint.py
    python benchmarks/checkpoint.py --gib 8 --folder /mnt/shared
    torchrun --nproc-per-node 8 benchmarks/checkpoint.py
    python benchmarks/checkpoint.py --tiny            the same code in seconds; nothing is written to results

A DeepSpeed engine (ZeRO-3, bf16, AdamW) of a model with random weights is saved and loaded as training does it, and the
same state by `torch.save` in line and by `torch.distributed.checkpoint.async_save`. Beside them, in turn: a plain copy
of the same bytes in memory, writing as many files of the same sizes with one flush at the end, and reading the files:
into memory that has been used before, and into new memory, as the optimizer's moments need it after a start. "Cold":
the system has been asked to forget the files before. Before each way the system writes what the one before has left.
The slowest rank counts, and of the rounds the median.
Prints a table and writes benchmarks/results/checkpoint-<device>.json.
"""

from __future__ import annotations

import argparse
import gc
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from _common import write

PIECE = 1 << 30
"""Bytes of the memory that is copied to, written from and read into again and again: more than caches hold."""
LAYER = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 8, "num_key_value_heads": 8}
LAYER_BYTES = 12 * (4 * 1024**2 + 3 * 1024 * 4096)
"""Of a checkpoint, for each layer of the language model."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=2.0, help="size of the checkpoint per rank, in GiB")
    parser.add_argument("--rounds", type=int, default=3, help="how often each way has its turn")
    parser.add_argument("--folder", type=Path, default=Path(), help="on the disk to measure; default: here")
    parser.add_argument("--tiny", action="store_true", help="all code, a small model, one round")
    args = parser.parse_args()

    from alignvlm.training import distributed

    world = distributed.start(timeout_minutes=30)
    try:
        content = measure(world, args.folder, 0.0 if args.tiny else args.gib, 1 if args.tiny else args.rounds)
        if world.is_main:
            print(table(content))
            if not args.tiny:
                name = f"checkpoint-{world.device.type}"
                print("\nwritten:", write(name, content, world.device.type))
    finally:
        distributed.stop()


def measure(world: Any, folder: Path, gib: float, rounds: int) -> dict[str, Any]:
    """Seconds of every part in every round; all ranks call it. `gib` 0 is a tiny model."""
    made = tempfile.mkdtemp(prefix="checkpoint-benchmark-", dir=folder) if world.is_main else None
    scratch = Path(world.broadcast(made))
    try:
        trainer = build(world, scratch / "export", gib)
        ways = Ways(world, trainer.engine, scratch)
        first = ways.ours()
        taken = [ways.round() for _ in range(rounds)]
        trainer.close()
    finally:
        world.barrier()
        if world.is_main:
            shutil.rmtree(scratch)
    return {
        "ranks": world.size,
        "bytes_per_rank": ways.bytes,
        "tensors_per_rank": len(list(ways.tensors())),
        "first_save": {part: first[part] for part in ("stall", "valid")},
        "rounds": taken,
        "median": {name: median_of([each[name] for each in taken]) for name in taken[0]},
    }


def build(world: Any, export: Path, gib: float) -> Any:
    """A trainer of a model with random weights that has taken a step; the optimizer's moments are random numbers."""
    from tests.one_rank import micro_batches, take_step, trainer_of
    from tests.tiny import tiny_model

    if world.is_main:
        layers = max(1, round(gib * 2**30 * world.size / LAYER_BYTES))
        tiny_model(text={**LAYER, "num_hidden_layers": layers} if gib else None)[0].save_pretrained(export)
    world.barrier()
    strategy = "cpu_zero3" if world.device.type == "cpu" else "zero3"
    trainer = trainer_of(export, strategy, world, "stages.connector.trainable=['*']", accumulation=world.size)
    take_step(trainer, micro_batches(1), world)
    for state in trainer.engine.optimizer.optimizer.state.values():
        for key in ("exp_avg", "exp_avg_sq"):
            state[key].uniform_()
    world.barrier()
    if world.is_main:
        shutil.rmtree(export)
    return trainer


class Ways:
    """The ways to save one engine's state, and the plain work that each cannot do without."""

    def __init__(self, world: Any, engine: Any, folder: Path) -> None:
        import torch

        from alignvlm.training.checkpoints.store import CheckpointStore

        self.world, self.engine, self.folder, self.step = world, engine, folder, 0
        self.store = CheckpointStore(folder / "ours", world, keep_last=1, keep_every=None)
        self.store.attach(engine)
        self.files = self.captured()
        self.bytes = sum(tensor.nbytes for tensor in self.tensors())
        self.memory = torch.ones(min(PIECE, self.bytes), dtype=torch.uint8, pin_memory=world.device.type == "cuda")

    def captured(self) -> dict[str, Any]:
        """What DeepSpeed saves, by the names of its files; nothing is copied."""
        found: dict[str, Any] = {}
        writer = self.engine.checkpoint_engine
        writer.save = lambda state_dict, path: found.update({Path(path).name: state_dict})
        self.engine.save_checkpoint(str(self.folder / "captured"), tag="state")
        del writer.save
        return found

    def tensors(self) -> Iterator[Any]:
        """All tensors of this rank's state."""
        yield from tensors_in(self.files)

    def round(self) -> dict[str, dict[str, float]]:
        """Every way and the plain work once; seconds of the slowest rank."""
        found = {}
        for way in (self.plain, self.ours, self.torch_save, self.async_save):
            gc.collect()
            os.sync()  # what was left to write would take processors and the disk from this way
            self.world.barrier()
            found[{"torch_save": "torch.save"}.get(way.__name__, way.__name__)] = way()
        return found

    def plain(self) -> dict[str, float]:
        """The copy comes last: beside ours."""
        seconds = {"write": self.timed(self.write_plainly)}
        for path in self.folder.glob(f"plain-{self.world.rank}-*"):
            path.unlink()
        os.sync()
        return seconds | {"copy": self.timed(self.copy)}

    def timed(self, work: Callable[[], object]) -> float:
        """Seconds until all ranks have done it."""
        self.world.barrier()
        began = time.perf_counter()
        work()
        return max(self.world.all_gather(time.perf_counter() - began))

    def copy(self) -> None:
        """Copy the state to memory of the host that has been used before."""
        import torch

        for tensor in self.tensors():
            flat = tensor.detach().reshape(-1).view(torch.uint8) if tensor.numel() else tensor
            for piece in flat.split(len(self.memory)):
                self.memory[: len(piece)].copy_(piece, non_blocking=True)
        if self.world.device.type == "cuda":
            torch.cuda.synchronize()

    def write_plainly(self) -> None:
        """Write files of the state's sizes, each flushed once."""
        memory = memoryview(self.memory.numpy())
        for name, state in self.files.items():
            left = sum(tensor.nbytes for tensor in tensors_in(state))
            with (self.folder / f"plain-{self.world.rank}-{name}").open("wb", buffering=0) as file:
                while left:
                    left -= file.write(memory[: min(left, len(memory))])
                os.fsync(file.fileno())

    def read(self, folder: Path, is_cold: bool = False, is_new: bool = False) -> float:
        """Seconds in which this rank's files of a folder are read, to the same memory again and again or to new one."""
        import torch

        files = [path for name in self.files for path in folder.rglob(name)]
        if is_cold:
            forget(files)

        def work() -> None:
            for path in files:
                memory = torch.empty(path.stat().st_size, dtype=torch.uint8) if is_new else self.memory
                view = memoryview(memory.numpy())
                with path.open("rb", buffering=0) as file:
                    while count := file.readinto(view):
                        view = view[count:] if is_new else view

        return self.timed(work)

    def ours(self) -> dict[str, float]:
        """A save as training makes it, and loading it when the files are in the system's memory and when not."""
        self.step += 1
        state, seconds = {"step": self.step, "world_size": self.world.size}, {"stall": 0.0}
        self.world.barrier()
        began = time.perf_counter()

        def stand_still(work: Callable[..., object], *arguments: Any) -> None:
            since = time.perf_counter()
            assert work(*arguments) is None
            seconds["stall"] += time.perf_counter() - since

        stand_still(self.store.begin, self.engine, state)
        for _ in range(2):  # as the sum of every step tells it
            while not min(self.world.all_gather(self.store.is_written)):
                time.sleep(0.002)
            stand_still(self.store.finish, False)
        seconds["valid"] = time.perf_counter() - began
        found = self.store.newest(print)
        assert found is not None
        files = list(found.folder.rglob("*.pt"))

        def load() -> None:
            newest = self.store.newest(print)
            assert newest is not None
            assert self.store.load(self.engine, newest) is None

        def timed_load() -> float:  # into an engine as it is after a start: the optimizer has no moments yet
            self.engine.optimizer.optimizer.state.clear()
            gc.collect()
            return self.timed(load)

        seconds["load"] = timed_load()
        forget(files)
        seconds["load_cold"] = timed_load()
        seconds["read"] = self.read(found.folder)
        seconds["read_new"] = self.read(found.folder, is_new=True)
        seconds["read_cold"] = self.read(found.folder, is_cold=True)
        return {name: max(self.world.all_gather(value)) for name, value in seconds.items()}

    def torch_save(self) -> dict[str, float]:
        """One file after the other, while training waits."""
        import torch

        folder = self.folder / f"torch-{self.world.rank}"
        folder.mkdir()

        def save() -> None:
            for name, state in self.files.items():
                with (folder / name).open("wb") as file:
                    torch.save(state, file)
                    file.flush()
                    os.fsync(file.fileno())

        def load() -> None:
            for name in self.files:
                torch.load(folder / name, map_location="cpu", weights_only=False)

        seconds = self.timed(save)
        found = {"stall": seconds, "valid": seconds, "load": self.timed(load)}
        forget(list(folder.iterdir()))
        found["load_cold"] = self.timed(load)
        shutil.rmtree(folder)
        return found

    def async_save(self) -> dict[str, float]:
        """PyTorch's distributed checkpoint, with a key for each rank: the ranks' tensors are not copies."""
        from torch.distributed import checkpoint

        folder, group = self.folder / "dcp", self.world.cpu_group
        state = {f"rank{self.world.rank}": self.files}
        self.world.barrier()
        began = time.perf_counter()
        saved = checkpoint.async_save(state, checkpoint_id=folder, process_group=group)
        stall = time.perf_counter() - began
        saved.result()
        valid = time.perf_counter() - began

        def load() -> None:
            checkpoint.load(state, checkpoint_id=folder, process_group=group)

        found = {"stall": max(self.world.all_gather(stall)), "valid": max(self.world.all_gather(valid))}
        found["load"] = self.timed(load)
        forget(list(folder.iterdir()))
        found["load_cold"] = self.timed(load)
        self.world.barrier()
        if self.world.is_main:
            shutil.rmtree(folder)
        self.world.barrier()
        return found


def tensors_in(tree: Any) -> Iterator[Any]:
    """The tensors of nested dictionaries and lists, each memory once."""
    import torch

    seen, waiting = set(), [tree]
    while waiting:
        value = waiting.pop()
        if isinstance(value, torch.Tensor):
            key = (value.data_ptr(), value.shape)
            if value.numel() and key not in seen:
                seen.add(key)
                yield value
        elif isinstance(value, dict):
            waiting += value.values()
        elif isinstance(value, list | tuple):
            waiting += value


def forget(files: list[Path]) -> None:
    """Ask the system to drop what it holds of the files."""
    for path in files:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def median_of(rows: list[dict[str, float]]) -> dict[str, float]:
    return {key: statistics.median(row[key] for row in rows) for key in rows[0]}


def table(content: dict[str, Any]) -> str:
    """The table of docs/goodput.md: seconds, and in brackets how often the plain work of the same round."""
    rounds, gib = content["rounds"], content["bytes_per_rank"] / 2**30
    plain = {"stall": ("plain", "copy"), "valid": ("plain", "write"), "load": ("ours", "read")}
    plain["load_cold"] = ("ours", "read_cold")

    def cell(way: str, part: str) -> str:
        ratio = statistics.median(each[way][part] / each[plain[part][0]][plain[part][1]] for each in rounds)
        return f"{content['median'][way][part]:.2f} s ({ratio:.2f})"

    parts = {"stall": "training waits", "valid": "until valid", "load_cold": "load, cold", "load": "load"}
    lines = [
        f"{content['ranks']} rank(s), {gib:.2f} GiB in {content['tensors_per_rank']} tensors each",
        "",
        "| | " + " | ".join(parts.values()) + " |",
        "|---|" + "---|" * len(parts),
    ]
    base = " | ".join(f"{content['median'][plain[part][0]][plain[part][1]]:.2f} s" for part in parts)
    lines.append(f"| plain copy, writing, reading | {base} |")
    for way in ("ours", "torch.save", "async_save"):
        lines.append(f"| {way} | " + " | ".join(cell(way, part) for part in parts) + " |")
    ratio = statistics.median(each["ours"]["load"] / each["ours"]["read_new"] for each in rounds)
    new = f"reading into new memory: {content['median']['ours']['read_new']:.2f} s, ours {ratio:.2f} of it"
    return "\n".join([*lines, "", new, f"first save: training waits {content['first_save']['stall']:.2f} s"])


if __name__ == "__main__":
    main()
