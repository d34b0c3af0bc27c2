"""The `alignvlm` command: its files parse arguments, call a function and print; heavy imports wait until then."""

from __future__ import annotations

import argparse
import glob
import importlib
import logging
import os
import sys
import time
import warnings
from collections.abc import Sequence

from alignvlm import __version__
from alignvlm.cli.arguments import Parser
from alignvlm.cli.output import PASSING, describe, one_line, output_is_gone, prepare_streams
from alignvlm.errors import UserError
from alignvlm.system.home import ensure_home
from alignvlm.system.ranks import is_rank_0
from data_pipeline.errors import DataError, LoadError, UnreachableError
from data_pipeline.masking import mask

MODULES = (
    "data",
    "training",
    "estimate",
    "evaluation",
    "study",
    "analyze",
    "runs",
    "serving",
    "config",
    "launch",
)
"""Each adds its commands, in the order of the help."""
RANK_0_SECONDS = 10.0
"""How long other ranks wait with a mistake, which rank 0 usually met too."""


def build_parser() -> argparse.ArgumentParser:
    """The whole command line; imports only argparse-level modules."""
    parser = Parser(
        prog="alignvlm",
        description="Train vision-language models with the ALIGN connector, from shards to a served model.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in MODULES:
        importlib.import_module(f"alignvlm.cli.{module}").add_parser(subparsers)
    return parser


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments of a command line. Raises UserError or SystemExit for a mistake."""
    parser = build_parser()
    arguments, rest = parser.parse_known_args(argv)
    if rest:  # argparse takes `key=value` only right after the recipe; users write it anywhere
        if not hasattr(arguments, "overrides") or any(word.startswith("-") or "=" not in word for word in rest):
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        arguments.overrides = [*arguments.overrides, *rest]
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; a user's mistake is one line on stderr and exit code 2, a mistake of ours has its traceback.

    Rank 0 speaks for all; a rank that is still there some seconds later met the mistake alone. A disk that fails is
    one line too, but exit code 1, and a store that does not answer exit code 75: launchers start the job again.
    """
    prepare_streams()
    try:
        try:
            return _run(argv)
        finally:
            sys.stdout.flush()
    except (UserError, DataError) as error:
        return _mistake(error)
    except BrokenPipeError:
        if output_is_gone():  # as in `alignvlm config show quickstart | head`
            return 1
        raise
    except OSError as error:
        message = describe(error)
        if message is None:
            raise
        output_is_gone()
        return _mistake_of_this_rank(message)
    except UnicodeEncodeError as error:
        if error.encoding == "utf-8":
            raise
        return _mistake_of_this_rank(f"{error.object!r} is no name in this locale ({error.encoding}); set PYTHONUTF8=1")
    except KeyboardInterrupt:
        return 130


def _run(argv: Sequence[str] | None) -> int:
    arguments = parse_arguments(argv)
    ensure_home()
    _quiet_libraries()
    _show_warnings()
    from data_pipeline.stores import hub

    with hub.held():  # a command reads each branch of the Hub at one commit
        return int(arguments.handler(arguments) or 0)


def _mistake(error: UserError | DataError) -> int:
    """Say what is wrong; the exit code."""
    cause = error.__cause__
    if isinstance(error, UnreachableError):
        from alignvlm.system.signals import REQUEUE

        _mistake_of_this_rank(str(error))
        return REQUEUE
    if isinstance(error, LoadError):
        return _mistake_of_this_rank(str(error))
    if isinstance(error, DataError) and isinstance(cause, OSError):  # a disk may fail on one host only
        code = _mistake_of_this_rank(str(error))
        return 1 if cause.errno in PASSING else code
    if not is_rank_0():
        time.sleep(RANK_0_SECONDS)  # a launcher ends rank 0 when another rank is gone, with its word unsaid
        return _mistake_of_this_rank(str(error))
    print(f"alignvlm: {one_line(str(error))}", file=sys.stderr)
    return 2


def _mistake_of_this_rank(message: str) -> int:
    rank = f"rank {os.environ['RANK']}: " if "RANK" in os.environ else ""
    print(f"alignvlm: {rank}{one_line(message)}", file=sys.stderr)
    return 2


def _show_warnings() -> None:
    """Warnings of both packages go to stderr, also when a library gives the root logger handlers of its own."""

    class Masked(logging.Formatter):
        """A line without the passwords of URLs in it."""

        def format(self, record: logging.LogRecord) -> str:
            return mask(super().format(record))

    handler = logging.lastResort  # writes to what sys.stderr is at that moment
    assert handler is not None
    handler.setFormatter(Masked("%(levelname)s: %(message)s"))
    for name in ("alignvlm", "data_pipeline"):
        logging.getLogger(name).addHandler(handler)


class _OncePerAddress(logging.Filter):
    """Of a hub that is not reached its client says so six times per file, in two lines each; one is enough."""

    def __init__(self) -> None:
        super().__init__()
        self._said: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        is_new = text not in self._said and not text.startswith("Retrying in ")
        self._said.add(text)
        return is_new


def _quiet_libraries() -> None:
    """Settings that libraries read when they are imported: no bars of theirs inside ours, no search for absent GPUs."""
    logging.getLogger("huggingface_hub.utils._http").addFilter(_OncePerAddress())
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", module=r"PIL\.")  # of odd image files; those that cannot be used are named
    if not glob.glob("/dev/nvidia[0-9]*") and not os.path.exists("/dev/kfd"):
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
