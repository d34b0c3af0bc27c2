"""The tests that docs/security.md and docs/faults.md name exist, and every file that a document links to."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.checkout import ROOT
from tests.documents.commands import DOCUMENTS


def rows(document: str) -> list[list[str]]:
    """Cells of every row of every table of a file in docs/, heads and rules left out."""
    lines = (ROOT / "docs" / document).read_text(encoding="utf-8").splitlines()
    table = [line for line, below in zip(lines, [*lines[1:], ""], strict=True) if not below.startswith("|---")]
    return [
        [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        for line in table
        if line.startswith("|") and not line.startswith("|---")
    ]


def functions(path: Path) -> set[str]:
    return {node.name for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if hasattr(node, "name")}


def test_every_promise_names_a_test_that_exists() -> None:
    promises = rows("security.md")
    assert len(promises) > 10
    for promise, _, shown in promises:
        named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", shown)
        assert named, f"no test for: {promise}"
        for file, function in named:
            assert (ROOT / file).is_file(), f"{file} of: {promise}"
            assert function in functions(ROOT / file), f"{file} has no {function}; of: {promise}"


def test_every_fault_names_tests_that_exist() -> None:
    faults = rows("faults.md")
    assert len(faults) > 10
    modules = {path.stem for path in (ROOT / "tests").rglob("test_*.py")}
    for fault, *_, named in faults:
        names = re.findall(r"`([^`]+)`", named)
        assert names or named == "–", f"no test for: {fault}"
        for name in names:
            assert name in modules or (ROOT / name).exists() or (ROOT / f"{name}.py").exists(), f"{name} of: {fault}"


@pytest.mark.parametrize("document", [*DOCUMENTS, ROOT / "CHANGELOG.md"], ids=lambda path: path.name)
def test_links_to_files_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)", document.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (document.parent / target).exists(), target
