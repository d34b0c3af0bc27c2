#!/usr/bin/env python3
"""transformers' own tests of models, of `generate` and of processors, on our classes; `make check-hf` runs it.

The tests come from the source distribution of the transformers that is installed, into .check-hf/, once. It lacks those
of `generate`, which come from GitHub; where that is not reached, `--more` names the tests/ of a checkout that has them.
What fails is compared with tests/conformance/exceptions.yaml; a failure that is not listed there ends with exit code 1.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tarfile
import urllib.request
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CONFORMANCE = ROOT / "tests/conformance"
CACHE = ROOT / ".check-hf"
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
KINDS = ("model", "generation", "processor")
GENERATION = "generation/test_utils.py"
"""What the source distribution lacks."""
GITHUB = "https://raw.githubusercontent.com/huggingface/transformers"


def main() -> int:
    """Run the testers, print counts and what differs from the list of exceptions."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tests", type=Path, help="tests/ of a checkout of transformers, of the installed version")
    parser.add_argument("--more", type=Path, help="tests/ of any checkout, for what the other tests lack")
    parser.add_argument("--only", choices=KINDS, help="one of the testers")
    parser.add_argument("--skipped", action="store_true", help="print why tests were skipped")
    parser.add_argument("-k", dest="expression", default="", help="as in pytest; nothing is compared then but failures")
    args = parser.parse_args()
    folders = [args.tests or downloaded(version("transformers")), *([args.more] if args.more else [])]
    packages()
    os.environ.update(
        CHECK_HF_TESTS=os.pathsep.join(str(folder.resolve()) for folder in folders),
        HF_HUB_OFFLINE="1",
        TOKENIZERS_PARALLELISM="false",
    )
    sys.path.insert(0, str(ROOT))
    print(f"transformers {version('transformers')}, tests of {', '.join(map(str, folders))}", flush=True)
    kinds = [kind for kind in KINDS if args.only in (None, kind)]
    if not any((folder / GENERATION).is_file() for folder in folders):
        print("without the tests of generate: --more names the tests/ of a checkout that has them")
        kinds = [kind for kind in kinds if kind != "generation"]
    results = [check(kind, args.expression, args.skipped) for kind in kinds]
    return 0 if all(results) else 1


def downloaded(release: str) -> Path:
    """The tests of transformers' source distribution, and what it lacks where GitHub is reached."""
    folder = CACHE / f"transformers-{release}"
    if not (folder / "tests").is_dir():
        print(f"downloading the source distribution of transformers {release} ...", flush=True)
        choice = ["--no-deps", "--no-binary", "transformers", f"transformers=={release}"]
        subprocess.run([*PIP, "download", "-q", *choice, "-d", str(CACHE)], check=True)
        with tarfile.open(CACHE / f"transformers-{release}.tar.gz") as archive:
            wanted = [m for m in archive.getmembers() if m.name.startswith(f"transformers-{release}/tests/")]
            archive.extractall(CACHE, wanted, filter="data")
    path = folder / "tests" / GENERATION
    if not path.is_file():
        try:
            with urllib.request.urlopen(f"{GITHUB}/v{release}/tests/{GENERATION}", timeout=20) as answer:
                content = answer.read()
        except OSError as error:
            print(f"{GITHUB} is not reached ({error})")
        else:
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content)
    return folder / "tests"


def packages() -> None:
    """What the tests import and nothing else here needs, in a folder of its own."""
    folder = CACHE / "packages"
    if not (folder / "parameterized").is_dir():
        subprocess.run([*PIP, "install", "-q", "--no-deps", "--target", str(folder), "parameterized"], check=True)
    sys.path.append(str(folder))


class Outcomes:
    """A plugin of pytest that keeps what became of each test; one with a failed subtest failed."""

    def __init__(self) -> None:
        self.of: dict[str, str] = {}
        self.reasons: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Called for each phase and subtest."""
        name = report.nodeid.rpartition("::")[2]
        if report.failed:
            self.of[name] = "failed"
            crash = getattr(report.longrepr, "reprcrash", None)
            self.reasons.setdefault(name, str(crash.message if crash else report.longrepr).split("\n")[0])
        elif report.skipped:
            self.of.setdefault(name, "skipped")
            self.reasons.setdefault(name, str(report.longrepr[-1]).split("\n")[0])
        elif report.when == "call":
            self.of.setdefault(name, "passed")


def check(kind: str, expression: str, shows_skipped: bool) -> bool:
    """Whether nothing failed but what is listed."""
    import pytest
    import yaml

    outcomes = Outcomes()
    settings = ["-o", "addopts=", "--import-mode=importlib", "-p", "no:cacheprovider", "-p", "no:terminal"]
    code = pytest.main(
        [*settings, "-W", "ignore", "-k", expression, str(CONFORMANCE / f"{kind}_tester.py")], plugins=[outcomes]
    )
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        print(f"{kind}: pytest ended with {code!r}")
        return False
    exceptions = yaml.safe_load((CONFORMANCE / "exceptions.yaml").read_text(encoding="utf-8"))[kind]
    failed = {name for name, outcome in outcomes.of.items() if outcome == "failed"}
    counts = Counter(outcomes.of.values())
    print(f"{kind}: {counts['passed']} passed, {len(failed)} failed, {counts['skipped']} skipped")
    for name in sorted(failed):
        print(f"  {'known   ' if name in exceptions else 'NOT KNOWN'} {name}: {outcomes.reasons[name][:200]}")
    for name in sorted(name for name, outcome in outcomes.of.items() if shows_skipped and outcome == "skipped"):
        print(f"  skipped  {name}: {outcomes.reasons[name][:200]}")
    for name in exceptions:
        if outcomes.of.get(name) == "passed" or (not expression and name not in outcomes.of):
            became = "passes now" if name in outcomes.of else "is no test any more"
            print(f"  {name} {became}: take it out of {CONFORMANCE.relative_to(ROOT)}/exceptions.yaml")
    return failed <= exceptions.keys()


if __name__ == "__main__":
    sys.exit(main())
