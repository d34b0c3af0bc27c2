"""`alignvlm launch`: what it prints is what would run, and what cannot work is refused before it waits in a queue."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import pytest

from alignvlm.config import load_recipe
from alignvlm.errors import UserError
from alignvlm.launch.slurm import seconds
from tests.fixtures.command import Command
from tests.jobs import ROOT, TINY


def test_slurm_dry_run_prints_the_whole_submission(command: Command) -> None:
    output = command(
        "launch", "slurm", TINY, "seed=3", "--nodes=2", "--gpus-per-node=2", "--time=1-00:00:00",
        "--partition=a b", "--sbatch=--qos=low", "--sbatch=--exclusive", "--dry-run",
    )  # fmt: skip
    folder, line, *_ = output.splitlines()
    assert folder == "mkdir -p runs/tiny/logs"
    words = shlex.split(line)
    script = ROOT / "launch" / "slurm" / "train.sbatch"
    assert words == [
        f"ALIGNVLM_PYTHON={sys.executable}", "ALIGNVLM_LOGS=runs/tiny/logs", "sbatch", "--parsable", "--job-name=tiny",
        "--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=2", "--cpus-per-task=2", "--time=1-00:00:00",
        "--signal=B:USR1@300", "--partition=a b", "--output=runs/tiny/logs/slurm-%j.log", "--qos=low", "--exclusive",
        str(script), str(TINY), "seed=3",
    ]  # fmt: skip
    assert script.read_text() in output


def test_slurm_submits_what_the_dry_run_printed(
    command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A stand-in for sbatch records its arguments and environment."""
    sbatch = tmp_path / "sbatch"
    sbatch.write_text('#!/bin/sh\nprintf "%s\\n" "$ALIGNVLM_PYTHON" "$ALIGNVLM_LOGS" "$@" >submitted\necho "42;here"\n')
    sbatch.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    arguments = ["slurm", TINY, "--gpus-per-node=0", "--processes-per-node=2"]
    line = command("launch", *arguments, "--dry-run").splitlines()[1]
    output = command("launch", *arguments)
    assert "submitted job 42" in output
    python, logs, *words = (tmp_path / "submitted").read_text().splitlines()
    assert [f"ALIGNVLM_PYTHON={python}", f"ALIGNVLM_LOGS={logs}", "sbatch", *words] == shlex.split(line)
    assert (tmp_path / "runs" / "tiny" / "logs").is_dir()


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--nodes=3", "--gpus-per-node=1"], "stages.connector.global_batch_packs is 4, which 3 ranks"),
        (["--gpus-per-node=2", "--processes-per-node=1"], "one process per GPU"),
        (["--gpus-per-node=2", "--time=10"], "lower --signal-seconds to at most 270"),
        (["--gpus-per-node=2", "--time=soon"], "--time 'soon' is not a time"),
        (["--gpus-per-node=2", "--signal-seconds=70000"], "must be from 1 to 65535"),
        (["--gpus-per-node=2"], "sbatch is not on the PATH"),
    ],
)
def test_slurm_refuses_in_one_line(
    arguments: list[str], part: str, command: Command,
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    error = command("launch", "slurm", TINY, *arguments, code=2)
    assert part in error
    assert error.count("\n") == 1


def test_stages_that_are_finished_need_not_fit(
    command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A run goes on with another number of processes."""
    monkeypatch.chdir(tmp_path)
    arguments = ["launch", "torchrun", TINY, "--nodes=3", "--processes-per-node=1", "--dry-run"]
    for stage in load_recipe(str(TINY)).stages.values():
        assert f"stages.{stage.name}.global_batch_packs is 4, which 3 ranks" in command(*arguments, code=2)
        Path(f"runs/tiny/{stage.number}-{stage.name}/export").mkdir(parents=True)
    assert "torchrun.sh" in command(*arguments)


@pytest.mark.parametrize(
    ("time", "expected"),
    [("90", 5400), ("2:30", 150), ("1:02:03", 3723), ("2-1", 176400), ("2-1:30", 178200), ("1-0:0:5", 86405)],
)
def test_slurm_times(time: str, expected: int) -> None:
    assert seconds(time) == expected
    assert seconds("UNLIMITED") is None


@pytest.mark.parametrize("time", ["", "1h", "1:2:3:4", "-5"])
def test_what_is_no_slurm_time(time: str) -> None:
    with pytest.raises(UserError, match="not a time"):
        seconds(time)


def test_other_launchers_print_the_script_they_become(command: Command) -> None:
    python = f"ALIGNVLM_PYTHON={sys.executable}"
    line = command("launch", "torchrun", TINY, "seed=3", "--nodes=2", "--rendezvous=a:1", "--dry-run")
    script = str(ROOT / "launch" / "torchrun.sh")
    assert shlex.split(line) == [
        python, "ALIGNVLM_NODES=2", "ALIGNVLM_RENDEZVOUS=a:1", "bash", script, str(TINY), "seed=3",
    ]  # fmt: skip
    line = command("launch", "hosts", TINY, "--hostfile=h", "--node-rank=1", "--dry-run")
    script = str(ROOT / "launch" / "deepspeed_hosts.sh")
    assert shlex.split(line) == [python, "ALIGNVLM_NODE_RANK=1", "bash", script, "h", str(TINY)]
    line = command("launch", "local", TINY, "--dry-run")
    assert shlex.split(line) == [python, "bash", str(ROOT / "launch" / "local.sh"), str(TINY)]
    assert "unknown" in command("launch", "local", TINY, "sede=3", "--dry-run", code=2)
