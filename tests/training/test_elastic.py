"""The repair of what DeepSpeed's universal loader leaves: hyperparameters of one group, one shared step count."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from alignvlm.errors import UserError
from alignvlm.training.checkpoints import elastic
from alignvlm.training.checkpoints.elastic import repair
from alignvlm.training.checkpoints.store import CheckpointInfo
from alignvlm.training.optim import Group
from tests.training.fakes import FakeWorld

GROUPS = [Group("vision", 1e-3, 0.1, ("a",)), Group("vision", 1e-3, 0.0, ("b",)), Group("language", 5e-4, 0.1, ("c",))]


def test_groups_get_their_own_hyperparameters_and_parameters_their_own_step() -> None:
    shared = torch.tensor(7.0)
    parameters = [torch.nn.Parameter(torch.ones(2)) for _ in GROUPS]
    inner = SimpleNamespace(state={p: {"step": shared, "exp_avg": torch.zeros(2)} for p in parameters})
    loaded = [{"params": [p], "lr": 9.0, "weight_decay": 0.1, "betas": (0.9, 0.95)} for p in parameters]
    repair(SimpleNamespace(param_groups=loaded, optimizer=inner), GROUPS)
    assert [group["weight_decay"] for group in loaded] == [0.1, 0.0, 0.1]
    assert [group["lr"] for group in loaded] == [1e-3, 1e-3, 5e-4]
    assert all(group["betas"] == (0.9, 0.95) for group in loaded)
    inner.state[parameters[0]]["step"] += 1
    assert [float(inner.state[p]["step"]) for p in parameters] == [8.0, 7.0, 7.0]


def test_another_number_of_groups_is_no_such_checkpoint() -> None:
    with pytest.raises(ValueError, match="zip"):
        repair(SimpleNamespace(param_groups=[{}], optimizer=SimpleNamespace(state={})), GROUPS)


def test_a_conversion_that_fails_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = "Traceback (most recent call last):\n  File x\nOSError: [Errno 28] No space left on device\n"
    failed = SimpleNamespace(returncode=1, stdout="", stderr=said)
    monkeypatch.setattr(elastic.subprocess, "run", lambda *arguments, **options: failed)
    checkpoint = CheckpointInfo(tmp_path / "step-00000002", {"step": 2, "world_size": 4})
    with pytest.raises(UserError, match=r"4 to 2 ranks failed \(OSError.* No space left on device\); free") as caught:
        elastic.convert(checkpoint, FakeWorld(size=2))
    assert "\n" not in str(caught.value)
    failed.returncode = 0  # but its mark cannot be written
    with pytest.raises(UserError, match=r"failed \(No such file or directory\)"):
        elastic.convert(checkpoint, FakeWorld(size=2))
