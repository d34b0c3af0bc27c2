"""What a run, a report and a study say about where they were made: package versions, git commit, machine."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

PACKAGES = ("alignvlm", "torch", "deepspeed", "transformers", "peft", "webdataset", "mlflow", "flash-attn", "numpy")


def describe_environment() -> dict[str, Any]:
    """Package versions, git commit (of this code, where it is a checkout and git is installed), machine and time."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "packages": versions,
        "python": platform.python_version(),
        "git_commit": _git_commit(),
        "machine": platform.machine(),
        "device": device_name(),
        "cpus": os.cpu_count(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def device_name() -> str:
    """Name of the GPU of a process that computes on one, else of the processor."""
    torch = sys.modules.get("torch")
    return str(torch.cuda.get_device_name()) if torch is not None and torch.cuda.is_available() else processor_name()


def processor_name() -> str:
    """Name of this machine's processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _git_commit() -> str | None:
    try:
        git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    except OSError:  # no git here
        return None
    return git.stdout.strip() or None
