"""Self-contained HTML pages from the templates of this package: style and script are inside, all text is escaped."""

from __future__ import annotations

from typing import Any

from alignvlm.report.charts import format_number
from alignvlm.resources import resource


def render_template(name: str, **content: Any) -> str:
    """A page from `report/templates/<name>` as text."""
    from jinja2 import Environment, FileSystemLoader, select_autoescape
    from markupsafe import Markup

    templates = resource("templates")
    environment = Environment(
        loader=FileSystemLoader(templates),
        autoescape=select_autoescape(["html"]),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = lambda x: f"{100 * x:.1f}"
    environment.filters["number"] = format_number
    environment.filters["in_text"] = _in_text
    style, script = (Markup((templates / f"report.{end}").read_text(encoding="utf-8")) for end in ("css", "js"))
    return environment.get_template(name).render(style=style, script=script, **content)


def _in_text(title: str) -> str:
    """A title inside a sentence: "exact match", but "ANLS"."""
    return title if title[:2].isupper() else title[:1].lower() + title[1:]
