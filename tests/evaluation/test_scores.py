"""Means over a task, and the constant answer that a model must beat."""

from __future__ import annotations

from collections.abc import Sequence

from alignvlm.evaluation.scores import baseline_of, mean_scores, metrics_of, most_frequent_answer, score, task_scores
from alignvlm.metrics import Metric, find_metric

METRICS = [find_metric(name) for name in ("exact_match", "anls", "relaxed_accuracy")]


def test_baseline_is_the_best_constant_answer() -> None:
    items = [["4"], ["7", "seven"], ["Seven"], ["7"], ["12"]]
    baseline = most_frequent_answer(METRICS, items)
    assert baseline.answer == "7"
    assert baseline.scores["exact_match"] == 2 / 5
    constants = [answer for item in items for answer in item]
    means = [mean_scores(METRICS, [score(METRICS, answer, answers) for answers in items]) for answer in constants]
    assert baseline.scores["exact_match"] == max(mean["exact_match"] for mean in means)


def test_baseline_counts_an_item_once() -> None:
    assert most_frequent_answer(METRICS, [["a", "A", " a"], ["b"], ["b"]]).answer == "b"


def test_the_baseline_scores_each_list_of_answers_once() -> None:
    asked: list[list[str]] = []

    def scored(prediction: str, answers: Sequence[str]) -> float:
        asked.append(list(answers))
        return float(prediction in answers)

    metric = Metric("scored", "Scored", "", scored)
    assert most_frequent_answer([metric], [["a"]] * 30 + [["b", "c"]] * 10).scores == {"scored": 0.75}
    assert asked == [["a"], ["b", "c"]]


def test_nothing_evaluated() -> None:
    assert mean_scores(METRICS, []) == {"exact_match": 0.0, "anls": 0.0, "relaxed_accuracy": 0.0}
    assert most_frequent_answer(METRICS, []).answer == ""


def test_an_entry_has_the_fields_of_its_tasks_metrics() -> None:
    rows = [{"answers": ["100"], **score(METRICS, text, ["100"])} for text in ("100", "101")]
    entry = task_scores(METRICS, rows)
    assert list(entry) == [
        "exact_match", "anls", "relaxed_accuracy",
        "items", "baseline", "baseline_answer", "baseline_anls", "baseline_relaxed_accuracy", "metrics",
    ]  # fmt: skip
    assert (entry["exact_match"], entry["relaxed_accuracy"]) == (0.5, 1.0)
    reordered = task_scores(METRICS[::-1], rows)
    assert "baseline_relaxed_accuracy" not in reordered
    assert baseline_of(reordered, "exact_match") == reordered["baseline_exact_match"]
    assert list(metrics_of(reordered)) == ["relaxed_accuracy", "anls", "exact_match"]


def test_entries_that_do_not_name_their_metrics_can_be_shown() -> None:
    entry = task_scores(METRICS[:2], [{"answers": ["1"], "exact_match": 1.0, "anls": 1.0}])
    del entry["metrics"]
    assert metrics_of(entry) == {m.name: {"title": m.title, "note": m.note} for m in METRICS[:2]}
