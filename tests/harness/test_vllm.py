"""vLLM serves an export by its own command: it answers and streams over OpenAI's API as the package answers itself."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from alignvlm.evaluation.answering import ModelAnswerer
from alignvlm.evaluation.items import Item
from tests.checkout import ROOT
from tests.serving.server import ask, question, stream
from tests.tiny import WORDS, picture, tiny_model

pytestmark = pytest.mark.vllm
TOKENS = 12
SIZES = [(32, 32), (70, 40), (20, 100), (64, 64)]
START = 900
"""Seconds that vLLM may take to load: one idle core needs one."""


@pytest.fixture(scope="module", params=[None, 40], ids=["whole vocabulary", "40 tokens of it"])
def stage(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stage's folder: an export that says various things, and its predictions about a gallery."""
    stage = tmp_path_factory.mktemp("runs") / "1-joint"
    text = {
        "tie_word_embeddings": False, "initializer_range": 0.3, "hidden_size": 128, "num_hidden_layers": 3,
        "max_position_embeddings": 512,
    }  # fmt: skip
    for part in tiny_model(
        {"num_active": request.param}, text
    ):  # heads of 32: vLLM's attention for CPUs has no smaller ones
        part.save_pretrained(stage / "export")
    (stage / "evaluation" / "gallery").mkdir(parents=True)
    answerer = ModelAnswerer.load(stage / "export", "cpu")
    rows = []
    for index, size in enumerate(SIZES):
        name = f"gallery/read-{index:06d}-0.png"
        picture(*size, seed=index).save(stage / "evaluation" / name)
        asked = WORDS[index]
        rows.append(
            {"question": asked, "prediction": said(answerer, asked, picture(*size, seed=index)), "images": [name]}
        )
    assert len({row["prediction"] for row in rows}) == len(rows)
    (stage / "evaluation" / "read.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return stage


@pytest.fixture(scope="module")
def port(stage: Path) -> Iterator[int]:
    """vLLM with the export, without a word about the model but its folder."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = stage / "vllm.log"
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(stage / "export"),
        "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager", "--max-model-len", "512",
    ]  # fmt: skip
    quiet = {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    with log.open("w") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env=os.environ | quiet, start_new_session=True
        )
    try:
        end = time.monotonic() + START
        while not healthy(port):
            assert process.poll() is None, log.read_text()[-4000:]
            assert time.monotonic() < end, log.read_text()[-4000:]
            time.sleep(1)
        yield port
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as response:
            return response.status == 200
    except OSError:
        return False


def said(answerer: ModelAnswerer, text: str, *images: Image.Image) -> str:
    content = [*({"type": "image"} for _ in images), {"type": "text", "text": text}]
    return answerer.answer([Item("k", 0, "", [], [{"role": "user", "content": content}], list(images))], TOKENS)[0]


def test_all_answers_about_a_gallery_are_those_of_the_evaluation(port: int, stage: Path) -> None:
    script = [sys.executable, ROOT / "scripts" / "compare_server.py", stage, "--max-new-tokens", str(TOKENS)]
    run = subprocess.run([*script, "--url", f"http://127.0.0.1:{port}/v1"], capture_output=True, text=True, check=False)
    assert run.stdout.splitlines()[-1] == f"{len(SIZES)} of {len(SIZES)} answers are equal", run.stdout + run.stderr
    assert run.returncode == 0


def test_answers_to_text_and_to_several_images_and_streams(port: int, stage: Path) -> None:
    answerer = ModelAnswerer.load(stage / "export", "cpu")
    model = {"model": str(stage / "export"), "max_tokens": TOKENS, "temperature": 0}
    images = [picture(70, 40, seed=5), picture(20, 30, seed=6)]
    for shown in ([], images):
        body = question(WORDS[0], *shown, **model)
        status, reply = ask(port, body)
        assert status == 200, reply
        expected = said(answerer, WORDS[0], *shown).rstrip("\ufffd")  # half a character, which vLLM leaves out
        assert reply["choices"][0]["message"]["content"] == expected
        deltas: list[dict[str, Any]] = [event["choices"][0]["delta"] for event in stream(port, body)]
        assert "".join(delta.get("content") or "" for delta in deltas) == expected
        assert len(deltas) > 4
