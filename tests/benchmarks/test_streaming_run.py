"""`benchmarks/streaming/run.py`: which aims a row is held to, and which ways to read share a pass from disk."""

from __future__ import annotations

from typing import Any

import pytest


def row(read: str, chosen: str, ratio: float, gets: float) -> dict[str, Any]:
    case = {"image": "crop", "place": "near", "processes": 1, "read": read, "chosen": chosen}
    return {**case, "ratio": ratio, "gets_per_sample": gets, "bytes_per_byte": 1.0, "start_requests": 2}


@pytest.mark.parametrize(("chosen", "gets", "limit"), [("shards", 1.0, "0.05"), ("ranges", 1.0, "1.03")])
def test_auto_is_held_to_the_requests_of_what_it_chose(
    benchmark_module: Any, chosen: str, gets: float, limit: str
) -> None:
    found = benchmark_module("run").judge([row("auto", chosen, 0.95, gets), row("ranges", "ranges", 0.85, gets)])
    name = f"crop near 1 process(es) auto (here {chosen})"
    assert found[f"{name} >= 0.9"]
    assert found[f"{name}: GETs per sample <= {limit}"] == (chosen == "ranges")
    assert not found["crop near 1 process(es) ranges >= 0.9"]  # missed, and listed


def test_the_ways_to_read_at_a_place_share_its_passes_from_disk(benchmark_module: Any) -> None:
    module = benchmark_module("run")
    places = module.by_place([case for case in module.TARGETS if case[0] == "crop"])
    assert places[("far", 1)] == ["auto", "ranges", "shards"]
    assert places[("far", 2)] == ["auto", "ranges"]
    rows = module.ratios(
        {"rate": 100.0, "samples": 10, "cpu": 0.1, "decoding": 0.08, "first": 0.2},
        {"rate": 90.0, "samples": 10, "cpu": 0.125, "decoding": 0.08, "first": 0.9},
        {"requests": 12, "busy": 2, "bytes": 1000, "cpu": 0.012},
        10,
        100.0,
    )
    assert (rows["ratio"], rows["cpu_ratio"], rows["gets_per_sample"], rows["bytes_per_byte"]) == (0.9, 0.8, 1.0, 1.0)
    assert (rows["first_batch_seconds_local"], rows["first_batch_seconds"]) == (0.2, 0.9)
