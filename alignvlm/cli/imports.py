"""Importing what models need, for every command that uses one."""

from __future__ import annotations

import sys

from alignvlm.system.imports import importing


def import_model() -> None:
    """`alignvlm.model`, which brings torch and transformers, in two thirds of the CPU time that a plain import takes.

    Call it when the arguments have been looked at: mistakes in them need not wait for it.
    """
    if "alignvlm.model" not in sys.modules:  # else nothing is imported, and later objects would be kept for good
        with importing():
            import alignvlm.model  # noqa: F401
