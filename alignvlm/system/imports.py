"""Importing what training needs in less time, for every start and restart of a job.

Of the 4.5 s of CPU time that the imports of training took (torch 2.13, transformers 5.23, one Xeon core), garbage
collections were 0.9 s, and scipy 0.2 s.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import ModuleType
from typing import Any

SCIPY = "scipy.optimize"
LOSSES = "transformers.loss.loss_utils"


@contextmanager
def importing() -> Iterator[None]:
    """Open around imports: garbage is not collected meanwhile, and what has been imported is never looked at later."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        _import_losses()
        yield
    finally:
        if was_enabled:
            gc.enable()
        gc.freeze()
        atexit.register(gc.unfreeze)  # extension modules complain of what is still there at the end of the process


def _import_losses() -> None:
    """transformers imports scipy for one function, which losses for detection call: they get one that does so then.

    Only they: whatever else is imported has the real package.
    """
    stand_in = _StandIn(SCIPY)
    sys.modules.setdefault(SCIPY, stand_in)
    try:
        with suppress(ImportError):  # who needs it says so
            importlib.import_module(LOSSES)
    finally:
        stand_in.step_aside()


class _StandIn(ModuleType):
    """Gives the one function, and whatever else it is asked for from the real module."""

    def step_aside(self) -> None:
        if sys.modules.get(SCIPY) is self:
            del sys.modules[SCIPY]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        self.step_aside()
        return getattr(importlib.import_module(SCIPY), name)

    @staticmethod
    def linear_sum_assignment(*arguments: Any, **named: Any) -> Any:
        return importlib.import_module(SCIPY).linear_sum_assignment(*arguments, **named)
