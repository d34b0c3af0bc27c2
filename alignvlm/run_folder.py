"""A run on disk: where everything lies, the resolved recipe, and the refusal to go on with a changed one."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml

from alignvlm.config import diff_recipes, recipe_to_dict, recipe_to_yaml
from alignvlm.config.schema import Recipe
from alignvlm.errors import UserError
from data_pipeline.files import write_atomic

FREE_TO_CHANGE = (
    "description", "extends", "runs", "checkpoint.*", "resilience.*", "tracking.*", "evaluation.*",
    "data.num_workers", "data.prefetch", "data.root", "train.processes", "train.timeout_minutes",
    "stages.*.micro_batch_packs",
)  # fmt: skip
"""Settings that change neither the data order nor the mathematics: a run may go on with other values."""

PACKAGES = ("alignvlm", "torch", "deepspeed", "transformers", "webdataset", "mlflow", "flash-attn", "numpy")


class Run:
    """The folder of one run; see the README for its layout."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.folder = Path(recipe.runs) / recipe.name
        self.stages = list(recipe.stages)

    @property
    def metrics_file(self) -> Path:
        return self.folder / "metrics.jsonl"

    @property
    def attempts_file(self) -> Path:
        return self.folder / "attempts.jsonl"

    @property
    def quarantine_file(self) -> Path:
        return self.folder / "quarantine.jsonl"

    def stage_folder(self, index: int) -> Path:
        """Folder of stage `index`; 0 is the model before any training."""
        return self.folder / f"{index}-{self.stages[index - 1] if index else 'init'}"

    def export(self, index: int) -> Path:
        """Hugging Face folder at the end of stage `index` (0: the initial model)."""
        return self.stage_folder(index) / "export"

    def has_export(self, index: int) -> bool:
        """Whether that folder is complete: it gets its name only when it is."""
        return self.export(index).is_dir()

    def newest_export(self) -> Path | None:
        """Of the last stage that has one."""
        done = [i for i in range(len(self.stages) + 1) if self.has_export(i)]
        return self.export(done[-1]) if done else None

    def open(self) -> None:
        """Create the folder, or make sure that it belongs to this recipe. Rank 0 only.

        Raises:
            UserError: when the run was started with other settings; lists the differences.
        """
        config = self.folder / "config.yaml"
        if config.exists():
            old = yaml.safe_load(config.read_text())
            changes = [c for c in diff_recipes(old, recipe_to_dict(self.recipe)) if not _is_free(c)]
            if changes:
                listed = "\n  ".join(changes)
                raise UserError(
                    f"{config}: this run was started with another recipe:\n  {listed}\n"
                    f"Set them back, give the new run another name (name={self.recipe.name}-2), or remove {self.folder}"
                )
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomic(config, recipe_to_yaml(self.recipe))
        environment = self.folder / "environment.json"
        if not environment.exists():
            write_atomic(environment, json.dumps(describe_environment(), indent=2) + "\n")


def describe_environment() -> dict[str, Any]:
    """Package versions, git commit (of the working directory, when there is one), machine and time."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    return {
        "packages": versions,
        "python": platform.python_version(),
        "git_commit": git.stdout.strip() or None,
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _is_free(change: str) -> bool:
    key = change.split(":", 1)[0].strip()
    return any(fnmatchcase(key, pattern) for pattern in FREE_TO_CHANGE)
