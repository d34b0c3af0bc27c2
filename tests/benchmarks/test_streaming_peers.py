"""`benchmarks/streaming/run.py --peers`: what a pass counts, rows, their table, a missing library, a pass of ours."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch


def test_cpu_time_of_processes_that_run_and_that_ended(benchmark_module: Any) -> None:
    reading = benchmark_module("_reading")
    burn = "import time, sys\nwhile time.process_time() < 0.3: pass\nprint(flush=True)\nsys.stdin.read()"
    before = reading.cpu_seconds()
    with subprocess.Popen([sys.executable, "-c", burn], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        running = reading.cpu_seconds() - before
    assert 0.25 < running < 3
    assert running <= reading.cpu_seconds() - before < running + 1


def test_a_pass_over_batches(benchmark_module: Any) -> None:
    tiles = torch.arange(5 * 3 * 14 * 14, dtype=torch.int32).remainder(256).to(torch.uint8).view(5, 3, 14, 14)

    def batches() -> Any:
        time.sleep(0.05)
        yield "texts", tiles[:2]
        time.sleep(0.1)
        yield "texts", tiles[2:]

    found = benchmark_module("_reading").take_pass(batches())
    assert found["images"] == 5
    assert found["pixels"] == sum(
        int(tiles[n, c, y, x]) for n in range(5) for c in range(3) for y in (0, 7) for x in (0, 7)
    )
    assert found["start"] >= 0.05
    assert found["rate"] == pytest.approx(5 / 0.15, rel=0.5)


def a_pass(rate: float, cpu: float, pixels: int = 7) -> dict[str, Any]:
    facts = {"images": 10, "pixels": pixels, "rate": rate, "start": 0.5, "cpu": cpu, "build": 0.1}
    return {**facts, "versions": {"torch": "2"}, "settings": {}, "counts": {"requests": 5, "bytes": 300}, "load": 1}


def test_rows_and_their_table(benchmark_module: Any) -> None:
    peers = benchmark_module("peers")
    ours = [a_pass(100, 1.0), a_pass(120, 1.0), a_pass(90, 1.0)]
    theirs = [a_pass(50, 2.0), a_pass(40, 4.0), a_pass(90, 2.0)]
    found = peers.summarize(theirs, ours, count=10, size=150)
    expected = {
        "images_per_second": 50, "images_per_cpu_second": 5, "ours_over_its_speed": 2, "ours_over_its_cpu_speed": 2,
        "requests_per_image": 0.5, "bytes_per_byte": 2,
    }  # fmt: skip
    assert {key: found[key] for key in expected} == expected
    assert "other pixels" in peers.summarize([a_pass(50, 2.0, pixels=8)], ours, count=10, size=150)["failed"]
    place = {"image": "page", "place": "disk"}
    rows = [
        {**place, "library": "litdata", "failed": "", **found},
        {**place, "library": "energon", "failed": "no wheel"},
    ]
    head, _, first, second = peers.table(rows).splitlines()
    assert {line.count("|") for line in (head, first, second)} == {4 + len(peers.COLUMNS)}
    assert second.startswith("| page | disk | energon | no wheel |")
    assert peers.judge(rows) == {"page disk: images per CPU second > litdata": True}


def test_a_library_that_cannot_be_installed(benchmark_module: Any, tmp_path: Path) -> None:
    environments = benchmark_module("environments")
    with pytest.raises(environments.Unavailable, match=r"missing\.whl"):
        environments.python_of("nothing", [str(tmp_path / "missing.whl")], tmp_path)
    assert environments.reason("Traceback\n  File …\nValueError: not so\n\n") == "ValueError: not so"
    with pytest.raises(environments.Unavailable, match=r"after 0 s"):
        environments.run([sys.executable, "-c", "import time; time.sleep(60)"], 0.2)


def test_a_pass_of_ours(benchmark_module: Any, tmp_path: Path) -> None:
    """The images are written, read by a process of its own, and come as they were decoded."""
    peers, reading = benchmark_module("peers"), benchmark_module("_reading")
    peers.write_images(tmp_path / "images", 24, (364, 364))
    benchmark_module("read_alignvlm").write(tmp_path / "images", tmp_path / "written")
    found = peers.Library(peers.OURS).read(str(tmp_path / "written"))
    tiles = [
        torch.from_numpy(reading.cut(reading.decode(jpeg)))[None] for _, jpeg, _ in reading.samples(tmp_path / "images")
    ]
    assert found["images"] == 24
    assert found["pixels"] == sum(map(reading.pixel_sum, tiles))
    assert json.dumps(found["settings"])
