"""POPE: whether a reply says yes, and accuracy, precision, recall and F1 of a set of replies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from alignvlm.metrics.vqa import punctuation_vlmevalkit


def parse_official(reply: str) -> str:
    """`no` when the first sentence has the word No, no or not, else `yes`."""
    words = reply.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(words) else "yes"


def parse_lmms_eval(reply: str) -> str:
    """The reply in lower case: anything but exactly `yes` or `no` is neither."""
    return reply.lower().strip()


def parse_vlmevalkit(reply: str) -> str:
    """`Yes` or `No` when the reply has exactly one of the words, else `Unknown`."""
    words = punctuation_vlmevalkit(reply.lower()).split()
    said = {word for word in ("yes", "no") if word in words}
    return said.pop().capitalize() if len(said) == 1 else "Unknown"


def pope_scores(said: Sequence[str], answers: Sequence[str]) -> dict[str, float]:
    """Accuracy, precision, recall, F1 (of yes) and the share of replies that say yes, from 0 to 1.

    Args:
        said: `yes`, `no` or anything else, which is wrong and belongs to neither class.
        answers: `yes` or `no`.
    """
    pairs = list(zip(said, answers, strict=True))
    hits, false_alarms, misses = (pairs.count(pair) for pair in (("yes", "yes"), ("yes", "no"), ("no", "yes")))
    precision = _ratio(hits, hits + false_alarms)
    recall = _ratio(hits, hits + misses)
    return {
        "accuracy": _ratio(sum(one == other for one, other in pairs), len(pairs)),
        "precision": precision,
        "recall": recall,
        "f1": _ratio(2 * precision * recall, precision + recall),
        "yes_ratio": _ratio(sum(word == "yes" for word, _ in pairs), len(pairs)),
    }


def pope_official(replies: Sequence[str], answers: Sequence[str]) -> dict[str, float]:
    """Scores of the benchmark's own evaluator, for which every answer but exactly `no` is yes."""
    labels = ["no" if answer == "no" else "yes" for answer in answers]
    return pope_scores([parse_official(reply) for reply in replies], labels)


def pope_lmms_eval(replies: Sequence[str], answers: Sequence[str]) -> dict[str, float]:
    """Scores as lmms-eval prints them; its `yes_ratio` is the share of yes among the answers, not the replies."""
    answers = [answer.lower().strip() for answer in answers]
    scores = pope_scores([parse_lmms_eval(reply) for reply in replies], answers)
    return scores | {"yes_ratio": _ratio(answers.count("yes"), sum(answers.count(word) for word in ("yes", "no")))}


def pope_vlmevalkit(replies: Sequence[str], items: Sequence[Mapping[str, str]]) -> dict[str, dict[str, float]]:
    """Scores in percent over all items and per category, where an item counts once for each of its categories.

    A reply that is neither yes nor no counts as no for F1, and as wrong for `acc`.

    Args:
        items: `answer` (Yes or No) and `category`, a comma-separated list.
    """
    groups: dict[str, list[tuple[str, str]]] = {"Overall": []}
    for reply, item in zip(replies, items, strict=True):
        for category in item["category"].split(","):
            for name in ("Overall", category):
                groups.setdefault(name, []).append((parse_vlmevalkit(reply), item["answer"]))
    return {name: _rating(group) for name, group in groups.items()}


def _rating(rows: Sequence[tuple[str, str]]) -> dict[str, float]:
    said, answers = zip(*(["yes" if word == "Yes" else "no" for word in row] for row in rows), strict=True)
    classes = pope_scores(said, answers)
    accuracy = _ratio(sum(one == other for one, other in rows), len(rows))
    return {"f1_Overall": 100 * classes["f1"], "acc": 100 * accuracy} | {
        name: 100 * classes[name] for name in ("precision", "recall")
    }


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
