"""The start of a rank: what it must not load."""

from __future__ import annotations

import subprocess
import sys

from tests.jobs import job_environment

PROGRAM = """
import sys
import torch
from alignvlm.training import distributed

world = distributed.start(1)
from deepspeed.runtime import compiler
from deepspeed.runtime.zero.utils import is_zero_supported_optimizer

assert compiler.compile() is torch.compile
assert is_zero_supported_optimizer(torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))]))
assert "torch._inductor.lowering" not in sys.modules, "the compiler was loaded"
print(world.rank, world.size)
"""


def test_checking_the_optimizer_does_not_load_the_compiler() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=job_environment(), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["0", "1"]
