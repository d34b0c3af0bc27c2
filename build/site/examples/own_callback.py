"""A callback of your own: how much of what the model reads is supervised, in metrics.jsonl, MLflow and checkpoints.

    python examples/own_callback.py quickstart

runs a recipe in one process; `torchrun --nproc-per-node 4 examples/own_callback.py RECIPE` in four.
"""

from __future__ import annotations

import sys
from typing import Any

import alignvlm


class SupervisedFraction(alignvlm.Callback):
    """Adds the mean fraction of supervised tokens since the stage began to each step's record."""

    def __init__(self) -> None:
        self._supervised = self._tokens = 0

    def on_start(self, state: alignvlm.StageState) -> None:
        if state.step == 0:  # a new stage; one that resumes has got its numbers from `load_state`
            self._supervised = self._tokens = 0

    def on_step(self, state: alignvlm.StageState, record: alignvlm.StepRecord) -> None:
        self._supervised += record.supervised
        self._tokens += record.tokens
        record.extra["supervised_fraction"] = self._supervised / max(1, self._tokens)

    def state(self) -> dict[str, Any]:
        return {"supervised": self._supervised, "tokens": self._tokens}

    def load_state(self, state: dict[str, Any]) -> None:
        self._supervised, self._tokens = state["supervised"], state["tokens"]


if __name__ == "__main__":
    sys.exit(alignvlm.train(sys.argv[1], callbacks=[SupervisedFraction()]))
