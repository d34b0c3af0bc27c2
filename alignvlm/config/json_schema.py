"""The JSON schema of recipes, for editors that check and complete YAML."""

from __future__ import annotations

import dataclasses
import typing
from typing import Any

from pydantic import TypeAdapter

from alignvlm.config.schema import Recipe
from alignvlm.config.types import field_types
from alignvlm.connectors.options import ConnectorOptions, connector_kinds, options_class


def json_schema() -> dict[str, Any]:
    """The schema as plain data; descriptions are those of schema.py, and a connector is one of the known kinds."""
    schema = TypeAdapter(Recipe).json_schema()
    definitions = schema["$defs"]
    kinds = {kind: options_class(kind) for kind in connector_kinds()}
    for options in kinds.values():
        definitions[options.__name__] = _stated(TypeAdapter(options).json_schema(), options)
    references = {kind: f"#/$defs/{options.__name__}" for kind, options in kinds.items()}
    # Not oneOf: a recipe that inherits its kind states options only, and several kinds may have them.
    definitions["ConnectorOptions"] = {
        "anyOf": [{"$ref": reference} for reference in references.values()],
        "discriminator": {"propertyName": "kind", "mapping": references},
    }
    for name, section in _sections(Recipe).items():
        described = schema if section is Recipe else definitions[name]
        if section is not ConnectorOptions:
            _stated(described, section)
            for value in described["properties"].values():
                if isinstance(value.get("additionalProperties"), dict):  # `name: null` removes an inherited entry
                    value["additionalProperties"] = {"anyOf": [value["additionalProperties"], {"type": "null"}]}
    _set_bounds(schema)
    return schema


def _set_bounds(node: Any) -> None:
    """Bounds that pydantic checks after a validator of ours stand under its own names in the schema."""
    for child in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        _set_bounds(child)
    if isinstance(node, dict) and node.get("type") == "integer":
        for own, name in (("ge", "minimum"), ("le", "maximum")):
            if own in node:
                node[name] = node.pop(own)


def _stated(definition: dict[str, Any], section: type) -> dict[str, Any]:
    """Only the keys that a recipe may state."""
    known = field_types(section)
    definition["properties"] = {name: value for name, value in definition["properties"].items() if name in known}
    return definition


def _sections(section: type) -> dict[str, type]:
    """Name -> class of every section below this one."""
    found = {section.__name__: section}
    pending = list(field_types(section).values())
    while pending:
        kind = pending.pop()
        pending += typing.get_args(kind)
        if dataclasses.is_dataclass(kind) and isinstance(kind, type) and kind.__name__ not in found:
            found |= {kind.__name__: kind}
            pending += field_types(kind).values()
    return found
