"""Two ZeRO-3 processes against one process without DeepSpeed: losses, every gradient, weights after three steps.

And ZeRO-3 with the shortcuts of `training/zero3/shortcuts.py` against DeepSpeed's own ways: the same bits, and no race
between streams, as far as `tests/training/logical_streams.py` models a GPU's.
And a LoRA stage with dropout, on two processes and on one: the same numbers, its checkpoints, and what it exports.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from alignvlm.best import last_checkpoints
from alignvlm.launch.local import free_port
from alignvlm.model.attention import SDPA
from alignvlm.parts import part_of, public_name
from tests.fixtures.command import Command
from tests.integration import lora_worker, shortcuts_worker, streams_worker
from tests.integration.zero3_worker import CASES, LR, STEPS
from tests.jobs import ROOT, job_environment, weights
from tests.one_rank import differing


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
        assert [process.wait(timeout=540) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    return torch.load(output, weights_only=True) | {"folder": str(output.with_suffix(".lora"))}


@pytest.mark.parametrize("name", CASES)
def test_zero3_equals_a_single_process(name: str, results: dict[str, dict[str, Any]]) -> None:
    result = results[name]
    assert result["moments"] > 0 == result["alive"]  # closing a stage frees the optimizer's memory

    model = CASES[name].model().train()
    model.get_decoder().set_attn_implementation(SDPA)
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


@pytest.mark.parametrize("name", shortcuts_worker.CASES)
def test_shortcuts_change_no_bit(name: str, results: dict[str, dict[str, Any]]) -> None:
    """Of gradients, weights, losses and norms: through a skipped step, and a pass without gradients between steps."""
    result = results["shortcuts"][name]
    assert result["differing"] == []
    assert result["tensors"] > 40
    ours, theirs = result["seen"]
    assert ours == theirs
    assert ours[0]["skipped"] == [True, False]


@pytest.mark.parametrize("name", [name for name, case in shortcuts_worker.CASES.items() if case[0] == "zero3"])
def test_no_race_between_streams(name: str, results: dict[str, dict[str, Any]]) -> None:
    """And a device with streams gets the same bits."""
    result = results["shortcuts"][name]
    assert result["races"] == [[], []]
    assert result["differing on streams"] == []
    assert result["same on streams"]
    assert len(result["streams"]) == 4  # computing, gathering, its collectives, reducing
    assert min(result["streams"]) > 50


@pytest.mark.parametrize("mutant", streams_worker.MUTANTS)
def test_a_wait_that_is_left_out_is_found(mutant: str, results: dict[str, dict[str, Any]]) -> None:
    race, (races, _) = streams_worker.MUTANTS[mutant].race, results["mutants"][mutant]
    assert any(re.search(race, each) for each in races) if race else not races, races


def test_a_step_never_waits_for_the_whole_device(results: dict[str, dict[str, Any]]) -> None:
    """Where weights stay gathered, it does once, when they are gathered anew."""
    assert results["mutants"]["none"][1] == 0


def test_another_version_of_deepspeed_keeps_its_own_ways(results: dict[str, dict[str, Any]]) -> None:
    """With the shortcuts a whole layer names its matrices only, where its vectors stay gathered."""
    for name, result in results["shortcuts"].items():
        shortened, whole = result["named"]
        assert (shortened < whole) == (shortcuts_worker.CASES[name][0] == "zero3"), name


@pytest.fixture(scope="module")
def lora_runs(results: dict[str, dict[str, Any]]) -> Path:
    """Folder of the runs of lora_worker.py."""
    return Path(results["folder"])


@pytest.fixture(scope="module")
def lora(results: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """What lora_worker.py found, by strategy."""
    return results["lora"]


@pytest.mark.parametrize("strategy", lora_worker.CASES)
def test_a_lora_stage_resumes_bit_for_bit_dropout_included(strategy: str, lora: dict[str, dict[str, Any]]) -> None:
    whole, resumed = lora[strategy]["whole"], lora[strategy]["resumed"]
    assert whole["curve"][lora_worker.SAVED :] == resumed["curve"]
    assert differing(whole["weights"], resumed["weights"]) == []
    assert {name.rpartition(".lora_")[0] != "" or part_of(name) == "connector" for name in whole["weights"]} == {True}


@pytest.mark.parametrize(("strategy", "within"), [("cpu_zero3", 2e-6), ("zero2", 1e-3)])
def test_a_lora_stage_is_the_same_on_one_rank_and_after_a_change(
    strategy: str, within: float, lora: dict[str, dict[str, Any]]
) -> None:
    """ZeRO-3 in fp32, and ZeRO-2 in bf16, where sums of two ranks are rounded otherwise."""
    whole, elastic = lora[strategy]["whole"], lora[strategy]["elastic"]
    losses = lambda found: [loss for loss, _ in found["curve"]]
    assert losses(elastic) == pytest.approx(losses(whole)[lora_worker.SAVED :], abs=within)
    if strategy == "cpu_zero3":
        alone = lora[strategy]["alone"]
        assert losses(alone) == pytest.approx(losses(whole), abs=within)
        for found in (alone, elastic):
            for name, value in whole["weights"].items():
                torch.testing.assert_close(found["weights"][name], value, rtol=0, atol=2e-5)


@pytest.mark.parametrize("strategy", lora_worker.ALIKE)
def test_zero_1_and_2_train_the_adapters_of_one_rank(strategy: str, lora: dict[str, dict[str, Any]]) -> None:
    alone, whole = lora["cpu_zero3"]["alone"], lora[f"{strategy} in fp32"]["whole"]
    for one, other in zip(whole["curve"], alone["curve"], strict=True):
        assert one == pytest.approx(other, rel=1e-5)
    assert whole["weights"].keys() == alone["weights"].keys()
    for name, value in alone["weights"].items():
        torch.testing.assert_close(whole["weights"][name], value, rtol=0, atol=2e-5)


@pytest.mark.parametrize("strategy", lora_worker.CASES)
def test_a_replayed_micro_batch_with_dropout_has_the_same_bits(strategy: str, lora: dict[str, dict[str, Any]]) -> None:
    first, second = lora[strategy]["whole"]["replays"]
    assert first == second
    assert (first[1] > 0) == (strategy == "zero2")


@pytest.mark.parametrize("strategy", lora_worker.CASES)
def test_a_lora_stage_exports_merged_weights(
    strategy: str, lora: dict[str, dict[str, Any]], lora_runs: Path, tmp_path: Path, command: Command
) -> None:
    """Base and adapter added up here are the export, a checkpoint's export, and what the next stage starts from."""
    run, scale = (
        lora_runs / f"{strategy}-{lora_worker.CASES[strategy]}",
        lora_worker.LORA["alpha"] / lora_worker.LORA["rank"],
    )
    whole, is_half = lora[strategy]["whole"], lora_worker.CASES[strategy] == "bf16"
    # The held-out loss of a stage sees its adapters.
    assert abs(lora[strategy]["after"] - lora[strategy]["before"]) > 0.1
    if is_half:
        following = load_file(run / "1-connector" / "masters.safetensors")  # not rounded to bf16
    else:
        following = lora[strategy]["next"]["weights"]
        assert lora[strategy]["next"]["held_out"] == pytest.approx(lora[strategy]["after"], abs=2e-6)
    base, export = (weights(run / stage / "export") for stage in ("0-init", "1-connector"))
    adapter = load_file(run / "1-connector" / "export" / "adapter" / "adapter_model.safetensors")
    assert base.keys() == export.keys()
    for name, value in export.items():
        key = "base_model.model." + name.removesuffix("weight")
        if key + "lora_A.weight" in adapter:
            added = scale * adapter[key + "lora_B.weight"] @ adapter[key + "lora_A.weight"]
            assert added.abs().max() > 0
            rounding = 2**-8 if is_half else 0
            torch.testing.assert_close(value.float(), base[name].float() + added, rtol=rounding, atol=1e-6)
            torch.testing.assert_close(following[public_name(name)], base[name].float() + added, rtol=0, atol=1e-6)
            assert torch.equal(following[public_name(name)].to(value.dtype), value)
        elif part_of(name) == "connector":
            assert torch.equal(value, whole["weights"][public_name(name)].to(value.dtype))
        else:
            assert torch.equal(value, base[name])
    command("export", last_checkpoints(run, 1)[0], tmp_path / "last")
    assert not [name for name, value in weights(tmp_path / "last").items() if not torch.equal(value, export[name])]
    assert (tmp_path / "last" / "adapter" / "adapter_config.json").is_file()


def test_a_mean_and_the_best_of_a_lora_stage(lora_runs: Path, tmp_path: Path, command: Command) -> None:
    """A mean is one of merged weights, which has no adapter; the first of two checkpoints is the best."""
    run = lora_runs / "cpu_zero3-fp32"
    command("export", run, tmp_path / "best", "--best")
    command("export", run, tmp_path / "mean", "--average", "2")
    folders = (tmp_path / "best", run / "1-connector" / "export", tmp_path / "mean")
    best, last, mean = map(weights, folders)
    for name, value in mean.items():
        torch.testing.assert_close(value, (best[name] + last[name]) / 2)
    assert [(tmp_path / name / "adapter").exists() for name in ("best", "mean")] == [True, False]
