"""`alignvlm config show|list|check|schema`: look at recipes without running them."""

from __future__ import annotations

import argparse
from typing import Any

from alignvlm.cli.arguments import add_recipe


def add_parser(subparsers: Any) -> None:
    """Add `config` and its actions to the command line."""
    parser = subparsers.add_parser("config", help="show, list and check recipes")
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")

    show = actions.add_parser("show", help="print a recipe with all inherited values and defaults")
    add_recipe(show, "train.precision=fp32")
    show.set_defaults(handler=run_show)

    listing = actions.add_parser("list", help="list the built-in recipes and DeepSpeed strategies")
    listing.set_defaults(handler=run_list)

    check = actions.add_parser("check", help="check a recipe; name the first mistake with its line")
    add_recipe(check, "train.precision=fp32")
    check.set_defaults(handler=run_check)

    schema = actions.add_parser("schema", help="print the JSON schema of recipes, for editors")
    schema.set_defaults(handler=run_schema)


def run_show(args: argparse.Namespace) -> int:
    from alignvlm.config import load_recipe, recipe_to_yaml

    print(recipe_to_yaml(load_recipe(args.recipe, args.overrides)), end="")
    return 0


def run_list(args: argparse.Namespace) -> int:
    from alignvlm.config import list_deepspeed_configs, list_recipes, load_recipe

    for name in list_recipes():
        print(f"{name:20} {load_recipe(name).description}")
    print(f"\ndeepspeed: {', '.join(list_deepspeed_configs())}")
    return 0


def run_check(args: argparse.Namespace) -> int:
    """Everything that training checks before it begins, except for what would have to be downloaded."""
    from alignvlm.checks import check_files, check_held_out, check_model, missing_data
    from alignvlm.cli.imports import import_model
    from alignvlm.config import load_recipe
    from alignvlm.evaluation.benchmarks.job import jobs_of_recipe

    recipe = load_recipe(args.recipe, args.overrides)
    check_files(recipe)
    jobs_of_recipe(recipe)
    import_model()
    unchecked = [*missing_data(recipe).values(), *check_model(recipe, for_training=False)]
    check_held_out(recipe)
    for line in unchecked:
        print(f"not checked: {line}")
    print(f"{args.recipe}: OK ({len(recipe.stages)} stages: {', '.join(recipe.stages)})")
    return 0


def run_schema(args: argparse.Namespace) -> int:
    import json

    from alignvlm.config.json_schema import json_schema
    from alignvlm.plugins import import_plugins

    import_plugins()
    print(json.dumps(json_schema(), indent=2))
    return 0
