"""What is tracked and where: the run's folder and the tracking URI, whose secrets are only ever in memory."""

from __future__ import annotations

import base64
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import yaml

from alignvlm.errors import UserError
from alignvlm.run_folder import Run, RunFolder, StageFolder
from data_pipeline.files import read_needed
from data_pipeline.masking import is_masked, mask

NAMES = {"mlflow": "MLflow", "tensorboard": "TensorBoard", "wandb": "Weights & Biases"}
SECRET_VARIABLES = (
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
    "DATABRICKS_TOKEN",
    "DATABRICKS_CLIENT_SECRET",
    "WANDB_API_KEY",
)


@dataclass(frozen=True)
class Target:
    """All that a delivery needs to know of a run; small and plain, so that another process can be told."""

    name: str
    """Name of the run."""
    path: str
    """Folder of the run."""
    stages: Sequence[tuple[int, str]]
    """Number and name of every stage, the initial model first."""
    experiment: str
    """MLflow experiment."""
    artifacts: str
    """Folder of MLflow's artifacts when the tracking URI is a database of ours."""
    uri: str = field(repr=False)
    """Tracking URI, secrets included."""
    tracker: str = "mlflow"
    """Which one of `mirrors.MIRRORS` it is delivered to."""

    @classmethod
    def all_of(cls, run: Run) -> list[Target]:
        """MLflow, and what the recipe names beside it."""
        return [cls.of(run, tracker) for tracker in ("mlflow", *dict.fromkeys(run.recipe.tracking.also))]

    @classmethod
    def of(cls, run: Run, tracker: str = "mlflow") -> Target:
        """The run's, with what MLflow's environment variables say."""
        recipe = run.recipe
        return cls(
            name=recipe.name,
            path=str(run.folder.path),
            stages=[(folder.number, folder.name) for folder in run.stage_folders()],
            experiment=os.environ.get("MLFLOW_EXPERIMENT_NAME") or recipe.tracking.experiment or recipe.name,
            artifacts=str((Path(recipe.runs) / "mlartifacts").resolve()),
            uri=tracking_uri(run),
            tracker=tracker,
        )

    @property
    def folder(self) -> RunFolder:
        return RunFolder(self.path)

    @property
    def shown_uri(self) -> str:
        """The tracking URI for messages and files."""
        return mask(self.uri)

    @property
    def shown(self) -> str:
        """The tracker in messages."""
        return f"MLflow at {self.shown_uri}" if self.tracker == "mlflow" else NAMES[self.tracker]

    def read_config(self) -> dict[str, Any]:
        """The resolved recipe as the run's folder has it, without secrets. DataError: the file is damaged."""
        return read_needed(self.folder.config, _read_yaml, "start the run again with its recipe, which writes it anew")

    def stage_folders(self) -> list[StageFolder]:
        """Folders of the initial model and of all stages, whether they exist or not."""
        return [self.folder.stage(number, name) for number, name in self.stages]

    def mask(self, text: str) -> str:
        """Text without the secrets of the tracking URI and of MLflow's environment variables, wherever they stand."""
        text = text.replace(self.uri, self.shown_uri)
        return mask(text, *_passwords(self.uri), *(os.environ.get(name, "") for name in SECRET_VARIABLES))

    def check(self) -> None:
        """Raise UserError when the URI comes from a file of a run, where its password is masked."""
        if is_masked(self.uri):
            raise UserError("the secret is masked in this copy of a recipe; set MLFLOW_TRACKING_URI")


def _read_yaml(path: Path) -> dict[str, Any]:
    return dict(yaml.safe_load(path.read_text(encoding="utf-8")))


def tracking_uri(run: Run) -> str:
    """`MLFLOW_TRACKING_URI`, else the recipe's, else a SQLite file beside the runs."""
    default = f"sqlite:///{(Path(run.recipe.runs) / 'mlflow.db').resolve()}"
    return os.environ.get("MLFLOW_TRACKING_URI") or run.recipe.tracking.uri or default


def _passwords(uri: str) -> list[str]:
    """The password of a URI, or the token in its place, as it is written, as it is meant, and as HTTP sends it."""
    scheme, _, rest = uri.partition("://")
    login, at, _ = rest.rpartition("@")
    user, _, password = login.partition(":")
    if not password and scheme in ("http", "https"):
        user, password = "", user
    if not at or not password:
        return []
    meant = unquote(password)
    return [
        password,
        meant,
        *(base64.b64encode(login.encode()).decode() for login in (f"{unquote(user)}:{meant}", f"{meant}:")),
    ]
