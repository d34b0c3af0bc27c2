"""The speed of a step: what counts as its time, and the share of the ranks' peak."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from alignvlm.config.schema import Recipe, StageConfig
from alignvlm.model.flops import Work, count_flops
from alignvlm.model.network import network_of
from alignvlm.training import throughput
from alignvlm.training.step import StepCounts
from alignvlm.training.throughput import Throughput, counted_flops, peak_flops
from tests.fixtures.damage import full_disk
from tests.tiny import tiny_model
from tests.training.fakes import FakeWorld


def test_a_step_takes_its_computing_and_its_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throughput, "peak_flops", lambda device, precision: 1e9)
    config = tiny_model()[0].config
    counts = StepCounts(supervised=40, samples=6, tokens=120, tiles=3, attended=2400)
    cache = tmp_path / "1-joint" / "flops.json"
    found = Throughput(Recipe(), StageConfig(), config, FakeWorld(size=2), cache)
    speed = found.measure(counts, seconds=1.5, data_wait=0.5)
    assert (speed.seconds, speed.data_wait) == (2.0, 0.5)
    assert (speed.tokens_per_second, speed.samples_per_second) == (60.0, 3.0)
    parts = count_flops(network_of(config), StageConfig().trainable).of(Work(120, 3, 40, 2400))
    assert speed.mfu == pytest.approx(sum(part.model for part in parts.values()) / 2.0 / (2 * 1e9))
    assert 0 < speed.memory_gib < 100


def test_flops_are_counted_once_for_a_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    calls, work, cache = [], Work(120, 3, 40, 2400), tmp_path / "1-joint" / "flops.json"
    monkeypatch.setattr(throughput, "count_flops", lambda *given: calls.append(given) or count_flops(*given))
    config = tiny_model()[0].config
    first = counted_flops(cache, config, StageConfig(trainable=["connector.*"])).of(work)
    assert counted_flops(cache, config, StageConfig(trainable=["connector.*"])).of(work) == first  # all bits
    assert len(calls) == 1
    assert counted_flops(cache, config, StageConfig()).of(work) != first
    assert len(calls) == 2
    cache.write_text(cache.read_text().replace('"language": [[', '"language": [[1.0], ['))
    assert counted_flops(cache, config, StageConfig()).of(work) == count_flops(network_of(config), ["*"]).of(work)
    assert "flops.json cannot be read and is made anew" in caplog.text
    caplog.clear()
    with full_disk(20):
        counted_flops(tmp_path / "flops.json", config, StageConfig())
    assert "the next start counts again" in caplog.text


def test_a_known_gpu_has_the_peak_of_its_data_sheet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    assert peak_flops(torch.device("cuda"), "bf16") == 989e12


def test_elsewhere_the_peak_is_measured() -> None:
    assert 1e8 < peak_flops(torch.device("cpu"), "fp32") < 1e14
