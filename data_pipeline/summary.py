"""A plan as JSON, for people and for comparing two plans."""

from __future__ import annotations

import hashlib
from itertools import islice
from typing import Any

import numpy as np

from data_pipeline.batch import GlobalBatch
from data_pipeline.plan import PLAN_VERSION, Plan

ORDER_BATCHES = 64


def summarise(plan: Plan, num_batches: int) -> dict[str, Any]:
    """See `Plan.summary`. `fill` is of the first epoch; `order` is the sha256 of the first batches' samples."""
    packs, tokens, tiles = plan.counts.totals(0)
    steps = plan.num_steps
    first = list(islice(plan.batches(0), min(ORDER_BATCHES, steps)))
    return {
        "version": PLAN_VERSION,
        "fingerprint": plan.fingerprint,
        "order": order_hash(first),
        "seed": plan.seed,
        "sequence_length": plan.sequence_length,
        "global_batch_packs": plan.global_batch_packs,
        "window_shards": plan.window_shards,
        "mix_block": plan.mix_block,
        "pack_window": plan.pack_window,
        "epochs": plan.epochs,
        "max_steps": plan.max_steps,
        "steps": steps,
        "steps_per_epoch": -(-packs // plan.global_batch_packs),
        "samples_per_epoch": plan.samples_per_epoch,
        "packs_per_epoch": packs,
        "tokens_per_epoch": tokens,
        "tiles_per_epoch": tiles,
        "fill": tokens / (packs * plan.sequence_length),
        "mixture": {name: _source(plan, name) for name in plan.names},
        "dropped_too_long": sum(order.num_too_long for order in plan.orders.values()),
        "dropped_unusable": sum(order.num_unmeasured for order in plan.orders.values()),
        "first_batches": [_batch(plan, batch) for batch in first[:num_batches]],
    }


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
