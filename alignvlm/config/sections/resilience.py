"""The section `resilience` of a recipe: bad steps, and how long each part of a job may stand still."""

from __future__ import annotations

from typing import Annotated

from annotated_types import Ge, Gt, Le

from alignvlm.settings import Float, PositiveInt, settings
from alignvlm.system.monitor.heart import Limit

MINUTES = 525_600
"""Largest limit: a year."""
Minutes = Annotated[Float, Gt(0), Le(MINUTES)]


@settings
class ResilienceConfig:
    """What happens when a step goes wrong, and how long anything may stand still before its rank is ended."""

    max_bad_steps: PositiveInt = 10
    """Stop after this many consecutive steps with a non-finite loss or gradient; such steps change no weight."""
    spike_factor: Annotated[Float, Ge(1)] | None = None
    """A loss above this multiple of the median of the last 50 steps sends the run back to the last checkpoint, from
    which it goes on without the packs that came since then; null switches this off."""
    replay_every: PositiveInt | None = None
    """Compute a micro-batch of every so many steps twice, before its step. When a bit of the loss or, except under
    ZeRO-3, of the gradient's norm differs, the run ends and names the rank, whose device is broken. null is off."""
    step_factor: Annotated[Float, Ge(2)] = 20.0
    """A step counts as hanging when it takes more than this many times the median of the last 50 steps and more than
    `step_minutes`."""
    step_minutes: Minutes = 3.0
    """A step never counts as hanging before this many minutes; where data lies in a store, not before a minute more
    than a store may stay silent (`ALIGNVLM_PATIENCE`). The first step after a start, and every step until 20 are done,
    may take `start_up_minutes`."""
    start_up_minutes: Minutes = 10.0
    """Importing, building a stage's engine and loading a checkpoint count as hanging after this many minutes without
    progress. Here and below, whatever reads or writes 1 MiB per second makes progress. How long ranks wait for the
    last one to start is `train.timeout_minutes`."""
    save_minutes: Minutes = 7.0
    """The same for a save that training waits for; bytes that are written and checked are progress."""
    evaluation_minutes: Minutes = 20.0
    """The same for evaluation, the report and the last delivery to MLflow; every batch of answers is progress."""
    export_minutes: Minutes = 20.0
    """The same for an export."""
    prepare_minutes: Minutes = 30.0
    """The same for preparing, which may include a download; every step of a bar is progress."""

    @property
    def limits(self) -> dict[str, Limit]:
        """Section of `system.timeline` -> how long it may go without progress."""
        keys = dict.fromkeys(("imports", "rendezvous", "engine", "load", "steps", "end"), "start_up_minutes")
        keys |= dict.fromkeys(("evaluation", "report", "delivery"), "evaluation_minutes")
        keys |= {"prepare": "prepare_minutes", "save": "save_minutes", "export": "export_minutes"}
        return {section: self.limit(key) for section, key in keys.items()}

    def limit(self, key: str) -> Limit:
        """The limit that one of the keys in minutes sets."""
        minutes = getattr(self, key)
        return Limit(60 * minutes, f"resilience.{key} is {minutes:g}")
