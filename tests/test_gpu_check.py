"""`make gpu-check`: rehearsed without a GPU and without MLflow; what it does when something fails or is missing."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.checkout import ROOT

SCRIPT = ROOT / "scripts" / "gpu_check.py"
RESULTS = {"kernels": "connector-cpu.json", "train": "train-cpu.json", "profile": "train-cpu-profile.json"}


@pytest.fixture
def gpu_check() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_check", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.parametrize("part", RESULTS)
def test_rehearsal(part: str, tmp_path: Path) -> None:
    (tmp_path / "mlflow.py").write_text("raise ImportError('there is no MLflow on such a machine')\n")
    done = subprocess.run(
        ["make", f"gpu-check-{part}", "TINY=1", f"PYTHON={sys.executable}", f"RESULTS={tmp_path / 'results'}"],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    log = (tmp_path / "results" / f"gpu-check-{part}.log").read_text()
    assert log in done.stdout
    assert log.count("\n# exit code 0 after ") == log.count("$ python ") == 2
    assert (tmp_path / "results" / RESULTS[part]).stat().st_size > 0


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
    assert capsys.readouterr().out == "needed here: pip install 'deepspeed>=0.19.8,<0.20' 'rapidfuzz>=3'\n"


def test_every_test_marked_cuda_belongs_to_a_part(gpu_check: ModuleType) -> None:
    marked = {str(p.relative_to(ROOT)) for p in (ROOT / "tests").rglob("test_*.py") if "mark.cuda" in p.read_text()}
    commands = [command for part in RESULTS for _, command in gpu_check.commands(part, False)]
    run = [word for command in commands for word in command if word.startswith("tests/")]
    assert sorted(run) == sorted(marked - {"tests/test_gpu_check.py"})
