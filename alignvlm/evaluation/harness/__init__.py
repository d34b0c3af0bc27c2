"""Exported models inside other evaluation harnesses: lmms-eval finds them by an entry point, VLMEvalKit is started."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lmms_eval.models.registry_v2 import ModelManifest


def lmms_eval_models() -> ModelManifest:
    """What lmms-eval calls, by the entry point of the group `lmms_eval.models`, to know `--model alignvlm`."""
    from lmms_eval.models.registry_v2 import ModelManifest

    place = "alignvlm.evaluation.harness.lmms_eval"
    return ModelManifest("alignvlm", simple_class_path=f"{place}.AlignVLMSimple", chat_class_path=f"{place}.AlignVLM")
