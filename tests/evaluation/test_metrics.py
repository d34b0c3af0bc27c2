"""Metrics against two independent implementations (metric_references.json) and against their definitions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alignvlm.evaluation.metrics import (
    anls,
    exact_match,
    levenshtein,
    mean_scores,
    most_frequent_answer,
    relaxed_accuracy,
    score,
)

REFERENCES: dict[str, Any] = json.loads(Path(__file__).with_name("metric_references.json").read_text(encoding="utf-8"))
texts = st.text(alphabet="ab1 ", max_size=8)


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


@given(texts, texts, texts)
def test_levenshtein_is_a_distance(a: str, b: str, c: str) -> None:
    assert levenshtein(a, b) == levenshtein(b, a)
    assert (levenshtein(a, b) == 0) == (a == b)
    assert levenshtein(a, c) <= levenshtein(a, b) + levenshtein(b, c)
    assert abs(len(a) - len(b)) <= levenshtein(a, b) <= max(len(a), len(b))


@given(texts, st.lists(texts, min_size=1, max_size=3))
def test_an_exact_match_is_right_by_every_metric(prediction: str, answers: list[str]) -> None:
    scores = score(prediction, answers)
    assert all(0.0 <= value <= 1.0 for value in scores.values())
    if scores["exact_match"]:
        assert scores == {"exact_match": 1.0, "anls": 1.0, "relaxed_accuracy": 1.0}


def test_exact_match_ignores_case_and_white_space_only() -> None:
    assert exact_match("  The  Total\n", ["the total"]) == 1.0
    assert exact_match("STRASSE", ["straße"]) == 1.0
    assert exact_match("the total.", ["the total"]) == 0.0
    assert exact_match("b", ["a", "B"]) == 1.0


def test_not_a_number_is_text() -> None:
    assert relaxed_accuracy("nan", ["nan"]) == 1.0
    assert relaxed_accuracy("inf", ["5"]) == 0.0


def test_answers_must_be_a_list_with_something_in_it() -> None:
    for answers in ([], "42"):
        with pytest.raises(ValueError, match="at least one accepted answer"):
            score("42", answers)


def test_baseline_is_the_best_constant_answer() -> None:
    items = [["4"], ["7", "seven"], ["Seven"], ["7"], ["12"]]
    baseline = most_frequent_answer(items)
    assert baseline["answer"] == "7"
    assert baseline["scores"]["exact_match"] == 2 / 5
    best = max(
        mean_scores([score(answer, answers) for answers in items])["exact_match"] for item in items for answer in item
    )
    assert baseline["scores"]["exact_match"] == best


def test_baseline_counts_an_item_once() -> None:
    assert most_frequent_answer([["a", "A", " a"], ["b"], ["b"]])["answer"] == "b"


def test_nothing_evaluated() -> None:
    assert mean_scores([]) == {"exact_match": 0.0, "anls": 0.0, "relaxed_accuracy": 0.0}
    assert most_frequent_answer([])["answer"] == ""
