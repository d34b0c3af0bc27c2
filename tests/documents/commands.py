"""The command lines of the documents: those of code blocks, and those inside sentences and tables."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass, field

from tests.checkout import ROOT

DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "examples/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
PROGRAMS = ("alignvlm", "make", "python", "bash", "sbatch", "pip", "mlflow", "launch/", "scripts/", ".venv/bin/python")
_VARIABLE = re.compile(r"[A-Z_]+=\S*")
_FENCED = re.compile(r"^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
_SPAN = re.compile(r"`([^`\n]+(?:\n[^`\n]+)?)`")


@dataclass(frozen=True)
class Line:
    """One command: `VARIABLE=… program words`."""

    text: str
    program: str
    words: list[str]
    variables: dict[str, str] = field(default_factory=dict)
    whole: bool = True
    """Whether it may be typed as it stands; a command in a sentence may be named without its arguments."""


def lines_of(document: str) -> list[Line]:
    """Every command of a Markdown text, those of code blocks first."""
    blocks = [match["text"] for match in _FENCED.finditer(document) if match["language"] in ("", "sh", "bash")]
    rest = _FENCED.sub("", document)
    blocks += [text[4:] for text in rest.splitlines() if text.startswith("    ")]
    sentences = "\n".join(text for text in rest.splitlines() if not text.startswith("    "))
    found = [parse(text, whole=True) for block in blocks for text in block.replace("\\\n", " ").splitlines()]
    found += [parse(" ".join(text.split()), whole=False) for text in _SPAN.findall(sentences)]
    return [line for line in found if line is not None]


def parse(text: str, whole: bool) -> Line | None:
    """A line's command up to a pipe, a redirection or a comment; None when it is no command of ours."""
    try:
        words = shlex.split(text.replace("\\|", "|"), comments=True)
    except ValueError:  # an apostrophe of prose
        return None
    variables = {}
    while words and _VARIABLE.fullmatch(words[0]):
        name, _, value = words.pop(0).partition("=")
        variables[name] = value
    if not words or not any(words[0] == name or (name[-1] == "/" and words[0].startswith(name)) for name in PROGRAMS):
        return None
    end = next((i for i, word in enumerate(words) if word in ("|", ">", "&&", ";")), len(words))
    program, *words = words[:end]
    return Line(text, program, words, variables, whole)
