"""Tar archives and pictures as foreign tools write them, and damage to them."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from PIL import Image

from tests.fixtures.zoo import save


def picture(
    width: int = 30, height: int = 20, format: str = "JPEG", colour: Any = (200, 10, 10), **options: Any
) -> bytes:
    return save(Image.new("RGB", (width, height), colour), format, **options)


def write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def overwrite(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)
