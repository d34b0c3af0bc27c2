"""What commands print under any encoding, into closed pipes and full disks; which exceptions are one line."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from alignvlm import cli
from alignvlm.cli import main
from alignvlm.cli.output import one_line
from data_pipeline.files import must_write
from tests.checkout import ROOT
from tests.fixtures.command import Command

WORDS = "größe → 漢字 \U0001f600"


def alignvlm(command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A shell line in which `alignvlm` is this checkout's."""
    line = f'set -o pipefail; alignvlm() {{ {sys.executable} -m alignvlm "$@"; }}; {command}'
    names = {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "", **environment}
    return subprocess.run(["bash", "-c", line], env=os.environ | names, capture_output=True, text=True)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A recipe whose name and description are in no 8-bit encoding."""
    path = tmp_path / f"{WORDS.split()[0]}.yaml"
    path.write_text(f'extends: quickstart\ndescription: "{WORDS}"\nruns: {tmp_path}\n', encoding="utf-8")
    return path


@pytest.mark.parametrize("encoding", ["ascii", "iso-8859-1"])
def test_text_reaches_a_stream_of_any_encoding(encoding: str, recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for words, said in (
        (["config", "show", str(recipe)], WORDS),
        (["estimate", str(recipe)], "of 80 GiB"),
        (["train", str(recipe), "--dry-run"], "größe"),
        (["config", "check", f"{recipe}→"], "größe"),
        (["launch", "slurm", "--help"], "Slurm"),
    ):
        streams = [io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict") for _ in range(2)]
        monkeypatch.setattr(sys, "stdout", streams[0])
        monkeypatch.setattr(sys, "stderr", streams[1])
        with contextlib.suppress(SystemExit):
            main(words)
        written = b"".join(stream.buffer.getvalue() for stream in streams if not stream.flush())
        assert said.encode(encoding, "backslashreplace") in written, words


def test_the_locale_of_old_systems(recipe: Path) -> None:
    """File names that are not ASCII are read there, and named where they are missing."""
    old = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = f"alignvlm config show *.yaml name=x && alignvlm config show '{WORDS}.yaml'"
    shown = alignvlm(f"cd '{recipe.parent}'; {command}", **old)
    assert "\\u2192" in shown.stdout
    assert "Traceback" not in shown.stderr
    assert shown.stderr.count("\n") == 1


def test_a_reader_that_leaves_is_no_error() -> None:
    done = alignvlm("alignvlm config schema | head -n 1; echo ${PIPESTATUS[1]}; alignvlm config list >&- 2>&-")
    assert done.stdout == "{\n0\n"
    assert done.stderr == ""


@pytest.mark.parametrize("words", ["config schema", "config show quickstart"])
def test_a_full_disk_behind_stdout_is_one_line(words: str) -> None:
    done = alignvlm(f"alignvlm {words} > /dev/full")
    assert (done.returncode, done.stderr) == (2, "alignvlm: cannot write: No space left on device\n")


def raising(error: BaseException) -> Callable[..., int]:
    def run(*_: object) -> int:
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (PermissionError(errno.EACCES, "Permission denied", "runs/x"), 2, "alignvlm: runs/x: Permission denied\n"),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "alignvlm: cannot write: No space left on device\n"),
        (OSError(errno.EXDEV, "no", "a", None, "b"), None, ""),
        (
            OSError("Error no file named model.safetensors\nin x"),
            2,
            "alignvlm: Error no file named model.safetensors in x\n",
        ),
        (FileExistsError(errno.EEXIST, "File exists", "a\nb", None, b"c"), 2, "alignvlm: a b → c: File exists\n"),
        (KeyboardInterrupt(), 130, ""),
        (
            UnicodeEncodeError("ascii", "größe", 2, 4, "ordinal not in range"),
            2,
            "alignvlm: 'größe' is no name in this locale (ascii); set PYTHONUTF8=1\n",
        ),
        (OSError(errno.EIO, "Input/output error", "x"), None, ""),
        (ConnectionResetError(errno.ECONNRESET, "reset"), None, ""),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), None, ""),
        (KeyError("a bug of ours"), None, ""),
        (UnicodeEncodeError("utf-8", "\ud800", 0, 1, "surrogates not allowed"), None, ""),
    ],
)
def test_what_a_user_can_mend_is_one_line_and_a_bug_keeps_its_traceback(
    error: BaseException,
    code: int | None,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("alignvlm.cli.config.run_list", raising(error))
    if code is None:
        with pytest.raises(type(error)):
            main(["config", "list"])
    else:
        assert main(["config", "list"]) == code
    assert capsys.readouterr().err == said


def test_a_rank_names_itself(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setattr(cli, "_run", raising(PermissionError(errno.EACCES, "Permission denied", "x")))
    assert main([]) == 2
    assert capsys.readouterr().err == "alignvlm: rank 3: x: Permission denied\n"


@pytest.mark.parametrize(("number", "code"), [(errno.ENOSPC, 2), (errno.EIO, 1), (errno.ESTALE, 1)])
def test_a_rank_says_what_its_disk_does_and_what_may_pass_is_tried_again(
    number: int, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def write(argv: object) -> int:
        with must_write(tmp_path / "export", "free some space"):
            raise OSError(number, os.strerror(number))

    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(cli, "_run", write)
    assert main([]) == code
    wanted = f"alignvlm: rank 1: {tmp_path}/export cannot be written ({os.strerror(number)}); free some space\n"
    assert capsys.readouterr().err == wanted


def test_a_message_is_one_line_without_control_characters(command: Command) -> None:
    assert one_line(" a\n\n  b\r\nc\u2028d ") == "a b c d"
    said = command("config", "check", "evil\x1b[31m\n\x07name", code=2)
    assert said.count("\n") == 1
    assert said[:-1].isprintable()
