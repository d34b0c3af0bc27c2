"""Without the packages of training `examples/load_export.py` and `alignvlm chat` answer as this process does.

A name that `sys.modules` holds as None is neither found nor imported, by other packages either.
"""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from alignvlm.evaluation.answering import ModelAnswerer
from alignvlm.evaluation.items import Item
from tests.jobs import ROOT, job_environment
from tests.tiny import picture, tiny_model

PROGRAM = """
import json, runpy, sys
from pathlib import Path

example, export, page, question, *absent = sys.argv[1:]
sys.modules.update(dict.fromkeys(absent))
sys.argv = [example, export, page, question, "--max-new-tokens", "6"]
runpy.run_path(example, run_name="__main__")

from alignvlm.cli import main

print(main(["chat", export, "--image", page, "--question", question, "--max-new-tokens", "6"]))
talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
Path("train.jsonl").write_text(json.dumps({"messages": talk}))
for words in (["train", "quickstart", "train.processes=1"], ["data", "write", "--from-jsonl", "train.jsonl", "shards"]):
    print(main(words))
assert not set(absent) & {name for name, module in sys.modules.items() if module is not None}
"""
MODULES = {"pillow": "PIL", "scikit-learn": "sklearn", "vega-datasets": "vega_datasets", "flash-attn": "flash_attn"}
"""Names of packages that are not those of their modules."""


@pytest.mark.slow
def test_they_answer_without_the_extras(tmp_path: Path) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras, base = project["optional-dependencies"], {Requirement(text).name for text in project["dependencies"]}
    packages = [Requirement(text).name for extra in ("train", "quickstart", "parquet", "ray") for text in extras[extra]]
    absent = [MODULES.get(name, name) for name in packages if name not in base]  # [train] wants a later transformers
    assert {"deepspeed", "mlflow", "webdataset", "matplotlib"} <= set(absent)
    model, processor = tiny_model(text={"tie_word_embeddings": False, "initializer_range": 0.5})  # says various things
    model.save_pretrained(tmp_path / "export")
    processor.save_pretrained(tmp_path / "export")
    image, question = picture(70, 40), "what is the total"
    image.save(tmp_path / "page.png")
    words = [ROOT / "examples" / "load_export.py", tmp_path / "export", tmp_path / "page.png", question, *absent]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *words], cwd=tmp_path, env=job_environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    content = [{"type": "image"}, {"type": "text", "text": question}]
    item = Item("k", 0, question, ["12"], [{"role": "user", "content": content}], [image])
    (answer,) = ModelAnswerer(model, processor, "cpu").answer([item], 6)
    assert answer
    line = "run runs/quickstart: 1 process, DeepSpeed cpu_zero3"
    assert done.stdout.split("\n") == [answer, answer, "0", line, "2", "2", ""]
    assert "alignvlm: this needs the packages of training" in done.stderr
    assert "pip install 'alignvlm[train]'" in done.stderr
    assert "alignvlm: writing shards needs webdataset: pip install 'alignvlm[train]'" in done.stderr
