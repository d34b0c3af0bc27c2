"""Measuring: samples that cannot be used are named, the others are measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.samples.schema import SampleError
from data_pipeline.shards.index import index_shards
from data_pipeline.shards.sources import measure_source, open_source
from tests.data_pipeline.tars import picture, write_tar


def test_images_that_cannot_be_used_are_named_when_measured(tmp_path: Path, encoder: Any) -> None:
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
    measure_source(folder, encoder, num_processes=1)
    source = open_source("bad", folder, encoder)
    assert [bad.key for bad in source.unusable] == ["broken", "none", "list", "text"]
    assert source.measures[:, 0].astype(bool).tolist() == [True, False, False, True, False, False]
    with pytest.raises(SampleError, match="truncated"):
        source.reader[3]
