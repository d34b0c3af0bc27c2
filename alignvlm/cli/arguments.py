"""Arguments that several commands share."""

from __future__ import annotations

import argparse


def add_recipe(parser: argparse.ArgumentParser, example: str = "seed=1") -> None:
    """Add `RECIPE [key=value …]`; `example` is an override that makes sense for the command.

    The parsed arguments have `recipe` and `overrides`, as `load_recipe` takes them.
    """
    parser.add_argument("recipe", help="name of a built-in recipe, or path of a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=f"settings to change, such as {example}")
