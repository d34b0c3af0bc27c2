"""The site's pages, before zensical builds them: each stands in the navigation, and every link leads somewhere."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import yaml

import alignvlm
from alignvlm.config import list_recipes, load_recipe
from tests.checkout import ROOT
from tests.fixtures.command import every_command


@pytest.fixture(scope="module")
def build() -> ModuleType:
    """scripts/site/build.py."""
    spec = importlib.util.spec_from_file_location("build_site", ROOT / "scripts" / "site" / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.path", [str(ROOT / "scripts" / "site"), *sys.path])  # where it finds its neighbours
        spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def site(build: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site") / "docs"
    build.Site(folder).write()
    return folder


def test_every_page_stands_in_the_navigation_once(build: ModuleType, site: Path) -> None:
    pages = {path.relative_to(site).as_posix() for path in site.rglob("*.md")}
    nav = yaml.safe_load((ROOT / "scripts" / "site" / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    rest = sorted(pages - set(build.names(nav)))
    named = build.names(build.expand(nav, rest, pages))
    assert rest == []
    assert sorted(named) == sorted(pages)
    assert {"index.md", "changelog.md", "data.md", "studies.md", "recipes/quickstart.md"} <= pages


def test_every_link_leads_to_a_page_or_a_file(site: Path) -> None:
    lost = []
    for page in site.rglob("*.md"):
        text = re.sub(r"^```.*?^```|`[^`\n]+`", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
        for target in re.findall(r"\]\(([^)\s#]+)(?:#[^)\s]*)?\)", text):
            if "://" not in target and not (page.parent / target).is_file():
                lost.append(f"{page.relative_to(site)}: {target}")
    assert lost == []


def test_a_pattern_takes_what_no_other_line_names(build: ModuleType) -> None:
    nav = [{"A": ["a.md", "missing.md", "x/*.md"]}, {"Gone": ["none.md"]}, {"Rest": ["*.md"]}]
    rest = ["b.md", "x/1.md", "x/2.md", "y/3.md"]
    assert build.expand(nav, rest, {"a.md", *rest}) == [{"A": ["a.md", "x/1.md", "x/2.md"]}, {"Rest": ["b.md"]}]
    assert rest == ["y/3.md"]  # which stops the build


def test_pages_made_from_the_code_have_all_of_it(site: Path) -> None:
    for name in list_recipes():
        recipe = load_recipe(name)
        text = (site / "recipes" / f"{name}.md").read_text(encoding="utf-8")
        assert all(f"| {stage} |" in text.partition("## Sources")[0] for stage in list(recipe.stages)[-1:])
        assert all(f"| `{source}` |" in text for source in recipe.data.sources)
        assert all(f"| `{task}` |" in text for task in recipe.evaluation.tasks)
    settings = (site / "settings.md").read_text(encoding="utf-8")
    for key in ("## stages.NAME", "## model.connector, kind perceiver", "| `global_batch_packs` |", "| `also` |"):
        assert key in settings
    commands = (site / "commands.md").read_text(encoding="utf-8")
    assert [tuple(title.split()) for title in re.findall(r"^## alignvlm (.*)$", commands, re.MULTILINE)] == list(
        every_command()
    )
    api = "".join(path.read_text(encoding="utf-8") for path in (site / "api").iterdir())
    assert sorted(re.findall(r"^::: alignvlm\.(\w+)$", api, re.MULTILINE)) == sorted(alignvlm.__all__)


def test_what_pages_would_fetch_from_elsewhere_is_found(build: ModuleType, tmp_path: Path) -> None:
    page = '<link rel="canonical" href="https://me/"><a href="https://arxiv.org">x</a><img src="own.png">'
    (tmp_path / "index.html").write_text(page)
    assert build.outside(tmp_path) == []
    for element in ('<script async src="https://cdn/x.js">', "<link rel=stylesheet href=//fonts/x.css>"):
        (tmp_path / "index.html").write_text(page + element)
        assert len(build.outside(tmp_path)) == 1
