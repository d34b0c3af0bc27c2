"""The line of metrics.jsonl: its keys are part of what users read, and callbacks only add to them."""

from __future__ import annotations

import pytest

from tests.training.fakes import record

KEYS = [
    "stage", "step", "time", "epoch", "loss", "lr", "grad_norm", "tokens", "samples", "supervised", "tiles", "skipped",
    "seconds", "tokens_per_second", "samples_per_second", "mfu", "data_wait", "memory_gib", "fill", "checkpoint_stall",
    "source_loss", "source_tokens", "source_supervised", "ranks", "stragglers",
]  # fmt: skip


def test_a_line_has_the_fields_and_then_what_callbacks_add() -> None:
    step = record()
    assert list(step.to_json()) == KEYS
    step.extra["connector_entropy"] = 3.5
    assert list(step.to_json()) == [*KEYS, "connector_entropy"]
    assert step.to_json()["connector_entropy"] == 3.5


def test_an_addition_cannot_replace_a_field() -> None:
    step = record()
    step.extra["loss"] = 0.0
    with pytest.raises(ValueError, match="'loss' is a field of the record"):
        step.to_json()
