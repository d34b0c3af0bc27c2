"""The wheel stands alone: built from the source distribution, installed outside the checkout, and run there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.checkout import ROOT, copy_checkout

CPUS = ("--nodes", "1", "--gpus-per-node", "0", "--processes-per-node", "2")
Run = Callable[..., str]
pytestmark = pytest.mark.slow

WHERE = """
import json, alignvlm, data_pipeline
from alignvlm.resources import FOLDERS
print(json.dumps({"packages": [alignvlm.__file__, data_pipeline.__file__],
                  "folders": {name: str(folder) for name, folder in FOLDERS.items()}}))
"""


def called(command: list[str], cwd: Path, **environment: str) -> str:
    """Standard output of a command that must succeed."""
    outer = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(command, cwd=cwd, env=outer | environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{command} ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-4000:]}"
    return done.stdout


def files_below(folder: Path) -> dict[str, tuple[bytes, bool]]:
    """Content and executable bit of every file, by relative path."""
    return {
        str(path.relative_to(folder)): (path.read_bytes(), os.access(path, os.X_OK))
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.suffix != ".pyc"
    }


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist of this checkout and the wheel built from that sdist; needs no network."""
    source = copy_checkout(tmp_path_factory.mktemp("source") / "alignvlm")
    out = tmp_path_factory.mktemp("dist")
    called([sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(source)], cwd=out)
    return out


@pytest.fixture(scope="module")
def installed(distributions: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder into which the wheel is installed, without its dependencies."""
    site = tmp_path_factory.mktemp("site")
    wheel = next(distributions.glob("*.whl"))
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", str(site), str(wheel)]
    called(pip, cwd=site)
    return site


@pytest.fixture(scope="module")
def run(installed: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Runs a program with the installed wheel, in an empty folder."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")

    def run(*command: str) -> str:
        return called([sys.executable, *command], cwd=elsewhere, PYTHONPATH=str(installed))

    return run


def test_wheel_brings_every_file_of_the_checkout_that_runs_need(run: Run, installed: Path) -> None:
    found = json.loads(run("-c", WHERE))
    assert all(Path(path).is_relative_to(installed) for path in found["packages"])
    in_checkout = {
        "recipes": ROOT / "alignvlm" / "recipes",
        "templates": ROOT / "alignvlm" / "report" / "templates",
        "page": ROOT / "alignvlm" / "serving" / "demo" / "page",
        "ds_configs": ROOT / "ds_configs",
        "launch": ROOT / "launch",
    }
    assert found["folders"].keys() == in_checkout.keys()
    for name, folder in in_checkout.items():
        copied = Path(found["folders"][name])
        assert copied.is_relative_to(installed)
        assert files_below(copied) == files_below(folder), name


def test_wheel_has_the_packages_and_nothing_else(distributions: Path) -> None:
    names = zipfile.ZipFile(next(distributions.glob("*.whl"))).namelist()
    version = next(name for name in names if name.endswith(".dist-info/METADATA")).split("-")[1].split(".dist")[0]
    assert {name.split("/")[0] for name in names} == {"alignvlm", "data_pipeline", f"alignvlm-{version}.dist-info"}
    modules = {name for name in names if name.endswith(".py")}
    assert modules == {
        str(path.relative_to(ROOT))
        for package in ("alignvlm", "data_pipeline")
        for path in ROOT.glob(f"{package}/**/*.py")
    }
    assert {"alignvlm/py.typed", "data_pipeline/py.typed", f"alignvlm-{version}.dist-info/licenses/LICENSE"} <= set(
        names
    )


def test_sdist_has_what_a_checkout_has(distributions: Path) -> None:
    with tarfile.open(next(distributions.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {
        "LICENSE",
        "README.md",
        "CHANGELOG.md",
        "Makefile",
        "constraints.txt",
        "setup.py",
        "pyproject.toml",
    } <= names
    assert {
        "tests/test_wheel.py",
        "docs/data.md",
        "benchmarks/loader.py",
        "examples/own_connector.py",
        "ds_configs/zero3.json",
    } <= names


def test_installed_command_knows_its_recipes_and_launch_files(run: Run) -> None:
    assert "quickstart" in run("-m", "alignvlm", "config", "list").split()
    assert "name: quickstart" in run("-m", "alignvlm", "config", "show", "quickstart")
    printed = run("-m", "alignvlm", "launch", "slurm", "quickstart", *CPUS, "--dry-run")
    assert (ROOT / "launch" / "slurm" / "train.sbatch").read_text() in printed
