"""POPE: is there such an object in the picture? Yes or no, asked in three ways."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

from alignvlm.evaluation.benchmarks.base import Benchmark, Flavour, Gold, Question, Scores, register_benchmark
from alignvlm.evaluation.benchmarks.readers import Original, Parquet, Record, Tsv
from alignvlm.metrics.choices import pope

CATEGORIES = ("adversarial", "popular", "random")


@register_benchmark
class POPE(Benchmark):
    """9,000 questions, half of them yes. VLMEvalKit's file has each once (5,127), with all categories it stands for."""

    name = "pope"
    title = "POPE"
    published_items = 9000
    sources = MappingProxyType(
        {
            "huggingface": Parquet(("test",), otherwise=Parquet(CATEGORIES)),
            "vlmevalkit": Tsv(("POPE",)),
            "original": Original(
                tuple(f"coco_pope_{category}.json" for category in CATEGORIES),
                image=lambda row: row["image"],
                image_folders=("val2014", "images", "../../val2014", "."),
            ),
        }
    )
    flavours = MappingProxyType(
        {
            "vlmevalkit": Flavour("{}"),
            "lmms_eval": Flavour(
                lambda asked: f"{asked.text.strip()}\nAnswer the question using a single word or phrase.",
                max_new_tokens=128,
            ),
            "official": Flavour("{}"),
        }
    )
    headline = "f1"

    def expected_items(self, layout: str) -> tuple[int, ...]:
        """Rows of the published set."""
        return (5127 if layout == "vlmevalkit" else self.published_items,)

    def question(self, layout: str, number: int, record: Record) -> Question:
        """A question, whose answer is yes or no, with its categories."""
        if layout == "original":
            text, answer, images = record.text("text"), record.text("label"), [record.image("image")]
            categories = [record["__file__"].removeprefix("coco_pope_").removesuffix(".json")]
        else:
            text, answer = record.text("question"), record.text("answer")
            images = record["images"] if layout == "vlmevalkit" else [record.image("image")]
            categories = record.text("category").split(",")
        answer = answer.strip().lower()
        if answer not in ("yes", "no"):
            raise record.wrong("label" if layout == "original" else "answer", f"must be yes or no, not {answer!r}")
        unknown = sorted(set(categories) - set(CATEGORIES))
        if unknown:
            raise record.wrong("category", f"must be of {', '.join(CATEGORIES)}, not {unknown[0]!r}")
        return Question(str(number), text, images, {"answer": answer, "categories": categories})

    def score(self, reply: str, gold: Gold, flavour: str) -> Scores:
        """What a reply adds to accuracy, precision and recall of yes, and the share of yes; once per category."""
        answer = gold["answer"]
        if flavour == "official":
            said = pope.parse_official(reply)
        else:
            said = pope.parse_lmms_eval(reply) if flavour == "lmms_eval" else pope.parse_vlmevalkit(reply).lower()
        right, says_yes, is_yes = float(said == answer), float(said == "yes"), float(answer == "yes")
        counted = said in ("yes", "no") or flavour == "vlmevalkit"  # there a reply that is neither is a miss
        scores: Scores = {}
        for end, weight in (("", len(gold["categories"])), *((f".{name}", 1) for name in gold["categories"])):
            values = {
                "precision": (says_yes * is_yes, says_yes),
                "recall": (says_yes * is_yes, is_yes * counted),
                "accuracy": (right, 1.0),
                "yes_ratio": (says_yes, 1.0),
            }
            scores |= {f"{name}{end}": (weight * above, weight * below) for name, (above, below) in values.items()}
        return scores | {"neither": (float(said not in ("yes", "no")), 1.0)}

    def combine(self, rates: dict[str, Any]) -> dict[str, Any]:
        """F1 of yes, over all questions and per category, in front."""
        f1 = {}
        for name in [name for name in rates if name.split(".")[0] == "precision"]:
            end = name.removeprefix("precision")
            precision, recall = rates[name], rates[f"recall{end}"]
            both = precision + recall
            f1[f"f1{end}"] = 2 * precision * recall / (both + (both == 0))
        return f1 | rates
