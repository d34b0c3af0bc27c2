"""The repair of what DeepSpeed's universal loader leaves: hyperparameters of one group, one shared step count."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from deepspeed.checkpoint.constants import FROZEN_PARAM_FRAGMENTS

from alignvlm.errors import UserError
from alignvlm.training.checkpoints import elastic
from alignvlm.training.checkpoints.elastic import repair
from alignvlm.training.checkpoints.renaming import names_of_modules
from alignvlm.training.checkpoints.store import TAG, CheckpointInfo
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


def test_weights_of_earlier_versions_get_their_modules_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = CheckpointInfo(tmp_path / "step-00000002", {"step": 2, "world_size": 4})

    def converted(words: list[str], **options: object) -> SimpleNamespace:
        for name in ("vision.a.weight", "language.lm_head.weight", "model.language_model.norm.weight"):
            Path(words[words.index("--output_folder") + 1], "zero", name).mkdir(parents=True)
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(elastic.subprocess, "run", converted)
    folder = elastic.convert(checkpoint, FakeWorld(size=2))
    names = {path.name for path in (folder / TAG / "zero").iterdir()}
    (folder / TAG / "zero" / "lm_head.weight").rename(folder / TAG / "zero" / "language.lm_head.weight")
    elastic.convert(checkpoint, FakeWorld(size=2))  # an earlier version has converted it
    assert names == {path.name for path in (folder / TAG / "zero").iterdir()}
    assert names == {"model.vision_tower.a.weight", "lm_head.weight", "model.language_model.norm.weight"}


class Engine:
    """Keeps what it is given, as DeepSpeed's engine is called by its `load_checkpoint`."""

    def __init__(self) -> None:
        self.loaded: list[dict[str, Any]] = []

    def load_module_state_dict(self, checkpoint: dict[str, Any], strict: bool = True) -> None:
        self.loaded.append(checkpoint[FROZEN_PARAM_FRAGMENTS])


def test_frozen_weights_of_earlier_versions_are_found_under_their_names() -> None:
    engine, frozen = Engine(), {"vision.a.weight": 1, "model.connector.w2": 2}
    with names_of_modules(engine):
        engine.load_module_state_dict(checkpoint={FROZEN_PARAM_FRAGMENTS: dict(frozen)}, strict=True)
    engine.load_module_state_dict(checkpoint={FROZEN_PARAM_FRAGMENTS: dict(frozen)})
    assert engine.loaded == [{"model.vision_tower.a.weight": 1, "model.connector.w2": 2}, frozen]
