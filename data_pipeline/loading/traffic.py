"""What a plan asks of object stores: requests and bytes per step, per second and per node, before anything runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from data_pipeline.loading.read_mode import Read, cache_limit, choose, near_bytes
from data_pipeline.order.plan import Plan
from data_pipeline.shards.sources import Source
from data_pipeline.stores.fetch_ahead import AHEAD_BYTES, reads_in_flight
from data_pipeline.stores.requests import num_parts

INDEX_BYTES = 200
"""About what one sample takes in its shard's index: a key, and places and checksums of two or three members."""
MEASURE_BYTES = 8


@dataclass(frozen=True)
class Traffic:
    """What one stage asks of object stores; all nodes together where nothing else is said."""

    requests_per_step: float
    """An upper bound: ranges that are neighbours are one request."""
    bytes_per_step: float
    cache_bytes_per_node: int
    """Indexes, sample lengths and whole shards."""
    reads_in_flight: int
    """Of one loader process."""
    ahead_bytes: int
    """Of one loader process."""
    nodes: int
    requests_per_second_per_node: float | None
    bytes_per_second_per_node: float | None
    """None where nobody says how long a step takes."""
    read: dict[str, str]
    """Source -> how it is read (`ranges` or `shards`), and why."""


def traffic(
    plan: Plan,
    workers: int,
    ranks: int,
    ranks_per_node: int,
    step_seconds: float | None,
    reads: Mapping[str, Read] | None = None,
    cache_bytes: int | None = None,
) -> dict[str, Any] | None:
    """The `Traffic` of a plan, as JSON; None where all its sources are local.

    Args:
        workers: loader processes of each rank.
        step_seconds: how long an optimizer step takes.
        reads, cache_bytes: as `build_loader` takes them.
    """
    nodes = -(-ranks // ranks_per_node)
    choices = choose(plan, reads or {}, nodes, cache_bytes)
    if not choices:
        return None
    limit, steps = cache_limit(cache_bytes), -(-plan.counts.totals(0)[0] // plan.settings.global_batch_packs)
    requests = size = cache = 0.0
    for name, choice in choices.items():
        source = plan.sources[name]
        assert isinstance(source, Source)
        sizes = source.reader.manifest.shards.sizes
        whole = sum(sizes)
        draws = plan.draws[name] / steps
        cache += len(source) * (INDEX_BYTES + MEASURE_BYTES)
        if choice.mode == "shards":
            passes = draws / max(plan.orders[name].num_usable, 1) * nodes
            requests += passes * sum(map(num_parts, sizes))
            size += passes * whole
            cache += min(whole if whole <= limit else near_bytes(plan, name, source), limit)
        else:
            requests += draws
            size += draws * whole / len(source)
    per_second = None if step_seconds is None else 1 / (step_seconds * nodes)
    asked = Traffic(
        requests_per_step=requests,
        bytes_per_step=size,
        cache_bytes_per_node=int(cache),
        reads_in_flight=reads_in_flight(max(workers, 1) * ranks_per_node),
        ahead_bytes=AHEAD_BYTES,
        nodes=nodes,
        requests_per_second_per_node=None if per_second is None else requests * per_second,
        bytes_per_second_per_node=None if per_second is None else size * per_second,
        read={name: str(choice) for name, choice in choices.items()},
    )
    return asdict(asked)


def describe(traffic: dict[str, Any]) -> str:
    """A stage's traffic, as `asdict` has it: a line, and one for each source."""
    t = traffic
    asked = f"{t['requests_per_step']:,.1f} requests and {t['bytes_per_step'] / 1e6:.1f} MB per step"
    if t["requests_per_second_per_node"] is not None:
        rate = f"{t['requests_per_second_per_node']:.1f} requests/s and {t['bytes_per_second_per_node'] / 1e6:.1f} MB/s"
        asked += f" = {rate} on each of {t['nodes']} node(s)"
    sources = "".join(f"\n    {name}: read by {read}" for name, read in t["read"].items())
    return (
        f"  from object stores: {asked}; {t['reads_in_flight']} reads in flight and {t['ahead_bytes'] / 1e6:.0f} MB "
        f"ahead per loader process, {t['cache_bytes_per_node'] / 1e6:.1f} MB of cache per node{sources}"
    )
