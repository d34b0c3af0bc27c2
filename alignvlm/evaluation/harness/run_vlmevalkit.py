"""Starts VLMEvalKit's own `run.py` with an export as one of its models, which it has no other way to learn about.

    python -m alignvlm.evaluation.harness.run_vlmevalkit --checkout VLMEvalKit --export EXPORT --data DocVQA_VAL

What this command does not know itself goes to `run.py`, such as `--data`, `--judge` and `--work-dir`.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from alignvlm.errors import UserError
from alignvlm.exports import check_export


def main(arguments: Sequence[str] | None = None) -> None:
    """Register the export under its name and hand over. Raises UserError: no export, or no checkout of VLMEvalKit."""
    parser = argparse.ArgumentParser(
        prog="python -m alignvlm.evaluation.harness.run_vlmevalkit",
        description="Run VLMEvalKit on an export; all other arguments are those of its run.py, without --model.",
        allow_abbrev=False,
    )
    parser.add_argument("--checkout", type=Path, required=True, help="folder of VLMEvalKit with its run.py")
    parser.add_argument("--export", type=Path, required=True, help="export folder of the model")
    parser.add_argument("--name", default="alignvlm", help="what VLMEvalKit calls the model in its files")
    parser.add_argument("--max-new-tokens", type=int, help="the longest reply, 512 by default")
    parser.add_argument("--device", help="such as cpu (default: the GPU of this process, else the CPU)")
    own, others = parser.parse_known_args(arguments)
    script = own.checkout.absolute() / "run.py"
    if not script.is_file():
        raise UserError(f"{script} is not there: give a checkout of https://github.com/open-compass/VLMEvalKit")
    check_export(own.export)
    options = {"max_new_tokens": own.max_new_tokens, "device": own.device}
    given = {name: value for name, value in options.items() if value is not None}
    sys.path.insert(0, str(script.parent))
    sys.argv = [str(script), *others, "--model", own.name]
    run = _module_of(script)  # it chooses this process's GPU before it imports torch's users
    from alignvlm.evaluation.harness.vlmevalkit import AlignVLM

    run.supported_VLM[own.name] = partial(AlignVLM, str(own.export.absolute()), **given)
    run.load_env()
    run.main()


def _module_of(script: Path) -> Any:
    spec = importlib.util.spec_from_file_location("vlmevalkit_run", script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except ModuleNotFoundError as error:
        raise UserError(f"VLMEvalKit needs {error.name}: pip install -e {script.parent}") from error
    return module


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(str(error))
