"""The `sbatch` command of a recipe: options, environment and checks. What runs is launch/slurm/train.sbatch."""

from __future__ import annotations

import hashlib
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from alignvlm.config.schema import Recipe
from alignvlm.errors import UserError
from alignvlm.launch.scripts import check_world, find_launcher

TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<rest>\d+(?::\d+){0,2})")
MAX_SIGNAL_SECONDS = 65535


@dataclass(frozen=True)
class SlurmJob:
    """One submission."""

    recipe_name: str
    """The recipe as the user wrote it: a name or a path."""
    overrides: Sequence[str]
    nodes: int
    gpus_per_node: int
    """0 trains on CPUs."""
    processes_per_node: int
    cpus_per_process: int
    time: str
    """Limit of one attempt, in Slurm's notation."""
    signal_seconds: int
    """How long before the time limit the job is signalled to save; Slurm may signal up to a minute earlier."""
    partition: str | None = None
    account: str | None = None
    options: Sequence[str] = ()
    """More options of sbatch, as they are."""

    def check(self, recipe: Recipe) -> None:
        """Find everything that would make the job fail or requeue forever, before it waits in a queue.

        Raises:
            UserError: with the option or the key to change.
        """
        check_world(recipe, self.nodes * self.processes_per_node, cuda=self.gpus_per_node > 0)
        if self.gpus_per_node and self.processes_per_node != self.gpus_per_node:
            raise UserError(
                f"--processes-per-node is {self.processes_per_node}, --gpus-per-node {self.gpus_per_node}: "
                "there is one process per GPU; leave --processes-per-node out"
            )
        limit = seconds(self.time)
        if not 0 < self.signal_seconds <= MAX_SIGNAL_SECONDS:
            raise UserError(f"--signal-seconds is {self.signal_seconds}, must be from 1 to {MAX_SIGNAL_SECONDS}")
        if limit is not None and limit < 2 * self.signal_seconds + 60:
            raise UserError(
                f"--time {self.time} leaves little time to train: the job is signalled to save "
                f"{self.signal_seconds} s before. Give it more time, or lower --signal-seconds to at most "
                f"{max(1, (limit - 60) // 2)}"
            )

    def environment(self, recipe: Recipe) -> dict[str, str]:
        """Variables of launch/slurm/train.sbatch."""
        return {"ALIGNVLM_PYTHON": sys.executable, "ALIGNVLM_LOGS": str(logs_folder(recipe))}

    def command(self, recipe: Recipe) -> list[str]:
        """The `sbatch` command."""
        script = str(find_launcher("slurm/train.sbatch"))
        options = self.stated(recipe.name, logs_folder(recipe) / "slurm-%j.log")
        return ["sbatch", "--parsable", *options, script, self.recipe_name, *self.overrides]

    def stated(self, name: str, log: Path) -> list[str]:
        """The options of `sbatch` for a job or an array of this shape."""
        options = {
            "job-name": name,
            "nodes": self.nodes,
            "ntasks-per-node": self.processes_per_node,
            "gpus-per-node": self.gpus_per_node or None,
            "cpus-per-task": self.cpus_per_process,
            "time": self.time,
            "signal": f"B:USR1@{self.signal_seconds}",
            "partition": self.partition,
            "account": self.account,
            "output": log,
        }
        return [*(f"--{name}={value}" for name, value in options.items() if value is not None), *self.options]

    def shell_line(self, recipe: Recipe) -> str:
        """Environment and command as one line for a shell."""
        variables = [f"{name}={shlex.quote(value)}" for name, value in self.environment(recipe).items()]
        return " ".join([*variables, shlex.join(self.command(recipe))])


@dataclass(frozen=True)
class SlurmArray:
    """Runs as tasks of one array, each of which is requeued by itself until it is finished."""

    shape: SlurmJob
    """How the job of one run looks; its recipe and overrides are not used."""
    name: str
    folder: Path
    """Holds the file of runs and the logs of the tasks."""
    runs: Sequence[tuple[Recipe, Sequence[str]]]
    """The recipe of each run, and the words of `alignvlm train` for it."""

    @property
    def lines(self) -> str:
        """One line per run, as launch/slurm/study.sbatch reads it."""
        return "".join(shlex.join([str(logs_folder(recipe)), *words]) + "\n" for recipe, words in self.runs)

    @property
    def file(self) -> Path:
        """The file of runs, named by its lines: a task reads it at every start, also after another submission."""
        return self.folder / f"runs-{hashlib.sha256(self.lines.encode()).hexdigest()[:8]}.txt"

    def command(self) -> list[str]:
        """The `sbatch` command."""
        options = [f"--array=0-{len(self.runs) - 1}", *self.shape.stated(self.name, self.folder / "slurm-%A-%a.log")]
        scripts = [str(find_launcher(f"slurm/{script}.sbatch")) for script in ("study", "train")]
        return ["sbatch", "--parsable", *options, *scripts, str(self.file)]


def logs_folder(recipe: Recipe) -> Path:
    """Logs of all attempts lie in the run's folder, one file per rank."""
    return Path(recipe.runs) / recipe.name / "logs"


def seconds(time: str) -> int | None:
    """A Slurm time limit in seconds (minutes, m:s, h:m:s, d-h, d-h:m, d-h:m:s); None when there is none.

    Raises:
        UserError: not a time.
    """
    if time.upper() in {"UNLIMITED", "INFINITE"}:
        return None
    match = TIME.fullmatch(time)
    if match is None:
        raise UserError(f"--time {time!r} is not a time as Slurm writes it, such as 90 (minutes), 12:00:00, 2-00:00:00")
    numbers = [int(number) for number in match["rest"].split(":")]
    if match["days"] is not None:
        hours, minutes, rest = [*numbers, 0, 0][:3]
        return int(match["days"]) * 86400 + hours * 3600 + minutes * 60 + rest
    hours, minutes, rest = {1: [0, *numbers, 0], 2: [0, *numbers], 3: numbers}[len(numbers)]
    return hours * 3600 + minutes * 60 + rest
