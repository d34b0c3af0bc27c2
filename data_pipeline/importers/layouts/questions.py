"""A `question` (or `query`, `prompt`) per row, and its `answer`, or a list of `answers` of which the first is said."""

from __future__ import annotations

from data_pipeline.importers.layouts.layout import Layout, Messages, Row, column
from data_pipeline.samples.schema import SampleError
from data_pipeline.samples.turns import pair_messages

_QUESTIONS = ("question", "query", "prompt")
_ANSWERS = ("answer", "answers", "label", "response")


def fits(row: Row) -> bool:
    return any(name in row for name in _QUESTIONS) and any(name in row for name in _ANSWERS)


def messages(row: Row) -> Messages:
    question, answer = column(row, *_QUESTIONS), column(row, *_ANSWERS)
    if isinstance(answer, list):
        if not answer:
            raise SampleError("no answer: the list of answers is empty")
        row["answers"] = answer
        answer = answer[0]
    return pair_messages(question, answer)


LAYOUT = Layout(fits, messages)
