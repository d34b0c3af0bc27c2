"""The letter that a reply chooses, as lmms-eval and VLMEvalKit read it (SEED-Bench; MMMU in VLMEvalKit)."""

from __future__ import annotations

import re
import string
from collections.abc import Mapping

NO_LETTER = "Z"
REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
FAILED_REQUEST = "Failed to obtain answer via API"
SPACES = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
ANSWER_IS = re.compile(r"answer\s+is\s+\**([ABCD])\**", re.IGNORECASE)
LAST_WORDS = 4
"""A single letter counts only when it stands among so many words at the end."""


def seedbench_lmms_eval(reply: str, answer: str) -> float:
    """1.0 when the first character of the reply is the letter, in either case: `Bananas` is B."""
    return float(reply.strip()[:1].lower() == answer.strip().lower())


def choose_vlmevalkit(reply: str, options: Mapping[str, str]) -> str:
    """The letter of the option that a reply names by VLMEvalKit's rules without a judge; `Z` where it finds none."""
    return _by_letter(reply, options) or _by_text(reply, options) or NO_LETTER


def mmmu_open_vlmevalkit(reply: str, answer: str) -> float:
    """An open question of MMMU in VLMEvalKit: a choice between the answer (A) and `Other Answers` (B).

    An answer that is itself one capital letter is taken for the right letter, so `C` is never right.
    """
    letter = answer if answer and len(answer) == 1 and answer in string.ascii_uppercase else "A"
    return float(choose_vlmevalkit(reply, {"A": answer, "B": "Other Answers"}) == letter)


def _by_letter(reply: str, options: Mapping[str, str]) -> str | None:
    if FAILED_REQUEST in reply:
        return None
    if any(refusal in reply for refusal in REFUSALS):
        return NO_LETTER
    words = reply.translate(SPACES).split()
    named = [letter for letter in options if letter in words]
    if len(named) == 1 and words.index(named[0]) >= len(words) - LAST_WORDS:
        return named[0]
    if not named and NO_LETTER in words:
        return NO_LETTER
    match = ANSWER_IS.search(reply)
    return match[1].upper() if match and match[1].upper() in options else None


def _by_text(reply: str, options: Mapping[str, str]) -> str | None:
    reply = reply.lower()
    if len(reply) > 2 * sum(len(text) for text in options.values()):
        return None
    named = [letter for letter, text in options.items() if text.lower() in reply]
    return named[0] if len(named) == 1 else None
