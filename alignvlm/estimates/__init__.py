"""What a run will take before it runs: parameters, memory, FLOPs, steps, hours. No weights, no GPU, no network."""

from alignvlm.estimates.estimate import Fit, RunEstimate, StageEstimate, estimate_run

__all__ = ["Fit", "RunEstimate", "StageEstimate", "estimate_run"]
