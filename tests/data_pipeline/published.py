"""Tiny files in the layouts of published datasets, made with pyarrow and json; images are JPEGs of different sizes."""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tests.data_pipeline.tars import picture, write_tar

Row = dict[str, Any]


def struct(width: int = 30) -> Row:
    """An image as `datasets` stores it."""
    return {"bytes": picture(width, 20), "path": f"{width}.jpg"}


def parquet(path: Path, rows: Sequence[Row], group: int = 100) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(list(rows)), path, row_group_size=group)
    return path


def save_to_disk(folder: Path, rows: Sequence[Row], files: int = 2) -> Path:
    """As `Dataset.save_to_disk` writes it: Arrow streams, and state.json that lists them."""
    folder.mkdir(parents=True)
    table = pa.Table.from_pylist(list(rows))
    size, names = -(-len(rows) // files), []
    for number in range(files):
        names.append(f"data-{number:05d}-of-{files:05d}.arrow")
        part = table.slice(number * size, size)
        with pa.OSFile(str(folder / names[-1]), "wb") as sink, pa.ipc.new_stream(sink, part.schema) as writer:
            writer.write_table(part, max_chunksize=2)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    (folder / "dataset_info.json").write_text("{}")
    return folder


def llava_row(number: int) -> Row:
    turns = [{"from": "human", "value": f"<image>\nWhat is {number}?"}, {"from": "gpt", "value": f"number {number}"}]
    return {"id": f"{number:09d}", "image": f"0000{number % 2}/{number}.jpg", "conversations": turns}


def llava_pretrain(folder: Path, count: int = 5, lines: bool = False) -> Path:
    """blip_laion_cc_sbu_558k.json, one list, and images.zip, as LLaVA-Pretrain has them."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [llava_row(i) for i in range(count)]
    with zipfile.ZipFile(folder / "images.zip", "w") as archive:
        for number, row in enumerate(rows):
            archive.writestr(row["image"], picture(30 + number, 20))
    file = folder / ("rows.jsonl" if lines else "blip_laion_cc_sbu_558k.json")
    file.write_text("\n".join(map(json.dumps, rows)) + "\n" if lines else json.dumps(rows))
    return file


def docdownstream(folder: Path, count: int = 3) -> Path:
    """train.jsonl of {image, messages, task_name, dataset_name}, and its images, as mPLUG publishes it."""
    rows = []
    for number in range(count):
        name = f"imgs/DUE_Benchmark/DocVQA/pngs/{number}.jpg"
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(picture(30 + number, 20))
        turns = [
            {"role": "user", "content": f"<|image|>What is {number}?"},
            {"role": "assistant", "content": f"number {number}"},
        ]
        rows.append({"image": [name], "messages": turns, "task_name": "qa_sft", "dataset_name": "DocVQA"})
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "train.jsonl"


def rows_of(layout: str) -> list[Row]:
    """Two good rows of a layout as their parquet files have them; each is one question about one image."""
    make: dict[str, Callable[[int], Row]] = {
        "llava": lambda i: llava_row(i) | {"image": struct(30 + i), "data_source": "x"},
        "finevision": lambda i: {
            "images": [struct(30 + i)], "source": "docvqa", "relevance_min": 4 + i, "relevance_ratings": [4 + i, 5],
            "texts": [{"user": f"What is {i}?", "assistant": f"number {i}"}],
        },
        "bigdocs": lambda i: {
            "identifier": str(i), "images": [struct(30 + i)], "queries": [f"What is {i}?"],
            "annotations": [f"number {i}"], "task": "qa", "source": "x",
        },
        "messages": lambda i: {
            "image": struct(30 + i),
            "messages": [{"role": "user", "content": f"What is {i}?"}, {"role": "assistant", "content": f"number {i}"}],
        },
        "questions": lambda i: {"question": f"What is {i}?", "answer": f"number {i}", "image": struct(30 + i)},
        "captions": lambda i: {
            "key": f"{i:09d}", "status": "success", "error_message": None, "jpg": picture(30 + i, 20),
            "caption": f"number {i}", "url": "https://host/x.jpg", "width": 30, "sha256": "00",
        },
        "pixmo": lambda i: {
            "image": struct(30 + i), "image_id": str(i),
            "questions": {"question": [f"What is {i}?"], "answer": [f"number {i}"]},
        },
        "interleaved": lambda i: {
            "images": [None, struct(30 + i), None], "texts": [f"What is {i}?", None, f"number {i}"], "metadata": "[]",
        },
    }  # fmt: skip
    return [make[layout](i) for i in range(2)]


def pixmo_images(folder: Path, urls: Sequence[str]) -> Path:
    """Images under the names that Molmo's downloader gives them."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, url in enumerate(urls):
        (folder / hashlib.sha256(url.encode()).hexdigest()).write_bytes(picture(30 + number, 20))
    return folder


def published_desk(folder: Path) -> None:
    """Tiny files in the layouts of the published datasets that documents and recipes name, under their names."""
    llava_pretrain(folder / "LLaVA-Pretrain")
    parquet(folder / "FineVision" / "docvqa" / "train-00000-of-00001.parquet", rows_of("finevision"))
    chats = [{"chat": row["messages"], "pages": row["image"]} for row in rows_of("messages")]
    parquet(folder / "chats" / "train-00000-of-00001.parquet", chats)
    parquet(folder / "LLaVA-NeXT-Data" / "data" / "train-00000-of-00001.parquet", rows_of("llava"))
    parquet(folder / "BigDocs-7.5M" / "data" / "train-00000-of-00001.parquet", rows_of("bigdocs"))
    docdownstream(folder / "DocDownstream-1.0")
    asked = {"question": "What is it?", "answers": ["number 0", "0"], "image": struct()}
    docvqa = [asked | {"questionId": "1", "docId": 1, "ucsf_document_page_no": "1", "data_split": "val"}]
    infovqa = [asked | {"image_url": "https://host/x.jpg", "operation/reasoning": ["counting"], "ocr": "[]"}]
    chartqa = [{"query": "What is it?", "label": ["number 0"], "human_or_machine": 0, "image": struct()}]
    for place, split, rows in (
        ("DocVQA/DocVQA", "validation", docvqa),
        ("DocVQA/InfographicVQA", "validation", infovqa),
        ("ChartQA/data", "test", chartqa),
    ):
        parquet(folder / place / f"{split}-00000-of-00001.parquet", rows)
        parquet(folder / place / "train-00000-of-00001.parquet", rows)
    pair = [("000000000.jpg", picture()), ("000000000.txt", b"a dog"), ("000000000.json", b'{"status": "success"}')]
    write_tar(folder / "data" / "cc12m" / "00000.tar", pair)
