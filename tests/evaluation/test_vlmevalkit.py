"""The model class for VLMEvalKit, against a stand-in for its `BaseModel` and `run.py` as they are documented."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from alignvlm.errors import UserError
from alignvlm.evaluation.answering import ModelAnswerer
from alignvlm.evaluation.harness.run_vlmevalkit import main
from alignvlm.evaluation.items import Item
from tests.checkout import ROOT
from tests.documents.commands import lines_of
from tests.tiny import picture, tiny_model

BASE = """
class BaseModel:
    INTERLEAVE = False
    def __init__(self):
        self.dump_image_func = None
    def set_dump_image(self, function):
        self.dump_image_func = function
    def use_custom_prompt(self, dataset):
        return False
    def generate(self, message, dataset=None):
        for piece in message:
            assert piece["type"] in ("text", "image", "video")
        return self.generate_inner(message, dataset)
    def chat(self, messages, dataset=None):
        return self.chat_inner(messages, dataset=dataset)
    def generate_inner(self, message, dataset=None):
        raise NotImplementedError
"""
RUN = """
import argparse, json
from vlmeval.config import supported_VLM
def load_env():
    supported_VLM["env"] = True
def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", nargs="+")
    parser.add_argument("--model", nargs="+")
    parser.add_argument("--judge")
    args = parser.parse_args()
    assert supported_VLM.pop("env")
    model = supported_VLM[args.model[0]]()
    model.set_dump_image(None)
    assert model.INTERLEAVE and not model.use_custom_prompt(args.data[0])
    messages = json.load(open(args.data[0]))
    replies = [model.generate(message=message, dataset="own") for message in messages]
    turns = [{"role": role, "content": messages[0]} for role in ("user", "assistant", "user")]
    json.dump([*replies, model.chat(turns, "own")], open("replies.json", "w"))
"""


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with an export and a folder like VLMEvalKit's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "argv", [])
    for name in [name for name in sys.modules if name.partition(".")[0] == "vlmeval" or name.endswith(".vlmevalkit")]:
        monkeypatch.delitem(sys.modules, name)
    for file, text in {"run.py": RUN, "vlmeval/vlm/base.py": BASE, "vlmeval/config.py": "supported_VLM = {}"}.items():
        Path("VLMEvalKit", file).parent.mkdir(parents=True, exist_ok=True)
        Path("VLMEvalKit", file).write_text(text)
    model, processor = tiny_model(text={"tie_word_embeddings": False, "initializer_range": 0.5})  # says various things
    model.save_pretrained("EXPORT")
    processor.save_pretrained("EXPORT")
    for number in range(2):
        picture(40, 30, seed=number).save(f"{number}.png")
    yield Path("VLMEvalKit")
    for name in [name for name in sys.modules if name.partition(".")[0] == "vlmeval" or name.endswith(".vlmevalkit")]:
        del sys.modules[name]


def test_run_py_asks_the_export_by_name(checkout: Path) -> None:
    image = [{"type": "image", "value": f"{number}.png"} for number in range(2)]
    text = [{"type": "text", "value": words} for words in ("what is the total", "read the field")]
    messages = [[image[0], text[0]], [text[0], image[0], text[1], image[1]], [text[1]]]
    Path("DocVQA_VAL").write_text(json.dumps(messages))
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    (words,) = (line.words for line in lines_of(page) if "alignvlm.evaluation.harness.run_vlmevalkit" in line.words)
    main([*words[2:], "--max-new-tokens", "6", "--device", "cpu"])
    replies = json.loads(Path("replies.json").read_text())
    answerer = ModelAnswerer.load("EXPORT", "cpu")

    def asked(message: list[dict[str, str]]) -> list[dict[str, str]]:
        return [{"type": p["type"]} | ({"text": p["value"]} if p["type"] == "text" else {}) for p in message]

    def answer(turns: list[dict[str, object]], pictures: list[int]) -> str:
        images = [picture(40, 30, seed=number) for number in pictures]
        return answerer.answer([Item("", 0, "", [], turns, images)], 6)[0].strip()

    turns = [[{"role": "user", "content": asked(message)}] for message in messages]
    talk = [{"role": role, "content": asked(messages[0])} for role in ("user", "assistant", "user")]
    pictures = [[0], [0, 1], []]
    assert replies == [*map(answer, turns, pictures), answer(talk, [0, 0, 0])]
    assert len(set(replies)) > 2


def test_mistakes_are_one_line(checkout: Path) -> None:
    own = ["--checkout", str(checkout), "--export", "EXPORT", "--device", "cpu", "--data", "DocVQA_VAL"]
    Path("DocVQA_VAL").write_text(json.dumps([[{"type": "image", "value": "gone.png"}]]))
    with pytest.raises(UserError, match=r"own: image gone\.png: "):
        main(own)
    Path("DocVQA_VAL").write_text(json.dumps([[{"type": "video", "value": "a.mp4"}]]))
    with pytest.raises(UserError, match="own shows video: alignvlm reads text and images only"):
        main(own)
    with pytest.raises(UserError, match=r"run\.py is not there: give a checkout"):
        main(["--checkout", "nowhere", "--export", "EXPORT"])
    (checkout / "run.py").write_text("import a_package_that_is_not_there")
    with pytest.raises(UserError, match=r"VLMEvalKit needs a_package_that_is_not_there: pip install -e "):
        main(own)
