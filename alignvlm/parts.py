"""A model's parameters by name: how recipes call them, and how modules do. Knows no model class.

A parameter has two names. Recipes, errors and metrics use the public one, which begins with its part: `vision.*`,
`connector.*`, `language.model.*`, `language.lm_head.*`. Modules are laid out as transformers does it, and exports and
checkpoints have their names: `model.vision_tower.*`, `model.connector.*`, `model.language_model.*`, `lm_head.*`.
Exports and checkpoints of earlier versions have the public names: the same renaming reads them.
"""

from __future__ import annotations

import re

RENAMINGS = (
    (r"^vision\.", "model.vision_tower."),
    (r"^connector\.", "model.connector."),
    (r"^language\.lm_head\.", "lm_head."),
    (r"^language\.\w+\.", "model.language_model."),
)
"""(regular expression, what modules have instead) of public names; one of them fits, the third before the fourth.

What follows `language.` was the language model's own word for its layers: `model` in most, `transformer` in some.
"""
_PUBLIC = {
    "model.vision_tower.": "vision.",
    "model.connector.": "connector.",
    "model.language_model.": "language.model.",
    "lm_head.": "language.lm_head.",
}


def module_name(name: str) -> str:
    """The modules' name of a parameter or module of either name."""
    for pattern, target in RENAMINGS:
        renamed, count = re.subn(pattern, target, name)
        if count:
            return renamed
    return name


def public_name(name: str) -> str:
    """The public name of a parameter or module of either name."""
    for prefix, public in _PUBLIC.items():
        if name.startswith(prefix):
            return public + name.removeprefix(prefix)
    return name


def part_of(name: str) -> str:
    """The part that a parameter of either name belongs to."""
    return public_name(name).partition(".")[0]
