"""bf16 under ZeRO-1, 2 and 3: stages hand fp32 masters on, bad gradients change no weight, sums are in fp32."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from alignvlm.launch.local import free_port
from tests.jobs import ROOT, job_environment, weights


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the two ranks of bf16_worker.py have left."""
    folder = tmp_path_factory.mktemp("bf16")
    job = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, "-m", "tests.integration.bf16_worker", str(folder)]
    ranks = [
        subprocess.Popen(
            command, cwd=ROOT, env=job_environment(RANK=str(rank), LOCAL_RANK=str(rank), **job), text=True,
            stdout=(folder / f"rank-{rank}.log").open("w"), stderr=subprocess.STDOUT,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        codes = [rank.wait(240) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    logs = "".join((folder / f"rank-{rank}.log").read_text()[-2000:] for rank in range(2))
    assert codes == [0, 0], logs
    assert "weights in bf16; the next stage starts from the fp32 weights in masters.safetensors" in logs
    return folder


@pytest.mark.parametrize("strategy", ["zero2", "cpu_zero3"])
def test_a_stage_starts_from_the_masters_of_the_stage_before(folder: Path, strategy: str) -> None:
    kept = load_file(folder / f"{strategy}.safetensors")
    last, first, trained, alone = (
        {name.partition("/")[2]: value for name, value in kept.items() if name.startswith(f"{part}/")}
        for part in ("last", "first", "trained", "alone")
    )
    assert first.keys() == alone.keys() == {name for name in last if not name.startswith("vision.")}
    for name, value in first.items():
        assert value.dtype == torch.float32
        assert torch.equal(value, last[name]), name
        assert torch.equal(alone[name], last[name]), name  # also with another number of ranks
    assert any(not torch.equal(value, value.bfloat16().float()) for value in first.values())

    export = folder / strategy / "1-connector" / "export"
    assert json.loads((export / "config.json").read_text())["dtype"] == "bfloat16"
    # Behind ZeRO-3 transformers saves SigLIP under the names of its older releases.
    exported = {name.replace("vision_model.", ""): value for name, value in weights(export).items()}
    assert all(torch.equal(value.bfloat16(), exported[name]) for name, value in last.items())
    after = load_file(folder / strategy / "2-instruct" / "masters.safetensors")
    assert after.keys() == last.keys()
    assert all(torch.equal(value, trained.get(name, last[name])) for name, value in after.items())
    assert any(not torch.equal(value, first[name]) for name, value in trained.items())


def test_a_bad_gradient_changes_no_weight_and_sums_do_not_lose_bits(folder: Path) -> None:
    results = json.loads((folder / "results.json").read_text())
    for strategy in ("zero1", "zero2", "cpu_zero3"):
        found = results[strategy]
        assert found["skipped"] == [True, False], strategy
        assert found["changed"][0] == 0 < found["changed"][1], strategy
    assert results["error, sums in fp32"] < 1e-4 < results["error, sums in bf16"]
