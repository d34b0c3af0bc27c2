"""Loading by any number of ranks, from files laid out here as DeepSpeed does; names of earlier versions."""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from alignvlm.best import STATE
from alignvlm.errors import UserError
from alignvlm.training.checkpoints.files.reading import checked
from alignvlm.training.checkpoints.files.sealing import seal
from alignvlm.training.checkpoints.loading import Unchecked, load
from alignvlm.training.checkpoints.store import TAG, CheckpointStore
from tests.evaluation.thread_ranks import ThreadRanks
from tests.training.fakes import FakeWorld

SHAPES = [{"a": (3, 5), "b": (7,)}, {"c": (2, 2, 2), "d": (1,)}]
"""Groups of parameters; nothing is divided by 2 or 3 evenly."""
KEYS = ("fp32", "exp_avg", "exp_avg_sq")


def value(name: str, key: str) -> torch.Tensor:
    """What a parameter is to be: other numbers everywhere."""
    shape = {**SHAPES[0], **SHAPES[1]}[name]
    first = 1000 * "abcd".index(name) + 100 * KEYS.index(key) + 1
    return torch.arange(first, first + math.prod(shape), dtype=torch.float32)


def padded(flat: torch.Tensor, parts: int, alignment: int = 1) -> torch.Tensor:
    return torch.cat([flat, torch.zeros(-len(flat) % (parts * alignment))])


def flats(stage: int, group: int, key: str, rank: int, size: int) -> torch.Tensor:
    """A rank's part of a group under this ZeRO stage."""
    values = [value(name, key) for name in SHAPES[group]]
    if stage == 3:
        return torch.cat([padded(each, size).chunk(size)[rank] for each in values])
    return padded(torch.cat(values), size, alignment=2).chunk(size)[rank]


def write_files(folder: Path, stage: int, size: int, prefix: str = "") -> None:
    """The files of so many ranks."""
    folder.mkdir(parents=True)
    shapes = [{prefix + name: torch.Size(shape) for name, shape in group.items()} for group in SHAPES]
    counters = {"global_steps": 7, "global_samples": 28, "skipped_steps": 1}
    for rank in range(size):
        state = {
            group: {key: flats(stage, group, key, rank, size) for key in KEYS[1:]} | {"step": torch.tensor(6.0)}
            for group in range(2)
        }
        inner = {"state": state, "param_groups": [{"lr": 9.0, "params": [0]}, {"lr": 9.0, "params": [1]}]}
        weights = [flats(stage, group, "fp32", rank, size) for group in range(2)]
        optimizer: dict[str, Any] = {"zero_stage": stage, "optimizer_state_dict": inner, "fp32_flat_groups": weights}
        if stage < 3:
            real = [sum(map(math.prod, group.values())) for group in SHAPES]
            lengths = [max(0, min(len(w), n - rank * len(w))) for w, n in zip(weights, real, strict=True)]
            cut = [weight[:length] for weight, length in zip(weights, lengths, strict=True)]
            optimizer = {"zero_stage": stage, "base_optimizer_state": inner, "single_partition_of_fp32_groups": cut}
        name = f"zero_pp_rank_{rank}_mp_rank_00"
        optimizer["partition_count"] = size if stage == 3 else [size, size]
        torch.save({"optimizer_state_dict": optimizer}, folder / f"{name}_optim_states.pt")
        if stage == 3 or rank == 0:
            model = f"{name if stage == 3 else 'mp_rank_00'}_model_states.pt"
            torch.save({"param_shapes": shapes, **counters}, folder / model)


class Engine:
    """An engine of this ZeRO stage on one of `size` ranks, with the attributes of DeepSpeed's that are needed."""

    def __init__(self, stage: int, rank: int, size: int) -> None:
        self.stage = stage
        self.flats = [torch.nn.Parameter(flats(stage, group, "fp32", rank, size) * 0) for group in range(2)]
        groups = [{"params": [flat], "lr": 1.0, "weight_decay": 0.1, "fused": True} for flat in self.flats]
        self.calls: list[Any] = []
        self.module = torch.nn.BatchNorm1d(3)
        self.on_nvme = False
        self.optimizer = SimpleNamespace(
            optimizer=SimpleNamespace(param_groups=groups, state={}), loss_scaler=None, dynamic_loss_scale=False,
            round_robin_bit16_padding=[[0, 0], [0, 0]], load_state_dict=lambda all, **options: self.calls.append(all),
            update_lp_params=lambda: self.calls.append("update"), checkpoint_event_epilogue=lambda: None,
            **{"fp32_partitioned_groups_flat" if stage == 3 else "single_partition_of_fp32_groups": self.flats},
        )  # fmt: skip

    def zero_optimization_stage(self) -> int:
        return self.stage

    def zero_nvme_offload_optimizer(self) -> bool:
        return self.on_nvme

    def _get_zero_param_shapes(self) -> list[dict[str, Any]]:
        return SHAPES


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize(("before", "after"), [(3, 2), (2, 3), (1, 11), (11, 1), (2, 2)])
def test_every_rank_gets_its_share(stage: int, before: int, after: int, tmp_path: Path) -> None:
    folder = tmp_path / "deepspeed"
    write_files(folder, stage, before)
    for rank in range(after):
        engine = Engine(stage, rank, after)
        load(engine, folder, FakeWorld(rank=rank, size=after))
        state = engine.optimizer.optimizer.state
        for group, flat in enumerate(engine.flats):
            assert torch.equal(flat, flats(stage, group, "fp32", rank, after))
            for key in KEYS[1:]:
                assert torch.equal(state[flat][key], flats(stage, group, key, rank, after)), f"{key} of rank {rank}"
        steps = [state[flat]["step"] for flat in engine.flats]
        assert [float(step) for step in steps] == [6.0, 6.0]
        assert steps[0] is not steps[1]
        assert (engine.global_steps, engine.global_samples, engine.skipped_steps) == (7, 28, 1)
        assert [group["lr"] for group in engine.optimizer.optimizer.param_groups] == [1.0, 1.0]
        (call,) = engine.calls
        assert call == "update" if stage == 2 else call[rank]["fp32_flat_groups"] is engine.flats


def test_buffers_are_those_of_the_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "deepspeed"
    write_files(folder, 3, 1)
    (file,) = folder.glob("*_model_states.pt")
    buffers = {"running_mean": torch.tensor([1.0, 2.0, 3.0]), "num_batches_tracked": torch.tensor(9)}
    model = torch.load(file, weights_only=False)
    torch.save(model | {"buffer_names": list(buffers), "module": buffers}, file)
    engine = Engine(3, 0, 1)
    load(engine, folder, FakeWorld())
    assert engine.module.running_mean.tolist() == [1, 2, 3]
    assert int(engine.module.num_batches_tracked) == 9
    assert engine.module.running_var.tolist() == [1, 1, 1]


def test_what_is_on_nvme_deepspeed_loads_for_as_many_ranks(tmp_path: Path) -> None:
    folder = tmp_path / "step-00000007" / "deepspeed"
    write_files(folder, 3, 2)
    engine = Engine(3, 0, 2)
    engine.on_nvme = True
    engine.load_checkpoint = lambda folder, tag: engine.calls.append((folder, tag))  # type: ignore[attr-defined]
    load(engine, folder, FakeWorld(rank=0, size=2))
    assert engine.calls == [(str(folder.parent), "deepspeed")]
    with pytest.raises(UserError, match="as many ranks as have saved them: 2, not 3"):
        load(engine, folder, FakeWorld(rank=0, size=3))


def test_without_zero_deepspeed_loads(tmp_path: Path) -> None:
    engine = Engine(0, 0, 1)
    engine.load_checkpoint = lambda folder, tag: engine.calls.append((folder, tag))  # type: ignore[attr-defined]
    load(engine, tmp_path / "step-00000007" / "deepspeed", FakeWorld())
    assert engine.calls == [(str(tmp_path / "step-00000007"), "deepspeed")]


def test_only_files_with_something_in_them_are_read(tmp_path: Path) -> None:
    folder = tmp_path / "step-00000007" / "deepspeed"
    write_files(folder, 3, 4)
    (folder / "zero_pp_rank_3_mp_rank_00_optim_states.pt").write_bytes(b"of another host")
    load(Engine(3, 0, 2), folder, FakeWorld(rank=0, size=2))
    with pytest.raises(UserError, match=r"deepspeed: rank 1 of 2 cannot .* \(.*rank_3_.*\); remove .*-00000007 to"):
        load(Engine(3, 1, 2), folder, FakeWorld(rank=1, size=2))


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("is_missing", [True, False])
def test_the_files_are_those_of_all_ranks_and_of_no_other(stage: int, is_missing: bool, tmp_path: Path) -> None:
    folder = tmp_path / "step-00000007" / "deepspeed"
    write_files(folder, stage, 2)
    first, second = (folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in range(2))
    if is_missing:
        second.unlink()
    else:  # of a job of three ranks
        shutil.copy(first, folder / "zero_pp_rank_2_mp_rank_00_optim_states.pt")
    found = 1 if is_missing else 3
    with pytest.raises(UserError, match=f"files of {found} ranks' optimizers, 2 have saved them"):
        load(Engine(stage, 0, 1), folder, FakeWorld())


@pytest.mark.parametrize("place", ["weights", "names"])
@pytest.mark.parametrize("stage", [2, 3])
def test_damage_is_found_while_a_file_is_loaded(stage: int, place: str, tmp_path: Path) -> None:
    folder = tmp_path / "step-00000007" / "deepspeed"
    write_files(folder, stage, 1)
    path = folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    own = [Unchecked(path, checked(path))]
    assert load(Engine(stage, 0, 1), folder, FakeWorld(), own) is None
    content = path.read_bytes()
    wanted = value("b", "exp_avg").numpy().tobytes() if place == "weights" else b"zero_stage"
    at = content.index(wanted) + len(wanted) // 2
    path.write_bytes(content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :])
    assert (
        load(Engine(stage, 0, 1), folder, FakeWorld(), own)
        == f"{path.name}: size or checksum differs from the manifest"
    )
    path.unlink()
    assert load(Engine(stage, 0, 1), folder, FakeWorld(), own) == f"{path.name}: No such file or directory"


def test_a_rank_that_cannot_read_hears_first_whether_the_file_of_another_one_is_damaged(tmp_path: Path) -> None:
    folder = tmp_path / "step-00000007" / "deepspeed"
    write_files(folder, 3, 2)
    first, second = (folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in range(2))
    owns = [[Unchecked(path, checked(path))] for path in (first, second)]
    first.write_bytes(first.read_bytes()[:-1000])
    ranks = ThreadRanks(2)
    found = ranks.run(lambda rank: load(Engine(3, rank.rank, 2), folder, rank, owns[rank.rank]))  # type: ignore[arg-type]
    assert found == [f"{first.name}: size or checksum differs from the manifest"] * 2


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize(("before", "after"), [(4, 2), (3, 2), (2, 3), (1, 2)])
def test_another_number_of_ranks_reads_and_checks_in_one_pass(
    stage: int, before: int, after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "step-00000007" / TAG
    write_files(folder, stage, before)
    (folder.parent / STATE).write_text(json.dumps({"step": 7, "world_size": before}))
    unsealed = folder.parent.rename(tmp_path / "step-00000007.partial")
    seal(unsealed, folder.parent, {})
    files = sorted(folder.glob("*_optim_states.pt"))
    read: list[tuple[str, int]] = []
    preadv = os.preadv

    def count(descriptor: int, views: list[memoryview], begin: int) -> int:
        read.append((Path(os.readlink(f"/proc/self/fd/{descriptor}")).name, sum(map(len, views))))
        return preadv(descriptor, views, begin)

    def resume(rank: Any) -> str | None:
        found = CheckpointStore(tmp_path, rank, 1, None).newest(pytest.fail)
        assert found is not None
        return load(Engine(stage, rank.rank, after), folder, rank, found.own)

    monkeypatch.setattr(os, "preadv", count)
    assert ThreadRanks(after).run(resume) == [None] * after
    total = sum(count for name, count in read if name.endswith("_optim_states.pt"))
    numbers = sum(4 * len(value(name, key)) for group in SHAPES for name in group for key in KEYS)
    size = sum(path.stat().st_size for path in files)
    assert size <= total < size + numbers
    content = files[-1].read_bytes()
    at = content.index(flats(stage, 0, "exp_avg", before - 1, before).numpy().tobytes())
    files[-1].write_bytes(content[:at] + b"?" + content[at + 1 :])
    assert ThreadRanks(after).run(resume) == [f"{files[-1].name}: size or checksum differs from the manifest"] * after


def test_what_deepspeed_loads_is_checked_before(tmp_path: Path) -> None:
    folder = tmp_path / "step-00000007" / "deepspeed"
    write_files(folder, 3, 1)
    path = folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    entry = checked(path)
    engine = Engine(0, 0, 1)  # it has no way to load yet
    assert load(engine, folder, FakeWorld(), [Unchecked(path, entry | {"crc32": 0})]) is not None
    engine.load_checkpoint = lambda folder, tag: engine.calls.append(tag)  # type: ignore[attr-defined]
    assert load(engine, folder, FakeWorld(), [Unchecked(path, entry)]) is None
    assert engine.calls == ["deepspeed"]


def test_weights_of_earlier_versions_get_their_modules_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "deepspeed"
    write_files(folder, 3, 2, prefix="vision.")
    engine = Engine(3, 0, 1)
    monkeypatch.setattr(
        engine, "_get_zero_param_shapes",
        lambda: [{f"model.vision_tower.{name}": shape for name, shape in group.items()} for group in SHAPES],
    )  # fmt: skip
    load(engine, folder, FakeWorld())
    assert torch.equal(engine.flats[1], torch.cat([value("c", "fp32"), value("d", "fp32")]))
