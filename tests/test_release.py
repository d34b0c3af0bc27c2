"""scripts/release.sh, in a repository of its own: what it refuses, and that it builds and tags what is ready."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import alignvlm
from tests.checkout import copy_checkout

VERSION = alignvlm.__version__


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """This checkout's files in a fresh repository, the version's heading in its changelog, all committed."""
    folder = copy_checkout(tmp_path / "alignvlm")
    (folder / "CHANGELOG.md").write_text(f"# Changelog\n\n## [Unreleased]\n\n## [{VERSION}] - 2026-01-31\n")
    git(folder, "init", "--quiet")
    commit(folder)
    return folder


def git(folder: Path, *arguments: str) -> str:
    who = ("-c", "user.name=test", "-c", "user.email=test@localhost")
    return subprocess.run(["git", *who, *arguments], cwd=folder, check=True, capture_output=True, text=True).stdout


def commit(folder: Path) -> None:
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message", "state")


def release(folder: Path) -> subprocess.CompletedProcess[str]:
    names = {"GIT_COMMITTER_NAME": "test", "GIT_COMMITTER_EMAIL": "test@localhost", "PYTHON": sys.executable}
    environment = os.environ | names | {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(["bash", "scripts/release.sh"], cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("CHANGELOG.md", "# Changelog\n\n## [Unreleased]\n", f"CHANGELOG.md has no heading '## [{VERSION}]"),
        ("CITATION.cff", "cff-version: 1.2.0\nversion: 9.9.9\n", f"CITATION.cff does not say 'version: {VERSION}'"),
    ],
)
def test_version_must_be_written_down(repository: Path, file: str, content: str, message: str) -> None:
    (repository / file).write_text(content)
    commit(repository)
    refused = release(repository)
    assert refused.returncode == 1
    assert message in refused.stderr
    assert git(repository, "tag") == ""


def test_uncommitted_changes_are_refused(repository: Path) -> None:
    (repository / "notes.txt").write_text("not committed")
    refused = release(repository)
    assert refused.returncode == 1
    assert "the working tree has changes" in refused.stderr


@pytest.mark.slow
def test_release_is_built_and_tagged_once(repository: Path) -> None:
    done = release(repository)
    assert done.returncode == 0, done.stdout + done.stderr
    built = {path.name for path in (repository / "dist").iterdir()}
    assert built == {f"alignvlm-{VERSION}.tar.gz", f"alignvlm-{VERSION}-py3-none-any.whl"}
    assert git(repository, "tag").split() == [f"v{VERSION}"]
    again = release(repository)
    assert again.returncode == 1
    assert f"the tag v{VERSION} exists" in again.stderr
