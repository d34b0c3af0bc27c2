"""Measuring: samples that cannot be used are named, the others are measured."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.errors import DataError
from data_pipeline.samples.schema import SampleError
from data_pipeline.shards.index import index_shards
from data_pipeline.shards.sources import measure_source, open_source
from tests.data_pipeline.tars import picture, write_tar
from tests.fixtures.damage import DAMAGES, full_disk
from tests.jobs import ROOT, job_environment


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six samples, four of which cannot be used."""
    folder = tmp_path / "bad"
    chat = json.dumps(
        {"messages": [{"role": "user", "content": "<image>hm"}, {"role": "assistant", "content": "a"}]}
    ).encode()
    members = []
    for key, image in (("good", picture()), ("broken", b"no image"), ("none", None), ("cut", picture(400, 400)[:900])):
        members.append((f"{key}.json", chat))
        if image is not None:
            members.append((f"{key}.0.jpg", image))
    members.append(("list.json", b"[1]"))
    members.append(("text.json", b"{"))
    write_tar(folder / "0.tar", members)
    index_shards(folder, num_processes=1)
    return folder


def test_images_that_cannot_be_used_are_named_when_measured(folder: Path, encoder: Any) -> None:
    measure_source(folder, encoder, num_processes=1)
    source = open_source("bad", folder, encoder)
    assert [bad.key for bad in source.unusable] == ["broken", "none", "list", "text"]
    assert source.measures[:, 0].astype(bool).tolist() == [True, False, False, True, False, False]
    with pytest.raises(SampleError, match="truncated"):
        source.reader[3]


@pytest.mark.parametrize(
    ("suffix", "damage"),
    [*((s, d) for s in (".npy", ".bad.jsonl") for d in (*DAMAGES, "missing")), (".npy", "other numbers")],
)
def test_damaged_measures_are_made_anew(
    folder: Path, encoder: Any, damage: str, suffix: str, caplog: pytest.LogCaptureFixture
) -> None:
    measures = measure_source(folder, encoder, num_processes=1)
    good = open_source("bad", folder, encoder)
    lengths, unusable = good.measures.tolist(), good.unusable
    path = measures.with_suffix(suffix)
    if damage == "missing":
        path.unlink()
    elif damage == "other numbers":
        path.write_bytes(path.read_bytes().replace(np.uint32(1).tobytes(), np.uint32(2).tobytes()))
    elif damage != "wrong types" or suffix != ".npy":
        path.write_bytes(DAMAGES[damage](path.read_bytes()))
    else:
        np.save(path, good.measures.astype(np.float64))
    with pytest.raises(DataError, match="`alignvlm data plan RECIPE`"):
        open_source("bad", folder, encoder)
    measure_source(folder, encoder, num_processes=1)
    again = open_source("bad", folder, encoder)
    assert (again.measures.tolist(), again.unusable) == (lengths, unusable)
    assert len(caplog.messages) == ((damage, suffix) != ("missing", ".npy"))


def test_measures_that_cannot_be_written_are_one_line(folder: Path, encoder: Any) -> None:
    with full_disk(100), pytest.raises(DataError, match=r"\.npy cannot be written \(File too large\); .* writable"):
        measure_source(folder, encoder, num_processes=1)


KILLED = """
import os, signal, sys
from data_pipeline.shards import sources
from tests.fixtures.letters import LetterEncoder

class Deadly(LetterEncoder):
    def measure(self, messages, image_sizes):
        if messages[0]["content"][-1]["text"] == "number 60":
            os.kill(os.getpid(), signal.SIGKILL)
        return super().measure(messages, image_sizes)

sources._CHUNK, sources.PART_SECONDS = (16, 16), 0.0
sources.measure_source(sys.argv[1], Deadly(), num_processes=1)
"""


def test_measuring_that_was_killed_goes_on_where_it_was(tmp_path: Path, encoder: Any) -> None:
    members = [(f"{key}.json", content) for key, content in (("bad", b"["), ("one", b"{}"))]
    for number in range(98):
        chat = [{"role": "user", "content": f"number {number}"}, {"role": "assistant", "content": "x" * (number % 7)}]
        members.append((f"{number:04d}.json", json.dumps({"messages": chat}).encode()))
    for name in ("killed", "whole"):
        write_tar(tmp_path / name / "0.tar", members)
        index_shards(tmp_path / name, num_processes=1)
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "killed")], cwd=ROOT, env=job_environment())
    assert done.returncode == -signal.SIGKILL
    parts = sorted(path.name.partition(".first-")[2] for path in (tmp_path / "killed").glob("*.first-*"))
    assert parts == ["48.bad.jsonl", "48.npy"]

    seen = []

    class Counting(type(encoder)):  # type: ignore[misc]
        def measure(self, messages: Any, image_sizes: Any) -> tuple[int, int]:
            seen.append(messages)
            return super().measure(messages, image_sizes)

    for name, count in (("killed", 100 - 48), ("whole", 98)):
        seen.clear()
        measure_source(tmp_path / name, Counting(), num_processes=1)
        assert len(seen) == count
    killed, whole = (open_source("s", tmp_path / name, encoder) for name in ("killed", "whole"))
    assert killed.measures.tolist() == whole.measures.tolist()
    assert killed.unusable == whole.unusable
    assert [bad.key for bad in killed.unusable] == ["bad", "one"]
    assert not list((tmp_path / "killed").glob("*.first-*"))
