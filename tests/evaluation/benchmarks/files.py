"""Tiny files of benchmarks in the layouts that people have on disk, and a stand-in for the model that answers them."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet

from alignvlm.evaluation.items import Item
from alignvlm.evaluation.likelihood import Likelihood
from tests.fixtures.zoo import save
from tests.tiny import picture


class Known:
    """Answers every question with the reply that is known for it, and remembers the batches that were asked."""

    def __init__(self, replies: Mapping[str, str]) -> None:
        self.replies, self.batches, self.asked = replies, [], {}

    def prepare(self, items: Sequence[Item]) -> Sequence[Item]:
        return items

    def generate(self, items: Sequence[Item], max_new_tokens: int, until: Sequence[str] = ()) -> list[str]:
        self.batches.append([item.key for item in items])
        self.asked |= {item.key: (item.messages[0]["content"], item.images, max_new_tokens) for item in items}
        return [self.replies[item.question] for item in items]

    def visual_tokens(self, width: int, height: int) -> int:
        return width * height

    def log_likelihoods(self, asked: Sequence[tuple[str, Sequence[str]]]) -> list[list[Likelihood]]:
        """The known reply is the most likely."""
        found = []
        self.batches.append([prompt for prompt, _ in asked])
        for prompt, continuations in asked:
            last = prompt.rpartition("\n\n")[2]
            question = next(question for question in self.replies if f"{question}\nA. " in last)
            self.asked[question] = prompt
            found.append([Likelihood(float(text == f" {self.replies[question]}"), 1, False) for text in continuations])
        return found

    def vocabulary_view(self, item: Item) -> None:
        return None


def png(seed: int = 0, size: int = 8) -> bytes:
    """An encoded picture, another one for every seed."""
    return save(picture(size, size, seed=seed))


def struct(seed: int = 0) -> dict[str, Any]:
    """An image as Hugging Face stores it."""
    return {"bytes": png(seed), "path": None}


def parquet(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """A parquet file of these rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pa.Table.from_pylist([dict(row) for row in rows]), path)
    return path


def tsv(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """A TSV as pandas writes it for VLMEvalKit; `image` is bytes or a list of them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = [{**row, **({"image": cell(row["image"])} if "image" in row else {})} for row in rows]
    pd.DataFrame(table).to_csv(path, sep="\t", index=False)
    return path


def cell(image: Any) -> Any:
    """What stands in an image cell: base64, a list of it, or the index of another row as it is."""
    if isinstance(image, list):
        return str([base64.b64encode(member).decode() for member in image])
    return base64.b64encode(image).decode() if isinstance(image, bytes) else image


def lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """A JSON-lines file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def docdownstream(
    root: Path, dataset: str, rows: Sequence[tuple[str, str, str]], documents: Sequence[Mapping[str, Any]] | None
) -> Path:
    """A folder like DocDownstream-1.0 with one dataset: rows are (document, question, answer)."""
    table = []
    for number, (name, question, answer) in enumerate(rows):
        image = root / "imgs" / dataset / f"{name}.pdf.{number}.png"
        image.parent.mkdir(parents=True, exist_ok=True)
        image.write_bytes(png(number))
        turns = [("user", f"<|image|>{question}"), ("assistant", answer)]
        messages = [{"role": role, "content": content} for role, content in turns]
        table.append({"image": [f"./{image.relative_to(root)}"], "messages": messages, "dataset_name": dataset})
    lines(root / "test" / f"{dataset}_test.jsonl", table)
    if documents is not None:
        meta = root / "meta" / dataset / "test"
        truth = [json.dumps({"gt_parses": [{"question": question}]}) for _, question, _ in rows]
        names = [{"file_name": f"x/{name}.pdf.0.png"} for name, *_ in rows]
        lines(meta / "metadata.jsonl", [n | {"ground_truth": t} for n, t in zip(names, truth, strict=True)])
        lines(meta / "document.jsonl", documents)
    return root


def document(name: str, **values: Any) -> dict[str, Any]:
    """A document of the DUE schema: key -> value, or list of values."""
    annotations = [
        {"key": key, "values": [{"value": each} for each in (value if isinstance(value, list) else [value])]}
        for key, value in values.items()
    ]
    return {"name": name, "annotations": annotations}
