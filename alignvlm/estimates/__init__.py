"""What a run will take before it runs: parameters, memory, FLOPs, steps, hours. No weights, no GPU, no network."""

from alignvlm.estimates.estimate import Fit, RunPlan, StagePlan, plan_run

__all__ = ["Fit", "RunPlan", "StagePlan", "plan_run"]
