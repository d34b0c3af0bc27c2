"""The package's face: every public name is there, used as a user would; importing it and planning need numpy only."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import data_pipeline

ROOT = Path(data_pipeline.__file__).parent


def test_from_records_to_batches_with_public_names_only(tmp_path: Path, records: Any, encoder: Any) -> None:
    from data_pipeline import (
        Plan,
        PlanSettings,
        Sample,
        SourceReader,
        build_loader,
        measure_source,
        open_source,
        write_shards,
    )

    write_shards(records(12), tmp_path / "mine", num_processes=1)
    assert isinstance(SourceReader(tmp_path / "mine")[0], Sample)
    measure_source(tmp_path / "mine", encoder, num_processes=1)
    sources = {"mine": open_source("mine", tmp_path / "mine", encoder)}
    plan = Plan(sources, {"mine": 1}, PlanSettings(sequence_length=200, global_batch_packs=1))
    keys = [key for step in build_loader(plan, encoder, num_workers=0) for batch in step for key in batch.keys]
    assert sorted(keys) == [f"mine/000000.tar/s{i:05d}" for i in range(12)]


def test_every_public_name_is_there_and_others_are_not() -> None:
    assert [name for name in data_pipeline.__all__ if getattr(data_pipeline, name).__name__ != name] == []
    assert set(data_pipeline.__all__) <= set(dir(data_pipeline))
    with pytest.raises(AttributeError, match="no attribute 'Plam'"):
        data_pipeline.Plam  # noqa: B018


def test_importing_and_planning_need_numpy_only() -> None:
    modules = [f"data_pipeline.order.{path.stem}" for path in (ROOT / "order").glob("[a-z]*.py")]
    assert len(modules) >= 8
    code = f"import sys, data_pipeline, {', '.join(modules)}; data_pipeline.PlanSettings; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT.parent
    ).stdout.split()
    assert "numpy" in loaded
    assert not {"torch", "PIL", "webdataset", "transformers", "alignvlm"} & set(loaded)
