"""Promises of docs/security.md about code: nothing that is read is run."""

from __future__ import annotations

import ast
import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from jinja2.exceptions import SecurityError

from alignvlm.config import load_recipe
from alignvlm.errors import UserError
from alignvlm.model import AlignVLMForConditionalGeneration
from tests.checkout import ROOT
from tests.tiny import conversation, tiny_model

FORBIDDEN = {
    "eval", "exec", "pickle", "cPickle", "dill", "joblib", "shelve", "marshal", "os.system", "os.popen", "yaml.load",
    "yaml.load_all", "yaml.unsafe_load", "yaml.full_load",
}  # fmt: skip


def dangerous(path: Path) -> Iterator[tuple[str, str]]:
    """(file, what) of calls and imports that could run data."""
    name = str(path.relative_to(ROOT))
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else [each.name for each in node.names]
            yield from ((name, module) for module in modules if module in FORBIDDEN)
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            options = {each.arg: ast.unparse(each.value) for each in node.keywords}
            if called in FORBIDDEN:
                yield name, called
            if called == "torch.load" and options.get("weights_only") != "True":
                yield name, called
            if called.endswith("np.load") and options.get("allow_pickle") != "False":
                yield name, called
            yield from ((name, f"{key}=True") for key in ("shell", "trust_remote_code") if options.get(key) == "True")


def test_no_module_runs_what_it_reads() -> None:
    found = {
        each
        for package in ("alignvlm", "data_pipeline")
        for p in (ROOT / package).rglob("*.py")
        for each in dangerous(p)
    }
    assert found == set()


def test_a_yaml_tag_is_an_error(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"extends: quickstart\nseed: !!python/object/apply:os.mkdir [{marker}]\n")
    with pytest.raises(UserError, match=r"r\.yaml:2: "):
        load_recipe(str(recipe))
    assert not marker.exists()


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ messages.append(messages[0]) }}",
    ],
)
def test_a_chat_template_cannot_leave_its_sandbox(template: str) -> None:
    _, processor = tiny_model()
    with pytest.raises(SecurityError):
        processor.tokenizer.apply_chat_template(conversation("a", "b"), chat_template=template, tokenize=False)


class Attack:
    """Unpickling it makes a folder."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.mkdir, (self.marker,)  # type: ignore[return-value]


def test_loading_a_model_folder_runs_no_code(tmp_path: Path) -> None:
    model, _ = tiny_model()
    marker = tmp_path / "marker"
    model.config.auto_map = {"AutoModel": "code.Model", "AutoConfig": "code.Config"}
    model.config.save_pretrained(tmp_path)
    (tmp_path / "code.py").write_text(f"import os; os.mkdir({str(marker)!r})")
    torch.save({"weight": Attack(marker)}, tmp_path / "pytorch_model.bin")
    with pytest.raises((pickle.UnpicklingError, OSError, ValueError)):
        AlignVLMForConditionalGeneration.from_pretrained(tmp_path)
    assert not marker.exists()
