"""YAML text as a tree whose every value remembers where it was written. Knows nothing of the schema (build.py does)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from alignvlm.errors import UserError, shown

MAX_BYTES = 2**18
"""Largest recipe file. The longest that we ship has 8 KB; YAML of this size takes about two seconds to parse."""
MAX_DEPTH = 32
"""Deepest nesting of values, and most keys in the dotted name of an override."""
MAX_VALUES = 20_000
"""Most values of a recipe file, counted with its aliases written out."""
MAX_KEY = 200
"""Most characters of a key."""


@dataclass(frozen=True)
class Value:
    """A scalar, a list of values or a mapping of values, and the place it comes from (`file:line` or an override)."""

    data: Any
    where: str

    def plain(self) -> Any:
        """The value without its places: dicts, lists and scalars."""
        if isinstance(self.data, dict):
            return {key: value.plain() for key, value in self.data.items()}
        if isinstance(self.data, list):
            return [value.plain() for value in self.data]
        return self.data


class RecipeLoader(yaml.SafeLoader):
    """YAML 1.2's scalars: `1e-3` is a number, `yes` and `on` are text, `012` is twelve."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012
    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """PyYAML's method, which calls itself once per level."""
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise yaml.MarkedYAMLError(problem=_TOO_DEEP, problem_mark=self.peek_event().start_mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


RecipeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:null", re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]
)
RecipeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
RecipeLoader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?[0-9]+$"), list("-+0123456789"))
RecipeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(?:(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+)(?:[eE][-+]?[0-9]+)?|\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    ),
    list("-+0123456789."),
)


_TOO_DEEP = f"more than {MAX_DEPTH} values inside each other"


class RecipeDumper(yaml.SafeDumper):
    """Writes YAML that RecipeLoader and YAML 1.1 readers understand alike (it quotes what either would mistake)."""


for first, resolvers in RecipeLoader.yaml_implicit_resolvers.items():
    for tag, pattern in resolvers:
        RecipeDumper.add_implicit_resolver(tag, pattern, [first])


def join(parent: str, key: str | int) -> str:
    """Dotted key of a child: of a mapping's entry by its name, of a list's by its number."""
    if isinstance(key, int):
        return f"{parent}[{key}]"
    return f"{parent}.{key}" if parent else key


def read_tree(path: Path) -> Value:
    """Parse a recipe file; UserError with file and line for anything that is not one YAML mapping."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise UserError(f"{path}: this recipe has more than {MAX_BYTES:,} bytes")
        value = _parse(data.decode(), str(path), lines=True)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot read this recipe: {error}") from error
    if value is None:
        raise UserError(f"{path}: this recipe is empty")
    if not isinstance(value.data, dict):
        raise UserError(f"{value.where}: a recipe is a mapping of keys to values")
    return value


def parse_override(text: str) -> tuple[list[str], Value]:
    """Split `a.b.c=value` into its keys and its YAML value."""
    where = f"override {shown(text, 160)}"
    dotted, equals, raw = text.partition("=")
    keys = [key.strip() for key in dotted.split(".")]
    if not equals or not all(keys):
        raise UserError(f"{where}: write it as key.subkey=value, for example train.precision=fp32")
    if len(keys) > MAX_DEPTH or len(raw) > MAX_BYTES:
        raise UserError(f"{where}: an override has at most {MAX_DEPTH} keys and {MAX_BYTES:,} characters")
    for key in keys:
        _check_key(key, where)
    return keys, _parse(raw, where, lines=False) or Value(None, where)


def merge(base: Value, update: Value, key: str = "") -> Value:
    """Merge mappings key by key; anything else replaces what was there.

    So do a `config` of another `model_type` and a connector of another `kind`: options of the former mean nothing.
    """
    if not isinstance(base.data, dict) or not isinstance(update.data, dict):
        return update
    if _tag_changed(base.data, update.data, "model_type"):
        return update
    if key == "model.connector" and _tag_changed({"kind": Value("align", ""), **base.data}, update.data, "kind"):
        return update
    merged = dict(base.data)
    for name, value in update.data.items():
        merged[name] = merge(merged[name], value, join(key, name)) if name in merged else value
    return Value(merged, update.where)


def _tag_changed(base: dict[str, Value], update: dict[str, Value], key: str) -> bool:
    return key in base and key in update and base[key].plain() != update[key].plain()


def _parse(text: str, source: str, *, lines: bool) -> Value | None:
    """The value that a YAML text states, None for an empty one. UserError, with its line, for what is not YAML."""
    try:
        node = yaml.compose(text, Loader=RecipeLoader)
    except yaml.reader.ReaderError as error:
        line = f":{text.count(chr(10), 0, error.position) + 1}" if lines else ""
        raise UserError(f"{source}{line}: not valid YAML: the character U+{error.character:04X} is not text") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark and lines else ""
        hint = "" if lines else f" (quotes inside the value may help: '\"{shown(text)[1:-1]}\"')"
        raise UserError(f"{source}{line}: not valid YAML: {error.problem or error.context}{hint}") from error
    return None if node is None else _Converter(source, lines).convert(node)


class _Converter:
    """From YAML nodes to values. An alias becomes a copy of what it names, so copies are bounded, and circles too."""

    def __init__(self, source: str, lines: bool) -> None:
        self.source, self.lines, self.left = source, lines, MAX_VALUES

    def convert(self, node: yaml.Node, depth: int = 1) -> Value:
        """The value of a node, `depth` levels below the file."""
        where = self.place(node)
        self.left -= 1
        if depth > MAX_DEPTH:
            raise UserError(f"{where}: {_TOO_DEEP}, or an alias inside the value that it names")
        if self.left < 0:
            raise UserError(f"{where}: this recipe has more than {MAX_VALUES:,} values, its aliases written out")
        if isinstance(node, yaml.MappingNode):
            mapping: dict[str, Value] = {}
            for key_node, value_node in node.value:
                # A block value starts below its key, and an alias far away: errors point at the key.
                place = self.place(key_node)
                key = _key(key_node, place)
                if key in mapping:
                    raise UserError(f"{place}: the key {key!r} is given twice (first at {mapping[key].where})")
                mapping[key] = Value(self.convert(value_node, depth + 1).data, place)
            return Value(mapping, where)
        if isinstance(node, yaml.SequenceNode):
            return Value([self.convert(item, depth + 1) for item in node.value], where)
        return Value(_scalar(node, where), where)

    def place(self, node: yaml.Node) -> str:
        return f"{self.source}:{node.start_mark.line + 1}" if self.lines else self.source


def _key(node: yaml.Node, where: str) -> str:
    if not isinstance(node, yaml.ScalarNode):
        raise UserError(f"{where}: a key must be a name, not a list or a mapping")
    _check_key(node.value, where)
    return node.value


def _check_key(key: str, where: str) -> None:
    if len(key) > MAX_KEY or not key.isprintable():
        raise UserError(f"{where}: the key {shown(key)} is no name: at most {MAX_KEY} printable characters")


def _scalar(node: yaml.Node, where: str) -> Any:
    kind = node.tag.rpartition(":")[2]
    if kind == "null":
        return None
    if kind == "bool":
        return node.value.lower() == "true"
    try:
        if kind == "int":
            return int(node.value)
        if kind == "float":
            return float(node.value.lower().replace(".inf", "inf").replace(".nan", "nan"))
    except ValueError as error:
        raise UserError(f"{where}: {shown(node.value)} is not a number") from error
    if kind == "str":
        return node.value
    raise UserError(f"{where}: the YAML tag {shown(node.tag)} is not used in recipes")
