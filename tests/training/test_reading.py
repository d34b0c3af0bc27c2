"""One pass over a file: its parts where they belong, converted where they have another type, and zlib's checksum."""

from __future__ import annotations

import random
import zlib
from pathlib import Path

import pytest
import torch

from alignvlm.training.checkpoints.files import reading
from alignvlm.training.checkpoints.files.reading import Part, checked, read_parts


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "BLOCK", 48)
    monkeypatch.setattr(reading, "PIECE", 100)


def write(path: Path, seed: int) -> tuple[bytes, list[Part], list[torch.Tensor]]:
    """Numbers of three types between other bytes; some parts are empty, some stand side by side."""
    drawn, content, parts, expected = random.Random(seed), b"", [], []
    for number in range(12):
        content += drawn.randbytes(drawn.choice([0, 0, 1, 7, 130]))
        dtype = (torch.float32, torch.bfloat16, torch.int64)[number % 3]
        numbers = torch.tensor(drawn.choices(range(-100, 100), k=drawn.choice([0, 1, 5, 60]))).to(dtype)
        target = torch.full((len(numbers) + 2,), 7.0, dtype=torch.float32 if number % 2 else dtype)
        parts.append(Part(len(content), dtype, target[1:-1]))
        expected.append(torch.cat([target[:1], numbers.to(target.dtype), target[-1:]]))
        content += numbers.view(torch.uint8).numpy().tobytes()
    path.write_bytes(content)
    drawn.shuffle(order := list(range(12)))
    return content, [parts[number] for number in order], [expected[number] for number in order]


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("is_whole", [True, False])
def test_parts_go_where_they_belong(seed: int, is_whole: bool, tmp_path: Path) -> None:
    content, parts, expected = write(tmp_path / "file", seed)
    read: list[int] = []
    if is_whole:
        found = checked(tmp_path / "file", read.append, parts)
        assert found == {"size": len(content), "crc32": zlib.crc32(content)}
        assert sum(read) == len(content)
    else:
        read_parts(tmp_path / "file", parts, read.append)
        assert sum(read) == sum(part.size for part in parts)
    for part, wanted in zip(parts, expected, strict=True):
        memory = torch.as_strided(part.target, (len(wanted),), (1,), part.target.storage_offset() - 1)
        assert torch.equal(memory, wanted)  # and nothing beside it has changed


def test_parts_that_overlap_or_are_not_there_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(40))
    target = torch.zeros(4)
    for offsets in ((0, 12), (28,)):
        with pytest.raises(ValueError, match="of 40 do not stand alone"):
            checked(tmp_path / "file", parts=[Part(offset, torch.float32, target) for offset in offsets])
