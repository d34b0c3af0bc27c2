"""MMMU: the option or the open answer that a reply gives, by the rules of its authors and of lmms-eval."""

from __future__ import annotations

import random
import re
import string
from collections.abc import Mapping, Sequence

STRIPPED = ",.!?;:'"
MARKERS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
TRIVIAL = {":", ",", ".", "!", "?", ";", "'"}
GROUPED_NUMBER = re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b")
SCIENTIFIC_NUMBER = re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+")
PLAIN_NUMBER = re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])")


def letters_of(options: Sequence[str]) -> dict[str, str]:
    """Letter -> text of the options, from A."""
    return dict(zip(string.ascii_uppercase, options, strict=False))


def choose_official(reply: str, options: Sequence[str]) -> str | None:
    """The letter that a reply names, as MMMU's own code finds it; None where that code would guess.

    `(X)`, else ` X `, else, in more than five words, the text of an option; of several the last one in the reply.
    """
    return _choose(reply, letters_of(options), [" {} "])


def choose_lmms_eval(reply: str, options: Sequence[str]) -> str | None:
    """As `choose_official`; a letter before a space or a full stop counts too."""
    return _choose(reply, letters_of(options), ["{} ", "{}."])


def guess(options: Sequence[str], seed: int, item: str) -> str:
    """A random letter for a reply that names none, the same for the same seed and item."""
    return random.Random(f"{seed}:{item}").choice(list(letters_of(options)))


def open_candidates(reply: str) -> set[str | float]:
    """Every text and number that an open reply may give as its answer."""
    parts = _key_parts(reply)
    numbers = (
        number
        for part in parts
        for pattern in (GROUPED_NUMBER, SCIENTIFIC_NUMBER, PLAIN_NUMBER)
        for number in pattern.findall(part)
    )
    return {candidate for text in (*parts, *numbers) for candidate in _comparable(text)}


def mmmu_open_official(reply: str, answers: str | Sequence[str]) -> float:
    """1.0 when a number in the reply equals an accepted one, or the reply contains an accepted text."""
    accepted = [a for answer in ([answers] if isinstance(answers, str) else answers) for a in _comparable(answer)]
    texts = [answer for answer in accepted if isinstance(answer, str)]
    for candidate in open_candidates(reply):
        right = any(text in candidate for text in texts) if isinstance(candidate, str) else candidate in accepted
        if right:
            return 1.0
    return 0.0


def _choose(reply: str, options: Mapping[str, str], forms: Sequence[str]) -> str | None:
    for character in STRIPPED:
        reply = reply.strip(character)
    reply = f" {reply} "
    for form, place in (("({})", "({})"), *((form, " {} ") for form in forms)):
        found = [letter for letter in options if form.format(letter) in reply]
        if found:  # places that do not occur are -1: then the first letter stands
            return max(found, key=lambda letter: reply.rfind(place.format(letter)))
    if len(reply.split()) > 5:
        lower = reply.lower()
        found = [letter for letter, text in options.items() if text.lower() in lower]
        if found:
            return max(found, key=lambda letter: lower.rfind(options[letter].lower()))
    return None


def _key_parts(reply: str) -> list[str]:
    reply = reply.strip().strip(".").lower()
    lines = reply.split("\n")
    parts = []
    for number, line in enumerate(lines, start=1):
        shortest = ""
        for marker in (*MARKERS, "=") if number == len(lines) else MARKERS:
            if marker in line:
                rest = line.rpartition(marker)[2].strip()
                if not shortest or len(rest) < len(shortest):
                    shortest = rest
        if shortest and shortest not in TRIVIAL:
            parts.append(shortest)
    return parts or [reply]


def _comparable(text: str) -> list[str | float]:
    """A number rounded to two decimals, or the text in lower case; a single letter needs a space beside it."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        lower = text.lower()
        return [f" {lower}", f"{lower} "] if len(lower) == 1 else [lower]
