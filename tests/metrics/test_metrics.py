"""Metrics against two independent implementations (metric_references.json) and against their definitions."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alignvlm.config import load_recipe
from alignvlm.errors import UserError
from alignvlm.metrics import find_metric, metric_names, register_metric, registry
from alignvlm.metrics.anls import anls
from alignvlm.metrics.exact_match import exact_match
from alignvlm.metrics.relaxed_accuracy import relaxed_accuracy

REFERENCES: dict[str, Any] = json.loads(Path(__file__).with_name("metric_references.json").read_text(encoding="utf-8"))
METRICS = [find_metric(name) for name in ("exact_match", "anls", "relaxed_accuracy")]
texts = st.text(alphabet="ab1 ", max_size=8)


@pytest.fixture
def own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is known in this test only."""
    monkeypatch.setattr(registry, "_METRICS", dict(registry._METRICS))


@pytest.mark.parametrize("case", REFERENCES["anls"], ids=lambda case: case["prediction"] or "empty")
def test_anls_as_others_compute_it(case: dict[str, Any]) -> None:
    value = anls(case["prediction"], case["answers"])
    assert value == pytest.approx(case["lmms_eval"], abs=1e-12)
    assert value == pytest.approx(case["anls_star"], abs=1e-12)


@pytest.mark.parametrize("case", REFERENCES["relaxed_accuracy"], ids=lambda c: f"{c['prediction']} for {c['answer']}")
def test_relaxed_accuracy_as_others_compute_it(case: dict[str, Any]) -> None:
    assert relaxed_accuracy(case["prediction"], [case["answer"]]) == case["lmms_eval"]


def test_references_hold_right_and_wrong_answers() -> None:
    for metric, key in (("anls", "lmms_eval"), ("anls", "anls_star"), ("relaxed_accuracy", "lmms_eval")):
        values = {case[key] for case in REFERENCES[metric]}
        assert {0.0, 1.0} <= values


@given(texts, st.lists(texts, min_size=1, max_size=3))
def test_an_exact_match_is_right_by_every_metric(prediction: str, answers: list[str]) -> None:
    scores = [metric(prediction, answers) for metric in METRICS]
    assert all(0.0 <= value <= 1.0 for value in scores)
    assert scores[0] < 1.0 or scores == [1.0, 1.0, 1.0]


@given(texts, texts)
def test_anls_does_not_ask_which_text_is_the_answer(a: str, b: str) -> None:
    assert anls(a, [b]) == anls(b, [a])


def test_long_answers_cost_little() -> None:
    """Code in plain Python takes 0.9 s for this pair."""
    started = time.process_time()
    anls("ab" * 1000, ["ba" * 1000])
    assert time.process_time() - started < 0.1


def test_exact_match_ignores_case_and_white_space_only() -> None:
    assert exact_match("  The  Total\n", ["the total"]) == 1.0
    assert exact_match("STRASSE", ["straße"]) == 1.0
    assert exact_match("the total.", ["the total"]) == 0.0
    assert exact_match("b", ["a", "B"]) == 1.0


def test_not_a_number_is_text() -> None:
    assert relaxed_accuracy("nan", ["nan"]) == 1.0
    assert relaxed_accuracy("inf", ["5"]) == 0.0


@pytest.mark.parametrize("answers", [[], "42"])
def test_answers_must_be_a_list_with_something_in_it(answers: Any) -> None:
    with pytest.raises(ValueError, match="at least one accepted answer"):
        METRICS[0]("42", answers)


@pytest.mark.usefixtures("own_registry")
def test_a_score_outside_the_unit_interval_is_refused() -> None:
    @register_metric("Length")
    def length(prediction: str, answers: Sequence[str]) -> float:
        return len(prediction)

    assert metric_names()[-1] == "length"
    assert find_metric("length")("a", ["b"]) == 1.0
    with pytest.raises(ValueError, match="metric 'length' must return a score in"):
        find_metric("length")("ab", ["b"])


@pytest.mark.usefixtures("own_registry")
@pytest.mark.parametrize(("name", "reason"), [("anls", "taken"), ("items", "field"), ("baseline_anls", "field")])
def test_names_that_a_metric_cannot_have(name: str, reason: str) -> None:
    def mine(prediction: str, answers: Sequence[str]) -> float:
        return 0.0

    mine.__name__ = name
    with pytest.raises(ValueError, match=reason):
        register_metric("Mine")(mine)


def test_an_unknown_metric_is_an_error_with_its_line(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    task = next(iter(load_recipe("quickstart").evaluation.tasks))
    recipe.write_text(f"extends: quickstart\nevaluation:\n  tasks:\n    {task}:\n      metrics: [anls, exact_mach]\n")
    with pytest.raises(UserError) as caught:
        load_recipe(str(recipe))
    key = f"evaluation.tasks.{task}.metrics"
    assert str(caught.value).startswith(
        f"{recipe}:5: {key}[1]: unknown metric 'exact_mach': did you mean 'exact_match'? (known: "
    )
    with pytest.raises(UserError, match="is empty: name at least one metric"):
        load_recipe("quickstart", [f"{key}=[]"])
