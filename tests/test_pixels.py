"""Training, evaluation, chat, the processor and the preview of a batch see the same pixels of one file."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from alignvlm.evaluation.items import items_of
from alignvlm.serving.chat import ChatSession
from data_pipeline.loading.show import render_batch
from data_pipeline.order.batch import GlobalBatch, Packs
from data_pipeline.shards.index import index_shards
from data_pipeline.shards.reader import SourceReader
from tests.data_pipeline.tars import write_tar
from tests.fixtures.zoo import zoo
from tests.tiny import tiny_model

ZOO = zoo()
QUESTION = (
    '{"messages": [{"role": "user", "content": "<image>what is the total"}, {"role": "assistant", "content": "7"}]}'
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`export`, the zoo's files in `files`, and in `shards` one sample of each."""
    folder = tmp_path_factory.mktemp("pixels")
    model, processor = tiny_model()
    model.save_pretrained(folder / "export")
    processor.save_pretrained(folder / "export")
    (folder / "files").mkdir()
    members = []
    for number, (name, (data, _)) in enumerate(ZOO.items()):
        (folder / "files" / name).write_bytes(data)
        members += [(f"{number:03d}.{name.rsplit('.', 1)[1]}", data), (f"{number:03d}.json", QUESTION.encode())]
    write_tar(folder / "shards" / "0.tar", members)
    index_shards(folder / "shards", num_processes=1)
    return folder


def test_all_see_the_same_pixels(folder: Path) -> None:
    reader = SourceReader(folder / "shards")
    paths = [folder / "files" / name for name in ZOO]
    session = ChatSession(folder / "export", paths, "cpu")
    processor = session.processor
    packs = Packs(
        np.zeros(len(ZOO), np.int64), np.arange(len(ZOO)), np.ones(len(ZOO), np.int64), np.ones(len(ZOO), np.int64),
        np.arange(len(ZOO) + 1),
    )  # fmt: skip
    page = render_batch(
        GlobalBatch(0, 0, packs), [reader], processor, sequence_length=1, decode_token=str,
        image_token_id=processor.image_token_id, max_packs=len(ZOO),
    )  # fmt: skip
    previews = [base64.b64decode(found) for found in re.findall('data:image/png;base64,([^"]*)', page)]
    assert len(previews) == len(ZOO) == len(reader)
    for number, (name, (data, expected)) in enumerate(ZOO.items()):
        sample = reader[number]
        (item,) = items_of(sample)
        seen = {
            "training": sample.images[0],
            "evaluation": item.images[0],
            "chat": session.images[number],
            "preview": Image.open(io.BytesIO(previews[number])),
        }
        for who, image in seen.items():
            assert np.array_equal(np.asarray(image), expected), f"{name}: {who}"
        trained = processor.encode(sample)
        assert reader.record(number)[1] == [expected.shape[1::-1]], name
        assert processor.measure(*reader.record(number)[:2]) == (len(trained.input_ids), len(trained.tiles)), name
        for source in (data, paths[number], Image.open(paths[number]), item.images):
            tiles = processor([source], ["<image>"])["pixel_values"]
            assert np.array_equal(tiles, trained.tiles), f"{name}: processor"
