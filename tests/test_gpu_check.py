"""`make gpu-check`: rehearsed without a GPU and without MLflow; what it does when something fails or is missing."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from packaging.requirements import Requirement

from tests.checkout import ROOT

SCRIPT = ROOT / "scripts" / "gpu_check.py"
PARTS = ("quick", "kernels", "train", "profile")


@pytest.fixture
def gpu_check() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_check", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rehearse(part: str, folder: Path, commands: int) -> Path:
    """Run a part at tiny sizes, every command of it with success; the folder of its results."""
    (folder / "mlflow.py").write_text("raise ImportError('there is no MLflow on such a machine')\n")
    results = folder / "results"
    done = subprocess.run(
        ["make", f"gpu-check-{part}", "TINY=1", f"PYTHON={sys.executable}", f"RESULTS={results}"],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    log = (results / f"gpu-check-{part}.log").read_text()
    assert log in done.stdout
    assert log.count("\n# exit code 0 after ") == log.count("$ python ") == commands
    return results


@pytest.mark.slow
def test_kernels(tmp_path: Path) -> None:
    assert (rehearse("kernels", tmp_path, 2) / "connector-cpu.json").stat().st_size > 0


@pytest.mark.slow
def test_profile(tmp_path: Path) -> None:
    """Training steps in variants, one of which cannot run here; part `train` runs the same without the profile."""
    results = rehearse("profile", tmp_path, 4)
    assert {path.name for path in results.glob("*.json")} == {
        "train-cpu-profile.json", "train-cpu-8b.json", "connector-blocks-4096.json"
    }  # fmt: skip
    result = json.loads((results / "train-cpu-profile.json").read_text())
    assert {"torch", "deepspeed", "transformers"} <= set(result["versions"])
    assert result["commit"]
    default, mlp, zero2, compiled = result["rows"]
    (flash,) = json.loads((results / "train-cpu-8b.json").read_text())["rows"]
    assert "flash-attn" in flash["failed"]
    assert "step_s" not in flash
    for row in (default, mlp, zero2, compiled):
        assert row["tokens"] == 2 * 160
        assert row["supervised"] == 2 * 20
        assert row["tiles"] == 2 * 24
        assert row["tokens_per_s"] == pytest.approx(row["tokens"] / row["step_s"])
        assert 0 < row["mfu"] < row["hfu"]
        assert row["peak_gib"] > 0
        assert not row["skipped"]
        assert 0 < row["host_micro_batch_s"] < row["host_step_s"]
        assert 0 < row["profile"]["connector_share"] < 1
        for table in ("kinds", "parts"):
            assert sum(part["share"] for part in row["profile"][table].values()) == pytest.approx(1)
        assert {"vision", "connector", "language"} < set(row["profile"]["parts"])
        products = row["profile"]["products"]
        assert products["tflops"] > 0
        assert products["tflop"] == pytest.approx(row["hardware_tflop"], rel=0.5)  # operators of our own have more
        assert sum(row["host_profile"]["self"].values()) == pytest.approx(1)
        assert {"alignvlm", "deepspeed", "transformers"} <= set(row["host_profile"]["caller"])
    for row in (zero2, compiled):
        assert row["loss"] == pytest.approx(default["loss"], rel=1e-5)  # the same weights, packs and steps
    assert mlp["model_tflop"] < default["model_tflop"]


@pytest.mark.slow
def test_quick(tmp_path: Path) -> None:
    """One command after the other, results of each; what cannot run here says why."""
    results = rehearse("quick", tmp_path, 5)
    varlen, sdpa, *flash = json.loads((results / "attention-cpu.json").read_text())["rows"]
    assert all(row["failed"].startswith("ValueError: model.attention") for row in (varlen, *flash))
    assert max(sdpa["errors"].values()) < 1e-2
    assert sdpa["total_ms"] > 0
    zero1, flash4 = json.loads((results / "train-cpu-quick.json").read_text())["rows"]
    assert zero1["profile"]["shapes"]
    assert "flash-attn-4" in flash4["failed"]
    (shape,) = json.loads((results / "connector-cpu-blocks.json").read_text())["measurements"]
    methods = ["ours", "ours, blocks of 100", "ours, blocks of 256", "floor: 7 plain products"]
    assert [result["method"] for result in shape["results"]] == methods
    assert all(result["total_ms"] > 0 for result in shape["results"])


def test_a_failed_command_does_not_stop_the_next_one(
    gpu_check: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits = "signal.signal(signal.SIGTERM, lambda *_: sys.exit('tidied')); print('waits', flush=True); time.sleep(60)"
    programs = ["raise SystemExit(3)", f"import signal, sys, time; {waits}", "print('the last')"]
    monkeypatch.setattr(
        gpu_check, "commands", lambda part, tiny: [(share, [sys.executable, "-c", program])
                                                   for share, program in zip((1, 0.2, 1), programs, strict=True)]
    )  # fmt: skip
    monkeypatch.setattr(gpu_check, "missing", list)
    assert gpu_check.main(["train", "--tiny", "--results", str(tmp_path), "--seconds=10"]) == 124
    log = (tmp_path / "gpu-check-train.log").read_text()
    assert [line.split()[3] for line in log.splitlines() if line.startswith("# exit code")] == ["3", "124", "0"]
    assert "waits\ntidied\n" in log
    assert "the last\n" in log


def test_training_steps_begin_no_variant_at_the_end_of_their_time(
    gpu_check: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shares = []

    def run(command: list[str], seconds: float, *others: object) -> int:
        shares.extend(float(word.split("=")[1]) / seconds for word in command if word.startswith("--budget="))
        return 0

    monkeypatch.setattr(gpu_check, "run", run)
    monkeypatch.setattr(gpu_check, "missing", lambda *_: [])
    for part in gpu_check.SECONDS:
        assert gpu_check.main([part, "--tiny", "--results", str(tmp_path)]) == 0
    assert shares == pytest.approx([0.7] * 4, abs=0.01)


def test_what_is_missing_is_one_line(
    gpu_check: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    there = {"deepspeed": "0.19.5", "torch": "2.11.0+cu130", "transformers": "5.17.0"}

    def version(name: str) -> str:
        if name == "rapidfuzz":
            raise gpu_check.PackageNotFoundError(name)
        return there.get(name, "99.9" if name in ("pytest", "triton") else gpu_check_version(name))

    gpu_check_version = gpu_check.version
    monkeypatch.setattr(gpu_check, "version", version)
    assert gpu_check.main(["kernels"]) == 2
    python = ".".join(map(str, sys.version_info[:2]))
    pip = "--no-deps --constraint=constraints.txt"
    wheels, source = "'transformers<5.25,>=5.19,>=5.23' 'rapidfuzz>=3'", "'deepspeed<0.20,>=0.19.8'"
    platforms = " ".join(f"--platform={name}" for name in gpu_check.PLATFORMS)
    assert capsys.readouterr().out == (
        f"needed here: {wheels} {source}; where there is a network: pip download {pip} --only-binary=:all: "
        f"--python-version={python} {platforms} --dest=wheels {wheels} "
        f"&& pip wheel {pip} --wheel-dir=wheels {source}; "
        "here: pip install --no-deps wheels/*.whl\n"
    )


def test_what_a_missing_package_brings_is_missing_too(gpu_check: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with nothing but PyTorch and transformers, and what these bring, is told all the others."""
    there = with_all_it_brings("torch") | with_all_it_brings("transformers")
    wanted = with_all_it_brings("deepspeed") | with_all_it_brings("peft") | with_all_it_brings("pytest-xdist")

    def absent(function: Any) -> Any:
        def asked(name: str) -> Any:
            if normal(name) not in there:
                raise gpu_check.PackageNotFoundError(name)
            return function(name)

        return asked

    for name in ("version", "requires"):
        monkeypatch.setattr(gpu_check, name, absent(getattr(gpu_check, name)))
    found = {normal(Requirement(text).name) for text in gpu_check.missing()}
    assert wanted - there <= found
    assert "execnet" in found
    assert {"nvidia-cutlass-dsl", "nvidia-cutlass-dsl-libs-cu13"} <= set(gpu_check.missing(["flash-attn-4"]))
    assert "nvidia-cutlass-dsl-libs-core" in gpu_check.missing(["flash-attn-4"])


def normal(name: str) -> str:
    return name.lower().replace("_", "-")


def with_all_it_brings(name: str) -> set[str]:
    """Names of an installed package and of what it requires here, extras aside."""
    found, left = set(), [name]
    while left:
        if (name := normal(left.pop())) not in found:
            found.add(name)
            brought = map(Requirement, importlib.metadata.requires(name) or ())
            left += [other.name for other in brought if not other.marker or other.marker.evaluate({"extra": ""})]
    return found


def test_every_test_marked_cuda_belongs_to_quick_and_to_another_part(gpu_check: ModuleType) -> None:
    marked = {str(p.relative_to(ROOT)) for p in (ROOT / "tests").rglob("test_*.py") if "mark.cuda" in p.read_text()}
    for parts in (PARTS[:1], PARTS[1:]):
        commands = [command for part in parts for _, command in gpu_check.commands(part, False)]
        run = [word for command in commands for word in command if word.startswith("tests/")]
        assert sorted(run) == sorted(marked - {"tests/test_gpu_check.py"})
