"""A run on disk: every file name for writers and readers, the resolved recipe, the refusal of a changed one."""

from __future__ import annotations

import json
import logging
import re
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from alignvlm.config import diff_recipes, recipe_to_dict, recipe_to_yaml
from alignvlm.config.schema import Recipe, StageConfig
from alignvlm.config.tree import read_tree
from alignvlm.errors import UserError
from alignvlm.system.environment import describe_environment
from data_pipeline.files import must_write, read_json, write_atomic

FREE_TO_CHANGE = (
    "description", "extends", "imports", "runs", "checkpoint.*", "resilience.*", "tracking.*", "evaluation.*",
    "data.num_workers", "data.prefetch", "data.root", "data.cache_gb", "data.sources.*.read",
    "train.processes", "train.timeout_minutes",
    "train.gradient_checkpointing*", "train.kept_logits_gib",
    "stages.*.micro_batch_packs",
)  # fmt: skip
"""Settings that change neither the data order nor the mathematics: a run may resume with other values."""

MOST_CHANGES = 12
"""Changed settings that an error lists."""

INITIAL = "init"
"""Name of stage 0, the model before any training."""
EVALUATION = "evaluation"
BENCHMARKS = "benchmarks"
VIEW_SUFFIX = ".vocabulary.json"
_STAGE_FOLDER = re.compile(r"(\d+)-(.+)")
_CHECKPOINT = re.compile(r"step-(\d+)", re.ASCII)
METRICS_LINE = {"stage": str, "step": int}
ATTEMPTS_LINE = {"stage": str, "resumed_at": int, "world_size?": int, "ended_early?": str, "hub?": {str: str}}
TIMELINE_LINE = {"time": float, "section": str, "host?": str, "last_beat?": float, "finished?": bool}
RECOMPUTATION = {"vision": int, "language": int, "circumstances": dict}
ENVIRONMENT = {"packages": {str: str}, "git_commit?": str, "device?": str, "started?": str}
"""What every line of metrics.jsonl, attempts.jsonl and timeline.jsonl and the objects in recomputation.json and
environment.json have, for their readers."""

WAY_OUT = "make the folder writable and free some space, or give another one: --output FOLDER"
"""What to do when the results of an evaluation cannot be written."""

log = logging.getLogger(__name__)


class EvaluationFolder:
    """Predictions and scores of one model: `runs/<name>/<n>-<stage>/evaluation`, or wherever `--output` says."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.results = path / "results.json"
        self.text = path / "text.json"
        self.gallery = path / "gallery"

    def predictions(self, task: str) -> Path:
        """One line per item, in order."""
        return self.path / f"{task}.jsonl"

    def unusable(self, task: str) -> Path:
        """One line per item or sample that could not be used; absent when there is none."""
        return self.path / f"{task}.unusable.jsonl"

    def part(self, task: str, rank: int, world_size: int) -> Path:
        """What one rank has answered, until the parts are joined."""
        return self.path / "parts" / f"{task}.{rank}-of-{world_size}.jsonl"

    def picture(self, task: str, index: int, number: int) -> Path:
        """Image `number` of sample `index`."""
        return self.gallery / f"{task}-{index:06d}-{number}.png"

    def view(self, task: str, index: int) -> Path:
        """What the connector reads in the first image of sample `index`."""
        return self.gallery / f"{task}-{index:06d}{VIEW_SUFFIX}"

    def views(self, task: str) -> list[Path]:
        """All of these that there are."""
        name = re.compile(rf"{re.escape(task)}-\d{{6,}}{re.escape(VIEW_SUFFIX)}", re.ASCII)
        return sorted(path for path in self.gallery.glob(f"*{VIEW_SUFFIX}") if name.fullmatch(path.name))


class BenchmarkFolder:
    """Replies and scores of one model on published benchmarks: `runs/<name>/<n>-<stage>/benchmarks`, or `--output`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.results = path / "results.json"
        self.paper = path / "paper.md"

    def replies(self, benchmark: str) -> Path:
        """One line per question, in order."""
        return self.path / f"{benchmark}.jsonl"

    def unusable(self, benchmark: str) -> Path:
        """One line per question that could not be asked; absent when there is none."""
        return self.path / f"{benchmark}.unusable.jsonl"

    def submission(self, benchmark: str) -> Path:
        """Replies in the form that a judge elsewhere reads, for the benchmarks that need one."""
        return self.path / f"{benchmark}.submission.json"

    def parts(self, benchmark: str, identity: str) -> Path:
        """What ranks have answered, until the benchmark is finished."""
        return self.path / "parts" / f"{benchmark}-{identity}"


class StageFolder:
    """`runs/<name>/<number>-<stage>`; number 0, `init`, is the model before any training."""

    def __init__(self, path: Path, number: int, name: str) -> None:
        self.path, self.number, self.name = path, number, name
        self.export = path / "export"
        self.masters = path / "masters.safetensors"
        self.checkpoints = path / "checkpoints"
        self.recomputation = path / "recomputation.json"
        self.skipped_steps = path / "skipped_steps.json"
        self.flops = path / "flops.json"
        self.evaluation = EvaluationFolder(path / EVALUATION)
        self.benchmarks = BenchmarkFolder(path / BENCHMARKS)

    @property
    def has_export(self) -> bool:
        """Whether the Hugging Face folder is complete: it gets its name only when it is."""
        return self.export.is_dir()

    def checkpoint_folders(self) -> list[Path]:
        """Finished checkpoints, the oldest first."""
        return checkpoint_folders(self.checkpoints)

    def analysis(self, name: str) -> Path:
        """What a study measured on the export; its evaluations are in the folder of the same name."""
        return self.path / "studies" / f"{name}.json"


class RunFolder:
    """`runs/<name>`: where everything of a run lies, for those who write it and for those who read it."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.environment = self.path / "environment.json"
        self.metrics = self.path / "metrics.jsonl"
        self.attempts = self.path / "attempts.jsonl"
        self.timeline = self.path / "timeline.jsonl"
        self.lost_steps = self.path / "lost_steps.jsonl"
        self.quarantine = self.path / "quarantine.jsonl"
        self.mlflow_state = self.path / "mlflow.json"
        self.wandb_state = self.path / "wandb.json"
        self.wandb = self.path / "wandb"
        self.tensorboard = self.path / "tensorboard"
        self.logs = self.path / "logs"
        self.report = self.path / "report"
        self.report_page = self.report / "index.html"
        self.report_results = self.report / "results.json"
        self.seal = self.path / "finished.json"

    def must_exist(self) -> None:
        """Raise UserError when there is no such folder."""
        if not self.path.is_dir():
            raise UserError(
                f"{self.path}: there is no run folder; give one that training wrote, such as runs/quickstart"
            )

    def read_config(self) -> dict[str, Any]:
        """The resolved recipe. Raises UserError when the file is damaged."""
        try:
            return read_tree(self.config).plain()
        except UserError as error:
            way_out = "it holds the recipe of this run: restore it, or give a new run another name"
            raise UserError(f"{' '.join(str(error).split())}; {way_out}") from error

    def holds(self, path: Path) -> bool:
        """Whether there is such a path inside the run folder; a path or link that leads out of it is a warning."""
        try:
            real = path.resolve(strict=True)
        except (OSError, RuntimeError, ValueError):  # there is none, links in a circle, a NUL byte
            return False
        inside = real.is_relative_to(self.path.resolve())
        if not inside:
            log.warning("%s leads out of the run folder and is left out", path)
        return inside

    def has_file(self, path: Path) -> bool:
        """Whether there is such a regular file inside the run folder."""
        return self.holds(path) and path.is_file()

    def stage(self, number: int, name: str) -> StageFolder:
        """Folder of a stage."""
        return StageFolder(self.path / f"{number}-{name}", number, name)

    def stages(self) -> list[StageFolder]:
        """Stage folders on disk, in order."""
        found = []
        for path in self.path.iterdir():
            match = _STAGE_FOLDER.fullmatch(path.name)
            if match and path.is_dir():
                found.append(self.stage(int(match[1]), match[2]))
        return sorted(found, key=lambda stage: stage.number)


class Run:
    """A recipe and its folder; see the README for the folder's layout."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.folder = RunFolder(Path(recipe.runs) / recipe.name)
        self.initial = self.folder.stage(0, INITIAL)
        """The model before any training."""

    def stage_folder(self, stage: StageConfig) -> StageFolder:
        """Folder of one of the recipe's stages."""
        return self.folder.stage(stage.number, stage.name)

    def stage_folders(self) -> list[StageFolder]:
        """Folders of the initial model and of all stages of the recipe, whether they exist or not."""
        return [self.initial, *map(self.stage_folder, self.recipe.stages.values())]

    def folder_before(self, stage: StageConfig) -> StageFolder:
        """Folder of the stage, or of the initial model, that a stage starts from."""
        return self.stage_folders()[stage.number - 1]

    def newest_export(self) -> Path | None:
        """Export of the last stage that has one."""
        exports = [folder.export for folder in self.stage_folders() if folder.has_export]
        return exports[-1] if exports else None

    def open(self) -> None:
        """Create the folder, or make sure that it belongs to this recipe. Rank 0 only.

        Raises:
            UserError: when the run was started with other settings; lists the differences. Or when nothing says with
                which. DataError: when the folder cannot be written.
        """
        self.check_recipe()
        for stage in self.folder.stages() if self.folder.path.is_dir() and not self.folder.config.exists() else ():
            if any(path.is_file() for path in stage.path.rglob("*")):  # such as what a job has saved after an `rm -r`
                raise UserError(
                    f"{self.folder.config} is missing, so nothing says with which recipe {stage.path} was made: "
                    f"restore it, give the new run another name (name={self.recipe.name}-2), or remove "
                    f"{self.folder.path}"
                )
        with must_write(self.folder.path, "make it writable, or give another folder for all runs: runs=FOLDER"):
            self.folder.path.mkdir(parents=True, exist_ok=True)
            write_atomic(self.folder.config, recipe_to_yaml(self.recipe))
            if not read_json(self.folder.environment, ENVIRONMENT):
                write_atomic(self.folder.environment, json.dumps(describe_environment(), indent=2) + "\n")

    def check_recipe(self) -> None:
        """Make sure that the folder, where there is one, belongs to this recipe.

        Raises:
            UserError: the run was started with other settings; lists the differences.
        """
        config = self.folder.config
        if config.exists():
            changes = [
                change
                for change in diff_recipes(self.folder.read_config(), recipe_to_dict(self.recipe))
                if not _is_free(change)
            ]
            if changes:
                more = [f"… and {len(changes) - MOST_CHANGES} more"] if len(changes) > MOST_CHANGES else []
                listed = "; ".join(changes[:MOST_CHANGES] + more)
                is_newer = any(": (absent) → " in change for change in changes)
                older = "finish it with the version that began it if that has no such keys, " if is_newer else ""
                raise UserError(
                    f"{config}: this run was started with another recipe ({listed}): "
                    f"set that back, {older}give the new run another name (name={self.recipe.name}-2), or remove "
                    f"{self.folder.path}"
                )


def evaluation_folder(export: Path, limit: int | None = None) -> Path:
    """Folder of the evaluation of an export, beside it; one of its own for the first `limit` samples of each task."""
    return export.parent / (EVALUATION if limit is None else f"{EVALUATION}-{limit}")


def benchmark_folder(export: Path, limit: int | None = None) -> Path:
    """Folder of the benchmarks of an export, beside it; one of its own for the first `limit` questions of each."""
    return export.parent / (BENCHMARKS if limit is None else f"{BENCHMARKS}-{limit}")


def run_of_export(export: Path) -> RunFolder:
    """The run that an export folder `runs/<name>/<n>-<stage>/export` belongs to, whether it exists or not."""
    return RunFolder(export.absolute().parents[1])


def run_of_checkpoint(checkpoint: Path) -> RunFolder:
    """The run that a folder `runs/<name>/<n>-<stage>/checkpoints/step-…` belongs to, whether it exists or not."""
    return RunFolder(checkpoint.absolute().parents[2])


def stages_at(path: Path) -> tuple[RunFolder, list[StageFolder]]:
    """The run and the stages in order that a run's folder or a stage's folder `runs/<name>/<n>-<stage>` stands for.

    Raises:
        UserError: it is neither.
    """
    match = _STAGE_FOLDER.fullmatch(path.absolute().name)
    run = RunFolder(path)
    if match and (path / "checkpoints").is_dir() and not run.config.exists():
        return RunFolder(path.absolute().parent), [StageFolder(path, int(match[1]), match[2])]
    stages = run.stages() if path.is_dir() else []
    if not stages:
        raise UserError(f"{path} is no run or stage; give runs/<name> or runs/<name>/<n>-<stage>")
    return run, stages


def checkpoint_folder(checkpoints: Path, step: int) -> Path:
    """Folder of the checkpoint after `step` steps."""
    return checkpoints / f"step-{step:08d}"


def checkpoint_folders(checkpoints: Path) -> list[Path]:
    """Finished checkpoints in a stage's folder of them, the oldest first: folders `step-<digits>`, never links."""
    found = [path for path in checkpoints.glob("step-*") if _CHECKPOINT.fullmatch(path.name)]
    return sorted((path for path in found if path.is_dir() and not path.is_symlink()), key=checkpoint_step)


def checkpoint_step(checkpoint: Path) -> int:
    """Steps after which a checkpoint was written."""
    return int(checkpoint.name.removeprefix("step-"))


def _is_free(change: str) -> bool:
    key = change.split(":", 1)[0].strip()
    if change == f"{key}: (absent) → None":  # a key that a later version has, and that asks for nothing
        return True
    return may_change(key)


def may_change(key: str) -> bool:
    """Whether a run may resume with another value of this setting, such as `train.processes`."""
    return any(fnmatchcase(key, pattern) for pattern in FREE_TO_CHANGE)
