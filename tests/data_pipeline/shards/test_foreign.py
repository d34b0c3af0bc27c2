"""Shards of other tools, read as they are: nothing is converted, and a sample that cannot be used says why."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.samples.schema import SampleError
from data_pipeline.shards.index import index_shards
from data_pipeline.shards.reader import SourceReader
from tests.data_pipeline.tars import picture, write_tar

ASKED = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "red"}]
CHAT = [{"role": "user", "content": "<image> and <image>"}, {"role": "assistant", "content": "two"}]


def read(folder: Path, *samples: tuple[str, Any, list[str]]) -> SourceReader:
    """Shards of samples (key, content of the .json, extensions of images), indexed."""
    members: list[tuple[str, bytes]] = []
    for key, content, images in samples:
        members += [(f"{key}.{name}", picture(30 + i, 20)) for i, name in enumerate(images)]
        members.append((f"{key}.json", json.dumps(content).encode()))
    write_tar(folder / "pretrain-0.tar", members)
    index_shards(folder, num_processes=1)
    return SourceReader(folder)


def said(reader: SourceReader, number: int) -> list[tuple[str, list[str]]]:
    return [(m["role"], [p.get("text", "IMAGE") for p in m["content"]]) for m in reader[number].messages]


def test_shards_of_llava_onevision_are_read_in_place(tmp_path: Path) -> None:
    """As its converter writes them: `texts`, `media` and `name` with members 0_NAME, and lists of turns beside .jpg."""
    name = ["0_B.jpg", "1_a.page.PNG"]
    reader = read(
        tmp_path,
        ("image_17", {"texts": CHAT, "media": "image", "name": name}, name),
        ("text_18", {"texts": CHAT[1:] + CHAT[1:], "media": "text"}, []),
        ("GCC_train_1", ASKED, ["jpg"]),
        ("image_19", {"texts": CHAT, "media": "image", "name": name[:1]}, name[:1]),
        ("video_1", {"texts": CHAT, "media": "video", "name": ["0_v.mp4"]}, []),
    )
    assert said(reader, 0) == [("user", ["IMAGE", " and ", "IMAGE"]), ("assistant", ["two"])]
    assert [image.width for image in reader[0].images] == [30, 31]
    assert reader[0].meta == {}
    assert reader.record(0)[1] == [(30, 20), (31, 20)]
    assert said(reader, 1) == [("assistant", ["two"])] * 2
    assert said(reader, 2) == [("user", ["IMAGE", "\nWhat is it?"]), ("assistant", ["red"])]
    with pytest.raises(SampleError, match=r"2 image placeholder.* but 1 image"):
        reader[3]
    with pytest.raises(SampleError, match="'video', not images"):
        reader[4]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"conversations": ASKED, "id": "a"}, [("user", ["IMAGE", "\nWhat is it?"]), ("assistant", ["red"])]),
        (
            {"texts": [{"user": "one?", "assistant": "1", "source": "x"}, {"user": "two?", "assistant": "2"}]},
            [("user", ["IMAGE", "one?"]), ("assistant", ["1"]), ("user", ["two?"]), ("assistant", ["2"])],
        ),
        ({"queries": ["q"], "annotations": ["a"]}, [("user", ["IMAGE", "q"]), ("assistant", ["a"])]),
        (
            {"question": "<|image|> <image>?", "answer": "a"},
            [("user", ["<|image|> ", "IMAGE", "?"]), ("assistant", ["a"])],
        ),
        ({"question": "a <image 1> b", "answer": "a"}, [("user", ["a ", "IMAGE", " b"]), ("assistant", ["a"])]),
        ([{"from": "gpt", "value": "[IMG] hm"}], [("assistant", ["IMAGE", " hm"])]),
    ],
)  # fmt: skip
def test_conversations_of_any_spelling(tmp_path: Path, content: Any, expected: list[Any]) -> None:
    assert said(read(tmp_path, ("a", content, ["0.png"])), 0) == expected


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ([{"from": "gpt", "value": "alone"}], "no user turn to put them in front of"),
        ({"question": "<image 2><image 1>", "answer": "a"}, r"not 1 to 2 in turn: \[2, 1\]"),
        ({"queries": ["a", "b"], "annotations": ["c"]}, "do not pair"),
        ([{"from": "robot", "value": "x"}], "turn 0 must be from human"),
        ({"texts": "hm"}, "not a list of turns"),
        ({"texts": [5]}, "turn 0 is neither a text nor an object"),
        (5, "neither an object nor a list of turns"),
    ],
)
def test_what_is_no_conversation_says_why(tmp_path: Path, content: Any, reason: str) -> None:
    with pytest.raises(SampleError, match=reason):
        read(tmp_path, ("a", content, ["0.png"]))[0]


def test_energon_meta_data_is_left_alone(tmp_path: Path) -> None:
    """A folder that energon prepared: its own files stay, and its code is not run."""
    (tmp_path / ".nv-meta").mkdir()
    (tmp_path / ".nv-meta" / "sample_loader.py").write_text("raise SystemExit('ran')")
    reader = read(tmp_path, ("part/a", {"conversations": ASKED}, ["jpg"]))
    assert reader[0].key == "part/a"
    assert sorted(path.name for path in (tmp_path / ".nv-meta").iterdir()) == ["sample_loader.py"]
