"""MMLU, test: multiple-choice questions without pictures, by the likelihood of the four letters (lmms-eval)."""

from __future__ import annotations

from types import MappingProxyType

from alignvlm.evaluation.benchmarks.base import Benchmark, Flavour, Gold, Question, Scores, register_benchmark
from alignvlm.evaluation.benchmarks.readers import Parquet, Record

LETTERS = "ABCD"
SHOTS = 5


def _choices(record: Record) -> str:
    """A question with its options, up to `Answer:`."""
    options = record.texts("choices")
    if len(options) != len(LETTERS):
        raise record.wrong("choices", f"has {len(options)} members, not {len(LETTERS)}")
    listed = [f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=True)]
    return "\n".join([record.text("question").strip(), *listed, "Answer:"])


def _letter(record: Record) -> str:
    """The right letter: the column is a class label or the letter itself."""
    answer = record["answer"]
    if isinstance(answer, int) and 0 <= answer < len(LETTERS):
        return LETTERS[answer]
    if answer in tuple(LETTERS):
        return answer
    raise record.wrong("answer", f"must be 0 to 3 or a letter, not {answer!r}")


@register_benchmark
class MMLU(Benchmark):
    """14,042 questions of 57 subjects; up to five examples of the subject come from the split `dev` beside them."""

    name = "mmlu"
    title = "MMLU"
    published_items = 14042
    verified_items = False
    sources = MappingProxyType(
        {"huggingface": Parquet(("test",), "all", otherwise=Parquet(("test",)), examples=("dev", "subject"))}
    )
    flavours = MappingProxyType({"lmms_eval": Flavour("{}", max_new_tokens=1)})
    continuations = tuple(f" {letter}" for letter in LETTERS)

    def question(self, layout: str, number: int, record: Record) -> Question:
        """The subject's description, its examples, and the question."""
        subject = record.text("subject")
        examples = record.get("__examples__", [])[:SHOTS]
        title = subject.replace("_", " ")
        parts = [f"The following are multiple choice questions (with answers) about {title}."]
        parts += [f"{_choices(example)} {_letter(example)}" for example in examples]
        gold = {"answer": _letter(record), "subject": subject, "examples": len(examples)}
        return Question(str(number), "\n\n".join([*parts, _choices(record)]), [], gold)

    def score(self, reply: str, gold: Gold, flavour: str) -> Scores:
        """Over all questions, and per subject; the reply is the most likely letter."""
        value = (float(reply == gold["answer"]), 1.0)
        return {"score": value, f"{gold['examples']} examples": value, gold["subject"]: value}
