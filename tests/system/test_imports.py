"""Imports of training: what is hidden meanwhile is there afterwards, and the collector works as before."""

from __future__ import annotations

import subprocess
import sys

from tests.jobs import ROOT, job_environment

LEFT_OUT = """
import gc, sys
from alignvlm.system.imports import importing
with importing():
    assert not gc.isenabled()
    assert "scipy.optimize" not in sys.modules
    from transformers.loss.loss_for_object_detection import linear_sum_assignment
assert gc.isenabled() and gc.get_freeze_count() > 1000
assert "scipy" not in sys.modules
print(linear_sum_assignment([[4, 1], [2, 8]]), file=sys.stderr)
import scipy.optimize
assert scipy.optimize.linear_sum_assignment is not linear_sum_assignment
with importing():
    assert sys.modules["scipy.optimize"] is scipy.optimize
"""
OF_A_COMMAND = """
import gc, sys
from alignvlm.cli.imports import import_model
import_model()
assert gc.isenabled() and gc.get_freeze_count() > 1000
assert "alignvlm.model" in sys.modules and "scipy" not in sys.modules
gc.unfreeze()
import_model()
assert gc.get_freeze_count() == 0
"""
OTHERS = """
import gc
from alignvlm.system.imports import importing
gc.disable()
with importing():
    import scipy.optimize._minpack_py
    from scipy.optimize import *
    assert scipy.optimize.minimize is minimize
assert not gc.isenabled()
"""


def stderr_of(program: str) -> str:
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, env=job_environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_what_is_left_out_of_imports_works_when_it_is_called() -> None:
    assert stderr_of(LEFT_OUT) == "(array([0, 1]), array([1, 0]))\n"


def test_a_command_keeps_its_imports_from_the_collector_and_nothing_later() -> None:
    assert stderr_of(OF_A_COMMAND) == ""


def test_everything_else_is_imported_with_scipy_and_the_collector_stays_off_where_it_was() -> None:
    assert stderr_of(OTHERS) == ""
