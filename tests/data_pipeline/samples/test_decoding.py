"""Decoding of members: JSON, text and images, and nothing that could run code."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.samples.decoding import decode_member
from data_pipeline.samples.schema import SampleError
from tests.data_pipeline.tars import picture


def test_members_come_as_their_extension_says() -> None:
    assert decode_member("json", b'{"a": [1, "\xc3\xa9"]}') == {"a": [1, "é"]}
    assert decode_member("txt", "é\n".encode()) == "é\n"
    for extension in ("jpg", "12.jpeg"):
        assert decode_member(extension, picture()).size == (30, 20)


@pytest.mark.parametrize(
    ("extension", "data", "reason"),
    [
        ("json", b"{", r"member \.json cannot be decoded: Expecting"),
        ("json", b"[" * 100_000, r"member \.json cannot be decoded: maximum recursion"),
        ("txt", b"\xff", r"member \.txt cannot be decoded: .* can't decode byte"),
        ("0.png", b"no picture", "image cannot be decoded"),
        ("bin", b"", r"members \.bin are not decoded: only JSON, text and images are"),
        ("seg.png", b"", r"members \.seg\.png are not decoded"),
    ],
)
def test_bytes_that_are_something_else_are_one_bad_sample(extension: str, data: bytes, reason: str) -> None:
    with pytest.raises(SampleError, match=reason):
        decode_member(extension, data)


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "pwned",)

    for extension in ("pkl", "pickle", "pyd", "pth", "npy"):
        with pytest.raises(SampleError):
            decode_member(extension, pickle.dumps(Trap()))
    assert not (tmp_path / "pwned").exists()
