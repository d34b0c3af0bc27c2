"""How the shards of a source in an object store are read: ranges of them, or whole ones on the node's disk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from data_pipeline.loading.far import is_far
from data_pipeline.loading.whole import WINDOWS_AHEAD
from data_pipeline.order.plan import Plan
from data_pipeline.shards.sources import Source
from data_pipeline.stores.fetch_ahead import REQUEST_BYTES
from data_pipeline.stores.object_storage import ObjectStorage
from data_pipeline.stores.shard_cache import default_limit

Read = Literal["auto", "ranges", "shards"]
WHOLE_SCHEMES = ("hf",)
"""Stores that count requests, few of them in five minutes."""


@dataclass(frozen=True)
class Choice:
    """How one source is read."""

    mode: Literal["ranges", "shards"]
    reason: str

    def __str__(self) -> str:
        return f"{self.mode} ({self.reason})"


def choose(plan: Plan, asked: Mapping[str, Read], nodes: int, cache_bytes: int | None) -> dict[str, Choice]:
    """The mode of every source that lies in an object store.

    `auto` takes whole shards where they cost less, a request counted as 64 KiB, and the disk has room for them; also
    from web servers that answer no ranges, which are asked for one.

    Args:
        asked: source -> what the recipe says; a source that is not named is `auto`.
        cache_bytes: of whole shards that a node may keep; None: the default.
    """
    choices: dict[str, Choice] = {}
    left = -1
    for name, source in plan.sources.items():
        if not isinstance(source, Source) or not is_far(source.reader):
            continue
        mode = asked.get(name, "auto")
        if mode != "auto":
            choices[name] = Choice(mode, "as the recipe says")
            continue
        if left < 0:
            left = cache_limit(cache_bytes)
        choices[name], taken = _weigh(plan, name, source, nodes, left)
        left -= taken
    return choices


def _weigh(plan: Plan, name: str, source: Source, nodes: int, limit: int) -> tuple[Choice, int]:
    """What is cheaper, and the bytes that it takes on the disk."""
    sizes = source.reader.manifest.shards.sizes
    whole, mean = sum(sizes), sum(sizes) / max(len(source), 1)
    held = near_bytes(plan, name, source)
    if held > limit:
        return Choice("ranges", f"{_gb(limit)} of disk do not hold the {_gb(held)} of its next shards"), 0
    if source.reader.storage.url.partition(":")[0].lower() in WHOLE_SCHEMES:
        return Choice("shards", "its store allows few requests"), min(whole, limit)
    draws = plan.num_samples(name)
    passes = draws / max(plan.orders[name].num_usable, 1)
    fetched = max(held, whole * (min(passes, 1.0) if whole <= limit else passes)) * nodes
    read = draws * mean
    requests = f"{draws:,} requests for {_gb(read)}"
    if fetched <= read + draws * REQUEST_BYTES:
        return Choice("shards", f"{_gb(fetched)} on {nodes} node(s) instead of {requests}"), min(whole, limit)
    storage = source.reader.storage
    if (
        sizes
        and isinstance(storage, ObjectStorage)
        and not storage.answers_ranges(source.reader.manifest.shards[0].name)
    ):
        return Choice("shards", "its server answers no ranged requests"), min(whole, limit)
    return Choice("ranges", f"{requests}; whole shards would be {_gb(fetched)} on {nodes} node(s)"), 0


def cache_limit(cache_bytes: int | None) -> int:
    """Bytes of whole shards that this node may keep; None: `default_limit`."""
    return default_limit() if cache_bytes is None else cache_bytes


def near_bytes(plan: Plan, name: str, source: Source) -> int:
    """Bytes of a source's shards that the first windows of the plan want on the disk together."""
    windows = plan.windows_from(0, 0, WINDOWS_AHEAD + 1)
    near = {shard for window in windows for shard in plan.window_shards(*window)[name].tolist()}
    return sum(source.reader.manifest.shards[shard].size for shard in near)


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
