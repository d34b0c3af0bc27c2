"""YAML text as a tree whose every value remembers where it was written. Knows nothing of the schema (build.py does)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from alignvlm.errors import UserError


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
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot read this recipe: {error}") from error
    try:
        node = yaml.compose(text, Loader=RecipeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        raise UserError(f"{path}{line}: not valid YAML: {error.problem or error.context}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {error}") from error
    if node is None:
        raise UserError(f"{path}: this recipe is empty")
    if not isinstance(node, yaml.MappingNode):
        raise UserError(f"{path}:{node.start_mark.line + 1}: a recipe is a mapping of keys to values")
    return _convert(node, str(path))


def parse_override(text: str) -> tuple[list[str], Value]:
    """Split `a.b.c=value` into its keys and its YAML value."""
    where = f"override {text!r}"
    dotted, equals, raw = text.partition("=")
    keys = [key.strip() for key in dotted.split(".")]
    if not equals or not all(keys):
        raise UserError(f"{where}: write it as key.subkey=value, for example train.precision=fp32")
    try:
        node = yaml.compose(raw, Loader=RecipeLoader)
    except yaml.YAMLError as error:
        raise UserError(
            f"{where}: the value {raw!r} is not valid YAML (quotes inside the value may help: '\"{raw}\"')"
        ) from error
    value = Value(None, where) if node is None else _convert(node, where, lines=False)
    return keys, value


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


def _convert(node: yaml.Node, source: str, lines: bool = True) -> Value:
    where = f"{source}:{node.start_mark.line + 1}" if lines else source
    if isinstance(node, yaml.MappingNode):
        mapping: dict[str, Value] = {}
        for key_node, value_node in node.value:
            place = f"{source}:{key_node.start_mark.line + 1}" if lines else source
            if not isinstance(key_node, yaml.ScalarNode):
                raise UserError(f"{place}: a key must be a name, not a list or a mapping")
            key = key_node.value
            if key in mapping:
                raise UserError(f"{place}: the key {key!r} is given twice (first at {mapping[key].where})")
            value = _convert(value_node, source, lines)
            # A block value starts below its key, and an alias far away: errors point at the key.
            mapping[key] = Value(value.data, place)
        return Value(mapping, where)
    if isinstance(node, yaml.SequenceNode):
        return Value([_convert(item, source, lines) for item in node.value], where)
    return Value(_scalar(node, where), where)


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
            return float(node.value.replace(".inf", "inf").replace(".nan", "nan"))
    except ValueError as error:
        raise UserError(f"{where}: {node.value!r} is not a number") from error
    if kind == "str":
        return node.value
    raise UserError(f"{where}: the YAML tag {node.tag!r} is not used in recipes")
