"""What happens around a step and is not the step: one callback per file; `training.run` says in which order."""

from alignvlm.training.callbacks.base import Callback, StageState

__all__ = ["Callback", "StageState"]
