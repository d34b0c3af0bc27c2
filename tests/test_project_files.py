"""The files around the code: the Makefile's promises, and what CI, pre-commit and the citation say about them."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import alignvlm
from tests.checkout import ROOT

MAKEFILE = (ROOT / "Makefile").read_text()
OTHER_OPENS = ("os", "Image", "tarfile", "storage", "place", "self", "run", "opener")
"""What has a method `open` that opens no text file."""
COMMANDS = set(re.findall(r"^\.PHONY: (.*)$", MAKEFILE, re.MULTILINE)[0].split())


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run make as if from a shell, also when these tests were started by make."""
    outer = {key: value for key, value in os.environ.items() if not key.startswith("MAKE") and key != "TORCH_INDEX"}
    return subprocess.run(["make", *arguments], cwd=ROOT, env=outer, capture_output=True, text=True)


def read(path: str) -> Any:
    return yaml.safe_load((ROOT / path).read_text())


def test_make_alone_lists_every_command() -> None:
    listed = re.findall(r"^make ([a-z-]+) +\S", make().stdout, re.MULTILINE)
    assert len(listed) == len(COMMANDS)
    assert set(listed) == COMMANDS


@pytest.mark.parametrize("command", ["quickstart", "test"])
def test_failed_pip_run_ends_make(tmp_path: Path, command: str) -> None:
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text("#!/bin/sh\necho no space left >&2\nexit 3\n")
    python.chmod(0o755)
    result = make(f"VENV={tmp_path}", f"PYTHON={sys.executable}", command)
    assert result.returncode == 2
    assert "no space left" in result.stderr
    assert not list(tmp_path.glob("installed-*"))


def test_index_of_torch_can_be_chosen(tmp_path: Path) -> None:
    def installs_torch(*arguments: str) -> str:
        printed = make("--dry-run", f"VENV={tmp_path}", *arguments, "quickstart").stdout
        return next(line for line in printed.splitlines() if " torch " in line)

    assert "--extra-index-url" not in installs_torch()
    assert "--extra-index-url https://example.org/cpu torch" in installs_torch("TORCH_INDEX=https://example.org/cpu")


def test_ci_runs_commands_that_exist() -> None:
    workflow = read(".github/workflows/ci.yml")
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    used = {word for step in steps for word in re.findall(r"make ([a-z-]+)", step.get("run", ""))}
    assert used == {"check", "quickstart", "test", "test-browser", "test-cluster", "test-fast", "test-kills"}
    assert used <= COMMANDS


def test_ci_covers_the_versions_that_the_package_names() -> None:
    versions = read(".github/workflows/ci.yml")["jobs"]["tests"]["strategy"]["matrix"]["python-version"]
    classifiers = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', (ROOT / "pyproject.toml").read_text())
    assert versions == classifiers


@pytest.mark.parametrize(
    "path", sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")), ids=lambda path: path.name
)
def test_issue_forms_have_what_github_asks_for(path: Path) -> None:
    form = yaml.safe_load(path.read_text())
    if path.name == "config.yml":
        assert form.keys() <= {"blank_issues_enabled", "contact_links"}
        return
    assert {"name", "description", "body"} <= form.keys()
    ids = [field["id"] for field in form["body"]]
    assert len(ids) == len(set(ids))
    assert all(field["attributes"]["label"] for field in form["body"])


def test_pre_commit_runs_what_make_check_runs() -> None:
    hooks = [hook for repo in read(".pre-commit-config.yaml")["repos"] for hook in repo["hooks"]]
    entries = " ".join(hook.get("entry", "") for hook in hooks)
    assert all(program in entries for program in ("ruff check", "ruff format", "mypy"))


def test_example_of_a_connector_is_the_code() -> None:
    example = (ROOT / "CONTRIBUTING.md").read_text().split("```python\n")[1].split("```")[0]
    options, connector = example.split("\n\n\n")
    assert options in (ROOT / "alignvlm" / "connectors" / "options.py").read_text()
    assert connector in (ROOT / "alignvlm" / "connectors" / "mlp.py").read_text()


def test_one_version_everywhere() -> None:
    citation = read("CITATION.cff")
    assert citation["version"] == alignvlm.__version__
    assert citation["license"] == "Apache-2.0"
    assert not re.search(r'^version = "', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)


def test_every_pinned_version_is_allowed_by_the_package() -> None:
    import tomllib

    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    texts = [*project["dependencies"], *(text for part in project["optional-dependencies"].values() for text in part)]
    needed = {canonicalize_name(each.name): each.specifier for each in map(Requirement, texts)}
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pinned = {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}
    assert all(version in needed[name] for name, version in pinned.items() if name in needed)
    gpu_only = {"flash-attn", "liger-kernel"}
    assert needed.keys() - gpu_only <= pinned.keys()


def test_every_text_file_is_read_and_written_as_utf_8() -> None:
    """Not in the encoding of whoever's locale: a call that opens text names its encoding."""
    found = []
    for path in [each for package in ("alignvlm", "data_pipeline") for each in (ROOT / package).rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            owner = ast.unparse(node.func).rpartition(".")[0]
            mode = next((str(each.value) for each in node.args if isinstance(each, ast.Constant)), "r")
            reads_text = name in ("read_text", "write_text") or (name == "open" and "b" not in mode)
            if reads_text and owner not in OTHER_OPENS and "encoding" not in {each.arg for each in node.keywords}:
                found.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert found == []
