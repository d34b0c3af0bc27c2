"""The settings of a plan, stated once: what decides the order, and how long it is followed."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from data_pipeline.errors import DataError

LARGEST = {
    "sequence_length": 2**24,
    "global_batch_packs": 2**20,
    "window_shards": 2**20,
    "mix_block": 2**24,
    "pack_window": 2**24,
    "epochs": 100_000,
}
"""Largest value of each setting: a plan with more would fill the memory, or not be counted in minutes."""
_LENGTH = ("epochs", "max_steps")


@dataclass(frozen=True, kw_only=True)
class PlanSettings:
    """Settings of `Plan`. Raises DataError for values that cannot work."""

    seed: int = 0
    sequence_length: int
    """Tokens of a pack; longer samples are dropped, counted and logged."""
    global_batch_packs: int
    """Packs of a step, over all ranks."""
    window_shards: int = 16
    """Shards per shuffle window."""
    mix_block: int = 1024
    """Samples per mixing block."""
    pack_window: int = 65536
    """Samples that are packed together."""
    epochs: int = 1
    """Passes over the mixture (mixing.py says what one is)."""
    max_steps: int | None = None
    """End after so many steps, even within an epoch."""

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if name != "seed" and value is not None and value < 1:
                raise DataError(f"{name} is {value}; it must be at least 1")
            if name in LARGEST and value > LARGEST[name]:
                raise DataError(f"{name} is {value}; it must be at most {LARGEST[name]}")

    def order(self) -> dict[str, Any]:
        """The settings that decide the order, without those that say how long it is followed."""
        return {name: value for name, value in asdict(self).items() if name not in _LENGTH}
