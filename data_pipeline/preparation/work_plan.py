"""What is to be written, cut by input before anything runs: names and contents of shards depend on nothing else.

`write-plan.json` in the folder of the new shards is the plan. All processes of all machines find the same one; the
first makes it.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any

from data_pipeline.errors import DataError
from data_pipeline.files import has_shape, read_needed
from data_pipeline.importers.records import Dataset, Reading
from data_pipeline.importers.rows.far_path import AnyPath
from data_pipeline.importers.rows.files import READERS
from data_pipeline.parallel import pool
from data_pipeline.preparation.target import PLAN, Target
from data_pipeline.progress import Progress, silent

PLAN_VERSION = 1
_ENDS = 64 * 1024
"""Bytes of a file's begin and end that tell it from another one of the same size."""
_NAMED = 20
"""Damaged files that an error names; each keeps all shards from being cut, so they are named at once."""
_SHAPE = {"version": int, "reading": dict, "files": [[str]], "tasks": [[int]]}


@dataclass(frozen=True)
class Input:
    """A file with rows: its path in the dataset, what keys begin with, and "size:digest of its ends"."""

    name: str
    prefix: str
    content: str


@dataclass(frozen=True)
class Task:
    """One shard, and the rows that go into it."""

    shard: str
    file: AnyPath
    input: Input
    begin: int
    end: int
    offset: int


@dataclass(frozen=True)
class WorkPlan:
    """All shards of a folder."""

    dataset: Dataset
    inputs: list[Input]
    ranges: list[list[int]]
    """[number of the input, first row, row after the last, byte of the first] of every shard."""

    @property
    def num_rows(self) -> int:
        return sum(end - begin for _, begin, end, _ in self.ranges)

    def tasks(self) -> list[Task]:
        """One task per shard, in the order of the shards."""
        width = max(6, len(str(len(self.ranges) - 1)))
        return [
            Task(f"{number:0{width}d}.tar", self.dataset.files[file], self.inputs[file], begin, end, offset)
            for number, (file, begin, end, offset) in enumerate(self.ranges)
        ]

    def content(self) -> dict[str, Any]:
        """The plan as JSON; where the dataset and its images lie is not part of it."""
        reading = asdict(self.dataset.reading)
        del reading["images"]
        files = [[each.name, each.prefix, each.content] for each in self.inputs]
        return {"version": PLAN_VERSION, "reading": reading, "files": files, "tasks": self.ranges}

    @property
    def fingerprint(self) -> str:
        """16 hex digits of everything that decides what is written."""
        return hashlib.sha256(json.dumps(self.content(), sort_keys=True).encode()).hexdigest()[:16]

    def check(self, dataset: Dataset, rows: int, target: Target) -> None:
        """Raises DataError when the plan, which lies in `target`, is that of another command."""
        most = max(end - begin for _, begin, end, _ in self.ranges)
        asked = WorkPlan(dataset, [], []).content()["reading"]
        if self.content()["reading"] != asked or most > rows:
            raise DataError(
                f"{target} holds shards of another dataset, or of other arguments: finish these with the same "
                "command, or delete the folder"
            )

    def to_bytes(self) -> bytes:
        """The content of write-plan.json."""
        content = self.content()
        lines = {name: ",\n  ".join(json.dumps(row) for row in content.pop(name)) for name in ("files", "tasks")}
        body = "".join(f',\n "{name}": [\n  {text}\n ]' for name, text in lines.items())
        return f"{json.dumps(content, indent=1)[:-2]}{body}\n}}\n".encode(errors="backslashreplace")


def make_plan(
    dataset: Dataset, rows: int, *, num_processes: int | None = None, progress: Progress = silent
) -> WorkPlan:
    """Cut a dataset into shards of at most `rows` rows. Raises DataError that names all files that cannot be read."""
    inputs, ranges, damaged = [], [], dict[str, DataError]()
    names, prefixes, files = dataset.names(), dataset.prefixes(), dataset.files
    with pool(num_processes, len(files)) as executor, progress("look at the files", len(files)) as advance:
        run = map if executor is None else executor.map
        for number, found in enumerate(run(_look, files, [rows] * len(files))):
            if isinstance(found, DataError):
                damaged[names[number]] = found
            else:
                inputs.append(Input(names[number], prefixes[number], found[0]))
                ranges += [[number, *each] for each in found[1]]
            advance(1)
    if len(damaged) > 1:
        some = ", ".join(list(damaged)[:_NAMED]) + (", …" if len(damaged) > _NAMED else "")
        raise DataError(f"{next(iter(damaged.values()))} ({len(damaged)} of {len(files)} files are damaged: {some})")
    if damaged:
        raise next(iter(damaged.values()))
    if not ranges:
        raise DataError(f"{dataset.path}: no rows")
    return WorkPlan(dataset, inputs, ranges)


def shared_plan(
    target: Target, dataset: Dataset, rows: int, *, num_processes: int | None = None, progress: Progress = silent
) -> WorkPlan:
    """The plan of a folder: the one that lies there, or a new one.

    Of a node's processes that begin at once one makes it. Of nodes that write to one object store each may make it, and
    all take the one that came first.

    Raises:
        DataError: the folder holds something else, the plan of another dataset, or of other arguments.
    """
    with target.claim():
        if PLAN not in target.names():
            made = make_plan(dataset, rows, num_processes=num_processes, progress=progress)
            target.create(PLAN, made.to_bytes())
        found = load_plan(target, dataset)
    found.check(dataset, rows, target)
    return found


def load_plan(target: Target, dataset: Dataset) -> WorkPlan:
    """The plan that lies in a folder, for this dataset. Raises DataError when it is damaged."""

    def read(path: str) -> WorkPlan:
        content = json.loads(target.read(PLAN))
        if not has_shape(content, _SHAPE) or content["version"] != PLAN_VERSION:
            raise ValueError("it does not hold what it should")
        reading = Reading(images=dataset.reading.images, **content["reading"])
        inputs = [Input(*each) for each in content["files"]]
        ranges = content["tasks"]
        if not ranges or not all(len(each) == 4 and 0 <= each[0] < len(inputs) for each in ranges):
            raise ValueError("its tasks are damaged")
        if [each.name for each in inputs] != dataset.names():
            raise DataError(f"{path} was planned for other files than {dataset.path} has now; delete the folder")
        return WorkPlan(Dataset(dataset.path, dataset.files, reading), inputs, ranges)

    return read_needed(f"{target}/{PLAN}", read, "delete the folder and write it again")


def content_of(path: AnyPath) -> str:
    """ "size:digest" of a file; the digest covers its two ends. Raises DataError when it cannot be read."""
    try:
        with path.open("rb", buffering=_ENDS) as file:
            size = file.seek(0, 2)
            file.seek(0)
            digest = hashlib.sha256(file.read(_ENDS))
            file.seek(max(0, size - _ENDS))
            digest.update(file.read(_ENDS))
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error
    return f"{size}:{digest.hexdigest()[:16]}"


def _look(path: AnyPath, rows: int) -> tuple[str, list[tuple[int, int, int]]] | DataError:
    try:
        return content_of(path), list(READERS[path.suffix.lower()].cut(path, rows))
    except DataError as error:
        return error
