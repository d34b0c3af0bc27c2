"""Arguments that several commands share: the parser, whose errors are one line, and the types of values."""

from __future__ import annotations

import argparse
import math
import re
from argparse import ArgumentTypeError
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from alignvlm.cli.output import one_line
from alignvlm.errors import UserError

if TYPE_CHECKING:
    from data_pipeline.preparation.engines import Engine

MAX_COUNT = 2**31 - 1
MAX_PROCESSES = 1024
"""Processes that one command may start on this machine."""


class Parser(argparse.ArgumentParser):
    """An ArgumentParser, also of the subcommands, that names a mistake in one line and points to the help."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options | {"exit_on_error": False})
        self.register("action", "parsers", _Commands)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse; UserError for a value that its argument does not take."""
        try:
            return super().parse_known_args(args, namespace)
        except argparse.ArgumentError as error:
            named = f"{error.argument_name} {error.message}" if error.argument_name else error.message
            raise UserError(f"{named}; see {self.prog} --help") from error

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"alignvlm: {one_line(message)}; see {self.prog} --help\n")


class _Commands(argparse._SubParsersAction):
    """The commands that a word chooses between. The help of each begins with its line in the list of all."""

    def add_parser(self, name: str, **options: Any) -> Any:
        if text := options.get("help", ""):
            options.setdefault("description", f"{text[0].upper()}{text[1:]}.")
        return super().add_parser(name, **options)


def add_recipe(parser: argparse.ArgumentParser, example: str = "seed=1") -> None:
    """Add `RECIPE [key=value …]`; `example` is an override that makes sense for the command.

    The parsed arguments have `recipe` and `overrides`, as `load_recipe` takes them.
    """
    parser.add_argument("recipe", type=word, metavar="RECIPE", help="name of a built-in recipe, or path of a YAML file")
    add_overrides(parser, f"settings to change, such as {example}")


def add_overrides(parser: argparse.ArgumentParser, text: str) -> None:
    """Add `[key=value …]`."""
    parser.add_argument("overrides", nargs="*", type=word, default=[], metavar="key=value", help=text)


def add_engine(parser: argparse.ArgumentParser) -> None:
    """Add the options that say which processes and machines do the work; `choose_engine` reads them."""
    parser.add_argument(
        "--processes",
        type=processes,
        metavar="N",
        help="processes on this machine (default: one per core; two per core when writing to a bucket)",
    )
    parser.add_argument(
        "--tasks", type=positive, metavar="N", help="share the work among N jobs, each of which runs this command"
    )
    parser.add_argument("--task", type=count, metavar="I", help="which of the N jobs this one is, from 0")
    parser.add_argument("--finish", action="store_true", help="after all jobs: check their work and write the manifest")
    parser.add_argument(
        "--ray",
        type=word,
        nargs="?",
        const="local",
        metavar="ADDRESS",
        help="use a Ray cluster (default: one that is started here)",
    )


def choose_engine(args: argparse.Namespace) -> Engine:
    """Who does the work. Raises UserError for options that do not go together."""
    from data_pipeline.preparation.engines import Local, Ray

    if (args.tasks is None) != (args.task is None):
        raise UserError("--tasks N and --task I belong together: N jobs run the command, each with its I from 0")
    if args.task is not None and args.task >= args.tasks:
        raise UserError(f"--task {args.task}: with --tasks {args.tasks} the jobs are 0 to {args.tasks - 1}")
    if sum((args.tasks is not None, args.finish, args.ray is not None)) > 1:
        raise UserError("--tasks, --finish and --ray are three ways: give one of them")
    return Local(args.processes) if args.ray is None else Ray(args.ray)


def columns(text: str) -> dict[str, str]:
    """NAME=COLUMN,…: names of a layout and what a file calls them."""
    pairs = [part.partition("=") for part in word(text).split(",")]
    if not all(name and column for name, _, column in pairs):
        raise ArgumentTypeError(f"{text!r}: must be NAME=COLUMN, such as images=pages,messages=chat")
    return {name: column for name, _, column in pairs}


def positive(text: str) -> int:
    """A whole number from 1."""
    return _whole(text, 1, MAX_COUNT)


def count(text: str) -> int:
    """A whole number from 0."""
    return _whole(text, 0, MAX_COUNT)


def port(text: str) -> int:
    """A TCP port; 0 is any free one."""
    return _whole(text, 0, 65535)


def processes(text: str) -> int:
    """How many processes to start."""
    return _whole(text, 1, MAX_PROCESSES)


def positive_number(text: str) -> float:
    """A finite number above 0."""
    number = _number(text)
    if not 0 < number < math.inf:
        raise ArgumentTypeError(f"{text}: must be a finite number above 0")
    return number


def fraction(text: str) -> float:
    """A number above 0 and at most 1."""
    number = _number(text)
    if not 0 < number <= 1:
        raise ArgumentTypeError(f"{text}: must be above 0 and at most 1")
    return number


def word(text: str) -> str:
    """Text that is not empty and has no NUL, which no name, path or command can hold."""
    if not text.strip():
        raise ArgumentTypeError(f"{text!r}: must not be empty")
    if "\0" in text:
        raise ArgumentTypeError(f"{text!r}: must not hold a NUL character")
    return text


def path(text: str) -> Path:
    """A path, whether it exists or not."""
    return Path(word(text))


def folder(text: str) -> Path:
    """An existing folder."""
    found = path(text)
    if not found.is_dir():
        raise ArgumentTypeError(f"{text}: {'this is a file, not a folder' if found.exists() else 'no such folder'}")
    return found


def file(text: str) -> Path:
    """An existing file, or a pipe or the like."""
    found = path(text)
    if found.is_dir():
        raise ArgumentTypeError(f"{text}: this is a folder, not a file")
    if not found.exists():
        raise ArgumentTypeError(f"{text}: no such file")
    return found


def hosts(text: str) -> str:
    """A number of hosts, or MIN:MAX."""
    limits = [positive(part) for part in text.split(":")]
    if len(limits) > 2 or limits != sorted(limits):
        raise ArgumentTypeError(f"{text}: must be a number of hosts, or MIN:MAX")
    return text


def endpoint(text: str) -> str:
    """HOST or HOST:PORT."""
    match = re.fullmatch(r"(?:\[[0-9a-fA-F:.]+\]|[\w.-]+)(?::([0-9]{1,5}))?", text)
    if match is None or not 0 < int(match[1] or 1) < 65536:
        raise ArgumentTypeError(f"{text[:80]!r}: must be HOST or HOST:PORT, such as host1:29400")
    return text


def web_address(text: str) -> str:
    """http://HOST[:PORT] or https://, with a path or without; a `/v1` or `/` at its end is left out."""
    found = re.fullmatch(r"https?://(?:[^\s/@]+@)?(?:\[[0-9a-fA-F:.]+\]|[\w.-]+)(?::[0-9]{1,5})?(?:/[^\s?#]*)?", text)
    if found is None:
        raise ArgumentTypeError(f"{text[:80]!r}: must be the address of a server, such as http://127.0.0.1:8000")
    return text.rstrip("/").removesuffix("/v1").rstrip("/")


def device_resource(text: str) -> tuple[str, int]:
    """NAME or NAME=NUMBER of a Kubernetes resource, such as rdma/hca_shared_devices_a."""
    match = re.fullmatch(
        r"([a-z0-9]([-a-z0-9.]*[a-z0-9])?/[A-Za-z0-9]([-\w.]{0,61}[A-Za-z0-9])?)(?:=(\d+))?", text, re.ASCII
    )
    if match is None:
        raise ArgumentTypeError(f"{text[:80]!r}: must be the name of a resource, such as rdma/hca_shared_devices_a")
    return match[1], positive(match[4] or "1")


def _whole(text: str, lowest: int, highest: int) -> int:
    try:
        number = int(text)
    except ValueError as error:
        raise ArgumentTypeError(f"{text[:80]!r}: must be a whole number") from error
    if number < lowest:
        raise ArgumentTypeError(f"{number}: must be at least {lowest}")
    if number > highest:
        raise ArgumentTypeError(f"{text}: must be at most {highest}")
    return number


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise ArgumentTypeError(f"{text[:80]!r}: must be a number") from error
