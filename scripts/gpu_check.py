"""What only a GPU can show, in three parts of less than nine minutes each.

    python scripts/gpu_check.py kernels        tests of the kernels; the ALIGN operator against its alternatives
    python scripts/gpu_check.py train          tests of the model, training and evaluation; training steps in variants
    python scripts/gpu_check.py profile        where the time goes: the row kernels, and one training step
    python scripts/gpu_check.py train --tiny   the same at tiny sizes, without a GPU; of the tests, the collection only

alignvlm need not be installed. What is missing is named in one line. A command that fails, or that takes longer than
is left, does not keep the next one from running; the exit code is the worst one. Logs and results are written as they
come, to benchmarks/results or the folder that --results names.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 520
"""Of a part, all its commands together."""
NOT_NEEDED = {"mlflow"}
"""Of the package's dependencies: nothing here tracks a run."""
TESTING = ("triton", "pytest", "pytest-xdist")
REHEARSED = "default,connector-mlp,attention-flash,zero2,compile-vision"
"""Variants of a training step with --tiny; flash-attn needs a GPU: it fails as expected."""
TEST_PROCESSES = 8
"""They share the GPU; the tests are small, and much of their time is the host's."""


def missing() -> list[str]:
    """Requirements of pyproject.toml, and of the tests, that are not fulfilled here."""
    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found = []
    for text in (*project["dependencies"], *project["optional-dependencies"]["train"], *TESTING):
        requirement = Requirement(text)
        if requirement.name in NOT_NEEDED:
            continue
        try:
            is_there = requirement.specifier.contains(version(requirement.name), prereleases=True)
        except PackageNotFoundError:
            is_there = False
        if not is_there:
            found.append(text)
    return found


def test_files(*folders: str) -> list[str]:
    """Files below these folders of tests/ that have tests marked `cuda`; others import what is not needed here."""
    paths = sorted(path for folder in folders for path in (ROOT / "tests" / folder).rglob("test_*.py"))
    return [str(path.relative_to(ROOT)) for path in paths if "mark.cuda" in path.read_text(encoding="utf-8")]


def tests(is_tiny: bool, *folders: str) -> list[str]:
    """The command that runs the tests marked `cuda`, or with `is_tiny` collects them."""
    command = [sys.executable, "-m", "pytest", "-m", "cuda", *test_files(*folders)]
    if is_tiny:
        return [*command, "--collect-only"]
    limit = ["--timeout=120"] if importlib.util.find_spec("pytest_timeout") else []
    return [*command, "-n", str(TEST_PROCESSES), "--dist", "worksteal", "--durations=15", *limit]


def commands(part: str, is_tiny: bool) -> Iterator[tuple[float, list[str]]]:
    """(share of the time that is left which it may take, command) in their order."""
    train = [
        sys.executable,
        "benchmarks/train.py",
        *(["--tiny", "--steps=1", f"--variants={REHEARSED}"] if is_tiny else []),
    ]
    if part == "kernels":
        sizes = ["--tokens=48", "--vocab=512", "--width=64", "--no-compile", "--no-plot", "--repeats=1"]
        yield 0.5, tests(is_tiny, "kernels")
        yield 1.0, [sys.executable, "benchmarks/connector.py", *(sizes if is_tiny else ["--device=cuda"])]
    elif part == "train":
        yield 0.5, tests(is_tiny, "model", "data_pipeline", "training", "evaluation")
        yield 1.0, [*train, *([] if is_tiny else ["--variants=all"])]
    else:
        yield 0.5, [sys.executable, "benchmarks/row_kernels.py", *(["--tiny"] if is_tiny else [])]
        yield 1.0, [*train, "--profile", "--name=profile"]


def run(command: list[str], seconds: float, environment: dict[str, str], log: Path) -> int:
    """Run a command, at most so long, its output also to the end of a file. Its exit code; 124 at the limit."""
    began = time.monotonic()
    with log.open("a", encoding="utf-8") as file:

        def say(line: str) -> None:
            for stream in (sys.stdout, file):
                stream.write(line)
                stream.flush()

        say(f"$ {shlex.join(['python', *command[1:]])}\n")
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, text=True, errors="replace", start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        ended = threading.Event()

        def stop() -> None:
            if not ended.wait(seconds):
                os.killpg(process.pid, signal.SIGKILL)

        threading.Thread(target=stop, daemon=True).start()
        assert process.stdout is not None
        for line in process.stdout:
            say(line)
        code = process.wait()
        ended.set()
        took = time.monotonic() - began
        code = 124 if code == -signal.SIGKILL and took >= seconds else abs(code)
        say(f"# exit code {code} after {took:.0f} s\n\n")
    return code


def main(words: Iterable[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["kernels", "train", "profile"])
    parser.add_argument("--tiny", action="store_true", help="rehearse without a GPU")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the results")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="that this part may take")
    arguments = parser.parse_args(None if words is None else list(words))
    lacking = missing()
    if lacking:
        print(f"needed here: pip install {shlex.join(lacking)}")
        return 2
    import torch

    if not arguments.tiny and not torch.cuda.is_available():
        print("PyTorch sees no CUDA GPU here; --tiny rehearses without one")
        return 2
    results = arguments.results.resolve()
    results.mkdir(parents=True, exist_ok=True)
    log = results / f"gpu-check-{arguments.part}.log"
    log.unlink(missing_ok=True)
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(paths), "BENCHMARK_RESULTS": str(results), "PYTHONUNBUFFERED": "1"
    }  # fmt: skip
    deadline, worst = time.monotonic() + arguments.seconds, 0
    for share, command in commands(arguments.part, arguments.tiny):
        left = deadline - time.monotonic()
        if "benchmarks/train.py" in command:
            command = [*command, f"--budget={0.7 * left:.0f}"]  # then no variant is begun
        worst = max(worst, run(command, share * left, environment, log))
    return worst


if __name__ == "__main__":
    sys.exit(main())
