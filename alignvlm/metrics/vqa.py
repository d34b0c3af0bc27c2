"""Soft accuracy of VQA v2 and TextVQA (ten human answers per question), with the normalisation of three evaluators."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from alignvlm.metrics.registry import register_metric

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
MAX_FULL_STOPS = 32
"""Full stops that are deleted at most: all three evaluators pass a flag of that value as the count."""
NUMBERS = {
    "none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6",
    "seven": "7", "eight": "8", "nine": "9", "ten": "10",
}  # fmt: skip
ARTICLES = {"a", "an", "the"}
DIGIT_COMMA_DIGIT = re.compile(r"\d,\d")
FULL_STOP = re.compile(r"\.(?!\d)")
FULL_STOP_ALONE = re.compile(r"(?<!\d)\.(?!\d)")

ONE_APOSTROPHE = """
ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's isn't it'd
it'll ma'am mightn't might've mustn't must've needn't not've o'clock oughtn't shan't should've shouldn't somebody'll
somebody's someone'd someone'll someone's something'd something'll that's there'd there're there's they'd they'll
they're they've 'twas wasn't we've weren't what'll what're what's what've when's where'd where's where've who'd who'll
who's who've why'll why're why's won't would've wouldn't y'all you'd you'll you're you've
"""
TWO_APOSTROPHES = """
couldn't've hadn't've he'd've it'd've mightn't've she'd've shouldn't've somebody'd've someone'd've something'd've
there'd've they'd've we'd've who'd've wouldn't've y'all'll you'd've
"""


def _contractions() -> dict[str, str]:
    """Word without (one of) its apostrophes -> the word."""
    table = {word.replace("'", ""): word for word in ONE_APOSTROPHE.split()}
    for word in TWO_APOSTROPHES.split():
        first, second = (position for position, letter in enumerate(word) if letter == "'")
        table |= {word[:cut] + word[cut + 1 :]: word for cut in (first, second)}
    table |= dict.fromkeys(("yall'd've", "y'alld've", "y'all'dve"), "y'all'd've")
    table |= dict.fromkeys(("ow's'at", "'ows'at", "'ow'sat"), "'ow's'at")
    return table | {"somebody'd": "somebodyd"}


CONTRACTIONS = _contractions()


def normalise_official(text: str) -> str:
    """As the evaluator of VQA v2 does where references differ."""
    return _words(_punctuation(_one_line(text), FULL_STOP))


def normalise_lmms_eval(text: str) -> str:
    """As lmms-eval's EvalAI processor: commas, question marks and `'s` are handled first."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return normalise_official(text)


def normalise_vlmevalkit(text: str) -> str:
    """As VLMEvalKit: a full stop beside any digit stays."""
    return _words(punctuation_vlmevalkit(_one_line(text)))


def punctuation_vlmevalkit(text: str) -> str:
    """The step about punctuation alone, which POPE uses too."""
    return _punctuation(text, FULL_STOP_ALONE)


@register_metric("VQA accuracy (official)", "agreement with ten people, as the VQA v2 evaluator normalises")
def vqa_official(prediction: str, answers: Sequence[str]) -> float:
    """Soft accuracy; texts are normalised only where the references are not all the same."""
    references = [_one_line(answer) for answer in answers]
    if len(set(references)) == 1:
        return _soft_accuracy(_one_line(prediction), references)
    return _normalised(prediction, references, normalise_official)


@register_metric("VQA accuracy (lmms-eval)", "agreement with ten people, as lmms-eval normalises")
def textvqa_lmms_eval(prediction: str, answers: Sequence[str]) -> float:
    """Soft accuracy of normalised texts."""
    return _normalised(prediction, answers, normalise_lmms_eval)


@register_metric("VQA accuracy (VLMEvalKit)", "agreement with ten people, as VLMEvalKit normalises")
def textvqa_vlmevalkit(prediction: str, answers: Sequence[str]) -> float:
    """Soft accuracy of normalised texts."""
    return _normalised(prediction, answers, normalise_vlmevalkit)


def _normalised(prediction: str, answers: Sequence[str], normalise: Callable[[str], str]) -> float:
    return _soft_accuracy(normalise(prediction), [normalise(answer) for answer in answers])


def _soft_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Mean over the references of min(1, m / 3), with m matches among the others: 0, 0.3, 0.6, 0.9, 1 of ten."""
    matches = sum(answer == prediction for answer in answers)
    return sum(min(1.0, (matches - (answer == prediction)) / 3) for answer in answers) / len(answers)


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def _punctuation(text: str, full_stop: re.Pattern[str]) -> str:
    """A character beside a space, or any in a text with a number such as 1,000, is deleted; elsewhere it is a space."""
    cleaned = text
    number = DIGIT_COMMA_DIGIT.search(text)
    for character in PUNCTUATION:
        beside_space = f"{character} " in text or f" {character}" in text
        cleaned = cleaned.replace(character, "" if beside_space or number else " ")
    return full_stop.sub("", cleaned, count=MAX_FULL_STOPS)


def _words(text: str) -> str:
    words = (NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)
