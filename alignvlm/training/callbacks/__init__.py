"""What happens around a step and is not the step: one callback per file, called in the order they are listed."""

from alignvlm.training.callbacks.base import Callback, StageState

__all__ = ["Callback", "StageState"]
