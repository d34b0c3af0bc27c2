"""Two ZeRO-3 processes against one process without DeepSpeed: losses, every gradient, weights after three steps."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

from alignvlm.launch.local import free_port
from tests.integration.zero3_worker import CASES, LR, STEPS
from tests.jobs import ROOT, job_environment


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What two ranks of one job found, by case."""
    output = tmp_path_factory.mktemp("zero3") / "results.pt"
    environment = job_environment(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    command = [sys.executable, "-m", "tests.integration.zero3_worker", str(output)]
    processes = [
        subprocess.Popen(command, cwd=ROOT, env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(2)
    ]
    try:
        assert [process.wait(timeout=300) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    return torch.load(output, weights_only=True)


@pytest.mark.parametrize("name", CASES)
def test_zero3_equals_a_single_process(name: str, results: dict[str, dict[str, Any]]) -> None:
    result = results[name]
    assert result["moments"] > 0 == result["alive"]  # closing a stage frees the optimizer's memory

    model = CASES[name].model().train()
    optimizer = torch.optim.AdamW(model.parameters(), **LR)
    batches = CASES[name].micro_batches()
    tokens = sum(int((b["labels"] != -100).sum()) for b in batches)
    for step in range(STEPS):
        loss = sum(model(**batch, num_items_in_batch=tokens).loss for batch in batches)
        loss.backward()
        assert result["losses"][step] == pytest.approx(loss.item(), rel=1e-6)
        if step == 0:
            for name, parameter in model.named_parameters():
                torch.testing.assert_close(result["gradients"][name], parameter.grad, rtol=1e-4, atol=2e-7)
        optimizer.step()
        optimizer.zero_grad()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(result["weights"][name], parameter.detach(), rtol=0, atol=5e-5)
