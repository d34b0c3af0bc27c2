#!/usr/bin/env python3
"""The documentation as a site in build/site: `make docs`.

Everything is gathered in build/docs first: the pages of docs/, those that lie elsewhere (README, changelog, examples),
and those made from the code (recipes, settings, commands, API); links between files of the repository become links
between pages. Zensical then builds the site and fails at a link that leads nowhere.
"""

from __future__ import annotations

import fnmatch
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT))

import code_pages  # noqa: E402
import recipe_pages  # noqa: E402

BORROWED = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "vulnerabilities.md",
    "examples/README.md": "examples.md",
}
"""File of the repository -> page of the site."""
LINK = re.compile(r"(\]\()([^)\s#]+)((?:#[^)\s]*)?\))")
CODE = re.compile(r"^```(?s:.*?)^```|^(?:    .*\n)+|`[^`\n]+`", re.MULTILINE)
FORMULA = re.compile(r"\$\$([^$]+)\$\$|\$(?=\S)([^$\n]+)(?<=\S)\$")


class Site:
    """The folder that the site is built from."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        docs = {f"docs/{path.relative_to(ROOT / 'docs').as_posix()}" for path in (ROOT / "docs").rglob("*.md")}
        self.pages = {name: name.removeprefix("docs/") for name in sorted(docs)} | BORROWED
        """File of the repository -> page of the site, for every page that is written by hand."""

    def write(self) -> set[str]:
        """Write all pages, and copy what they link to; returns the names of the pages."""
        made = recipe_pages.pages() | code_pages.pages()
        for file, page in self.pages.items():
            made[page] = self._turn_links(file, page, (ROOT / file).read_text(encoding="utf-8"))
        made["examples.md"] += code_pages.sources(ROOT / "examples")
        made["changelog.md"] = f"---\nsearch: {{exclude: true}}\n---\n{made['changelog.md']}"
        for name, text in made.items():
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            (self.folder / name).write_text(text, encoding="utf-8")
        shutil.copytree(HERE / "assets", self.folder / "assets")
        return set(made)

    def _turn_links(self, file: str, page: str, text: str) -> str:
        """Links to files of the repository lead to their pages, or to a copy; code stays as it is."""

        def turned(match: re.Match[str]) -> str:
            target = os.path.normpath((PurePosixPath(file).parent / match[2]).as_posix())
            if "://" in match[2] or not (ROOT / target).is_file():
                return match[0]  # another site, or a mistake that stops the build
            place = self.pages.get(target) or target.removeprefix("docs/")
            if target not in self.pages:
                (self.folder / place).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / target, self.folder / place)
            return f"{match[1]}{os.path.relpath(place, PurePosixPath(page).parent)}{match[3]}"

        return outside_code(text, lambda part: LINK.sub(turned, part))


def outside_code(text: str, change: Callable[[str], str]) -> str:
    """A Markdown text whose parts outside of code are changed."""
    parts, end = [], 0
    for code in CODE.finditer(text):
        parts += [change(text[end : code.start()]), code[0]]
        end = code.end()
    return "".join([*parts, change(text[end:])])


def draw_formulas(text: str) -> str:
    """`$…$` and `$$…$$` as MathML, which browsers draw by themselves."""
    from latex2mathml.converter import convert

    def drawn(match: re.Match[str]) -> str:
        block, inline = match.groups()
        return f"<div>{convert(block, display='block')}</div>" if block else f"<span>{convert(inline)}</span>"

    return FORMULA.sub(drawn, text)


def expand(nav: Any, rest: list[str], known: set[str]) -> Any:
    """Patterns become the names among `rest` that they fit, each once; pages that are not there (yet) are left out."""
    if isinstance(nav, str):
        return nav if nav in known else None
    if isinstance(nav, dict):
        found = {key: expand(value, rest, known) for key, value in nav.items()}
        return {key: value for key, value in found.items() if value} or None
    items: list[Any] = []
    for item in nav:
        if isinstance(item, str) and "*" in item:
            fitting = [n for n in rest if n.count("/") == item.count("/") and fnmatch.fnmatch(n, item)]
            rest[:] = [name for name in rest if name not in fitting]
            items += fitting
        elif kept := expand(item, rest, known):
            items.append(kept)
    return items


def names(nav: Any) -> list[str]:
    """Every page and pattern of a `nav`."""
    if isinstance(nav, str):
        return [nav]
    return [name for item in (nav.values() if isinstance(nav, dict) else nav) for name in names(item)]


def outside(site: Path) -> list[str]:
    """What pages load from other sites; links that a reader may follow are none."""
    loaded = re.compile(r"""<(?:script|img|iframe|source|link)\b[^>]*?(?:src|href)=["']?((?:https?:)?//[^"'> ]+)""")
    own = re.compile(r"""<link\b[^>]*rel=["']?canonical""")
    found = {
        f"{page.relative_to(site)}: {match[1]}"
        for page in sorted(site.rglob("*.html"))
        for match in loaded.finditer(page.read_text(encoding="utf-8"))
        if not own.match(match[0])
    }
    return sorted(found)


def main() -> int:
    build = ROOT / "build"
    for folder in ("docs", "site"):
        shutil.rmtree(build / folder, ignore_errors=True)
    pages = Site(build / "docs").write()
    for page in ((build / "docs" / name) for name in pages):
        page.write_text(outside_code(page.read_text(encoding="utf-8"), draw_formulas), encoding="utf-8")
    settings = yaml.safe_load((HERE / "mkdocs.yml").read_text(encoding="utf-8"))
    named = set(names(settings["nav"]))
    rest = sorted(pages - named)
    settings["nav"] = expand(settings["nav"], rest, pages)
    if rest:
        print(f"no line of nav in scripts/site/mkdocs.yml fits {', '.join(rest)}", file=sys.stderr)
        return 1
    (build / "mkdocs.yml").write_text(yaml.safe_dump(settings, sort_keys=False, allow_unicode=True), encoding="utf-8")
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--clean", "-f", str(build / "mkdocs.yml")]
    code = subprocess.run(command, cwd=build).returncode
    if code:
        return code
    if fetched := outside(build / "site"):
        print(f"pages fetch something from elsewhere: {', '.join(fetched)}", file=sys.stderr)
        return 1
    print(f"open {build / 'site' / 'index.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
