"""Which checkpoints an export takes: the best by a score, or the last ones.

The scores of a checkpoint lie in its `state.json` and are written with it. Those of held-out tasks
are taken of a stage's export, whose weights are those of the stage's last checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignvlm.config.names import LOSS, TASK
from alignvlm.errors import UserError
from alignvlm.evaluation.evaluate import read_results
from alignvlm.evaluation.scores import metrics_of
from alignvlm.run_folder import StageFolder, checkpoint_folders, checkpoint_step, stages_at
from data_pipeline.files import read_json

STATE = "state.json"
"""What a checkpoint says about itself."""


@dataclass(frozen=True)
class Best:
    """The checkpoint with the best value of a score."""

    folder: Path
    score: float

    @property
    def step(self) -> int:
        return checkpoint_step(self.folder)


def is_better(name: str, score: float, than: float | None) -> bool:
    """Whether a score beats another one, None for none: a loss is the better the lower it is, all else the higher.

    A score that is not finite beats nothing; equal scores do not beat each other.
    """
    if not math.isfinite(score):
        return False
    return than is None or (score < than if name.startswith(LOSS) else score > than)


def find_best(checkpoints: Iterable[tuple[Path, Mapping[str, float]]], name: str) -> Best | None:
    """The best of (checkpoint, its scores), the first of equal ones; None where none has this score."""
    best: Best | None = None
    for folder, scores in checkpoints:
        if name in scores and is_better(name, scores[name], best.score if best else None):
            best = Best(folder, scores[name])
    return best


def read_scores(checkpoint: Path) -> dict[str, float]:
    """The scores that were taken of a checkpoint's weights while its stage trained; {} where it has none."""
    return _numbers(read_json(checkpoint / STATE).get("scores"))


def stage_scores(
    stage: StageFolder, may_read: Callable[[Path], bool] = Path.is_file
) -> list[tuple[Path, dict[str, float]]]:
    """(checkpoint, its scores) of a stage, the oldest first; its last one has those of the held-out tasks as well.

    Files that `may_read` refuses are as if they were not there.
    """
    found = []
    for folder in stage.checkpoint_folders():
        state = read_json(folder / STATE) if may_read(folder / STATE) else {}
        scores = _numbers(state.get("scores"))
        if stage.has_export and may_read(stage.evaluation.results) and state.get("step", -1) == state.get("num_steps"):
            scores |= _task_scores(stage)
        found.append((folder, scores))
    return found


def best_checkpoint(path: Path) -> tuple[str, Best]:
    """The score that the recipe of a run names (`checkpoint.keep_best`), and the best checkpoint by it.

    Args:
        path: a run's folder, or that of a stage.

    Raises:
        UserError: it is neither, the recipe names no score, or no checkpoint has it.
    """
    run, stages = stages_at(path)
    checkpoint = run.read_config().get("checkpoint")
    name = checkpoint.get("keep_best") if isinstance(checkpoint, dict) else None
    if not isinstance(name, str):
        raise UserError(
            f"{run.config}: checkpoint.keep_best names no score, so no checkpoint is the best; give one of "
            f"{run.path}/<n>-<stage>/checkpoints instead"
        )
    best = find_best((scored for stage in stages for scored in stage_scores(stage)), name)
    if best is None:
        raise UserError(
            f"{path}: no checkpoint has the score {name} (checkpoint.keep_best) yet; give a checkpoint instead"
        )
    return name, best


def last_checkpoints(path: Path, count: int) -> list[Path]:
    """The last `count` checkpoints of a stage, the oldest first.

    Args:
        path: the last of them, the folder of their stage, or that of a run: then its last stage with checkpoints.

    Raises:
        UserError: there are fewer.
    """
    if path.absolute().parent.name == "checkpoints":
        folder = path.parent
        if path not in checkpoint_folders(folder):
            raise UserError(f"{path} is no checkpoint; give a folder {folder}/step-…, or the folder of the run")
        found = [each for each in checkpoint_folders(folder) if checkpoint_step(each) <= checkpoint_step(path)]
    else:
        stages = [stage for stage in stages_at(path)[1] if stage.checkpoint_folders()]
        if not stages:
            raise UserError(f"{path} has no checkpoints")
        folder, found = stages[-1].checkpoints, stages[-1].checkpoint_folders()
    if len(found) < count:
        raise UserError(
            f"{folder} holds {len(found)} of the {count} checkpoints to average; take fewer, or keep more in "
            f"another run (checkpoint.keep_last={count})"
        )
    return found[-count:]


def _task_scores(stage: StageFolder) -> dict[str, float]:
    """`task/<name>` -> the task's score by its first metric, of the stage's export."""
    entries = read_results(stage.evaluation).get("tasks", {})
    return {f"{TASK}{name}": entry[next(iter(metrics_of(entry)))] for name, entry in entries.items()}


def _numbers(scores: Any) -> dict[str, float]:
    """The entries that are numbers; one that was not finite is null on disk."""
    entries = scores.items() if isinstance(scores, dict) else ()
    return {name: value for name, value in entries if isinstance(value, int | float) and not isinstance(value, bool)}
