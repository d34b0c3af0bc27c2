"""What a cluster starts for a recipe and a number of machines; the scripts themselves are in launch/."""

from __future__ import annotations

from alignvlm.launch.scripts import check_world, find_launcher
from alignvlm.launch.slurm import SlurmJob

__all__ = ["SlurmJob", "check_world", "find_launcher"]
