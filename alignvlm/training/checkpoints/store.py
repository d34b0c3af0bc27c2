"""Checkpoints of a stage: save, verify, find the newest valid one, remove old ones but not the best.

A checkpoint holds DeepSpeed's shards (weights, optimizer), `state.json` (step, data position, world size, state of the
callbacks) and the random state of every rank. It is written under another name, and its manifest is written last: a
folder without one is no checkpoint. The content belongs to `training.stage`; this file knows folders and checksums.

A disk that is full or fails costs the checkpoint, never the training: the problem is returned, equal on all ranks.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from alignvlm.best import STATE, find_best, is_better, read_scores
from alignvlm.run_folder import checkpoint_folder, checkpoint_folders, checkpoint_step
from alignvlm.training.checkpoints.background import BackgroundCheckpointEngine
from alignvlm.training.checkpoints.renaming import names_of_modules
from alignvlm.training.distributed import World
from data_pipeline.files import crc32_of, has_shape, reason, write_atomic

log = logging.getLogger(__name__)
FORMAT = 1
"""Version of the layout; a change is announced in CHANGELOG.md as breaking."""
TAG = "deepspeed"
MANIFEST = "manifest.json"
UNIVERSAL_SUFFIX = ".universal"
"""Suffix of the converted copy that a run with another number of ranks loads."""


@dataclass(frozen=True)
class CheckpointInfo:
    """A checkpoint on disk."""

    folder: Path
    state: dict[str, Any]

    @property
    def step(self) -> int:
        return int(self.state["step"])


class CheckpointStore:
    """The checkpoints of one stage. A save starts with `begin` and ends with `finish`, some steps later."""

    def __init__(
        self, folder: Path, world: World, keep_last: int, keep_every: int | None, keep_best: str | None = None
    ) -> None:
        self.folder = folder
        self.world = world
        self.keep_last = keep_last
        self.keep_every = keep_every
        self.keep_best = keep_best
        self._writer: BackgroundCheckpointEngine | None = None
        self._pending: Path | None = None

    def attach(self, engine: Any) -> None:
        """Make the engine write in the background."""
        self._writer = engine.checkpoint_engine = BackgroundCheckpointEngine(engine._config, self._advance)
        engine._copy_recovery_script = lambda folder: None  # `alignvlm export` converts checkpoints

    @property
    def is_written(self) -> bool:
        """Whether this rank has a pending save whose files have all been written."""
        return self._pending is not None and self._writer is not None and self._writer.done

    def begin(self, engine: Any, state: dict[str, Any]) -> str | None:
        """Start writing a checkpoint; `state` is JSON with at least `step`. Every rank calls it, after `finish`.

        Returns:
            Why it cannot be saved (the disk is full), equal on all ranks; nothing has been written in that case.
        """
        assert self._pending is None, "a save is still being written"
        final = checkpoint_folder(self.folder, state["step"])
        partial = final.with_name(final.name + ".partial")
        problem = None
        if self.world.is_main:
            problem = self._make_room(partial)
        problem = self.world.broadcast(problem)
        if problem is not None:
            return problem
        text = json.dumps({"format": FORMAT, **state}, indent=2) + "\n"
        engine.save_checkpoint(str(partial), tag=TAG)
        assert self._writer is not None
        self._writer.save(_random_state(), str(partial / f"random-{self.world.rank:05d}.pt"))
        if self.world.is_main:
            self._writer.save_text(partial / STATE, text)
        self._pending = final
        return None

    def finish(self) -> str | None:
        """Wait for all ranks' files, checksum them, write the manifest and give the folder its name.

        Until it returns, the previous checkpoint is the newest valid one. Every rank calls it; without a pending save
        it does nothing.

        Returns:
            Why the checkpoint was abandoned (a rank could not write), equal on all ranks.
        """
        if self._pending is None:
            return None
        assert self._writer is not None
        final, self._pending = self._pending, None
        partial = final.with_name(final.name + ".partial")
        problem = self._first(self._writer.result()) or self._seal(partial, final)
        if self.world.is_main:
            if problem is None:
                self._remove_old()
            else:
                shutil.rmtree(partial, ignore_errors=True)
        self.world.barrier()
        return problem

    def is_best(self, scores: Mapping[str, float], step: int) -> bool:
        """Whether weights with these scores after `step` beat every finished checkpoint before; rank 0 looks for all.

        Every rank calls it, after `finish`. False where the score that `keep_best` names is not among them.
        """
        name, found = self.keep_best, False
        if name is None or name not in scores:
            return False
        if self.world.is_main:
            earlier = [old for old in checkpoint_folders(self.folder) if checkpoint_step(old) < step]
            best = find_best(((old, read_scores(old)) for old in earlier), name)
            found = is_better(name, scores[name], best.score if best else None)
        return self.world.broadcast(found)

    @property
    def newest_step(self) -> int:
        """Step of the newest finished checkpoint; 0 when there is none."""
        return max(map(checkpoint_step, checkpoint_folders(self.folder)), default=0)

    def close(self) -> None:
        """Wait until this rank has written its files."""
        if self._writer is not None:
            self._writer.cleanup()

    def _advance(self, count: int) -> None:
        self.world.beat()  # a save may take long while it writes or checks

    def _make_room(self, partial: Path) -> str | None:
        """Remove unfinished checkpoints, and check that another one of the last one's size fits on the disk."""
        for unfinished in self.folder.glob("step-*.partial"):
            shutil.rmtree(unfinished, ignore_errors=True)
        try:
            partial.mkdir(parents=True)
            last = checkpoint_folders(self.folder)[-1:]
            needed = sum((folder / name).stat().st_size for folder in last for name in _files(folder))
            free = shutil.disk_usage(self.folder).free
        except OSError as error:
            return f"{partial}: {reason(error)}"
        if free < needed:
            shutil.rmtree(partial, ignore_errors=True)
            return f"{self.folder}: {free / 2**30:.1f} GiB free, a checkpoint needs {needed / 2**30:.1f} GiB"
        return None

    def newest(self, warn: Callable[[str], None]) -> CheckpointInfo | None:
        """The newest checkpoint whose files are all there and undamaged; `warn` gets a line for each damaged one."""
        candidates = self.world.broadcast(checkpoint_folders(self.folder)[::-1] if self.world.is_main else None)
        for folder in candidates:
            problem = self._first(first_difference(folder, self.world.rank, self.world.size))
            if problem is None:
                return CheckpointInfo(folder, json.loads((folder / STATE).read_bytes()))
            if self.world.is_main:
                warn(f"checkpoint {folder} is not valid, trying an older one: {problem}")
        return None

    def load(self, engine: Any, checkpoint: CheckpointInfo) -> None:
        """Restore engine and random state; the checkpoint must have been saved by as many ranks."""
        with names_of_modules(engine):
            engine.load_checkpoint(str(checkpoint.folder), tag=TAG)
        _restore_random_state(checkpoint.folder / f"random-{self.world.rank:05d}.pt")

    def _first(self, problem: str | None) -> str | None:
        """The first problem of any rank, on all ranks."""
        return next((found for found in self.world.all_gather(problem) if found is not None), None)

    def _seal(self, partial: Path, final: Path) -> str | None:
        """Checksum all files, each rank its share, write the manifest and give the folder its name; or why not."""
        mine: dict[str, dict[str, int]] = {}
        listed: list[str] = []
        problem = None
        try:
            listed = _files(partial)
        except OSError as error:
            problem = reason(error)
        # A host may not see the newest files of the others yet; every rank sees its own.
        names = sorted(set().union(*self.world.all_gather(listed)))
        try:
            for name in names[self.world.rank :: self.world.size]:
                mine[name] = _checksum(partial, name, self._advance)
        except OSError as error:
            problem = problem or reason(error)
        parts = self.world.all_gather(mine)
        problem = self._first(problem)
        if problem is None and self.world.is_main:
            files = {name: entry for part in parts for name, entry in part.items()}
            try:
                write_atomic(partial / MANIFEST, json.dumps({"format": FORMAT, "files": files}, indent=1) + "\n")
                _sync(partial)
                shutil.rmtree(final, ignore_errors=True)
                partial.rename(final)
                _sync(self.folder)
            except OSError as error:
                problem = f"{final}: {reason(error)}"
        return self.world.broadcast(problem)

    def _remove_old(self) -> None:
        found = checkpoint_folders(self.folder)
        best = self.keep_best and find_best(((folder, read_scores(folder)) for folder in found), self.keep_best)
        for old in found[: -self.keep_last]:
            if (self.keep_every and checkpoint_step(old) % self.keep_every == 0) or (best and old == best.folder):
                continue
            try:
                shutil.rmtree(old.rename(old.with_name(f"{old.name}.partial")))  # a kill here leaves no half of one
            except OSError as error:
                log.warning("%s cannot be removed: %s", old, reason(error))
            shutil.rmtree(old.with_name(f"{old.name}{UNIVERSAL_SUFFIX}"), ignore_errors=True)


def first_difference(folder: Path, rank: int = 0, world_size: int = 1) -> str | None:
    """What is wrong with a checkpoint's manifest or with this rank's share of its files; None when nothing is."""
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        return f"manifest: {reason(error)}"
    if isinstance(manifest, dict) and manifest.get("format") != FORMAT:
        return f"its format is {manifest.get('format')}, this version reads {FORMAT}"
    if not has_shape(manifest, {"files": {str: {"size": int, "crc32": int}}}) or STATE not in manifest["files"]:
        return "manifest: it does not list the files of a checkpoint"
    for name in sorted(manifest["files"])[rank::world_size]:
        try:
            actual = _checksum(folder, name)
        except (OSError, ValueError) as error:
            return f"{name}: {reason(error)}"
        if actual != manifest["files"][name]:
            return f"{name}: size or checksum differs from the manifest"
    return None


def _files(folder: Path) -> list[str]:
    """Names of the regular files in a checkpoint, sorted; links are not followed."""
    paths = (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    return sorted(str(path.relative_to(folder)) for path in paths)


def _checksum(folder: Path, name: str, advance: Callable[[int], object] = lambda count: None) -> dict[str, int]:
    """Size and CRC-32 of a checkpoint's file, which is also flushed to disk; `advance` hears of the bytes read.

    Raises OSError when it cannot be read, or is no regular file inside the folder: a device might have no end.
    """
    path = folder / name
    if path.resolve() != folder.resolve() / name or not path.is_file():
        raise OSError("it is missing or no regular file in the folder")
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        checksum = crc32_of(file, size, advance)
        os.fsync(file.fileno())
    return {"size": size, "crc32": checksum}


def _sync(folder: Path) -> None:
    """Flush a folder's directory entries to disk."""
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
