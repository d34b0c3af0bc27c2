"""bf16 under ZeRO-1, 2 and 3: bad gradients change no weight, and gradients are summed in fp32."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.jobs import ROOT, job_environment


def test_a_bad_gradient_changes_no_weight_and_sums_do_not_lose_bits(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.integration.bf16_worker", str(tmp_path)]
    done = subprocess.run(
        command, cwd=ROOT, env=job_environment(), capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    results = json.loads((tmp_path / "results.json").read_text())
    for strategy in ("zero1", "zero2", "cpu_zero3"):
        found = results[strategy]
        assert found["skipped"] == [True, False], strategy
        assert found["changed"][0] == 0 < found["changed"][1], strategy
    assert results["error, sums in fp32"] < 1e-4 < results["error, sums in bf16"]
