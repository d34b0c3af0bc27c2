"""Pictures of a trained run's pages for the documentation: the demo and the report.

    python scripts/screenshots.py runs/quickstart [--out docs/images]

Needs chromium and playwright (`make test-browser` installs both). The run is one that has been evaluated.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ("charts", "tables")
"""Tasks whose example is asked, the first that there is."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of a run, such as runs/quickstart")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images")
    arguments = parser.parse_args()
    exports = sorted(arguments.run.glob("*/export"))
    report = arguments.run / "report" / "index.html"
    if not exports or not report.is_file():
        return fail(f"{arguments.run} is no finished run: it has no export or no report")
    try:
        from playwright.sync_api import sync_playwright
    except ModuleNotFoundError:
        return fail("playwright is not installed: make test-browser")
    program = shutil.which("chromium")
    if program is None:
        return fail("chromium is not installed: make test-browser")
    arguments.out.mkdir(parents=True, exist_ok=True)
    with demo(exports[-1]) as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1180, "height": 1150})
        page.goto(address)
        ask_an_example(page)
        page.screenshot(path=arguments.out / "demo.png")
        page = browser.new_page(viewport={"width": 1280, "height": 1500})
        page.goto(report.resolve().as_uri())
        page.screenshot(path=arguments.out / "report.png")
        browser.close()
    print(f"wrote {arguments.out / 'demo.png'} and {arguments.out / 'report.png'}")
    return 0


def ask_an_example(page: Any) -> None:
    """Ask one, wait for the answer, and point at the patch with the strongest token."""
    cards = page.locator("#cards button")
    cards.first.wait_for()
    tasks = [cards.nth(i).locator("small").inner_text() for i in range(cards.count())]
    cards.nth(next((tasks.index(task) for task in EXAMPLES if task in tasks), 0)).click()
    page.locator(".answer[aria-busy=false]").wait_for()
    cells = page.locator(".cell")
    cells.first.wait_for()
    fills = cells.evaluate_all("cells => cells.map((cell) => Number(cell.firstChild.style.fillOpacity))")
    cells.nth(fills.index(max(fills))).click()
    page.evaluate("window.scrollTo(0, 0)")


@contextmanager
def demo(export: Path) -> Iterator[str]:
    """The address of `alignvlm demo` on a free port."""
    command = [sys.executable, "-m", "alignvlm", "demo", str(export), "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        found = re.search(r"http://\S+", process.stdout.readline())
        if found is None:
            raise SystemExit("alignvlm demo did not start")
        yield found[0]
    finally:
        process.terminate()
        process.wait(30)


def fail(message: str) -> int:
    print(message, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
