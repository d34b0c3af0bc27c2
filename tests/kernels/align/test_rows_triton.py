"""The Triton row kernels in Triton's interpreter, and whether they compile for a GPU that is not here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels.align.row_checks import CHECKS

ROOT = Path(__file__).parents[3]

COMPILE = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from alignvlm.kernels.align import rows_triton as rows

def build(kernel, constants, dtypes, **options):
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else dtypes.get(n, "*fp32") for n in names}
    source = ASTSource(kernel, signature, {(names.index(n),): v for n, v in constants.items()})
    assert compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["cubin"]

flags = {"HAS_NORM": True, "HAS_GAMMA": True, "HAS_BETA": True}
dtypes = {"z_ptr": "*bf16", "dp_ptr": "*bf16", "width": "i32", "num_tokens": "i32"}
build(rows._forward_kernel, flags | {"HAS_LSE": False, "lse_ptr": None, "BLOCK": 8192}, dtypes, num_warps=8)
build(
    rows._backward_kernel,
    flags | {"STORE_P": True, "AFFINE_SUMS": True, "TILE_TOKENS": rows._TILE_TOKENS,
             "TILE_VOCAB": rows._TILE_VOCAB, "STEP_TOKENS": rows._STEP_TOKENS},
    dtypes, num_warps=8,
)
build(rows._rescale_kernel, {"BLOCK": 1024}, dtypes)
"""


def run(*arguments: str, **environment: str) -> None:
    process = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stdout + process.stderr


@pytest.mark.slow
@pytest.mark.parametrize("check", [check.__name__ for check in CHECKS])
def test_rows_in_the_interpreter(check: str) -> None:
    run("-m", "tests.kernels.align.row_checks", check, TRITON_INTERPRET="1")


@pytest.mark.slow
def test_kernels_compile_for_hopper(tmp_path: Path) -> None:
    script = tmp_path / "compile.py"
    script.write_text(COMPILE)
    run(str(script), TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path), PYTHONPATH=str(ROOT))
