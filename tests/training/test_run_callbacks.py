"""The order of callbacks, and what the user's own may be."""

from __future__ import annotations

import pytest

import alignvlm
from alignvlm.errors import UserError
from alignvlm.training.callbacks import Callback
from alignvlm.training.run import all_callbacks, train


class Mine(Callback):
    """The user's own."""


class MetricsLog(Callback):
    """The user's own, with a name that is taken."""


def test_the_users_own_see_a_complete_record_before_it_is_written_and_are_saved() -> None:
    names = [callback.name for callback in all_callbacks(None, [Mine()])]
    assert names == [
        "ConnectorStatistics", "RankTimes", "BadNumbers", "Replay", "HeldOutLoss", "Mine", "EarlyEnd", "MetricsLog",
        "ProgressBar", "StepLimit", "Checkpoints",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ([MetricsLog()], "two are named 'MetricsLog'"),
        ([Mine(), Mine()], "two are named 'Mine'"),
        ([Mine], "is not an instance of alignvlm.Callback"),
    ],
)
def test_mistakes_are_reported_before_anything_runs(own: list, message: str) -> None:
    with pytest.raises(UserError, match=message):
        train(alignvlm.load_recipe("quickstart"), callbacks=own)
