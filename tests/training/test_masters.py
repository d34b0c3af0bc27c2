"""The file of fp32 masters between two stages: missing, damaged, of another training. test_bf16.py hands one on."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from alignvlm.run_folder import StageFolder
from alignvlm.training.checkpoints import masters as module
from alignvlm.training.checkpoints.masters import load_masters, remove_masters, save_masters
from data_pipeline.errors import DataError
from tests.fixtures.damage import DAMAGES
from tests.training.fakes import FakeWorld

WORLD: Any = FakeWorld()


@pytest.fixture
def before(tmp_path: Path) -> StageFolder:
    return StageFolder(tmp_path / "1-connector", 1, "connector")


@pytest.fixture
def engine() -> Any:
    """One trainable parameter in bf16 that a ZeRO-2 optimizer, of which this rank has the last two numbers, updates."""
    model = nn.Module()
    model.weight = nn.Parameter(torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.bfloat16))
    master = torch.zeros(2)
    address = SimpleNamespace(start=2, numel=2)
    fragment = model.weight.detach().flatten()[2:]
    model.weight._hp_mapping = SimpleNamespace(lp_fragment_address=address, lp_fragment=fragment)
    model.weight.set_full_hp_param = lambda value: master.copy_(value[2:])
    return SimpleNamespace(module=model, master=master, zero_quantized_weights=lambda: False)


def write(before: StageFolder, *values: float) -> None:
    before.path.mkdir()
    save_file({"weight": torch.tensor(values).reshape(2, -1)}, before.masters)


def test_a_rank_takes_its_part(before: StageFolder, engine: Any) -> None:
    write(before, 1.0, 2.0, 3.001, 4.002)
    load_masters(engine, before, WORLD)
    assert torch.equal(engine.master, torch.tensor([3.001, 4.002]))


def test_without_masters_a_stage_says_that_it_starts_from_bf16(
    before: StageFolder, engine: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    load_masters(engine, before, WORLD)
    said = f"{before.masters}: there is none, so this stage starts from the bf16 weights of {before.export}\n"
    assert capsys.readouterr().out == said
    load_masters(engine, StageFolder(before.path.with_name("0-init"), 0, "init"), WORLD)
    assert capsys.readouterr().out == ""


def test_a_full_disk_is_seen_before_anything_is_gathered(
    before: StageFolder, engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    parameters: list[Any] = []
    monkeypatch.setattr(module, "gathered", lambda trained: (parameters.append(p) for p in trained))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=15))
    with pytest.raises(DataError, match=r"masters.safetensors cannot be written \(No space left on device, it needs 0"):
        save_masters(engine, StageFolder(before.path, 0, "init"), before, WORLD)
    assert len(parameters) == 1  # gathered all the same, for the other ranks
    assert not list(before.path.iterdir())


def test_masters_go_when_the_next_stage_is_exported(before: StageFolder, caplog: pytest.LogCaptureFixture) -> None:
    write(before, 1.0, 2.0)
    remove_masters(before)
    remove_masters(before)
    assert not before.masters.exists()
    before.masters.mkdir()
    remove_masters(before)
    assert "masters.safetensors is no longer needed and cannot be removed: Is a directory" in caplog.text


@pytest.mark.parametrize("values", [(1.0, 2.0, 3.5, 4.0), (1.0, 2.0, 3.0, 4.0, 5.0, 6.0)])
def test_masters_of_another_training_are_refused(before: StageFolder, engine: Any, values: tuple[float, ...]) -> None:
    write(before, *values)
    with pytest.raises(DataError, match=r"weight is not what .*export holds in bf16; .* or remove .*masters.safetens"):
        load_masters(engine, before, WORLD)


@pytest.mark.parametrize("damage", [name for name in DAMAGES if name != "wrong types"])
def test_damaged_masters_are_one_line(before: StageFolder, engine: Any, damage: str) -> None:
    write(before, 1.0, 2.0, 3.0, 4.0)
    before.masters.write_bytes(DAMAGES[damage](before.masters.read_bytes()))
    with pytest.raises(DataError, match=r"^.*masters.safetensors cannot be read \(.*\); remove .*"):
        load_masters(engine, before, WORLD)
