"""What the goodput of a run would be with a failure every so often: what each one costs, what training itself loses.

Between two failures lies one start, its share of steps taken again and of waiting for the next attempt, and the rest of
the time, in which the steps that count have the same share as in the run that was measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from alignvlm.errors import UserError
from alignvlm.report.attempts import PARTS
from alignvlm.report.charts import format_duration
from alignvlm.report.goodput import Goodput

PER_FAILURE = ("start_up", "retaken", "waiting")
"""Parts of the wall clock that come with every failure; the others come with the steps."""


@dataclass(frozen=True)
class Projection:
    """A run with a failure every `every` seconds."""

    every: float
    costs: dict[str, float]
    """Part of `PER_FAILURE` -> seconds for each failure."""
    shares: dict[str, float]
    """Each other part -> its share of the time without failures; they add up to 1."""

    @property
    def ettr(self) -> float:
        """Effective training time ratio; 0 when a failure costs more than the time between two of them."""
        return self.shares["steps"] * max(0.0, 1 - sum(self.costs.values()) / self.every)

    @property
    def ettr_without_waiting(self) -> float:
        """The same without the time between attempts, such as that in a scheduler's queue."""
        lost = self.costs["start_up"] + self.costs["retaken"]
        return self.shares["steps"] * max(0.0, 1 - lost / (self.every - min(self.costs["waiting"], self.every / 2)))

    def to_json(self) -> dict[str, Any]:
        """All numbers; times in seconds."""
        return {
            "failure_every_seconds": self.every,
            "ettr": self.ettr,
            "ettr_without_waiting": self.ettr_without_waiting,
            "seconds_per_failure": self.costs,
            "shares_without_failures": self.shares,
        }

    def __str__(self) -> str:
        costs = ", ".join(f"{PARTS[part]} {format_duration(seconds)}" for part, seconds in self.costs.items())
        shares = ", ".join(
            f"{PARTS[part]} {100 * share:.1f} %" for part, share in self.shares.items() if part != "steps" and share
        )
        return (
            f"with a failure every {format_duration(self.every)}: ETTR {100 * self.ettr:.1f} %, "
            f"{100 * self.ettr_without_waiting:.1f} % without the time between attempts\n"
            f"  each failure costs {format_duration(sum(self.costs.values()))}: {costs}\n"
            f"  of the rest of the time {100 * self.shares['steps']:.1f} % are steps that count"
            + (f"; {shares}" if shares else "")
        )


def project(found: Goodput, every: float) -> Projection:
    """The projection of a run that failed at least once to a failure every `every` seconds.

    Raises:
        UserError: no attempt of the run has failed, or it has taken no step that counts.
    """
    parts = found.parts
    failures = sum(each.end in ("killed", "stopped") for each in found.attempts)
    if not failures or not parts["steps"]:
        raise UserError("no attempt of this run has ended early after a step: what a failure costs is not known")
    costs = {
        "start_up": parts["start_up"] / len(found.attempts),
        "retaken": parts["retaken"] / failures,
        "waiting": parts["waiting"] / failures,
    }
    rest = {part: seconds for part, seconds in parts.items() if part not in PER_FAILURE}
    total = sum(rest.values())
    return Projection(every, costs, {part: seconds / total for part, seconds in rest.items()})
