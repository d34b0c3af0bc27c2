"""The mixture is exact in every block and over an epoch."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.errors import DataError
from data_pipeline.order.mixing import block_quotas, block_slots, epoch_draws


@given(st.lists(st.integers(1, 400), min_size=1, max_size=6), st.integers(1, 64))
def test_every_block_has_the_exact_share_rounded(draws: list[int], block: int) -> None:
    counts = np.asarray(draws, dtype=np.int64)
    quotas = block_quotas(counts, block)
    total = int(counts.sum())
    ends = np.minimum(np.arange(len(quotas)) * block, total)
    assert (quotas.sum(axis=1) == ends).all()
    assert (np.diff(quotas, axis=0) >= 0).all()
    assert (quotas[-1] == counts).all()
    shares = ends[:, None] * counts[None] / total
    assert (np.abs(quotas - shares) < 1).all()


@given(st.dictionaries(st.sampled_from("abcd"), st.tuples(st.integers(1, 500), st.floats(0.01, 5)), min_size=1))
def test_an_epoch_sees_every_source_whole_and_one_exactly_once(table: dict[str, tuple[int, float]]) -> None:
    draws = epoch_draws({k: v[0] for k, v in table.items()}, {k: v[1] for k, v in table.items()})
    assert all(draws[name] >= size for name, (size, _) in table.items())
    assert any(draws[name] == size for name, (size, _) in table.items())


def test_weights_in_proportion_to_sizes_see_everything_once() -> None:
    sizes = {"a": 12_345, "b": 777, "c": 3}
    assert epoch_draws(sizes, {"a": 12_345, "b": 777, "c": 3}) == sizes
    assert epoch_draws({"a": 10, "b": 30}, {"a": 0.25, "b": 0.75}) == {"a": 10, "b": 30}


def test_blocks_are_shuffled_but_keep_their_quotas() -> None:
    quotas = block_quotas(np.asarray([300, 100]), 40)
    slots = block_slots(quotas, 2, 5, seed=1, epoch=0)
    assert len(slots) == 120
    for block in slots.reshape(3, 40):
        assert np.bincount(block).tolist() == [30, 10]
    assert (slots[:40] != slots[40:80]).any()
    assert (slots == block_slots(quotas, 0, 10, 1, 0)[80:200]).all()


@pytest.mark.parametrize(
    ("mixture", "reason"),
    [
        ({}, "the mixture is empty: name at least one source"),
        ({"a": 0.0}, "weight 0.0 of source 'a' must be a positive number"),
        ({"a": 1.0, "b": -1.0}, "weight -1.0 of source 'b' must be a positive number"),
        ({"a": float("nan")}, "weight nan of source 'a' must be a positive number"),
        ({"a": float("inf")}, "weight inf of source 'a' must be a positive number"),
        ({"nobody": 1.0}, r"source 'nobody' is not among the sources \(a, b, empty\)"),
        ({"a": 1.0, "empty": 1.0}, "source 'empty' has no usable sample"),
        ({"a": 1.0, "b": 1e-12}, "an epoch would have 3,000,000,000,003 samples, more than 10,000,000,000, until 'b'"),
    ],
)
def test_impossible_mixtures_are_refused_by_name(mixture: dict[str, float], reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        epoch_draws({"a": 10, "b": 3, "empty": 0}, mixture)
