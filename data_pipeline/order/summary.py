"""A plan as JSON, for people and for comparing two plans."""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from itertools import islice
from typing import Any

import numpy as np

from data_pipeline.order.batch import GlobalBatch, accumulation_steps
from data_pipeline.order.plan import PLAN_VERSION, Plan

ORDER_BATCHES = 64


def summarise(plan: Plan, num_batches: int = 3) -> dict[str, Any]:
    """What a plan is, as JSON: settings, steps, mixture, fill, dropped samples, first batches, a hash of the order.

    `fill` is of the first epoch; `order` is the sha256 of the first batches' samples.
    """
    packs, tokens, tiles = plan.counts.totals(0)
    steps = plan.num_steps
    first = list(islice(plan.batches(0), min(ORDER_BATCHES, steps)))
    return {
        "version": PLAN_VERSION,
        "fingerprint": plan.fingerprint,
        "order": order_hash(first),
        **asdict(plan.settings),
        "steps": steps,
        "steps_per_epoch": -(-packs // plan.settings.global_batch_packs),
        "samples_per_epoch": plan.samples_per_epoch,
        "packs_per_epoch": packs,
        "tokens_per_epoch": tokens,
        "tiles_per_epoch": tiles,
        "fill": tokens / (packs * plan.settings.sequence_length),
        "mixture": {name: _source(plan, name) for name in plan.names},
        "dropped_too_long": sum(order.num_too_long for order in plan.orders.values()),
        "dropped_unusable": sum(order.num_unmeasured for order in plan.orders.values()),
        "first_batches": [_batch(plan, batch) for batch in first[:num_batches]],
    }


def describe(stage: str, summary: dict[str, Any]) -> list[str]:
    """A stage's plan as lines of text, from what `summarise` and `world_summary` (under "world") say."""
    s = summary
    lines = [
        f"stage {stage}: {s['steps']} steps ({s['steps_per_epoch']} per epoch, {s['epochs']} epoch(s)), "
        f"{s['global_batch_packs']} packs of {s['sequence_length']} tokens per step",
        f"  one epoch: {s['samples_per_epoch']} samples, {s['packs_per_epoch']} packs {s['fill']:.2%} full, "
        f"{s['tokens_per_epoch']} tokens, {s['tiles_per_epoch']} tiles",
        f"  plan {s['fingerprint']} version {s['version']}, order {s['order'][:16]}",
    ]
    for source, row in s["mixture"].items():
        dropped = row["dropped_too_long"] + row["dropped_unusable"]
        lines.append(
            f"  {source}: {row['realised']:.2%} of samples (weight {row['weight']:.2%}), {row['draws_per_epoch']} of "
            f"{row['samples']} samples = {row['passes_per_epoch']:.2f} passes, {row['shards']} shards"
            + (f", DROPPED {row['dropped_too_long']} too long, {row['dropped_unusable']} unusable" if dropped else "")
            + (f", {row['not_selected']} not selected" if row.get("not_selected") else "")
        )
    for batch in s["first_batches"]:
        first = " ".join(batch["packs"][0]) if batch["packs"] else ""
        lines.append(
            f"  step {batch['step']}: {batch['samples']} samples, {batch['tokens']} tokens, {batch['tiles']} tiles; "
            f"first pack: {first[:90]}"
        )
    if "world" in s:
        world = s["world"]
        lines.append(
            f"  {world['world_size']} ranks x {world['micro_batch_packs']} packs x "
            f"{world['accumulation_steps']} micro-batches; "
            f"the busiest rank has {world['tile_imbalance']:.3f} times the mean number of tiles"
        )
    return lines


def order_hash(batches: list[GlobalBatch]) -> str:
    """sha256 (hex) of the samples and pack borders of these batches, in order."""
    digest = hashlib.sha256()
    for batch in batches:
        for array in (batch.packs.source, batch.packs.index, batch.packs.offsets):
            digest.update(np.ascontiguousarray(array, dtype="<i8").tobytes())
    return digest.hexdigest()


def _source(plan: Plan, name: str) -> dict[str, Any]:
    order = plan.orders[name]
    draws = plan.draws[name]
    return {
        "fingerprint": plan.sources[name].fingerprint,
        "weight": plan.mixture[name] / sum(plan.mixture.values()),
        "realised": draws / plan.samples_per_epoch,
        "samples": order.num_usable,
        "draws_per_epoch": draws,
        "passes_per_epoch": draws / order.num_usable,
        "shards": len(order.usable),
        "dropped_too_long": order.num_too_long,
        "dropped_unusable": order.num_unmeasured,
        "not_selected": order.num_unselected,
    }


def _batch(plan: Plan, batch: GlobalBatch) -> dict[str, Any]:
    tokens, tiles = batch.packs.totals()
    offsets = batch.packs.offsets
    names = [plan.names[source] for source in batch.packs.source]
    documents = [f"{name}:{index}" for name, index in zip(names, batch.packs.index.tolist(), strict=True)]
    return {
        "step": batch.step,
        "epoch": batch.epoch,
        "samples": len(documents),
        "tokens": int(tokens.sum()),
        "tiles": int(tiles.sum()),
        "packs": [documents[offsets[p] : offsets[p + 1]] for p in range(min(len(batch.packs), 4))],
    }


def world_summary(plan: Plan, world_size: int, micro_batch_packs: int) -> dict[str, Any]:
    """Accumulation and balance for a number of ranks.

    `tile_imbalance` is the heaviest rank's tiles over the mean of the ranks, averaged over the micro-steps of the first
    batches: what the slowest rank costs. Raises DataError when the batch sizes do not divide.
    """
    accumulation = accumulation_steps(plan.settings.global_batch_packs, world_size, micro_batch_packs)
    heaviest = mean = 0.0
    for batch in islice(plan.batches(0), ORDER_BATCHES):
        _, tiles = batch.packs.totals()
        per_rank = tiles[batch.micro_batches(world_size, micro_batch_packs)].sum(axis=2)  # [accumulation, ranks]
        heaviest += float(per_rank.max(axis=1).sum())
        mean += float(per_rank.mean(axis=1).sum())
    return {
        "world_size": world_size,
        "micro_batch_packs": micro_batch_packs,
        "accumulation_steps": accumulation,
        "tile_imbalance": heaviest / mean if mean else 1.0,
    }


def diff_plans(old: Any, new: Any, path: str = "") -> list[str]:
    """What changed between two plans (or parts of them) as JSON: lines `key: old → new`, empty when nothing did."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = list(dict.fromkeys([*old, *new]))
        return [
            line
            for key in keys
            for line in diff_plans(
                old.get(key, "absent"), new.get(key, "absent"), f"{path}.{key}" if path else str(key)
            )
        ]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [
            line for i, (a, b) in enumerate(zip(old, new, strict=True)) for line in diff_plans(a, b, f"{path}[{i}]")
        ]
    return [] if old == new else [f"{path}: {_short(old)} → {_short(new)}"]


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 100 else f"{text[:97]}…"
