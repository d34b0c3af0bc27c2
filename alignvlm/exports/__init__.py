"""The Hugging Face folder of a model: written, checked, published."""

from alignvlm.exports.card import name_of_export
from alignvlm.exports.folder import (
    CLASSES,
    CLASSES_FILE,
    MODEL_TYPE,
    WEIGHTS,
    WEIGHTS_INDEX,
    FoundInPackage,
    auto_map,
    check_export,
    read_tensor_places,
    save_export,
)
from alignvlm.exports.push import Push, check_token

__all__ = [
    "CLASSES",
    "CLASSES_FILE",
    "MODEL_TYPE",
    "WEIGHTS",
    "WEIGHTS_INDEX",
    "FoundInPackage",
    "Push",
    "auto_map",
    "check_export",
    "check_token",
    "name_of_export",
    "read_tensor_places",
    "save_export",
]
