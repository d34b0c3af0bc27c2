"""Loads checkpoints of earlier versions, in which weights have the public names of alignvlm/parts.py."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from alignvlm.parts import module_name


@contextmanager
def names_of_modules(engine: Any) -> Iterator[None]:
    """While this is open, the engine also loads checkpoints of earlier versions, in which weights have public names.

    The model knows such names by itself (`_load_from_state_dict`); frozen weights lie apart, and DeepSpeed looks for
    those of its own parameters.
    """
    from deepspeed.checkpoint.constants import FROZEN_PARAM_FRAGMENTS

    load = engine.load_module_state_dict

    def load_renamed(checkpoint: dict[str, Any], **options: Any) -> None:
        frozen = checkpoint.get(FROZEN_PARAM_FRAGMENTS)
        if frozen is not None:
            checkpoint[FROZEN_PARAM_FRAGMENTS] = {module_name(name): part for name, part in frozen.items()}
        load(checkpoint=checkpoint, **options)

    engine.load_module_state_dict = load_renamed
    try:
        yield
    finally:
        del engine.load_module_state_dict
