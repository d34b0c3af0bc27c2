"""Imports follow the order that docs/architecture.md draws, never up or in a circle; files and folders stay small."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("alignvlm", "data_pipeline")
MAX_LINES = 350
MAX_MODULES = 12

# From top to bottom: a module imports from its own room and from those below; rooms of one row do not know each other.
ORDER = {
    "alignvlm": (
        ("cli",),
        ("serving",),
        ("studies",),
        ("training",),
        ("report",),
        ("best",),
        ("evaluation",),
        ("estimates",),
        ("stage_data",),
        ("checks",),
        ("model",),
        ("launch",),
        ("run_folder",),
        ("config",),
        ("connectors", "metrics"),
        ("kernels",),
        ("exports", "parts", "plugins", "settings", "system"),
        ("errors", "progress", "resources"),
    ),
    "data_pipeline": (
        ("loading",),
        ("preparation",),
        ("importers",),
        ("generators",),
        ("shards",),
        ("stores",),
        ("order",),
        ("samples",),
        ("files", "parallel", "progress"),
        ("checksums", "errors", "masking"),
    ),
}
FACADES = {"__init__", "__main__"}
"""The packages' own files above all rooms: the public names and `python -m alignvlm`."""
NAMES_FOR_ALL = {("alignvlm", "__version__")}
"""What any room may take from a package itself: a literal, which needs no other module."""


def modules(root: Path = ROOT) -> dict[str, Path]:
    """Dotted name -> file, of every module of both packages."""
    found = {}
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(path: Path, known: set[str]) -> Iterator[str]:
    """Modules of `known` that a file imports, at the top or inside functions, except for type checking only."""
    pending: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import; imports here are absolute"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                if inner in known:
                    yield inner
                elif node.module in known and (node.module, alias.name) not in NAMES_FOR_ALL:
                    yield node.module
        elif isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            pending.extend(node.orelse)
            continue
        pending.extend(ast.iter_child_nodes(node))


def graph(root: Path = ROOT) -> dict[str, set[str]]:
    """Module -> the modules of both packages that it imports."""
    found = modules(root)
    return {name: set(imported(path, set(found))) - {name} for name, path in found.items()}


def room_of(module: str) -> tuple[str, str]:
    """(package, room); a package's own file is the room "__init__"."""
    package, _, rest = module.partition(".")
    return package, rest.partition(".")[0] or "__init__"


def height(package: str, room: str) -> int:
    """0 for the lowest room; the packages' own files stand above all rooms."""
    if room in FACADES:
        return len(ORDER[package])
    row = next((number for number, rooms in enumerate(ORDER[package]) if room in rooms), None)
    assert row is not None, f"{package}.{room} has no place in ORDER: draw it here and in docs/architecture.md"
    return len(ORDER[package]) - 1 - row


def upward(arrows: dict[str, set[str]]) -> list[str]:
    """Every import that does not point down, as "module -> module"."""
    wrong = []
    for source, targets in arrows.items():
        package, room = room_of(source)
        for target in sorted(targets):
            other, its_room = room_of(target)
            if package == other:
                allowed = room == its_room or height(package, room) > height(other, its_room)
            else:
                allowed = package == "alignvlm"
            if not allowed:
                wrong.append(f"{source} -> {target}")
    return wrong


def test_imports_point_down() -> None:
    assert upward(graph()) == []


def test_documentation_draws_this_order() -> None:
    drawing = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").split("```")[1]
    drawn = re.findall(r"^(\w+/\w+) ", drawing, re.MULTILINE)
    assert drawn == [f"{package}/{room}" for package, rows in ORDER.items() for row in rows for room in row]


def test_no_modules_import_each_other_in_a_circle() -> None:
    try:
        TopologicalSorter(graph()).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


@pytest.mark.parametrize(
    ("file", "line", "wrong"),
    [
        ("alignvlm/model/new.py", "from alignvlm.training import run", "alignvlm.model.new -> alignvlm.training.run"),
        ("alignvlm/model/new.py", "def f():\n    import alignvlm.cli", "alignvlm.model.new -> alignvlm.cli"),
        ("alignvlm/errors.py", "from alignvlm.progress import x", "alignvlm.errors -> alignvlm.progress"),
        ("data_pipeline/order/new.py", "import alignvlm.errors", "data_pipeline.order.new -> alignvlm.errors"),
        ("alignvlm/model/new.py", "if TYPE_CHECKING:\n    import alignvlm.cli", None),
        ("alignvlm/cli/new.py", "from alignvlm import __version__\nimport data_pipeline.order", None),
    ],
)
def test_the_check_sees_arrows(tmp_path: Path, file: str, line: str, wrong: str | None) -> None:
    places = ("alignvlm/cli", "alignvlm/training", "alignvlm/model", "data_pipeline/order")
    for name in ("alignvlm", "data_pipeline", *places):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "__init__.py").touch()
    for name in ("training/run", "errors", "progress"):
        (tmp_path / "alignvlm" / f"{name}.py").touch()
    (tmp_path / file).write_text(line + "\n")
    assert upward(graph(tmp_path)) == ([wrong] if wrong else [])


def python_files() -> list[Path]:
    return [path for name in (*PACKAGES, "benchmarks") for path in sorted((ROOT / name).rglob("*.py"))]


def test_files_stay_short() -> None:
    lengths = {str(path.relative_to(ROOT)): len(path.read_text("utf-8").splitlines()) for path in python_files()}
    assert {name: lines for name, lines in lengths.items() if lines > MAX_LINES} == {}


def test_folders_stay_small() -> None:
    folders = {path.parent for path in python_files()}
    sizes = {str(folder.relative_to(ROOT)): len(list(folder.glob("*.py"))) for folder in folders}
    assert {name: size for name, size in sizes.items() if size > MAX_MODULES} == {}
