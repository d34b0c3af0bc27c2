"""What only a GPU can show, in parts of less than nine minutes each.

    python scripts/gpu_check.py quick          what matters most, in less than six minutes: tests, attention, where a
                                               step's time goes, how large the operator's blocks should be
    python scripts/gpu_check.py kernels        tests of the kernels; the ALIGN operator against its alternatives
    python scripts/gpu_check.py train          tests of the model, training and evaluation; training steps in variants
    python scripts/gpu_check.py profile        where the time goes: the row kernels, steps of the 1B and the 8B recipe
    python scripts/gpu_check.py train --tiny   the same at tiny sizes, without a GPU; of the tests, the collection only

alignvlm need not be installed. What is missing is named in one line, with what to download where there is a network.
A command that fails, or that takes longer than is left, does not keep the next one from running; the exit code is the
worst one. Logs and results are written as they come, to benchmarks/results or the folder that --results names.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SECONDS = {"quick": 345, "kernels": 520, "train": 520, "profile": 520}
"""Of a part, all its commands together."""
REHEARSAL = 4
"""Times as long may a rehearsal take: a busy machine without a GPU is slow, and its time is cheap."""
NOT_NEEDED = {"mlflow", "nvidia-cutlass-dsl-libs-cu12"}
"""Of what is required: nothing here tracks a run, and PyTorch comes for CUDA 13."""
TESTING = ("triton", "pytest", "pytest-xdist")
REHEARSED, REHEARSED_8B = "default,connector-mlp,zero2,compile-vision", "attention-flash"
"""Variants of a training step with --tiny, each once; flash-attn needs a GPU: it fails as expected."""
REHEARSED_QUICKLY = "zero1,attention-flash4"
QUICK = ",".join("no-checkpointing" + more for more in (
    "+zero1", "+zero1+attention-flash4", "", "+no-shortcuts", "+zero1+compile-vision+compile-language+layers-unfused",
))  # fmt: skip
"""The first with a profile, which takes longer than three variants without."""
EIGHT_B = "default,attention-flash4,connector-mlp"
SMALL_BLOCKS = ("--tokens=48", "--vocab=512", "--width=64", "--repeats=1", "--blocks", "100", "256")
LEFT_OUT = ("liger-kernel>=0.8", "flash-attn-4>=4.0.0b36")
"""Variants of a step ask for them; without them the others are measured."""
TESTED = ("--no-deps", "--constraint=constraints.txt")
"""Options of pip for these packages alone, in the versions that were tested together."""
NO_WHEELS = ("deepspeed",)
"""Published as sources only; without a compiler at hand they become pure Python."""
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
"""pip takes a wheel for one of these names, not for what an older system would also run."""
BROUGHT = {
    "accelerate": "huggingface_hub numpy packaging psutil pyyaml safetensors",
    "deepspeed": "einops hjson msgpack ninja numpy packaging psutil py-cpuinfo pydantic tqdm",
    "peft": "accelerate huggingface_hub numpy packaging psutil pyyaml safetensors tqdm transformers",
    "pydantic": "annotated-types pydantic-core typing-extensions typing-inspection",
    "pytest": "iniconfig packaging pluggy pygments",
    "pytest-xdist": "execnet pytest",
    "rich": "markdown-it-py pygments",
    "markdown-it-py": "mdurl",
    "webdataset": "braceexpand numpy pyyaml",
    "flash-attn-4": "apache-tvm-ffi>=0.1.11,<0.2 einops nvidia-cutlass-dsl quack-kernels>=0.5.3 torch-c-dlpack-ext",
    "nvidia-cutlass-dsl": " ".join(f"nvidia-cutlass-dsl-libs-{part}" for part in ("base", "core", "cu13")),
    "nvidia-cutlass-dsl-libs-base": "cuda-bindings protobuf",
}
"""What packages bring that a machine with PyTorch and transformers may lack: one that is not there cannot say it."""
COMPILED_ONCE = {
    "FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED": "1",
    "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR": str(Path(tempfile.gettempdir()) / "flash-attn-4-kernels"),
}
"""flash-attn-4 keeps its compiled kernels: 5 s of CPU time for heads of 64 and 10 s for 128, else in every process."""
LAST_SECONDS = 5.0
"""That a command has to end in when its time is over."""
TEST_PROCESSES = 8
"""They share the GPU; the tests are small, and much of their time is the host's."""


def missing(wanted: Iterable[str] | None = None) -> list[str]:
    """Requirements that are not fulfilled here, with all that they bring: of pyproject.toml and the tests, or these."""
    from packaging.requirements import Requirement

    if wanted is None:
        project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        wanted = (*project["dependencies"], *project["optional-dependencies"]["train"], *TESTING)
    found: dict[str, Any] = {}
    seen, left = set(), list(wanted)
    while left:
        text = left.pop(0)
        requirement = Requirement(text)
        name = requirement.name
        if text in seen or name in NOT_NEEDED or not _applies(requirement):
            continue
        seen.add(text)
        try:
            is_there = requirement.specifier.contains(version(name), prereleases=True)
            brought = requires(name) or ()
        except PackageNotFoundError:
            is_there, brought = False, BROUGHT.get(name, "").split()
        if not is_there:
            found[name] = found.get(name, requirement.specifier) & requirement.specifier
        left += [other for other in brought if _applies(Requirement(other))]
    return [f"{name}{specifier}" for name, specifier in found.items()]


def _applies(requirement: Any) -> bool:
    """Whether a requirement holds on this machine, extras aside."""
    return requirement.marker is None or requirement.marker.evaluate({"extra": ""})


def how_to_get(lacking: list[str]) -> str:
    """Commands for a machine with a network, and for this one."""
    sources = [text for text in lacking if text.startswith(NO_WHEELS)]
    wheels = [text for text in lacking if text not in sources]
    python = ".".join(map(str, sys.version_info[:2]))
    commands = []
    if wheels:
        options = ["--only-binary=:all:", f"--python-version={python}", *(f"--platform={name}" for name in PLATFORMS)]
        commands.append(shlex.join(["pip", "download", *TESTED, *options, "--dest=wheels", *wheels]))
    if sources:
        commands.append(shlex.join(["pip", "wheel", *TESTED, "--wheel-dir=wheels", *sources]))
    return " && ".join(commands) + "; here: pip install --no-deps wheels/*.whl"


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
    connector = [sys.executable, "benchmarks/connector.py", *([] if is_tiny else ["--device=cuda"])]
    if part == "quick":
        yield 0.4, tests(is_tiny, "model", "training", "evaluation", "data_pipeline")
        yield 0.25, [sys.executable, "benchmarks/attention.py", *(["--tiny"] if is_tiny else [])]
        if is_tiny:
            train[-1] = f"--variants={REHEARSED_QUICKLY}"
        quick = [] if is_tiny else [f"--variants={QUICK}", "--steps=3"]
        yield 0.75, [*train, *quick, "--profile=1", "--name=quick"]
        tokens = ["--repeats=3", "--blocks", "--tokens", "16384", "17496", "4096", "8192", "32768"]
        yield 0.6, [*connector, *(SMALL_BLOCKS if is_tiny else tokens)]
        yield 1.0, tests(is_tiny, "kernels")
    elif part == "kernels":
        sizes = ["--tokens=48", "--vocab=512", "--width=64", "--no-compile", "--repeats=1"]
        yield 0.5, tests(is_tiny, "kernels")
        yield 1.0, [sys.executable, "benchmarks/connector.py", *(sizes if is_tiny else ["--device=cuda"])]
    elif part == "train":
        yield 0.5, tests(is_tiny, "model", "data_pipeline", "training", "evaluation")
        yield 1.0, [*train, *([] if is_tiny else ["--variants=all"])]
    else:
        yield 0.3, [sys.executable, "benchmarks/row_kernels.py", *(["--tiny"] if is_tiny else [])]
        yield 0.5, [*train, "--profile", "--name=profile"]
        large = (
            [*train[:-1], f"--variants={REHEARSED_8B}"] if is_tiny else [*train, "--model=8b", f"--variants={EIGHT_B}"]
        )
        yield 0.8, [*large, "--profile", "--name=8b"]
        wide = ["--blocks", "--tokens", "16384", "4096", "--width", "4096"]
        yield 1.0, [*connector, *(SMALL_BLOCKS if is_tiny else wide), "--name=connector-blocks-4096"]


def run(command: list[str], seconds: float, environment: dict[str, str], log: Path) -> int:
    """Run a command, at most so long, its output also to the end of a file. Its exit code; 124 at the limit.

    There it is asked to end first: training steps have written random weights, to memory where there is a lot of it.
    """
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
                os.killpg(process.pid, signal.SIGTERM)
                if not ended.wait(LAST_SECONDS):
                    os.killpg(process.pid, signal.SIGKILL)

        threading.Thread(target=stop, daemon=True).start()
        assert process.stdout is not None
        for line in process.stdout:
            say(line)
        code = process.wait()
        ended.set()
        took = time.monotonic() - began
        code = 124 if took >= seconds else abs(code)
        say(f"# exit code {code} after {took:.0f} s\n\n")
    return code


def main(words: Iterable[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=list(SECONDS))
    parser.add_argument("--tiny", action="store_true", help="rehearse without a GPU")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the results")
    parser.add_argument("--seconds", type=float, help="that this part may take")
    arguments = parser.parse_args(None if words is None else list(words))
    lacking = missing()
    if lacking:
        print(f"needed here: {shlex.join(lacking)}; where there is a network: {how_to_get(lacking)}")
        return 2
    if left_out := missing(LEFT_OUT):
        print(f"left out without {shlex.join(left_out)}; where there is a network: {how_to_get(left_out)}")
    if not arguments.tiny:
        import torch

        if not torch.cuda.is_available():
            print("PyTorch sees no CUDA GPU here; --tiny rehearses without one")
            return 2
    results = arguments.results.resolve()
    results.mkdir(parents=True, exist_ok=True)
    log = results / f"gpu-check-{arguments.part}.log"
    log.unlink(missing_ok=True)
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | COMPILED_ONCE | {
        "PYTHONPATH": os.pathsep.join(paths), "BENCHMARK_RESULTS": str(results), "PYTHONUNBUFFERED": "1"
    }  # fmt: skip
    limit = arguments.seconds or SECONDS[arguments.part] * (REHEARSAL if arguments.tiny else 1)
    deadline, worst = time.monotonic() + limit, 0
    for share, command in commands(arguments.part, arguments.tiny):
        seconds = share * (deadline - time.monotonic())
        if "benchmarks/train.py" in command:
            command = [*command, f"--budget={0.7 * seconds:.0f}"]  # then no variant is begun
        worst = max(worst, run(command, seconds, environment, log))
    return worst


if __name__ == "__main__":
    sys.exit(main())
