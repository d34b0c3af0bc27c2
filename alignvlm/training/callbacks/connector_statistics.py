"""How the connector spreads its mass over the vocabulary: entropy and top-token probability, now and then."""

from __future__ import annotations

from collections.abc import Sequence

from alignvlm.training.callbacks.base import Callback, StageState
from alignvlm.training.record import StepRecord
from data_pipeline.loading.collate import MicroBatch


class ConnectorStatistics(Callback):
    """Asks the connector for its statistics once per tracking interval; they are of rank 0's first micro-batch."""

    def before_step(self, state: StageState, batches: Sequence[MicroBatch]) -> None:
        if (state.step + 1) % state.recipe.tracking.interval == 0:
            state.trainer.model.model.connector.collect_statistics = True

    def on_step(self, state: StageState, record: StepRecord) -> None:
        connector = state.trainer.model.model.connector
        record.extra |= {f"connector_{name}": value for name, value in connector.last_statistics.items()}
        connector.last_statistics = {}
