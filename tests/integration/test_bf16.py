"""bf16 under ZeRO-1, 2 and 3: stages hand fp32 masters on, bad gradients change no weight, sums are in fp32."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from safetensors.torch import load_file

from alignvlm.best import last_checkpoints
from alignvlm.estimates.disk import checkpoint_bytes, staged_bytes
from alignvlm.launch.local import free_port
from alignvlm.parts import module_name, public_name
from alignvlm.training.checkpoints.store import TAG
from alignvlm.training.checkpoints.weights import CheckpointWeights
from tests.documents.commands import lines_of
from tests.fixtures.command import Command
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


def public_weights(export: Path) -> dict[str, torch.Tensor]:
    """An export's weights by public name, as masters.safetensors has them."""
    return {public_name(name): value for name, value in weights(export).items()}


def tensor_bytes(checkpoint: Path, without: str = "none") -> int:
    """Bytes of the tensors in a checkpoint's files, without some by name, those that share memory once."""
    found: dict[tuple[str, int], int] = {}

    def add(tree: Any, file: str) -> None:
        if isinstance(tree, torch.Tensor):
            found[file, tree.untyped_storage().data_ptr()] = tree.untyped_storage().nbytes()
        elif isinstance(tree, dict | list | tuple):
            for each in tree.values() if isinstance(tree, dict) else tree:
                add(each, file)

    paths = [path for path in (checkpoint / TAG).glob("*.pt") if without not in path.name]
    files = [(path.name, torch.load(path, weights_only=False)) for path in paths]
    for name, content in files:
        add(content, name)
    return sum(found.values())


@pytest.mark.parametrize("strategy", ["zero1", "zero2", "cpu_zero3"])
def test_the_bucket_of_gradients_is_no_larger_than_all_of_them(folder: Path, strategy: str) -> None:
    bucket, learning = json.loads((folder / "results.json").read_text())[f"bucket, {strategy}"]
    assert bucket == learning


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
    found = public_weights(export)
    assert all(torch.equal(value.bfloat16(), found[name]) for name, value in last.items())
    after = load_file(folder / strategy / "2-instruct" / "masters.safetensors")
    assert after.keys() == last.keys()
    assert all(torch.equal(value, trained.get(name, last[name])) for name, value in after.items())
    assert any(not torch.equal(value, first[name]) for name, value in trained.items())


@pytest.mark.parametrize("strategy", ["zero2", "cpu_zero3"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_disk_that_is_full_for_rank_0_is_the_same_error_on_all_ranks(folder: Path, strategy: str, rank: int) -> None:
    errors = json.loads((folder / f"{strategy}-{rank}.json").read_text())
    stage = folder / strategy / "2-instruct"
    said = {name: message.partition(" (")[0] for name, (message, _) in errors.items()}
    assert said == {
        "masters": f"{stage}/masters.safetensors cannot be written", "export": f"{stage}/export cannot be written",
    }  # fmt: skip
    assert errors["masters"][1] == errno.EFBIG
    assert {path.name for path in stage.iterdir()} == {"masters.safetensors", "checkpoints"}


@pytest.mark.parametrize("strategy", ["zero2", "cpu_zero3"])
def test_an_export_is_the_mean_of_checkpoints_of_any_number_of_ranks(
    folder: Path, strategy: str, tmp_path: Path, command: Command
) -> None:
    kept = load_file(folder / f"{strategy}.safetensors")
    run = folder / strategy
    checkpoints = last_checkpoints(run, 2)  # two ranks wrote the first one, one rank the second
    names = {name.removeprefix("alone/") for name in kept if name.startswith("alone/")}
    expected = {name: (kept[f"trained/{name}"].double() + kept[f"alone/{name}"].double()) / 2 for name in names}
    output = command("export", run, tmp_path / "mean", "--average", "2", "--dtype", "float32")
    assert f"mean of step-00000001, step-00000002 in {run}/2-instruct/checkpoints\n" in output
    mean = public_weights(tmp_path / "mean")
    for name in names:
        assert torch.allclose(mean[name].double(), expected[name], rtol=2**-23, atol=0), name
    assert any(not torch.equal(mean[name], kept[f"alone/{name}"]) for name in names)
    assert all(
        torch.equal(mean[name.removeprefix("last/")], value.bfloat16().float())  # frozen: as the stage had them
        for name, value in kept.items()
        if name.startswith("last/vision.")
    )
    command("export", checkpoints[-1], tmp_path / "rounded", "--average", "2")
    rounded = public_weights(tmp_path / "rounded")
    assert all(torch.equal(rounded[name], value.bfloat16()) for name, value in mean.items())
    for checkpoint, part in zip(checkpoints, ("trained", "alone"), strict=True):
        ours = CheckpointWeights(checkpoint / TAG)
        theirs = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint), tag=TAG)
        assert theirs.keys() == ours.names
        assert all(torch.equal(ours[name], value.float()) for name, value in theirs.items())
        assert all(torch.equal(ours[module_name(name)], kept[f"{part}/{name}"]) for name in names)
    learns = sum(mean[name].numel() for name in names)
    frozen = sum(value.numel() for name, value in kept.items() if name.startswith("last/")) - learns
    settings = learns, frozen, 3 if "zero3" in strategy else 2, 2
    whole = checkpoint_bytes(*settings)
    assert whole <= tensor_bytes(checkpoints[0]) <= 1.01 * whole  # parts of ranks are padded
    of_rank_0 = staged_bytes(*settings, world_size=2, ranks=1)
    assert of_rank_0 <= tensor_bytes(checkpoints[0], without="_rank_1_") <= 1.01 * of_rank_0
    assert staged_bytes(*settings, world_size=2, ranks=2) == whole


@pytest.mark.parametrize("strategy", ["zero2", "cpu_zero3"])
def test_one_rank_goes_on_from_what_two_have_saved(folder: Path, strategy: str) -> None:
    kept = load_file(folder / f"{strategy}.safetensors")
    saved, loaded = (
        {name.removeprefix(part): value for name, value in kept.items() if name.startswith(part)}
        for part in ("saved/", "elastic/")
    )
    assert saved.keys() == loaded.keys()
    assert [name for name in saved if not torch.equal(saved[name], loaded[name])] == []
    assert saved["steps"].tolist() == [1.0]
    moments = [value for name, value in saved.items() if name.endswith("/exp_avg_sq")]
    assert moments
    assert any(value.any() for value in moments)


def test_the_exports_of_the_evaluation_page(
    folder: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As they stand, but for the names and the number of checkpoints that there are here."""
    run, here = folder / "zero2", {"2-joint": "2-instruct", "3": "2"}
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    Path("runs/NAME").symlink_to(run)
    (run / "config.yaml").write_text("checkpoint: {keep_best: loss/held_out}\n")
    page = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    lines = [line.words for line in lines_of(page) if line.whole and line.words[0] == "export"]
    assert len(lines) == 3
    for number, words in enumerate(lines):
        words = [f"{number}" if word == "OUTPUT" else here.get(word, word) for word in words]
        printed = command(*(word.replace("2-joint", here["2-joint"]) for word in words))
        said = "step-00000001 (loss/held_out 1)\n" if "--best" in words else "mean of step-00000001, step-00000002 in "
        assert said in printed
        assert len(weights(tmp_path / f"{number}")) > 10


def test_a_bad_gradient_changes_no_weight_and_sums_do_not_lose_bits(folder: Path) -> None:
    results = json.loads((folder / "results.json").read_text())
    for strategy in ("zero1", "zero2", "cpu_zero3"):
        found = results[strategy]
        assert found["skipped"] == [True, False], strategy
        assert found["changed"][0] == 0 < found["changed"][1], strategy
    assert results["error, sums in fp32"] < 1e-4 < results["error, sums in bf16"]


@pytest.mark.parametrize("part", ["vision", "language"])
def test_layers_before_which_nothing_is_trained_get_their_gradients(folder: Path, part: str) -> None:
    assert json.loads((folder / "results.json").read_text())[f"error, {part} layers alone"] < 1e-4


@pytest.mark.parametrize("strategy", ["zero2", "cpu_zero3"])
def test_two_ranks_and_one_find_the_same_held_out_loss(folder: Path, strategy: str) -> None:
    two, one = json.loads((folder / "results.json").read_text())["held out"][strategy]
    assert two == one  # bit for bit
    assert set(one) == {"loss/held_out", "loss/text", "loss/pages"}
    assert min(one["loss/text"], one["loss/pages"]) < one["loss/held_out"] < max(one["loss/text"], one["loss/pages"])
