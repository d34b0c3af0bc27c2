"""`alignvlm track`: deliver to MLflow what a run could not deliver while the server was away."""

from __future__ import annotations

import argparse
from typing import Any


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("track", help="bring MLflow up to date with a run's folder")
    parser.add_argument("recipe", help="name of a recipe or path of a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="the settings the run was started with")
    parser.set_defaults(handler=run)


def run(arguments: argparse.Namespace) -> int:
    from alignvlm.config import load_recipe
    from alignvlm.errors import UserError
    from alignvlm.run_folder import Run
    from alignvlm.training.tracking.mirror import Mirror

    run = Run(load_recipe(arguments.recipe, arguments.overrides))
    if not run.folder.config.exists():
        raise UserError(f"{run.folder.path}: no such run; start it with `alignvlm train {arguments.recipe}`")
    mirror = Mirror(run)
    mirror.sync()
    print(f"{run.folder.path} is up to date at {mirror.uri}, run {mirror.state['parent']}")
    return 0
