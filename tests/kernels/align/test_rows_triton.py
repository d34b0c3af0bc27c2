"""The Triton row kernels in Triton's interpreter, and whether they compile for a GPU that is not here."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels.align.row_checks import CHECKS

ROOT = Path(__file__).parents[3]


def run(*arguments: str, **environment: str) -> str:
    process = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


@pytest.mark.slow
@pytest.mark.parametrize("check", [check.__name__ for check in CHECKS])
def test_rows_in_the_interpreter(check: str) -> None:
    run("-m", "tests.kernels.align.row_checks", check, TRITON_INTERPRET="1")


@pytest.mark.slow
def test_kernels_compiled_for_hopper(tmp_path: Path) -> None:
    """No spilled registers, enough threads per SM, rows in pieces of 16 bytes that come ahead of the arithmetic."""
    environment = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    kernels = json.loads(run("-m", "tests.kernels.align.compiled", **environment))
    assert all(k["spills"] == k["stack"] == k["local"] == 0 for k in kernels.values())
    for name, num_matrices, resident in (("forward 8192", 1, 512), ("forward 16384", 1, 256), ("backward", 2, 512)):
        found = kernels[name]
        pieces = num_matrices * found["row_bytes"] // 16 // found["threads"]  # per thread and token
        assert found["wide_copies"] == pieces * found["stages"], name  # all but one before the loop
        assert found["wide_stores"] >= pieces, name
        assert found["barriers"] <= 6, name  # one for the copies, at most four for sums over the row, one at the end
        assert 65536 // (found["reg"] * found["threads"]) * found["threads"] >= resident, name


def test_no_kernel_is_tuned_at_run_time() -> None:
    """A kernel that tries configurations in the first step takes other ones on other machines, and with them sums."""
    names = {
        (path.relative_to(ROOT).as_posix(), name)
        for path in (ROOT / "alignvlm").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        for name in (getattr(node, "attr", None), getattr(node, "id", None), getattr(node, "name", None))
    }
    assert ("alignvlm/kernels/align/rows_triton.py", "jit") in names
    assert {path for path, name in names if name in ("autotune", "Autotuner")} == set()
