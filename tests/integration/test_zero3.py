"""Two ZeRO-3 processes against one process without DeepSpeed: losses, every gradient, weights after three steps."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from alignvlm.launch.local import free_port
from tests.integration.zero3_worker import LR, STEPS, micro_batches
from tests.jobs import ROOT, job_environment
from tests.tiny import tiny_model


def run_ranks(*arguments: str, ranks: int = 2) -> None:
    """The worker as so many processes of one job."""
    environment = job_environment(WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    command = [sys.executable, "-m", "tests.integration.zero3_worker", *arguments]
    processes = [
        subprocess.Popen(command, cwd=ROOT, env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(ranks)
    ]
    try:
        assert [process.wait(timeout=180) for process in processes] == [0] * ranks
    finally:
        for process in processes:
            process.kill()


@pytest.mark.parametrize(("tying", "checkpointing"), [("tied", "plain"), ("untied", "checkpointing")])
def test_zero3_equals_a_single_process(tying: str, checkpointing: str, tmp_path: Path) -> None:
    output = tmp_path / "result.pt"
    run_ranks(str(output), tying, checkpointing)
    result = torch.load(output, weights_only=True)
    assert result["moments"] > 0 == result["alive"]  # closing a stage frees the optimizer's memory

    model, _ = tiny_model(text={"tie_word_embeddings": tying == "tied"})
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), **LR)
    batches = micro_batches()
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
