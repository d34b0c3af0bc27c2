"""Metrics against what the published evaluators themselves said (evaluator_cases.json; each case names its source)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from alignvlm.errors import UserError
from alignvlm.metrics import find_metric, vcr
from alignvlm.metrics.bootstrap import confidence_interval
from alignvlm.metrics.choices import mmmu
from alignvlm.metrics.vectors import SCORERS, differences, equal, read_vectors
from tests.fixtures.command import Command

FILE = Path(__file__).with_name("evaluator_cases.json")
CASES: dict[str, list[dict[str, Any]]] = json.loads(FILE.read_text(encoding="utf-8"))


@pytest.mark.parametrize("metric", CASES)
def test_a_metric_scores_as_its_evaluator(metric: str) -> None:
    assert [str(difference) for difference in differences({metric: CASES[metric]})] == []


def test_every_metric_of_the_command_has_cases_that_differ_among_themselves() -> None:
    assert set(SCORERS) == set(CASES)
    for metric, cases in CASES.items():
        assert len({json.dumps(case["expected"], sort_keys=True) for case in cases}) > 1, metric


def test_score_ends_with_the_count_and_names_what_differs(tmp_path: Path, command: Command) -> None:
    assert command("score", "--vectors", FILE).splitlines()[-1] == f"{sum(map(len, CASES.values()))} of 395"
    cases = [dict(case) for case in CASES["anls_due"]]
    cases[1]["expected"] = 0.123
    (tmp_path / "wrong.json").write_text(json.dumps({"anls_due": cases}))
    first, last = command("score", "--vectors", tmp_path / "wrong.json", code=1).splitlines()
    assert first.startswith("anls_due[1]: expected 0.123, got ")
    assert last == f"{len(cases) - 1} of {len(cases)}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[", "not JSON"),
        ("[1]", "must hold metrics"),
        ("{}", "must hold metrics"),
        ('{"anls_deu": []}', "must hold metrics"),
        ('{"anls_due": 1}', "'anls_due' must be a list of cases"),
    ],
)
def test_other_files_are_refused_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "cases.json").write_text(text)
    with pytest.raises(UserError, match=message):
        read_vectors(tmp_path / "cases.json")


def test_cases_that_cannot_be_scored_differ(tmp_path: Path, command: Command) -> None:
    right = {"prediction": "a", "references": ["a"], "expected": 1.0}
    without_references = {"prediction": "a", "references": [], "expected": 1.0}
    table = {
        "anls_deu": [right], "anls_due": [right, 1, {"prediction": "a"}, right | {"expected": 10**400}],
        "textvqa_lmms_eval": [without_references],
        "tablevqabench_vtabfact": [{"prediction": None, "references": "1", "expected": 0.0}],
    }  # fmt: skip
    (tmp_path / "cases.json").write_text(json.dumps(table))
    *differing, last = command("score", "--vectors", tmp_path / "cases.json", code=1).splitlines()
    assert last == "2 of 7"
    assert [line.partition(":")[0] for line in differing] == [
        "anls_deu[0]", "anls_due[1]", "anls_due[2]", "anls_due[3]", "textvqa_lmms_eval[0]",
    ]  # fmt: skip
    assert "unknown metric 'anls_deu': did you mean 'anls_due'" in differing[0]


@pytest.mark.parametrize(
    ("metric", "prediction", "references", "expected"),
    [  # results of lmms-eval 0.7.3 and VLMEvalKit e8e78f0: lengths are those of the upper-case text
        ("anls_lmms_eval", "ŉ", ["ŉ."], 2 / 3),
        ("anls_vlmevalkit", "Straße|", ["traße|"], 0.875),
        # ... and the mean over several answers
        ("gqa_vlmevalkit", "thousand", ["million", "Thousand"], 0.5),
        ("gqa_lmms_eval", "yes.", ["yes", "no"], 0.5),
        ("gqa_lmms_eval", "İ%", ["İ"], 0.0),  # numpy's texts keep their length, and İ has two letters in lower case
        # what is no text is written as one
        ("mcq_vlmevalkit", 7.5, {"answer": "B", "options": {"A": 3, "B": 7.5}}, {"parsed": "B", "correct": 1.0}),
        ("mmmu_open_vlmevalkit", 7, "7", 1.0),
        ("relaxed_accuracy_vlmevalkit", "14", ["a", 14], 1.0),
        ("relaxed_accuracy_vlmevalkit", "USA", "(['Canada', 'USA'])", 1.0),
        (
            "due_f1_deepform", [{"name": "a", "key": "k", "answer": None}], [{"name": "a", "annotations": []}],
            dict.fromkeys(("f1", "precision", "recall"), 0.0),
        ),
        # MM-Vet looks for a capability in the text of the list
        (
            "mmvet_aggregate", [1.0, 0.5], ["ocr, math", "rec"],
            {"overall": 75.0, "per_capability_rounded": dict.fromkeys(("know", "gen", "spat"), 0.0)
                | {"rec": 50.0, "ocr": 100.0, "math": 100.0}},
        ),
        # and POPE takes every label but `no` for yes
        ("pope_official", ["No", "yes"], ["no", "Yes"], dict.fromkeys(("accuracy", "precision", "recall", "f1"), 1.0)
            | {"yes_ratio": 0.5}),
    ],
)  # fmt: skip
def test_rare_cases_are_scored_as_the_evaluators_do(
    metric: str, prediction: Any, references: Any, expected: Any
) -> None:
    assert equal(SCORERS[metric](prediction, references), expected)


def test_results_are_compared_with_their_types() -> None:
    assert equal({"f1": 0.5 + 1e-7}, {"f1": 0.5})
    assert not equal({"f1": 0.5 + 1e-5}, {"f1": 0.5})
    assert not equal("1.0", 1.0)
    assert not equal([1.0, None], [1.0])


def test_several_answers_are_right_only_when_the_reply_is_split() -> None:
    assert find_metric("wtq_due")("Italy | France", ["France", "Italy"]) == 0.0
    assert find_metric("wtq_due_split")("Italy | France", ["France", "Italy"]) == 1.0


def test_the_tolerant_tabfact_is_another_metric() -> None:
    for reply in ("true.", "Yes", " ENTAILED"):
        assert find_metric("tabfact_docowl_exact")(reply, ["True"]) == 0.0
        assert find_metric("tabfact_tolerant")(reply, ["True"]) == 1.0
    assert find_metric("tabfact_tolerant")("maybe", ["True"]) == 0.0


def test_a_guess_is_the_same_for_a_seed_and_spread_over_the_options() -> None:
    guesses = [mmmu.guess(["a", "b", "c", "d"], seed=1, item=f"item{number}") for number in range(400)]
    assert guesses == [mmmu.guess(["a", "b", "c", "d"], seed=1, item=f"item{number}") for number in range(400)]
    assert all(70 < guesses.count(letter) < 130 for letter in "ABCD")


def test_vcr_without_spacy_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "spacy", None)
    vcr._tokenizer.cache_clear()
    with pytest.raises(UserError, match=r"pip install 'alignvlm\[vcr\]'"):
        vcr.score_blanks("a", ["a"])


def test_the_interval_of_a_mean_is_that_of_its_standard_error() -> None:
    scores = np.random.default_rng(1).random(400) < 0.3
    rows = np.stack([scores, np.ones(400)], axis=1).astype(float)
    low, high = confidence_interval(rows, lambda sums: sums[:, 0] / sums[:, 1])
    error = scores.std() / 400**0.5
    assert low == pytest.approx(scores.mean() - 1.96 * error, abs=0.15 * error)
    assert high == pytest.approx(scores.mean() + 1.96 * error, abs=0.15 * error)
    assert confidence_interval(rows, lambda sums: sums[:, 0] / sums[:, 1]) == (low, high)
    with pytest.raises(ValueError, match="no item"):
        confidence_interval(rows[:0], lambda sums: sums[:, 0])
