"""MMMU, validation: questions of 30 college subjects, most with options, some with several images."""

from __future__ import annotations

import ast
import re
from types import MappingProxyType
from typing import Any

from alignvlm.evaluation.benchmarks.base import (
    LETTER,
    Benchmark,
    Flavour,
    Gold,
    Part,
    Question,
    Scores,
    register_benchmark,
)
from alignvlm.evaluation.benchmarks.general.options import choice_vlmevalkit, listed, options_of_tsv
from alignvlm.evaluation.benchmarks.readers import Only, Parquet, Record, Tsv
from alignvlm.metrics.choices import letters, mmmu
from alignvlm.metrics.relaxed_accuracy import answers_in_cell

SEED = 42
TAG = re.compile(r"<image (\d)>")
DOMAINS = {
    "Art and Design": ("Art", "Art_Theory", "Design", "Music"),
    "Business": ("Accounting", "Economics", "Finance", "Manage", "Marketing"),
    "Science": ("Biology", "Chemistry", "Geography", "Math", "Physics"),
    "Health and Medicine": (
        "Basic_Medical_Science", "Clinical_Medicine", "Diagnostics_and_Laboratory_Medicine", "Pharmacy",
        "Public_Health",
    ),
    "Humanities and Social Science": ("History", "Literature", "Sociology", "Psychology"),
    "Tech and Engineering": (
        "Agriculture", "Architecture_and_Engineering", "Computer_Science", "Electronics", "Energy_and_Power",
        "Materials", "Mechanical_Engineering",
    ),
}  # fmt: skip
DOMAIN_OF = {subject: domain for domain, subjects in DOMAINS.items() for subject in subjects}


def place_by_number(question: Question) -> list[Part]:
    """VLMEvalKit's message: image N at `<image N>`; without any tag the images come first."""
    text = choice_vlmevalkit(question)
    pieces = TAG.split(text)
    if len(pieces) == 1:
        return [*({"type": "image"} for _ in question.images), {"type": "text", "text": text}]
    numbers = question.gold["images"]
    parts: list[Part] = []
    for position, piece in enumerate(pieces):
        if position % 2:
            parts.append({"type": "image", "image": str(numbers.index(int(piece)))})
        elif piece:
            parts.append({"type": "text", "text": piece})
    return parts


def place_in_order(question: Question) -> list[Part]:
    """lmms-eval's message: the images that occur, sorted by number, at the tags from left to right.

    Text between further tags of an image that was placed already is left out, as it is there.
    """
    task = f"{listed(question)}\n\n{LETTER}" if question.options else ""
    ask = "\nAnswer the question using a single word or phrase."
    pieces = re.split(r"<image \d>", f"{question.text}\n{task or ask}")
    parts: list[Part] = []
    for number in range(len(question.images)):
        if number < len(pieces) - 1 and pieces[number].strip():
            parts.append({"type": "text", "text": pieces[number].strip()})
        parts.append({"type": "image"})
    return [*parts, {"type": "text", "text": pieces[-1].strip()}]


@register_benchmark
class MMMU(Benchmark):
    """900 questions: 847 with options and 53 open ones."""

    name = "mmmu"
    title = "MMMU"
    published_items = 900
    sources = MappingProxyType(
        {
            "huggingface": Parquet(("validation",)),
            "vlmevalkit": Tsv(("MMMU_DEV_VAL",), Only("split", "validation", ("dev",))),
        }
    )
    flavours = MappingProxyType(
        {
            "vlmevalkit": Flavour(place_by_number),
            "lmms_eval": Flavour(place_in_order, max_new_tokens=128),
            "official": Flavour(place_in_order, max_new_tokens=128),
        }
    )

    def question(self, layout: str, number: int, record: Record) -> Question:
        """A question with the images that it or its options name."""
        text = record.text("question")
        gold: Gold = {"answer": record.text("answer")}
        if layout == "vlmevalkit":
            options, id = options_of_tsv(record), record.get("id") or record.text("index")
            gold["hint"], available = record.get("hint", ""), dict(enumerate(record["images"], start=1))
        else:
            choice = record.text("question_type") == "multiple-choice"
            options = mmmu.letters_of(_list_of(record)) if choice else {}
            id = record.text("id")
            available = {n: record[f"image_{n}"] for n in range(1, 8) if record.get(f"image_{n}")}
        named = sorted({int(n) for n in TAG.findall("\n".join([text, *options.values()]))})
        missing = [n for n in named if n not in available]
        if missing:
            raise record.wrong(f"image_{missing[0]}" if layout == "huggingface" else "image", "is named and not there")
        numbers = named or (list(available) if layout == "vlmevalkit" else [])
        images = [record["images"][n - 1] if layout == "vlmevalkit" else record.image(f"image_{n}") for n in numbers]
        subject = re.sub(r"^(?:validation|dev|test)_|_\d+$", "", id)
        gold |= {"id": id, "options": options, "images": numbers, "domain": DOMAIN_OF.get(subject, "")}
        return Question(id, text, images, gold, options)

    def score(self, reply: str, gold: Gold, flavour: str) -> Scores:
        """Accuracy where a reply that names no option is wrong, and where it is a guess, the same for every run."""
        value, unparsed, guessed = _judge(reply, gold, flavour)
        scores = {"score": (value, 1.0), "unparsed": (float(unparsed), 1.0), "with guesses": (guessed, 1.0)}
        kind = "choice" if gold["options"] else "open"
        return scores | {name: (value, 1.0) for name in (kind, gold["domain"]) if name}


def _judge(reply: str, gold: Gold, flavour: str) -> tuple[float, bool, float]:
    """(score, whether no option was named, score with a guess instead)."""
    answer, options = gold["answer"], gold["options"]
    if not options:
        if flavour == "vlmevalkit":
            value = letters.mmmu_open_vlmevalkit(reply, answer)
        else:
            value = mmmu.mmmu_open_official(reply, answers_in_cell(answer))
        return value, False, value
    if flavour == "vlmevalkit":
        letter: str | None = letters.choose_vlmevalkit(reply, options)
        value = float(letter == answer)
        return value, letter == letters.NO_LETTER, value  # that evaluator does not guess
    choose = mmmu.choose_official if flavour == "official" else mmmu.choose_lmms_eval
    letter = choose(reply, list(options.values()))
    value = float(letter == answer)
    guess = mmmu.guess(list(options.values()), SEED, gold["id"])
    return value, letter is None, float(guess == answer) if letter is None else value


def _list_of(record: Record) -> list[str]:
    """The options, which the column writes as a Python list."""
    try:
        value: Any = ast.literal_eval(record.text("options"))
    except (ValueError, SyntaxError) as error:
        raise record.wrong("options", f"is not a Python list: {record['options']!r:.80}") from error
    if not isinstance(value, list) or not value:
        raise record.wrong("options", "must be a list with something in it")
    return [str(member) for member in value]
