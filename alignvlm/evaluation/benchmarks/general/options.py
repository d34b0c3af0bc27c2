"""What benchmarks of several options share: how they are listed, and VLMEvalKit's prompt and columns."""

from __future__ import annotations

import string

from alignvlm.evaluation.benchmarks.base import Question
from alignvlm.evaluation.benchmarks.readers import Record


def listed(question: Question) -> str:
    """One option per line, `A. text`."""
    return "\n".join(f"{letter}. {text}" for letter, text in question.options.items())


def choice_vlmevalkit(question: Question) -> str:
    """VLMEvalKit's prompt of a choice; a question without options is only asked."""
    hint = f"Hint: {question.gold['hint']}\n" if question.gold.get("hint") else ""
    options = f"Options:\n{listed(question)}\n" if question.options else ""
    ending = "Please select the correct answer from the options above. \n" if question.options else ""
    return f"{hint}Question: {question.text}\n{options}{ending}"


def options_of_tsv(record: Record) -> dict[str, str]:
    """The options in the columns A, B, … of VLMEvalKit's files; an empty cell is no option."""
    return {letter: record[letter] for letter in string.ascii_uppercase if record.get(letter)}
