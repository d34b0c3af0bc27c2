"""Pages of the commands, from their parsers, and of the API, from its docstrings."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import alignvlm
import data_pipeline
from alignvlm.cli import build_parser

Words = tuple[str, ...]
TOPICS = {
    "python": ("Python API", "What `import alignvlm` offers to run things.", ()),
    "model": (
        "Models and processors",
        "An export in transformers; [Exports in transformers](../transformers.md) shows their use.",
        (
            "AlignVLMConfig", "AlignVLMForConditionalGeneration", "AlignVLMProcessor", "AlignVLMImageProcessor",
        ),
    ),
    "extending": (
        "Extending",
        "Connectors, metrics and callbacks of your own. [Examples](../examples.md) has whole programs, and "
        "[Contributing](../contributing.md) says what else registers itself.",
        (
            "Connector", "ConnectorOptions", "register_connector", "register_metric", "Callback", "StageState",
            "StepRecord",
        ),
    ),
}  # fmt: skip
"""Page -> title, introduction, names of `alignvlm`; the first one has all names that no other has."""


def pages() -> dict[str, str]:
    """Page of the site -> its text."""
    named = {name for _, _, names in TOPICS.values() for name in names}
    found = {"commands.md": _commands()}
    for page, (title, introduction, names) in TOPICS.items():
        chosen = names or [name for name in alignvlm.__all__ if name not in named]
        found[f"api/{page}.md"] = _api(title, introduction, "alignvlm", chosen)
    about = "Shards, the data order and the loader. They know nothing of models and can be used alone."
    return found | {"api/data_pipeline.md": _api("data_pipeline", about, "data_pipeline", data_pipeline.__all__)}


def _api(title: str, introduction: str, package: str, names: Sequence[str]) -> str:
    return f"# {title}\n\n{introduction}\n\n" + "\n".join(f"::: {package}.{name}\n" for name in names)


def sources(folder: Path) -> str:
    """The Python files of a folder as sections with their code."""
    files = sorted(folder.glob("*.py"))
    return "".join(f"\n## {file.name}\n\n```python\n{file.read_text(encoding='utf-8')}```\n" for file in files)


def _commands() -> str:
    os.environ["COLUMNS"] = "100"
    parts = [
        "# Commands\n\nWhat `alignvlm COMMAND --help` prints. Every command of a recipe takes overrides, `key=value`."
    ]
    for words, parser in _leaves(build_parser(), ()):
        parts.append(f"## alignvlm {' '.join(words)}\n\n```text\n{parser.format_help()}```")
    return "\n\n".join(parts) + "\n"


def _leaves(
    parser: argparse.ArgumentParser, words: tuple[str, ...]
) -> list[tuple[tuple[str, ...], argparse.ArgumentParser]]:
    choices = [a.choices for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    if not choices:
        return [(words, parser)]
    return [leaf for name, each in choices[0].items() for leaf in _leaves(each, (*words, name))]
