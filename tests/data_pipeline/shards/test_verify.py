"""Verifying: every kind of damage is found, and nothing else."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.samples.schema import SampleError
from data_pipeline.shards.reader import SourceReader
from data_pipeline.shards.sidecars import index_name
from data_pipeline.shards.verify import verify_folder
from data_pipeline.shards.writer import write_shards
from tests.data_pipeline.tars import overwrite, write_tar


def test_verify_finds_every_kind_of_damage(tmp_path: Path, records: Any) -> None:
    folder = tmp_path / "damaged"
    write_shards(records(60), folder, samples_per_shard=10, num_processes=1)
    assert verify_folder(folder, decode=True, num_processes=1) == []
    entry = SourceReader(folder).entry(2)
    overwrite(folder / "000000.tar", entry.members["json"][0], b"#")
    os.truncate(folder / "000001.tar", 6000)
    (folder / "000002.tar").unlink()
    (folder / index_name("000003.tar")).write_text("{}\n")
    write_tar(folder / "extra.tar", [("a.txt", b"x")])
    problems = verify_folder(folder, num_processes=2)
    assert any(f"sample {entry.key}: content changed" in line for line in problems)
    for shard in ("000001", "000002", "000003", "extra"):
        assert any(line.startswith(shard) for line in problems), shard
    assert not any(line.startswith(("000004", "000005")) for line in problems)
    with pytest.raises(SampleError, match="checksum"):
        SourceReader(folder)[2]
