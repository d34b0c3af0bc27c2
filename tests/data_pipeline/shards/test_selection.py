"""Parts of a source: a share by the hash of shard and key, conditions on meta data; both part of the fingerprint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from alignvlm.cli.output import one_line
from alignvlm.config import load_recipe
from alignvlm.errors import UserError
from data_pipeline.errors import DataError
from data_pipeline.order.plan import Plan
from data_pipeline.order.settings import PlanSettings
from data_pipeline.order.summary import describe, summarise
from data_pipeline.samples.selection import Selection
from data_pipeline.shards.index import index_shards
from data_pipeline.shards.sources import Source, measure_source, open_source
from tests.data_pipeline.tars import write_tar


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """200 samples in two shards: ratings from 0 to 4, every fifth of another source, the last one unusable."""
    for shard in range(2):
        members = []
        for i in range(100):
            turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": str(i)}]
            row = {"messages": turns, "rating": i % 5, "all": [5, i % 5], "meta": {"lang": "de" if i % 2 else "en"}}
            row |= {"source": "x"} if i % 5 else {}
            members.append((f"{i:03d}.json", b"[" if (shard, i) == (1, 99) else json.dumps(row).encode()))
        write_tar(tmp_path / "src" / f"{shard}.tar", members)
    index_shards(tmp_path / "src", num_processes=1)
    return tmp_path / "src"


def select(folder: Path, encoder: Any, processes: int = 1, **part: Any) -> Source:
    measure_source(folder, encoder, "", Selection(**part), num_processes=processes)
    return open_source("s", folder, encoder, "", Selection(**part))


def taken(source: Source) -> set[int]:
    return set(np.flatnonzero(source.measures[:, 0]).tolist())


@pytest.mark.parametrize(
    ("filter", "expected"),
    [
        ({"rating": 3}, lambda i: i % 5 == 3),
        ({"rating": [0, 4]}, lambda i: i % 5 in (0, 4)),
        ({"rating": {"min": 2, "max": 3}}, lambda i: i % 5 in (2, 3)),
        ({"all": {"min": 4}}, lambda i: i % 5 == 4),
        ({"meta.lang": "de"}, lambda i: i % 2),
        ({"source": "x", "rating": {"max": 1}}, lambda i: i % 5 == 1),
        ({"source": {"not": "x", "missing": True}}, lambda i: i % 5 == 0),
        ({"meta": {"min": 1}}, lambda i: False),
    ],
)
def test_conditions_on_meta_data(folder: Path, encoder: Any, filter: dict[str, Any], expected: Any) -> None:
    source = select(folder, encoder, filter=filter)
    assert taken(source) == {n for n in range(199) if expected(n % 100)}
    assert [bad.key for bad in source.unusable] == ["099"]  # named: nobody knows its meta data


def test_a_share_is_the_same_by_any_number_of_processes_and_part_of_a_larger_one(folder: Path, encoder: Any) -> None:
    small = select(folder, encoder, sample=0.3)
    (folder / f"measures-{small.fingerprint}.npy").unlink()
    assert taken(select(folder, encoder, processes=2, sample=0.3)) == taken(small)
    assert taken(small) < taken(select(folder, encoder, sample=0.6))
    assert 35 < len(taken(small)) < 85
    assert {n % 100 for n in taken(small) if n < 100} != {n % 100 for n in taken(small) if n >= 100}  # equal keys
    whole = select(folder, encoder)
    assert len({whole.fingerprint, small.fingerprint, select(folder, encoder, sample=0.31).fingerprint}) == 3
    assert (whole.measures[sorted(taken(small))] == small.measures[sorted(taken(small))]).all()


def test_a_plan_draws_what_is_selected_and_says_how_many_are_not(folder: Path, encoder: Any) -> None:
    source = select(folder, encoder, filter={"rating": 3}, sample=0.5)
    plan = Plan({"s": source}, {"s": 1}, PlanSettings(sequence_length=64, global_batch_packs=2))
    drawn = {int(n) for batch in plan.batches() for n in batch.packs.index}
    assert drawn == taken(source)
    lines = "\n".join(describe("only", summarise(plan)))
    assert f"{200 - len(drawn) - len(source.unusable)} not selected" in lines
    source = select(folder, encoder, filter={"ratng": 3})
    with pytest.raises(DataError, match=rf"no usable sample: {200 - len(source.unusable)} are not selected"):
        Plan({"s": source}, {"s": 1}, PlanSettings(sequence_length=64, global_batch_packs=2))


@pytest.mark.parametrize(
    ("part", "reason"),
    [
        ({"sample": 0}, "above 0 and at most 1"),
        ({"filter": {"a": {"mni": 1}}}, "filter.a has the unknown condition 'mni': did you mean 'min'"),
        ({"filter": {"a": {"min": "x"}}}, "filter.a.min is 'x', not a number"),
        ({"filter": {"a": [{"b": 1}]}}, "neither a text nor a number"),
        ({"filter": {"a": None}}, "None is neither"),
    ],
)
def test_what_is_no_selection_is_named(part: dict[str, Any], reason: str) -> None:
    with pytest.raises(DataError) as caught:
        Selection(**part)
    assert reason in str(caught.value)


def test_a_recipe_names_the_line_of_a_filter_that_is_none(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    start = "extends: low_resource_3b\nname: mine\ndata:\n  sources:\n    llava_558k:\n"
    recipe.write_text(start + "      sample: 0.5\n      filter: {score: {mni: 4}}\n")
    with pytest.raises(UserError) as caught:
        load_recipe(str(recipe))
    assert one_line(str(caught.value)).startswith(f"{recipe}:7: data.sources.llava_558k: filter.score")
    recipe.write_text(start + "      sample: 0.5\n    docvqa_val: {sample: 0.5}\n")
    with pytest.raises(UserError, match="an evaluation takes whole sources"):
        load_recipe(str(recipe))
    recipe.write_text(start + "      sample: 0\n")
    with pytest.raises(UserError, match=r"sample is 0, but must be a number, more than 0 and at most 1$"):
        load_recipe(str(recipe))
