"""The plan: every sample exactly once, the same batches wherever one starts, exact steps, a golden order."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.errors import DataError
from data_pipeline.order.batch import GlobalBatch
from data_pipeline.order.plan import Plan, Position
from data_pipeline.order.settings import LARGEST, PlanSettings
from data_pipeline.order.summary import diff_plans, order_hash, summarise, world_summary

SMALL = PlanSettings(sequence_length=1000, global_batch_packs=8, window_shards=3, mix_block=32, pack_window=200)


def same(a: GlobalBatch, b: GlobalBatch) -> bool:
    return (a.step, a.epoch) == (b.step, b.epoch) and order_hash([a]) == order_hash([b])


def documents(batches: list[GlobalBatch]) -> list[tuple[int, int]]:
    return [pair for b in batches for pair in zip(b.packs.source.tolist(), b.packs.index.tolist(), strict=True)]


@settings(max_examples=25, deadline=None)
@given(
    count=st.integers(1, 600),
    per_shard=st.integers(1, 90),
    window_shards=st.integers(1, 9),
    pack_window=st.integers(10, 400),
    mix_block=st.integers(1, 300),
    batch=st.integers(1, 16),
    seed=st.integers(0, 99),
)
def test_every_sample_exactly_once(
    synthetic: Any,
    count: int,
    per_shard: int,
    window_shards: int,
    pack_window: int,
    mix_block: int,
    batch: int,
    seed: int,
) -> None:
    plan = Plan(
        {"a": synthetic(count, per_shard=per_shard)},
        {"a": 1},
        PlanSettings(
            seed=seed,
            sequence_length=900,
            global_batch_packs=batch,
            window_shards=window_shards,
            pack_window=pack_window,
            mix_block=mix_block,
        ),
    )
    batches = list(plan.batches())
    assert sorted(index for _, index in documents(batches)) == list(range(count))
    assert len(batches) == plan.num_steps
    for b in batches:
        tokens, _ = b.packs.totals()
        assert len(b.packs) == batch
        assert tokens.max() <= 900


def test_sources_that_end_early_go_on_evenly(synthetic: Any) -> None:
    sources = {"a": synthetic(500, "a"), "b": synthetic(130, "b")}
    plan = Plan(sources, {"a": 0.5, "b": 0.5}, replace(SMALL, epochs=3))
    seen = Counter(documents(list(plan.batches())))
    assert [seen[0, i] for i in range(500)] == [3] * 500
    times = [seen[1, i] for i in range(130)]
    assert sum(times) == 1500
    assert max(times) - min(times) <= 1


def test_epochs_have_different_orders(synthetic: Any) -> None:
    plan = Plan({"a": synthetic(400)}, {"a": 1}, replace(SMALL, epochs=2))
    batches = list(plan.batches())
    first, second = (documents([b for b in batches if b.epoch == e]) for e in (0, 1))
    assert sorted(first) == sorted(second)
    assert first != second


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_any_position_continues_the_same_batches(synthetic: Any, data: st.DataObject) -> None:
    sources = {"a": synthetic(700, "a"), "b": synthetic(300, "b")}
    plan = Plan(sources, {"a": 2, "b": 1}, replace(SMALL, epochs=2))
    batches = list(plan.batches())
    step = data.draw(st.integers(0, len(batches)))
    position = Position.from_json(plan.position(step).to_json())
    again = Plan(sources, {"a": 2, "b": 1}, replace(SMALL, epochs=2))
    rest = list(again.batches(position))
    assert len(rest) == len(batches) - step
    assert all(same(a, b) for a, b in zip(rest, batches[step:], strict=True))
    assert again.position(step) == position


def test_positions_are_small_and_belong_to_one_plan(synthetic: Any) -> None:
    plan = Plan({"a": synthetic(700)}, {"a": 1}, SMALL)
    text = plan.position(3).to_json()
    assert len(text) <= 200
    other = Plan({"a": synthetic(701)}, {"a": 1}, SMALL)
    with pytest.raises(DataError, match="belongs to plan"):
        next(other.batches(Position.from_json(text)))
    with pytest.raises(DataError, match="not a position"):
        Position.from_json("{}")
    with pytest.raises(DataError, match="outside the plan"):
        plan.position(plan.num_steps + 1)


@pytest.mark.parametrize(("world", "micro"), [(1, 1), (1, 16), (2, 4), (4, 2), (16, 1), (8, 1)])
def test_ranks_share_each_batch_exactly(synthetic: Any, world: int, micro: int) -> None:
    plan = Plan({"a": synthetic(900)}, {"a": 1}, replace(SMALL, global_batch_packs=16))
    for batch in plan.batches():
        dealt = batch.micro_batches(world, micro)
        assert dealt.shape == (16 // (world * micro), world, micro)
        assert sorted(dealt.reshape(-1).tolist()) == list(range(16))


def test_vision_work_is_level(synthetic: Any) -> None:
    plan = Plan({"a": synthetic(3000, longest=400)}, {"a": 1}, replace(SMALL, global_batch_packs=32, pack_window=3000))
    assert world_summary(plan, 4, 4)["tile_imbalance"] < 1.1


def test_batch_sizes_that_do_not_divide_name_what_fits(synthetic: Any) -> None:
    plan = Plan({"a": synthetic(900)}, {"a": 1}, replace(SMALL, global_batch_packs=12))
    with pytest.raises(DataError, match="set it to 8 or 16, or micro_batch_packs to 1, 2, 3, 6, or use 1 ranks"):
        next(plan.batches()).micro_batches(2, 4)


@pytest.mark.parametrize("name", ["sequence_length", "global_batch_packs", "mix_block", "epochs", "max_steps"])
def test_settings_that_cannot_work_are_named(name: str) -> None:
    with pytest.raises(DataError, match=f"{name} is 0; it must be at least 1"):
        replace(SMALL, **{name: 0})


@pytest.mark.parametrize("name", LARGEST)
def test_settings_that_no_machine_holds_are_named(name: str) -> None:
    replace(SMALL, **{name: LARGEST[name]})
    with pytest.raises(DataError, match=f"{name} is 1000000000000; it must be at most {LARGEST[name]}"):
        replace(SMALL, **{name: 10**12})


def test_long_and_unusable_samples_are_counted_and_named(synthetic: Any, caplog: pytest.LogCaptureFixture) -> None:
    source = synthetic(500, zeros=7)
    long = int((source.measures[:, 0] > 600).sum())
    plan = Plan({"a": source}, {"a": 1}, replace(SMALL, sequence_length=600))
    assert "longer than 600 tokens" in caplog.text
    summary = summarise(plan)
    assert (summary["dropped_too_long"], summary["dropped_unusable"]) == (long, 7)
    assert summary["samples_per_epoch"] == 500 - 7 - long
    with pytest.raises(DataError, match=r"0 are not selected .*, 493 are longer than 10 tokens, 7 cannot be used"):
        Plan({"a": source}, {"a": 1}, replace(SMALL, sequence_length=10))


def test_max_steps_ends_in_the_middle(synthetic: Any) -> None:
    sources = {"a": synthetic(700)}
    whole = Plan(sources, {"a": 1}, replace(SMALL, epochs=3))
    short = Plan(sources, {"a": 1}, replace(SMALL, epochs=3, max_steps=60))
    batches = list(short.batches())
    assert short.num_steps == len(batches) == 60 < whole.num_steps
    assert short.fingerprint == whole.fingerprint
    assert all(same(a, b) for a, b in zip(batches, whole.batches(), strict=False))
    one = Plan(sources, {"a": 1}, SMALL).num_steps
    assert Plan(sources, {"a": 1}, replace(SMALL, max_steps=10**6)).num_steps == one
    assert Plan(sources, {"a": 1}, replace(SMALL, epochs=3, max_steps=one)).num_steps == one


def test_counts_are_kept_in_the_cache(synthetic: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = {"a": synthetic(5000)}
    plan = Plan(sources, {"a": 1}, SMALL, cache=tmp_path)
    steps, position = plan.num_steps, plan.position(40)
    monkeypatch.setattr(Plan, "_measure_window", lambda self, epoch, window: pytest.fail("counted again"))
    again = Plan(sources, {"a": 1}, SMALL, cache=tmp_path)
    assert (again.num_steps, again.position(40)) == (steps, position)


def test_damaged_counts_are_counted_again(
    synthetic: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    sources = {"a": synthetic(5000)}
    steps = Plan(sources, {"a": 1}, SMALL, cache=tmp_path).num_steps
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    other = np.load(path)
    other[:, 0] += 1
    with path.open("wb") as file:
        np.save(file, other)
    for damaged in (path.read_bytes(), whole[:-100], b"", bytes(len(whole))):
        path.write_bytes(damaged)
        caplog.clear()
        assert Plan(sources, {"a": 1}, SMALL, cache=tmp_path).num_steps == steps
        assert [f"{path} cannot be read and is made anew" in message for message in caplog.messages] == [True]
        assert path.read_bytes() == whole


def test_counts_that_cannot_be_kept_are_a_warning(
    synthetic: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "plans").touch()
    plan = Plan({"a": synthetic(5000)}, {"a": 1}, SMALL, cache=tmp_path / "plans")
    assert plan.num_steps == Plan({"a": synthetic(5000)}, {"a": 1}, SMALL).num_steps
    assert "cannot be written" in caplog.text


def test_window_spans_few_shards(synthetic: Any) -> None:
    source = synthetic(2000, per_shard=20)
    plan = Plan({"a": source}, {"a": 1}, replace(SMALL, window_shards=5, pack_window=100))
    packs = plan._window(0, 3)
    assert len(np.unique(packs.index // 20)) == 5


def test_summary_is_json_and_differences_are_named(synthetic: Any) -> None:
    one = summarise(Plan({"a": synthetic(700)}, {"a": 1}, SMALL))
    two = summarise(Plan({"a": synthetic(700)}, {"a": 1}, replace(SMALL, seed=1)))
    assert json.loads(json.dumps(one)) == one
    assert diff_plans(one, one) == []
    assert "seed: 0 → 1" in diff_plans(one, two)
    assert any(line.startswith("order:") for line in diff_plans(one, two))


def test_golden_order(synthetic: Any) -> None:
    """Fails when the order of training changes: resuming breaks, so raise PLAN_VERSION and write it in CHANGELOG.md."""
    sources = {"a": synthetic(900, "a"), "b": synthetic(250, "b")}
    plan = Plan(sources, {"a": 0.7, "b": 0.3}, replace(SMALL, seed=7, epochs=2))
    assert order_hash(list(islice(plan.batches(), 100))) == GOLDEN
    assert (plan.fingerprint, plan.num_steps) == ("cba60fcc35321435", 156)


GOLDEN = "df66f2161a471a8d65155a644ba5d6de99f36bb96f52cd52aa957f2c0527a00b"
