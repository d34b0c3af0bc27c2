"""Scores a file of reference cases, `{metric: [{prediction, references, expected, source}]}`, against these metrics."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignvlm.errors import UserError
from alignvlm.metrics import mmvet, registry, vcr, vqa
from alignvlm.metrics.choices import letters, mmmu, pope
from alignvlm.metrics.tables import denotation, due_f1, tablevqabench
from data_pipeline.errors import nearest

TOLERANCE = 1e-6
CASE = ("prediction", "references", "expected")
Scorer = Callable[[Any, Any], Any]
"""(prediction, references) -> what stands under `expected`."""


@dataclass(frozen=True)
class Difference:
    """A case that this package scores otherwise than the file says."""

    metric: str
    number: int
    """Place of the case in its metric's list, from 0."""
    prediction: Any
    references: Any
    expected: Any
    got: Any

    def __str__(self) -> str:
        shown = (json.dumps(value, ensure_ascii=False) for value in (self.prediction, self.references))
        prediction, references = (text if len(text) <= 300 else f"{text[:300]} …" for text in shown)
        case = f"{self.metric}[{self.number}]: expected {json.dumps(self.expected, ensure_ascii=False)}"
        return f"{case}, got {json.dumps(self.got, ensure_ascii=False)} for {prediction} against {references}"


def read_vectors(path: Path) -> dict[str, list[dict[str, Any]]]:
    """The cases of a file, unchecked. Raises UserError for a file of another shape or an empty one."""
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error})") from error
    if not isinstance(table, dict) or not any(table.values()):
        raise UserError(f"{path}: must hold metrics with a list of cases each, {{metric: [case, …]}}")
    for metric, cases in table.items():
        if not isinstance(cases, list):
            raise UserError(f"{path}: {metric!r} must be a list of cases, not {cases!r:.80}")
    return table


def differences(table: Mapping[str, Sequence[Any]]) -> Iterator[Difference]:
    """Every case whose result differs from `expected` by more than 1e-6, or that cannot be scored."""
    for metric, cases in table.items():
        for number, case in enumerate(cases):
            try:
                prediction, references, expected = (case[name] for name in CASE)
            except (KeyError, TypeError):
                yield Difference(metric, number, None, None, None, f"no case with {', '.join(CASE)}: {case!r:.80}")
                continue
            try:
                got = find_scorer(metric)(prediction, references)
                agrees = equal(got, expected)
            except Exception as error:  # a case of another shape may break a metric anywhere
                got, agrees = f"{type(error).__name__}: {error}", False
            if not agrees:
                yield Difference(metric, number, prediction, references, expected, got)


def find_scorer(metric: str) -> Scorer:
    """A metric of such a file by name. Raises UserError with the nearest name."""
    if metric not in SCORERS:
        raise UserError(f"unknown metric {metric!r}: {nearest(metric, SCORERS)}")
    return SCORERS[metric]


def equal(got: Any, expected: Any) -> bool:
    """Whether two results are the same, numbers within the tolerance."""
    if isinstance(expected, Mapping):
        return isinstance(got, Mapping) and set(got) == set(expected) and all(equal(got[k], expected[k]) for k in got)
    if isinstance(expected, list):
        return isinstance(got, list) and len(got) == len(expected) and all(map(equal, got, expected))
    if isinstance(expected, int | float) and isinstance(got, int | float):
        return math.isclose(got, expected, rel_tol=0, abs_tol=TOLERANCE)
    return type(got) is type(expected) and got == expected


def _per_item(name: str) -> Scorer:
    """A registered metric of one prediction; a single reference may stand without a list, no reply is `none`."""
    metric = registry.find_metric(name)

    def score(prediction: Any, references: Any) -> float:
        answers = references if isinstance(references, list) else [references]
        return metric("none" if prediction is None else prediction, [str(answer) for answer in answers])

    return score


def _text(function: Callable[[str], Any]) -> Scorer:
    """What a function makes of the prediction; there are no references."""
    return lambda prediction, _: function(prediction)


def _choice_vlmevalkit(prediction: Any, options: Mapping[str, Any]) -> str:
    """There a reply or an option that is no text, such as a number, is written as one first."""
    return letters.choose_vlmevalkit(str(prediction), {letter: str(text) for letter, text in options.items()})


def _choice(choose: Callable[[str, Any], str | None]) -> Scorer:
    def score(prediction: str, references: Mapping[str, Any]) -> dict[str, Any]:
        letter = choose(prediction, references["options"])
        correct = None if letter is None else float(letter == references["answer"])
        return {"parsed": "RANDOM" if letter is None else letter, "correct": correct}

    return score


def _fintabnetqa(prediction: str, reference: str) -> dict[str, float]:
    return {
        "relieved": tablevqabench.fintabnetqa_relieved(prediction, [reference]),
        "exact": tablevqabench.fintabnetqa_exact(prediction, [reference]),
    }


def _mmvet(scores: Sequence[float], capabilities: Sequence[str]) -> dict[str, Any]:
    means = mmvet.mmvet_scores(scores, capabilities)
    rounded = {name: round(means[name], 2) for name in mmvet.CAPABILITIES}
    return {"overall": means["overall"], "per_capability_rounded": rounded}


def _vcr(reply: str, blanks: Sequence[str]) -> list[dict[str, float]]:
    return [blank._asdict() for blank in vcr.score_blanks(reply, blanks)]


SCORERS: dict[str, Scorer] = {
    **{f"anls_{flavour}": _per_item(name) for flavour, name in (("vlmevalkit", "anls"), ("due", "anls_due"))},
    "anls_lmms_eval": lambda prediction, references: _per_item("anls")(prediction.strip(), references),
    **{
        name: _per_item(name)
        for name in (
            "relaxed_accuracy_lmms_eval", "relaxed_accuracy_vlmevalkit", "relaxed_accuracy_docowl",
            "textvqa_lmms_eval", "textvqa_vlmevalkit", "vqa_official", "gqa_lmms_eval", "gqa_vlmevalkit",
            "tabfact_docowl_exact", "tablevqabench_vwtq", "tablevqabench_vtabfact",
        )
    },
    "vqa_normalise_lmms_eval": _text(vqa.normalise_lmms_eval),
    "vqa_normalise_vlmevalkit": _text(vqa.normalise_vlmevalkit),
    "wtq_official": denotation.wtq_official,
    "wtq_due": denotation.wtq_due_items,
    "wtq_normalise": _text(denotation.normalise),
    "tablevqabench_fintabnetqa": _fintabnetqa,
    "due_f1_deepform": due_f1.due_f1,
    "due_f1_kleister": due_f1.due_f1,
    "mmmu_mc_official": _choice(mmmu.choose_official),
    "mmmu_mc_lmms_eval": _choice(mmmu.choose_lmms_eval),
    "mcq_vlmevalkit": _choice(_choice_vlmevalkit),
    "mmmu_open_official": mmmu.mmmu_open_official,
    "mmmu_open_vlmevalkit": lambda reply, answer: letters.mmmu_open_vlmevalkit(str(reply), str(answer)),
    "mmmu_open_parse": _text(lambda reply: sorted(map(str, mmmu.open_candidates(reply)))),
    "seedbench_lmms_eval": letters.seedbench_lmms_eval,
    "pope_official": pope.pope_official,
    "pope_lmms_eval": pope.pope_lmms_eval,
    "pope_parse_official": _text(pope.parse_official),
    "pope_parse_vlmevalkit": _text(pope.parse_vlmevalkit),
    "pope_rating_vlmevalkit": pope.pope_vlmevalkit,
    "vcr": _vcr,
    "vcr_tokenise_en": _text(vcr.tokenise),
    "mmvet_aggregate": _mmvet,
}  # fmt: skip
"""Every metric of such a file. A name carries the evaluator whose rule it is."""
