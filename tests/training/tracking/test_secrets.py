"""A password in a recipe or in the environment: no file and no output has it, and the recipe still fits its run."""

from __future__ import annotations

from pathlib import Path

import pytest

from alignvlm.cli import main
from alignvlm.config import load_recipe
from alignvlm.run_folder import Run
from tests.jobs import TINY
from tests.training.tracking.conftest import LOGIN, SECRET, answer, serving


def test_no_command_and_no_file_shows_a_password(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The server sends back what it was sent, as proxies do on their pages of errors."""
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "t0ken-of-mine")
    monkeypatch.chdir(tmp_path)
    echo = answer(403, f"for {LOGIN}: s3cr@t-word or t0ken-of-mine do not match")
    with serving(echo) as address:
        overrides = [f"tracking.uri=http://{LOGIN}{address}", f"description=of https://{LOGIN}host/x?token={SECRET}"]
        for _ in range(2):  # the second start compares the recipe with what the first one wrote
            run = Run(load_recipe(str(TINY), overrides))
            run.open()
        assert run.recipe.tracking.uri == f"http://{LOGIN}{address}"
        assert main(["track", str(TINY), *overrides]) == 2
        assert main(["config", "show", str(TINY), *overrides]) == 0
        assert main(["train", "--dry-run", str(TINY), *overrides]) == 0
        assert main(["launch", "local", "--dry-run", str(TINY), *overrides]) == 0
        assert main(["config", "check", str(TINY), *overrides, f"tracking.url=http://{LOGIN}{address}"]) == 2
        with pytest.raises(SystemExit):
            main(["config", "check", str(TINY), f"--uri=http://{LOGIN}{address}"])
        pods = ["--image=x", "--claim=x", "--gpus-per-node=1"]
        assert main(["launch", "kubernetes", str(TINY), *overrides, *pods]) == 2
    shown = "".join(capfd.readouterr())
    assert f"http://someone:***@{address} answers with HTTP 403; the files keep everything, track again later" in shown
    assert "a manifest is no place for a password" in shown
    assert "Traceback" not in shown
    written = {path: path.read_text() for path in tmp_path.rglob("*") if path.is_file()}
    assert "description: of https://someone:***@host/x?token=***" in run.folder.config.read_text()
    for text in [shown, *written.values()]:
        assert "s3cr" not in text
        assert "t0ken" not in text
