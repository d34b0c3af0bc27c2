"""Checkpoints of a stage: save, verify, find the newest valid one, remove old ones but not the best.

A checkpoint holds DeepSpeed's shards (weights, optimizer), `state.json` (step, data position, world size, state of the
callbacks) and the random state of every rank. It is written under another name, and its manifest is written last: a
folder without one is no checkpoint. The content belongs to `training.stage`; this file knows folders and manifests.

A disk that is full or fails costs the checkpoint, never the training: the problem is returned, equal on all ranks.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from alignvlm.best import STATE, find_best, is_better, read_scores
from alignvlm.run_folder import checkpoint_folder, checkpoint_folders, checkpoint_step
from alignvlm.training.checkpoints.background import BackgroundCheckpointEngine
from alignvlm.training.checkpoints.files.manifest import (
    FORMAT,
    by_kind_and_rank,
    difference,
    files_in,
    read_manifest,
    regular_file,
)
from alignvlm.training.checkpoints.files.sealing import SUFFIX, complete_saves, list_of, seal
from alignvlm.training.checkpoints.files.written import Entry
from alignvlm.training.checkpoints.layout import OPTIMIZER_FILES
from alignvlm.training.checkpoints.loading import Unchecked, load
from alignvlm.training.distributed import World
from data_pipeline.files import reason

log = logging.getLogger(__name__)
TAG = "deepspeed"
UNIVERSAL_SUFFIX = ".universal"
"""Suffix of the converted copy that earlier versions wrote for another number of ranks; it goes with its checkpoint."""


@dataclass(frozen=True)
class CheckpointInfo:
    """A checkpoint on disk."""

    folder: Path
    state: dict[str, Any]
    own: tuple[Unchecked, ...] = ()
    """Files that this rank checks when it loads them."""

    @property
    def step(self) -> int:
        return int(self.state["step"])


class CheckpointStore:
    """The checkpoints of one stage. A save starts with `begin` and ends with `finish`, some steps later.

    On the training thread it costs the copy to host memory and three small collectives. Files are written, summed up
    and flushed by threads of each rank; one of rank 0's writes the manifest, renames the folder and removes old ones.
    """

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
        self._is_collected = False
        self._sealing: Future[str | None] | None = None
        self._latest: int | None = None
        """The step that this job has started from, or rank 0 has sealed since; None before it has looked for one."""

    def attach(self, engine: Any) -> None:
        """Make the engine write in the background."""
        writer = BackgroundCheckpointEngine(engine._config, self.world.device, self._advance)
        self._writer = engine.checkpoint_engine = writer
        engine._copy_recovery_script = lambda folder: None  # `alignvlm export` converts checkpoints
        engine._get_param_fragment_func = _fragment  # DeepSpeed's copies each frozen one to fresh memory

    @property
    def is_written(self) -> bool:
        """Whether what this rank's threads have to do for a pending save is done, up to the next call of `finish`."""
        if self._pending is None or self._writer is None:
            return False
        return self._writer.done and (self._sealing is None or self._sealing.done())

    def begin(self, engine: Any, state: dict[str, Any]) -> str | None:
        """Start writing a checkpoint; `state` is JSON with at least `step`. Every rank calls it, after `finish`.

        Returns:
            Why it cannot be saved (the disk is full), equal on all ranks; nothing has been written in that case.
        """
        assert self._pending is None, "a save is still being written"
        final = checkpoint_folder(self.folder, state["step"])
        partial = final.with_name(final.name + SUFFIX)
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
        self._writer.write()
        if self.world.is_main:
            self._writer.save_text(partial / STATE, text)
        self._writer.save_list(partial / list_of(self.world.rank))
        self._pending, self._is_collected = final, False
        return None

    def finish(self, wait: bool = True) -> str | None:
        """Bring a pending save to its end; every rank calls it, and without one it does nothing.

        Until then, the previous checkpoint is the newest valid one.

        Args:
            wait: until the checkpoint is valid or abandoned. False takes one of two parts, each of which is to be
                called when all ranks are `is_written`: rank 0 hears of all files; then all hear of the checkpoint.

        Returns:
            Why the checkpoint was abandoned (a rank could not write), equal on all ranks.
        """
        if self._pending is None:
            return None
        problem = None
        if not self._is_collected:
            problem = self._collect(self._pending)
            self._is_collected = True
            if problem is None and not wait:
                return None
        if problem is None:
            problem = self.world.broadcast(self._sealing.result() if self._sealing is not None else None)
        self._pending = self._sealing = None
        return problem

    def _collect(self, final: Path) -> str | None:
        """Wait for all ranks' files and let rank 0's thread make a checkpoint of them; the first problem of any."""
        assert self._writer is not None
        partial = final.with_name(final.name + SUFFIX)
        entries, problem = self._writer.result()
        parts = self.world.all_gather({str(path.relative_to(partial)): entry for path, entry in entries.items()})
        problem = self.world.first_problem(problem)
        if self.world.is_main:
            if problem is None:
                files = {name: entry for part in parts for name, entry in part.items()}
                self._sealing = self._writer.submit(self._seal, partial, final, files)
            else:
                shutil.rmtree(partial, ignore_errors=True)
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
        """Step of the newest finished checkpoint, as rank 0 knows it; 0 when there is none."""
        return max(map(checkpoint_step, self._finished()), default=0)

    def close(self) -> None:
        """Wait until this rank has written its files."""
        if self._writer is not None:
            self._writer.cleanup()

    def _advance(self, count: int) -> None:
        self.world.beat()  # a save may take long while the disk takes it, and so may looking at an old one

    def _make_room(self, partial: Path) -> str | None:
        """Remove unfinished checkpoints, and check that another one of the last one's size fits on the disk."""
        for unfinished in self.folder.glob(f"step-*{SUFFIX}"):
            shutil.rmtree(unfinished, ignore_errors=True)
        try:
            partial.mkdir(parents=True)
            last = checkpoint_folders(self.folder)[-1:]
            needed = sum((folder / name).stat().st_size for folder in last for name in files_in(folder))
            free = shutil.disk_usage(self.folder).free
        except OSError as error:
            return f"{partial}: {reason(error)}"
        if free < needed:
            shutil.rmtree(partial, ignore_errors=True)
            return f"{self.folder}: {free / 2**30:.1f} GiB free, a checkpoint needs {needed / 2**30:.1f} GiB"
        return None

    def newest(self, warn: Callable[[str], None], before: int | None = None) -> CheckpointInfo | None:
        """The newest checkpoint, of a step below `before`, whose files are all there and undamaged.

        The files of the optimizer are checked by `load` only, which reads them anyway.
        A save that all ranks had written when a job ended is sealed, once nothing newer is valid. `warn` gets a line
        for that, and for each damaged checkpoint.
        """
        unsealed = complete_saves(self.folder) if self.world.is_main else {}
        found = sorted({*checkpoint_folders(self.folder), *unsealed}, key=checkpoint_step, reverse=True)
        found = [folder for folder in found if before is None or checkpoint_step(folder) < before]
        self._latest = 0
        for folder in self.world.broadcast(found):
            if not self.world.broadcast(self._seal_late(folder, unsealed, warn)):
                continue
            own, problem = self._look_at(folder)
            problem = self.world.first_problem(problem)
            if problem is None:
                self._latest = checkpoint_step(folder)
                return CheckpointInfo(folder, json.loads((folder / STATE).read_bytes()), own)
            if self.world.is_main:
                warn(not_valid(folder, problem))
        return None

    def load(self, engine: Any, checkpoint: CheckpointInfo) -> str | None:
        """Restore the engine, and the random state where as many ranks have saved it.

        Returns:
            Why the checkpoint is not valid, equal on all ranks; the engine is of no use then.

        Raises:
            UserError: on all ranks, when the files are not laid out as they should be.
        """
        problem = load(engine, checkpoint.folder / TAG, self.world, checkpoint.own)
        if problem is None and checkpoint.state["world_size"] == self.world.size:
            _restore_random_state(checkpoint.folder / f"random-{self.world.rank:05d}.pt")
        return problem

    def _look_at(self, folder: Path) -> tuple[tuple[Unchecked, ...], str | None]:
        """The files that this rank checks when it loads them, and what is wrong with its share of all others."""
        own: list[Unchecked] = []
        try:
            files = read_manifest(folder)
            saved = sorted((name for name in files if name.endswith(OPTIMIZER_FILES[1:])), key=by_kind_and_rank)
            for number, name in enumerate(saved):
                entry = files.pop(name)
                # One rank checks each: that which loads its middle, so its own one where as many ranks have saved.
                if (2 * number + 1) * self.world.size // (2 * len(saved)) == self.world.rank:
                    own.append(Unchecked(regular_file(folder, name), entry))
                    if own[-1].path.stat().st_size != entry["size"]:
                        return (), f"{name}: size differs from the manifest"
        except ValueError as error:
            return (), str(error)
        except OSError as error:
            return (), reason(error)
        return tuple(own), difference(folder, files, self.world.rank, self.world.size, self._advance)

    def _seal(self, partial: Path, final: Path, files: dict[str, Entry]) -> str | None:
        """Write the manifest, give the folder its name and remove old checkpoints; or why the save is abandoned."""
        try:
            seal(partial, final, files)
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            return f"{final}: {reason(error)}"
        self._latest = checkpoint_step(final)
        try:
            self._remove_old()
        except OSError as error:
            log.warning("%s: old checkpoints cannot be found and stay: %s", self.folder, reason(error))
        return None

    def _seal_late(self, final: Path, unsealed: dict[Path, dict[str, Entry]], warn: Callable[[str], None]) -> bool:
        """Seal a save that nobody has sealed; False when the disk fails, True for any other checkpoint."""
        if final not in unsealed:
            return True
        try:
            seal(final.with_name(final.name + SUFFIX), final, unsealed[final])
        except OSError as error:
            warn(f"WARNING: {final}: a finished save cannot be sealed: {reason(error)}")
            return False
        warn(f"{final}: all ranks had written it when the job before ended; it is sealed now")
        return True

    def _finished(self) -> list[Path]:
        """Checkpoints up to where this job is, the oldest first: it has passed over later ones, which are damaged."""
        found = checkpoint_folders(self.folder)
        return [folder for folder in found if self._latest is None or checkpoint_step(folder) <= self._latest]

    def _remove_old(self) -> None:
        found = self._finished()
        best = self.keep_best and find_best(((folder, read_scores(folder)) for folder in found), self.keep_best)
        for old in found[: -self.keep_last]:
            if (self.keep_every and checkpoint_step(old) % self.keep_every == 0) or (best and old == best.folder):
                continue
            try:
                shutil.rmtree(old.rename(old.with_name(f"{old.name}{SUFFIX}")))  # a kill here leaves no half of one
            except OSError as error:
                log.warning("%s cannot be removed: %s", old, reason(error))
            shutil.rmtree(old.with_name(f"{old.name}{UNIVERSAL_SUFFIX}"), ignore_errors=True)
            self._advance(1)


def not_valid(folder: Path, problem: str) -> str:
    """The warning of a damaged checkpoint."""
    return f"checkpoint {folder} is not valid, trying an older one: {problem}"


def _fragment(parameter: Any) -> torch.Tensor:
    """This rank's part of a frozen parameter, which DeepSpeed asks for in a save."""
    return (parameter.ds_tensor if hasattr(parameter, "ds_id") else parameter).detach()


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
