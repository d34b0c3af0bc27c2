"""A made-up run folder, as training and evaluation write it: three stages, two tasks, pictures, quarantine."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image, ImageDraw

from alignvlm.evaluation.metrics import mean_scores, most_frequent_answer, score

STAGES = ("init", "connector", "joint", "instruct")
TASKS = {"fields": 40, "tables": 30}
SKILL = {
    "fields": {"init": 0.0, "connector": 0.25, "joint": 0.7, "instruct": 0.9},
    "tables": {"init": 0.0, "connector": 0.05, "joint": 0.3, "instruct": 0.45},
}


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A finished run."""
    return write_run(tmp_path / "runs" / "demo")


@pytest.fixture
def unfinished_run(tmp_path: Path) -> Path:
    """The same run, killed in its second stage while a line was being written."""
    folder = write_run(tmp_path / "runs" / "cut", stages=STAGES[:2])
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "joint", "st')
    return folder


def write_run(folder: Path, stages: tuple[str, ...] = STAGES, steps_per_stage: int = 90) -> Path:
    rng = random.Random(0)
    folder.mkdir(parents=True)
    config = {
        "name": folder.name,
        "description": "A small model from scratch learns to read handwritten fields and small tables.",
        "stages": {name: {} for name in STAGES[1:]},
        "train": {"processes": 2},
        "evaluation": {"tasks": {task: {"source": f"{task}-heldout"} for task in TASKS}},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    environment = {
        "packages": {"torch": "2.13.0", "deepspeed": "0.19.8", "transformers": "5.23.0"},
        "git_commit": "4f1c2d3e5a6b7c8d9e0f",
        "started": "2026-11-22T09:12:44+00:00",
    }
    (folder / "environment.json").write_text(json.dumps(environment))
    attempts = [{"stage": stage, "resumed_at": 0, "world_size": 2} for stage in stages[1:]]
    attempts.append({"stage": stages[-1], "resumed_at": 40, "world_size": 2})
    (folder / "attempts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in attempts))
    bad = [
        {"source": "fields", "shard": "000001.tar", "key": f"fields-{i}", "error": f"image {i} is truncated"}
        for i in range(3)
    ]
    (folder / "quarantine.jsonl").write_text("".join(json.dumps(line) + "\n" for line in bad))
    with (folder / "metrics.jsonl").open("w") as file:
        for number, stage in enumerate(stages[1:]):
            for step in range(1, steps_per_stage * (number + 1) + 1):
                file.write(json.dumps(_step(rng, number, stage, step, steps_per_stage * (number + 1))) + "\n")
    for number, stage in enumerate(stages):
        (folder / f"{number}-{stage}" / "export").mkdir(parents=True)
        (folder / f"{number}-{stage}" / "export" / "config.json").write_text("{}")
        _write_evaluation(folder / f"{number}-{stage}" / "evaluation", stage, number)
    return folder


def _step(rng: random.Random, number: int, stage: str, step: int, num_steps: int) -> dict[str, Any]:
    done = step / num_steps
    lr = 3e-4 * min(1, step / 20) * 0.5 * (1 + math.cos(math.pi * done))
    seconds = rng.uniform(0.9, 1.1)
    record = {
        "stage": stage,
        "step": step,
        "epoch": 0,
        "loss": (6.5 / (number * 2 + 1)) * math.exp(-2.5 * done) * rng.uniform(0.85, 1.15) + 0.05,
        "lr": {"connector": lr, "language": lr if number else 0.0, "vision": lr / 5 if number else 0.0},
        "grad_norm": math.exp(rng.gauss(0.3 - number * 0.4, 0.35)),
        "tokens": 16384,
        "samples": 140,
        "seconds": seconds,
        "tokens_per_second": 16384 / seconds,
        "fill": rng.uniform(0.985, 0.998),
        "data_wait": rng.uniform(0.0, 0.01),
    }
    if step % 10 == 0:
        record |= {"connector_entropy": 6.9 - number - done, "connector_top_mass": 0.002 + 0.05 * number + 0.04 * done}
    return record


def _write_evaluation(folder: Path, stage: str, number: int) -> None:
    (folder / "gallery").mkdir(parents=True)
    tasks = {}
    for task, count in TASKS.items():
        rng = random.Random(f"{task}")
        luck = random.Random(f"{task}-{stage}")
        rows = []
        for index in range(count):
            answer = str(rng.randint(1, 99) if task == "fields" else rng.randint(100, 2500))
            right = luck.random() < SKILL[task][stage]
            prediction = (
                answer if right else ["", "<|x|>&", "7", answer[:-1] + "4"][luck.randint(0, min(3, number + 1))]
            )
            question = "Which number is written?" if task == "fields" else "What is the Population (K) of Rio in 1972?"
            row: dict[str, Any] = {"index": index, "turn": 0, "key": f"{task}-{index:04d}", "task": task}
            row |= {"question": question, "answers": [answer], "prediction": prediction} | score(prediction, [answer])
            if index % 10 == 0:
                row["images"] = [f"gallery/{task}-{index:06d}-0.png"]
                picture = _picture(task, answer)
                picture.save(folder / row["images"][0])
                if index < 20:
                    view = _view(luck, picture.size, number)
                    (folder / "gallery" / f"{task}-{index:06d}.vocabulary.json").write_text(json.dumps(view))
            rows.append(row)
        (folder / f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        baseline = most_frequent_answer([row["answers"] for row in rows])
        tasks[task] = {
            **mean_scores(rows),
            "items": count,
            "baseline": baseline["scores"]["exact_match"],
            "baseline_answer": baseline["answer"],
            "baseline_anls": baseline["scores"]["anls"],
            "baseline_relaxed_accuracy": baseline["scores"]["relaxed_accuracy"],
            "unreadable": 0,
            "seconds": 3.2,
            "identity": "0123456789abcdef",
        }
    (folder / "results.json").write_text(json.dumps({"model": str(folder.parent / "export"), "tasks": tasks}))


def _picture(task: str, answer: str) -> Image.Image:
    image = Image.new("RGB", (64, 64) if task == "fields" else (192, 128), "white")
    pen = ImageDraw.Draw(image)
    if task == "fields":
        pen.rectangle((4, 14, 58, 50), outline="gray")
        pen.text((10, 18), answer, fill="black", font_size=26)
    else:
        for row in range(4):
            pen.line((0, 32 * row, 192, 32 * row), fill="silver")
            pen.text((6, 32 * row + 8), ["City", "Rio", "Lima", "Quito"][row], fill="black", font_size=14)
            pen.text((110, 32 * row + 8), "K" if row == 0 else str(int(answer) // row), fill="black", font_size=14)
    return image


def _view(rng: random.Random, size: tuple[int, int], number: int) -> dict[str, Any]:
    words = ["4", "42", "␣the", "number", "⏎", "ing", "<|im_end|>", "0", "population", "␣1"]
    columns, rows = max(1, size[0] // 64), max(1, size[1] // 64)
    tiles = []
    for i in range(columns * rows):
        c, r = i % columns, i // columns
        cells = []
        for _ in range(64):
            p = min(0.95, 0.05 + 0.25 * number * rng.random())
            top = [[word, round(p / 2**k, 5)] for k, word in enumerate(rng.sample(words, 5))]
            cells.append({"top": top, "entropy": 6.0 - number})
        tiles.append({"box": [c / columns, r / rows, (c + 1) / columns, (r + 1) / rows], "side": 8, "cells": cells})
    return {"tiles": tiles, "entropy": 6.2 - number, "vocabulary": 1024}
