"""The command line as a whole: where arguments may stand, what it refuses, what it does not load."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from alignvlm.cli import main
from tests.checkout import ROOT
from tests.fixtures.command import Command, every_command


def test_overrides_may_follow_options(command: Command, tmp_path: Path) -> None:
    output = command("train", "quickstart", f"runs={tmp_path}", "--dry-run", "train.processes=1")
    assert output.startswith(f"run {tmp_path}/quickstart: 1 process, DeepSpeed cpu_zero3\n")


@pytest.mark.parametrize("words", [["config", "check", "quickstart", "--sede=5"], ["report", "runs/x", "seed=5"]])
def test_what_no_command_knows_is_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2
    assert f"unrecognized arguments: {words[-1]}" in capsys.readouterr().err


def test_rank_zero_reports_a_mistake_before_the_others(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    monkeypatch.setattr("alignvlm.cli.time.sleep", waited.append)
    monkeypatch.setenv("RANK", "1")
    assert command("report", "runs/nothing", code=2).startswith(
        "alignvlm: rank 1: runs/nothing: there is no run folder"
    )
    assert waited.pop() >= 10
    monkeypatch.setenv("RANK", "0")
    assert command("report", "runs/nothing", code=2).startswith("alignvlm: runs/nothing: there is no run folder")
    assert not waited


def test_export_and_track_say_the_way_out(command: Command, tmp_path: Path) -> None:
    assert "already exists; give another folder" in command("export", "checkpoint", tmp_path, code=2)
    message = command("track", "quickstart", f"runs={tmp_path}", code=2)
    assert "no such run; start it with `alignvlm train" in message


def test_every_command_and_argument_says_what_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    for words, parser in every_command().items():
        if words == ("plan",):  # the former name of another command, which says so
            continue
        assert parser.description[0].isupper(), words
        assert parser.description.endswith((".", ":")), words
        for action in parser._actions:
            assert action.help, (words, action.dest)
            shown = action.metavar or action.dest if action.nargs != 0 else "N"  # flags have no value
            if not action.choices and shown != "key=value":
                assert any(letter.isupper() for letter in str(shown)), (words, action.dest)


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys; from alignvlm.cli import build_parser; build_parser().format_help();"
        "print(sorted({'torch', 'numpy', 'transformers', 'pydantic', 'rapidfuzz'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
