"""Recipes from files: find, inherit (`extends`), override, check, write back, compare. The schema is in schema.py."""

from __future__ import annotations

import dataclasses
import logging
import os
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from alignvlm.config.build import build, check_scalars, origins
from alignvlm.config.names import with_names
from alignvlm.config.schema import Recipe
from alignvlm.config.tree import RecipeDumper, Value, join, merge, parse_override, read_tree
from alignvlm.config.types import child_type, field_types, section_of
from alignvlm.config.validate import check_recipe, ignored_settings
from alignvlm.connectors.options import ConnectorOptions
from alignvlm.errors import UserError, shown
from alignvlm.plugins import import_plugins
from alignvlm.resources import resource
from alignvlm.settings import FILLED
from data_pipeline.errors import did_you_mean, nearest
from data_pipeline.masking import mask

SUFFIXES = (".yaml", ".yml")
MAX_PARENTS = 16
"""Recipes that extend one after the other."""

logger = logging.getLogger(__name__)


def list_recipes() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(path.stem for path in resource("recipes").glob("*.yaml"))


def find_recipe(name_or_path: str, beside: Path | None = None) -> Path:
    """Path of a recipe given by name or by path; `beside` is the folder that a relative path may start from."""
    is_path = name_or_path.endswith(SUFFIXES) or "/" in name_or_path
    folders = [Path(), *([beside] if beside else [])]
    if is_path:
        for folder in folders:
            path = Path(os.path.expanduser(folder / name_or_path))
            if os.path.isfile(path):
                return path
    else:
        path = resource("recipes", f"{name_or_path}.yaml")
        if os.path.isfile(path):
            return path
    raise _no_recipe(name_or_path, is_path)


def _no_recipe(name: str, is_path: bool) -> UserError:
    """Says where the recipe may be: in a run's folder, or in a file with nearly this name."""
    config = os.path.join(name, "config.yaml")
    if os.path.isfile(config):
        return UserError(f"{shown(name)} is a folder; the recipe of the run in it is {shown(config)}")
    folder = os.path.dirname(name)
    try:
        listed = os.listdir(folder or ".")
    except (OSError, ValueError):
        listed = []
    files = {os.path.splitext(file)[0]: os.path.join(folder, file) for file in listed if file.endswith(SUFFIXES)}
    wanted = os.path.basename(name)
    found = files.get(wanted.removesuffix(".yaml").removesuffix(".yml"))
    hint = f"did you mean {found!r}? " if found else ""
    if is_path:
        hint = hint or f"{did_you_mean(name, files.values())} ".lstrip()
        return UserError(f"recipe file {shown(name)} does not exist; {hint}by name: {', '.join(list_recipes())}")
    hint = hint or f"{nearest(name, list_recipes())}; "
    return UserError(f"unknown recipe {shown(name)}: {hint}or give a path ending in .yaml")


def load_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read, inherit, override and check a recipe.

    `overrides` are `dotted.key=value` with YAML values; `null` removes an inherited entry of a mapping (a stage, a
    source, a learning rate). Raises UserError with file, line and key. The result stands alone: it has no `extends`.
    """
    path = find_recipe(name_or_path)
    tree = _inherit(path, ())
    for text in overrides:
        keys, value = parse_override(text)
        _check_reachable(tree, keys, value.where)
        for key in reversed(keys):
            value = Value({key: value}, value.where)
        tree = merge(tree, value)
    tree = _without_removed(Recipe, tree)
    check_scalars(tree)
    _import_modules(tree)
    recipe = build(tree)
    # A file name is UTF-8 also where the locale is not.
    name = recipe.name or os.fsencode(path.stem).decode("utf-8", "replace")
    recipe = dataclasses.replace(recipe, name=name, extends=None, places=origins(tree))
    recipe = with_names(recipe)
    check_recipe(recipe)
    for warning in ignored_settings(recipe):
        logger.warning("%s", warning)
    return recipe


def _import_modules(tree: Value) -> None:
    """Import what the recipe asks for; the schema itself is checked afterwards, because modules may extend it."""
    import_plugins()
    value = tree.data.get("imports")
    for name in value.data if value is not None and isinstance(value.data, list) else []:
        if isinstance(name.data, str):
            try:
                import_plugins([name.data])
            except UserError as error:
                raise UserError(f"{name.where}: {error}") from error


def recipe_to_dict(recipe: Recipe) -> dict[str, Any]:
    """Plain dicts, lists and scalars, as `load_recipe` would read them; passwords in URLs are masked."""
    return _plain(recipe)


def recipe_to_yaml(recipe: Recipe) -> str:
    """The whole recipe as YAML; loading it gives an equal recipe, except for passwords in URLs, which are masked."""
    return yaml.dump(recipe_to_dict(recipe), Dumper=RecipeDumper, sort_keys=False, allow_unicode=True, width=120)


def diff_recipes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What differs between two recipes given as dicts: "dotted.key: old → new", in the order of the keys."""
    before, after = _flatten(old), _flatten(new)
    lines = []
    for key in [*before, *(key for key in after if key not in before)]:
        if key not in before:
            lines.append(f"{key}: (absent) → {after[key]!r}")
        elif key not in after:
            lines.append(f"{key}: {before[key]!r} → (absent)")
        elif before[key] != after[key]:
            lines.append(f"{key}: {before[key]!r} → {after[key]!r}")
    return lines


def _inherit(path: Path, seen: tuple[Path, ...]) -> Value:
    resolved = path.resolve()
    if resolved in seen:
        chain = " → ".join(step.name for step in (*seen[seen.index(resolved) :], resolved))
        raise UserError(f"{path}: recipes extend each other in a circle: {chain}")
    if len(seen) > MAX_PARENTS:
        raise UserError(f"{path}: more than {MAX_PARENTS} recipes extend one after the other")
    tree = read_tree(path)
    parent = tree.data.get("extends")
    if parent is None or parent.data is None:
        return tree
    if not isinstance(parent.data, str):
        raise UserError(f"{parent.where}: extends is {parent.plain()!r}, but must be the name or path of one recipe")
    try:
        parent_path = find_recipe(parent.data, path.parent)
    except UserError as error:
        raise UserError(f"{parent.where}: extends: {error}") from error
    inherited = _inherit(parent_path, (*seen, resolved))
    inherited.data.pop("name", None)
    merged = merge(inherited, tree)
    return Value(merged.data, tree.where)


def _check_reachable(tree: Value, keys: Sequence[str], where: str) -> None:
    """An override may not invent a stage, a source or a task: a mistyped name would silently start a new one."""
    kind: Any = Recipe
    node: Value | None = tree
    dotted = ""
    for key in keys:
        if kind is ConnectorOptions or kind is Any:  # a connector's options depend on its kind, which may come later
            return
        section = section_of(kind)
        entries = node.data if node is not None and isinstance(node.data, dict) else {}
        known: Any = None
        if dataclasses.is_dataclass(section):
            known = field_types(section)
        elif typing.get_origin(section) is dict:
            known = entries if dataclasses.is_dataclass(section_of(typing.get_args(section)[1])) else [key]
        if known is None:
            raise UserError(f"{where}: unknown key {join(dotted, key)!r}: {dotted} is a single value, without keys")
        if key not in known:
            raise UserError(f"{where}: unknown key {join(dotted, key)!r}: {nearest(key, known)}")
        kind = child_type(section, key, None)
        dotted = join(dotted, key)
        node = entries.get(key)


def _without_removed(kind: Any, value: Value) -> Value:
    """Drop `name: null` from mappings whose values cannot be null: that is how a recipe removes what it inherits."""
    if not isinstance(value.data, dict):
        return value
    section = section_of(kind)
    kept: dict[str, Value] = {}
    for key, child in value.data.items():
        child_kind = Any if kind is ConnectorOptions else child_type(section, key, None)
        if child.data is None and typing.get_origin(section) is dict and child_kind is not Any:
            continue
        kept[key] = _without_removed(child_kind, child)
    return Value(kept, value.where)


def _plain(value: Any) -> Any:
    """Dicts, lists and scalars, without what the loader fills in by itself."""
    if dataclasses.is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value) if FILLED not in f.metadata}
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return mask(value) if isinstance(value, str) else value


def _flatten(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(item, Mapping) and item:
            flat.update(_flatten(item, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = list(item) if isinstance(item, tuple) else item
    return flat
