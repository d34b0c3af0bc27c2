"""Pages of the built-in recipes and of all settings, from the recipes and their schema as the program reads them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from alignvlm.config import Recipe, find_recipe, list_recipes, load_recipe
from alignvlm.config.json_schema import json_schema

FIRST = "quickstart"


def pages() -> dict[str, str]:
    """Page of the site -> its text."""
    recipes = [load_recipe(name) for name in sorted(list_recipes(), key=lambda name: (name != FIRST, name))]
    found = {"recipes/index.md": _overview(recipes), "settings.md": _settings()}
    return found | {f"recipes/{recipe.name}.md": _page(recipe) for recipe in recipes}


def _overview(recipes: Sequence[Recipe]) -> str:
    rows = [
        (f"[{r.name}]({r.name}.md)", r.description, _network(r.model.vision), r.model.connector.kind,
         _network(r.model.language), " → ".join(r.stages), r.train.deepspeed)
        for r in recipes
    ]  # fmt: skip
    head = ("recipe", "what it trains", "vision", "connector", "language", "stages", "DeepSpeed")
    return (
        "# Recipes\n\nA recipe is one YAML file: model, sources, stages. These come with the package; "
        "`alignvlm config show RECIPE` prints one with every default, and a recipe of your own may extend one. "
        "[Every setting](../settings.md) has its type, default and meaning.\n\n" + _table(head, rows)
    )


def _page(recipe: Recipe) -> str:
    model, data = recipe.model, recipe.data
    connector = ", ".join(f"{k} {_shown(v)}" for k, v in vars(model.connector).items() if k != "kind")
    parts = [
        ("vision", _network(model.vision)), ("connector", f"{model.connector.kind}: {connector}"),
        ("language", _network(model.language)),
        ("tiles", ", ".join(f"{key} {_shown(value)}" for key, value in vars(model.tiles).items())),
        ("attention", model.attention), ("precision", recipe.train.precision), ("DeepSpeed", recipe.train.deepspeed),
    ]  # fmt: skip
    fields = ("mixture", "trainable", "lr", "epochs", "max_steps", "global_batch_packs", "sequence_length",
              "warmup_steps", "schedule", "weight_decay", "betas", "deepspeed")  # fmt: skip
    stages = [(f"`{key}`", *(_shown(getattr(stage, key)) for stage in recipe.stages.values())) for key in fields]
    sources = [
        (f"`{source.name}`", f"`{source.path}`", source.generator or "shards of yours", _shown(source.num_samples),
         _used_by(recipe, source.name))
        for source in data.sources.values()
    ]  # fmt: skip
    tasks = [
        (f"`{name}`", f"`{task.source}`", ", ".join(task.metrics), _shown(task.limit), _shown(task.max_new_tokens))
        for name, task in recipe.evaluation.tasks.items()
    ]
    sections = [
        f"# {recipe.name}\n\n{recipe.description}\n\n    alignvlm train {recipe.name}\n",
        "## Model\n\n" + _table(("part", "what"), parts),
        "## Stages\n\n" + _table(("", *recipe.stages), stages),
        "## Sources\n\n" + _table(("source", f"folder in `{data.root}`", "made by", "samples", "used by"), sources),
        "## Held-out tasks\n\n" + _table(("task", "source", "metrics", "items", "answer tokens"), tasks),
        f"## The file\n\n```yaml\n{Path(find_recipe(recipe.name)).read_text(encoding='utf-8')}```\n",
    ]
    return "\n".join(sections)


def _used_by(recipe: Recipe, source: str) -> str:
    stages = [name for name, stage in recipe.stages.items() if source in stage.mixture]
    tasks = [f"task {name}" for name, task in recipe.evaluation.tasks.items() if task.source == source]
    return ", ".join(stages + tasks)


def _network(part: Any) -> str:
    """A pretrained model by its name, one from scratch by its sizes."""
    if part.path:
        return f"`{part.path}`"
    config = part.config or {}
    sizes = f"{config.get('num_hidden_layers')} layers of {config.get('hidden_size')}"
    return f"{config.get('model_type')} from scratch, {sizes}"


def _settings() -> str:
    schema = json_schema()
    places = _places(schema)
    parts = [
        "# Every setting of a recipe\n\nThe keys of a recipe's YAML file, section by section; on a command line "
        "`stages.joint.max_steps=100`. `alignvlm config schema` prints this as a JSON schema for editors."
    ]
    for name, place in places.items():
        section = schema["$defs"].get(name, schema)
        rows = [
            (f"`{key}`", _type(field, places, schema), _shown(field["default"]) if "default" in field else "",
             field.get("description", ""))
            for key, field in section["properties"].items()
        ]  # fmt: skip
        parts.append(f"## {place}\n\n{section.get('description', '')}\n")
        parts.append(_table(("key", "type", "default", "meaning"), rows))
    return "\n\n".join(parts)


def _places(schema: dict[str, Any]) -> dict[str, str]:
    """Definition -> where a recipe has such a section, from the outside to the inside."""
    found = {"": "The file"}

    def visit(node: Any, place: str) -> None:
        if isinstance(node, list):
            for each in node:
                visit(each, place)
            return
        name = node.get("$ref", "").rpartition("/")[2]
        if name:
            section = schema["$defs"][name]
            if "properties" in section and name not in found:
                kind = section["properties"].get("kind", {}).get("const")
                found[name] = f"{place}, kind {kind}" if kind else place
            visit({key: value for key, value in section.items() if key != "$ref"}, place)
        for key in ("anyOf", "oneOf", "allOf"):
            visit(node.get(key, []), place)
        visit([node["items"]] if isinstance(node.get("items"), dict) else [], place)
        if isinstance(node.get("additionalProperties"), dict):
            visit(node["additionalProperties"], f"{place}.NAME")
        for key, field in node.get("properties", {}).items():
            visit(field, f"{place}.{key}".lstrip("."))

    visit(schema, "")
    return found


def _type(field: dict[str, Any], places: dict[str, str], schema: dict[str, Any]) -> str:
    """A type of JSON's schema in words; another section as a link."""
    if "$ref" in field:
        name = field["$ref"].rpartition("/")[2]
        if name not in places:
            return _type(schema["$defs"][name], places, schema)
        anchor = re.sub(r"[^\w ]", "", places[name].lower()).replace(" ", "-")
        return f"[{places[name]}](#{anchor})"
    if "enum" in field:
        return ", ".join(f"`{value}`" for value in field["enum"])
    if "const" in field:
        return f"`{field['const']}`"
    for choice in ("anyOf", "oneOf", "allOf"):
        if choice in field:
            return " or ".join(dict.fromkeys(_type(each, places, schema) for each in field[choice]))
    if field.get("type") == "array" and isinstance(field.get("items"), dict):
        return f"list of {_type(field['items'], places, schema)}"
    if field.get("type") == "object" and isinstance(field.get("additionalProperties"), dict):
        return f"name → {_type(field['additionalProperties'], places, schema)}"
    return str(field.get("type", "any"))


def _shown(value: Any) -> str:
    """A value as a cell of a table."""
    if value is None:
        return "–"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_shown(each)}" for key, each in value.items()) or "none"
    if isinstance(value, list | tuple):
        return ", ".join(map(_shown, value)) or "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return f"{value:,}"
    return f"`{value}`" if isinstance(value, str) and value else str(value)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    cells = [[" ".join(str(cell).split()).replace("|", "\\|") for cell in row] for row in (head, *rows)]
    cells.insert(1, ["---"] * len(head))
    return "".join(f"| {' | '.join(row)} |\n" for row in cells)
