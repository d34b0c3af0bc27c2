"""`make gpu-check`: rehearsed without a GPU and without MLflow; what it does when something fails or is missing."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.checkout import ROOT

SCRIPT = ROOT / "scripts" / "gpu_check.py"
PARTS = ("kernels", "train", "profile")


@pytest.fixture
def gpu_check() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_check", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rehearse(part: str, folder: Path) -> Path:
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
    assert log.count("\n# exit code 0 after ") == log.count("$ python ") == 2
    return results


@pytest.mark.slow
def test_kernels(tmp_path: Path) -> None:
    assert (rehearse("kernels", tmp_path) / "connector-cpu.json").stat().st_size > 0


@pytest.mark.slow
def test_profile(tmp_path: Path) -> None:
    """Training steps in variants, one of which cannot run here; part `train` runs the same without the profile."""
    result = json.loads((rehearse("profile", tmp_path) / "train-cpu-profile.json").read_text())
    assert {"torch", "deepspeed", "transformers"} <= set(result["versions"])
    assert result["commit"]
    default, mlp, flash, zero2, compiled = result["rows"]
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
        assert sum(kind["share"] for kind in row["profile"]["kinds"].values()) == pytest.approx(1)
    for row in (zero2, compiled):
        assert row["loss"] == pytest.approx(default["loss"], rel=1e-5)  # the same weights, packs and steps
    assert mlp["model_tflop"] < default["model_tflop"]


def test_a_failed_command_does_not_stop_the_next_one(
    gpu_check: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs = ["raise SystemExit(3)", "import time; print('waits', flush=True); time.sleep(60)", "print('the last')"]
    monkeypatch.setattr(
        gpu_check, "commands", lambda part, tiny: [(share, [sys.executable, "-c", program])
                                                   for share, program in zip((1, 0.2, 1), programs, strict=True)]
    )  # fmt: skip
    monkeypatch.setattr(gpu_check, "missing", list)
    assert gpu_check.main(["train", "--tiny", "--results", str(tmp_path), "--seconds=10"]) == 124
    log = (tmp_path / "gpu-check-train.log").read_text()
    assert [line.split()[3] for line in log.splitlines() if line.startswith("# exit code")] == ["3", "124", "0"]
    assert "waits\n" in log
    assert "the last\n" in log


def test_what_is_missing_is_one_line(
    gpu_check: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    there = {"deepspeed": "0.19.5", "torch": "2.11.0+cu130"}

    def version(name: str) -> str:
        if name == "rapidfuzz":
            raise gpu_check.PackageNotFoundError(name)
        return there.get(name, "99.9" if name in ("pytest", "triton") else gpu_check_version(name))

    gpu_check_version = gpu_check.version
    monkeypatch.setattr(gpu_check, "version", version)
    assert gpu_check.main(["kernels"]) == 2
    assert capsys.readouterr().out == "needed here: pip install 'rapidfuzz>=3' 'deepspeed>=0.19.8,<0.20'\n"


def test_every_test_marked_cuda_belongs_to_a_part(gpu_check: ModuleType) -> None:
    marked = {str(p.relative_to(ROOT)) for p in (ROOT / "tests").rglob("test_*.py") if "mark.cuda" in p.read_text()}
    commands = [command for part in PARTS for _, command in gpu_check.commands(part, False)]
    run = [word for command in commands for word in command if word.startswith("tests/")]
    assert sorted(run) == sorted(marked - {"tests/test_gpu_check.py"})
