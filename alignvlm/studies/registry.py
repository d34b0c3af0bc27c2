"""The studies by name. A module is imported when its study is asked for."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from alignvlm.errors import UserError
from data_pipeline.errors import nearest

if TYPE_CHECKING:  # `alignvlm --help` names the studies and loads none
    from alignvlm.studies.study import Study

STUDIES = {
    "connectors": "alignvlm.studies.connectors",
    "init": "alignvlm.studies.init",
    "noise": "alignvlm.studies.noise",
    "vocabulary": "alignvlm.studies.vocabulary",
}
"""Name -> the module whose STUDY it is."""


def find_study(name: str) -> Study:
    """A study by name. Raises UserError naming the nearest."""
    if name not in STUDIES:
        raise UserError(f"unknown study {name!r}: {nearest(name, STUDIES)}")
    return importlib.import_module(STUDIES[name]).STUDY
