"""Where a setting was written: errors about a recipe begin with its file and line, also long after it was read."""

from __future__ import annotations

from alignvlm.config.schema import Recipe
from alignvlm.errors import UserError


def place(recipe: Recipe, key: str) -> str:
    """`file:line` of a dotted key; of the nearest section around it where the recipe does not state the key itself."""
    while key and key not in recipe.places:
        key = key.rpartition(".")[0]
    return recipe.places.get(key, "recipe")


def recipe_error(recipe: Recipe, key: str, message: str) -> UserError:
    """The error that a setting cannot work; `message` names the key, its value and the way out."""
    return UserError(f"{place(recipe, key)}: {message}")
