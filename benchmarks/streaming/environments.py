"""An environment for each library that is compared, made once and kept: its packages need not agree with ours.

An environment sees this one's packages behind its own: PIL, which decodes, is the same for all, and torch where its
requirements do not name it. What a library needs in another version it has for itself.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

FACTS = "installed.json"
SHARED = ("torch", "pillow")
"""Packages that an environment has in another version only where its requirements name them."""
SECONDS = 600
"""For one installation."""
GRACE_SECONDS = 5.0


class Unavailable(Exception):
    """A library that cannot be installed or run here, and why, in one line."""


def work_folder() -> Path:
    """Where environments are kept: below XDG_CACHE_HOME or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "alignvlm-benchmarks"


def python_of(name: str, requirements: Sequence[str], work: Path) -> Path:
    """The Python of an environment with these packages; made when it is missing or has others. Raises Unavailable."""
    folder = work / name
    python = folder / "bin" / "python"
    wanted = {"requirements": list(requirements), "python": sys.version, "shares": sysconfig.get_path("purelib")}
    facts = folder / FACTS
    if facts.exists() and json.loads(facts.read_text()) == wanted:
        return python
    shutil.rmtree(folder, ignore_errors=True)
    print(f"{name}: installing {' '.join(requirements)} into {folder}", flush=True)
    venv.create(folder)
    own = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    (own / "shared.pth").write_text(wanted["shares"] + "\n")
    constraints = folder / "constraints.txt"
    shared = [name for name in SHARED if not any(each.startswith(f"{name}==") for each in requirements)]
    constraints.write_text("".join(f"{name}=={importlib.metadata.version(name)}\n" for name in shared))
    run([str(python), "-m", "pip", "install", "--quiet", "-c", str(constraints), *requirements], SECONDS)
    facts.write_text(json.dumps(wanted))
    return python


def run(command: Sequence[str], seconds: float, environment: dict[str, str] | None = None) -> str:
    """What a command printed; what it started ends with it. Raises Unavailable with the last line of its errors."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=out, stderr=errors, env=environment, start_new_session=True)
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise Unavailable(f"not done after {seconds:.0f} s") from None
        finally:
            _end(process)
        out.seek(0)
        errors.seek(0)
        if code:
            raise Unavailable(reason(errors.read()) or f"exit code {code}")
        return out.read()


def _end(process: subprocess.Popen[str]) -> None:
    """End a process' group. One that has ended leaves some of it a moment: what removes its shared memory."""
    until = time.monotonic() + (GRACE_SECONDS if process.poll() is not None else 0)
    with suppress(ProcessLookupError):
        while time.monotonic() < until:
            os.killpg(process.pid, 0)
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def reason(errors: str) -> str:
    """The line of a program's errors that says what was wrong: pip's first, else the last exception, else the last."""
    lines = [line.rstrip() for line in errors.splitlines() if line.strip()]
    said = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")][:1]
    raised = [line for line in lines if re.match(r"[A-Za-z_][\w.]*(: |$)", line)][-1:]
    return next(iter([*said, *raised, *lines[-1:]]), "")[:300]
