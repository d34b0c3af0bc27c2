"""The allocator of loader processes."""

from __future__ import annotations

import subprocess
import sys

FAULTS = """
import resource, sys
import numpy as np
from data_pipeline.loading.malloc import keep_memory
if sys.argv[1] == "keep":
    keep_memory()
def work():
    for _ in range(50):
        image, tile = np.ones(2**20, np.uint8), np.ones(2**20, np.uint8)
        del image, tile
work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
work()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_freed_memory_is_kept_for_the_next_image() -> None:
    def faults(mode: str) -> int:
        return int(
            subprocess.run([sys.executable, "-c", FAULTS, mode], capture_output=True, check=True, text=True).stdout
        )

    assert faults("keep") < 100 < faults("as it is")
