"""Checkpoints of a stage: written beside, valid by a manifest written last, newest valid one found, old ones removed.

A checkpoint holds DeepSpeed's shards (weights, optimizer), `state.json` (step, data position, world size) and the
random state of every rank. What is in it belongs to training.stage; this file knows folders and checksums.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from alignvlm.training.distributed import World
from alignvlm.training.run import write_text

FORMAT = 1
"""Version of the layout; a change is announced in CHANGELOG.md as breaking."""
TAG = "deepspeed"
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Found:
    """A checkpoint on disk."""

    folder: Path
    state: dict[str, Any]

    @property
    def step(self) -> int:
        return int(self.state["step"])


class CheckpointStore:
    """The checkpoints of one stage."""

    def __init__(self, folder: Path, world: World, keep_last: int, keep_every: int | None) -> None:
        self.folder = folder
        self.world = world
        self.keep_last = keep_last
        self.keep_every = keep_every

    def save(self, engine: Any, state: dict[str, Any]) -> Path:
        """Write a checkpoint of all ranks; `state` is JSON with at least `step`. Every rank calls it.

        Until the manifest is written and the folder renamed, the previous checkpoint is the newest valid one.
        """
        final = self.folder / f"step-{state['step']:08d}"
        partial = final.with_name(final.name + ".partial")
        if self.world.is_main:
            shutil.rmtree(partial, ignore_errors=True)
            shutil.rmtree(final, ignore_errors=True)
            partial.mkdir(parents=True)
        self.world.wait()
        engine.save_checkpoint(str(partial), tag=TAG)
        torch.save(_random_state(), partial / f"random-{self.world.rank:05d}.pt")
        if self.world.is_main:
            write_text(partial / "state.json", json.dumps({"format": FORMAT, **state}, indent=2) + "\n")
        self.world.wait()
        self._seal(partial)
        if self.world.is_main:
            partial.rename(final)
            _sync(self.folder)
            self._remove_old()
        self.world.wait()
        return final

    def newest(self, tell: Callable[[str], None]) -> Found | None:
        """The newest checkpoint whose files are all there and unharmed; others are named and passed over."""
        candidates = self.world.broadcast(
            sorted(self.folder.glob("step-*"), reverse=True) if self.world.is_main else None
        )
        for folder in candidates:
            problem = self._problem(folder)
            if problem is None:
                return Found(folder, json.loads((folder / "state.json").read_text()))
            if self.world.is_main:
                tell(f"checkpoint {folder} is not valid, trying an older one: {problem}")
        return None

    def load(self, engine: Any, found: Found) -> None:
        """Bring engine and random state back; the world size must be the one that saved."""
        engine.load_checkpoint(str(found.folder), tag=TAG)
        _restore_random_state(found.folder / f"random-{self.world.rank:05d}.pt")

    def _seal(self, folder: Path) -> None:
        """Checksum all files, the ranks sharing the work, and write the manifest."""
        names = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
        mine = {name: _measure(folder / name) for name in names[self.world.rank :: self.world.size]}
        parts = self.world.gather(mine)
        if self.world.is_main:
            files = {name: entry for part in parts for name, entry in part.items()}
            write_text(folder / MANIFEST, json.dumps({"format": FORMAT, "files": files}, indent=1) + "\n")
            _sync(folder)

    def _problem(self, folder: Path) -> str | None:
        """Why a checkpoint cannot be used; all ranks agree on the answer."""
        if folder.name.endswith(".partial"):
            return "it was never finished"
        try:
            manifest = json.loads((folder / MANIFEST).read_text())
        except (OSError, ValueError) as error:
            manifest = {"format": FORMAT, "files": {}}
            mine = f"manifest: {error}"
        else:
            mine = _first_difference(folder, manifest, self.world)
        found = [p for p in self.world.gather(mine) if p is not None]
        return found[0] if found else None

    def _remove_old(self) -> None:
        done = sorted(p for p in self.folder.glob("step-*") if not p.name.endswith(".partial"))
        for old in done[: -self.keep_last]:
            if not (self.keep_every and int(old.name.removeprefix("step-")) % self.keep_every == 0):
                shutil.rmtree(old)


def _first_difference(folder: Path, manifest: dict[str, Any], world: World) -> str | None:
    if manifest.get("format") != FORMAT:
        return f"its format is {manifest.get('format')}, this version reads {FORMAT}"
    for name in sorted(manifest["files"])[world.rank :: world.size]:
        try:
            actual = _measure(folder / name)
        except OSError as error:
            return f"{name}: {error}"
        if actual != manifest["files"][name]:
            return f"{name}: size or checksum differs from the manifest"
    return None


def _measure(path: Path) -> dict[str, int]:
    """Size and CRC-32 of a file, which is also flushed to disk."""
    checksum = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            checksum = zlib.crc32(block, checksum)
        os.fsync(file.fileno())
    return {"size": path.stat().st_size, "crc32": checksum}


def _sync(folder: Path) -> None:
    """Flush a folder's entries to disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _random_state() -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _restore_random_state(path: Path) -> None:
    state = torch.load(path, weights_only=True)
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
