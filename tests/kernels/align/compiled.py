"""What the Triton row kernels become on a GPU that is not here: `python -m tests.kernels.align.compiled` prints JSON.

Compiles them for sm_90 as training runs them (bf16, all parts of the operator) and reads PTX and resource usage.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from alignvlm.kernels.align import rows_triton as rows

HOPPER = GPUTarget("cuda", 90, 32)
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TYPES = dict.fromkeys(("z_ptr", "dp_ptr", "p_ptr"), "*bf16")
TYPES |= dict.fromkeys(("width", "num_tokens", "tile_tokens"), "i32")
"""Of arguments that are neither constants nor pointers to fp32."""
ALIGNED = [["tt.divisibility", 16]]
"""As Triton finds at a launch: of all pointers, and of a block's width; the number of tokens may be odd."""
TRAINING = {"HAS_NORM": True, "HAS_GAMMA": True, "HAS_BETA": True}


def build(kernel: Any, constants: dict[str, Any], **options: Any) -> dict[str, int]:
    """Compile a kernel and count what matters."""
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else TYPES.get(name, "*fp32") for name in names}
    values = {(names.index(name),): value for name, value in constants.items()}
    arguments = [(i, name) for i, name in enumerate(names) if name not in constants]
    aligned = {(i,): ALIGNED for i, name in arguments if name == "width" or name.endswith("_ptr")}
    compiled = compile(ASTSource(kernel, signature, values, aligned), target=HOPPER, options=options)
    ptx = compiled.asm["ptx"]
    counts = {
        "barriers": r"\bbar\.sync",
        "copies": r"cp\.async\.c[ag]",
        "wide_copies": r"cp\.async\.cg[^;]*, 0x10",
        "wide_stores": r"st\.global[\w.]*\.v4\.b32",
        "spills": r"\.local\b",
    }
    found = {name: len(re.findall(pattern, ptx)) for name, pattern in counts.items()}
    return found | usage(compiled.asm["cubin"]) | {"threads": 32 * options.get("num_warps", 4)}


def usage(cubin: bytes) -> dict[str, int]:
    """Registers per thread, and bytes on the stack, in shared and in local memory."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(TOOLS / "cuobjdump"), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name.lower(): int(value) for name, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", text)}


def all_kernels() -> Iterator[tuple[str, dict[str, int]]]:
    """Both row kernels as a training step launches them, the forward at both widths of a block, and the rescaling."""
    for width in (8192, 16384):
        constants = TRAINING | {
            "HAS_LSE": False, "lse_ptr": None, "BLOCK": width, "ROWS": rows._rows_per_program(width),
            "STAGES": rows._STAGES,
        }  # fmt: skip
        built = build(rows._forward_kernel, constants, **rows._OPTIONS)
        yield f"forward {width}", built | {"row_bytes": 2 * width, "stages": rows._STAGES}
    constants = TRAINING | {
        "STORE_P": True, "TOKEN_SUMS": True, "AFFINE_SUMS": True,
        "TILE_VOCAB": rows._TILE_VOCAB, "STAGES": rows._STAGES,
    }  # fmt: skip
    built = build(rows._backward_kernel, constants, **rows._OPTIONS)
    yield "backward", built | {"row_bytes": 2 * rows._TILE_VOCAB, "stages": rows._STAGES}
    yield "rescale", build(rows._rescale_kernel, {"BLOCK": 1024}, **rows._OPTIONS)


if __name__ == "__main__":
    print(json.dumps(dict(all_kernels())))
