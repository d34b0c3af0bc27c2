"""Trackers that a run folder is mirrored to: one module each, brought up to date from the files on disk."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from alignvlm.training.tracking.client import TimeLimit
from alignvlm.training.tracking.mirrors.mlflow import MLflow
from alignvlm.training.tracking.mirrors.tensorboard import TensorBoard
from alignvlm.training.tracking.mirrors.wandb import WeightsAndBiases
from alignvlm.training.tracking.target import Target


class Mirror(Protocol):
    """What a tracker's module offers. After an error the mirror is dropped, and the next one begins from the files."""

    notes: list[str]
    """Lines about entries that the tracker does not take; who reports them empties the list."""

    @property
    def place(self) -> str:
        """Where the run is found, after the first `sync`."""

    def sync(self) -> None:
        """Deliver everything that the folder holds and the tracker does not."""

    def close(self) -> None:
        """Called after the last delivery; returns when the tracker has everything."""


MIRRORS: dict[str, Callable[[Target, TimeLimit], Mirror]] = {
    "mlflow": MLflow,
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
}
