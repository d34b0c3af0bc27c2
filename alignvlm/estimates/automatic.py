"""`train.gradient_checkpointing: auto`: which layers recompute in a stage, chosen by the estimate and noted.

It changes no number. A resume under the same circumstances takes what the note says.
"""

from __future__ import annotations

from dataclasses import asdict

import torch

from alignvlm.config.deepspeed import read_strategy
from alignvlm.config.schema import RecomputeConfig, StageConfig
from alignvlm.estimates.memory import GIB, HEADROOM, stage_memory
from alignvlm.estimates.recomputation import automatic
from alignvlm.exports import check_export
from alignvlm.kernels.fused_costs import fuse_on_meta
from alignvlm.model import AlignVLMConfig
from alignvlm.model.network import network_of
from alignvlm.progress import say
from alignvlm.run_folder import RECOMPUTATION, Run
from data_pipeline.files import must_write, read_json, to_json, write_atomic


def noted_recomputation(run: Run, stage: StageConfig, world_size: int, gpu_memory: int, fused: bool) -> RecomputeConfig:
    """What a stage takes: what it took before under these circumstances, else the choice of now. On rank 0 only.

    Args:
        gpu_memory: bytes of the smallest GPU; 0 without one.
        fused: whether Liger's layers train.

    Raises:
        DataError: the note cannot be written, or the weights that the stage starts from are damaged.
    """
    path = run.stage_folder(stage).recomputation
    circumstances = {
        "world_size": world_size,
        "gpu_bytes": gpu_memory,
        "micro_batch_packs": stage.micro_batch_packs,
        "kept_logits_gib": run.recipe.train.kept_logits_gib,
        "fused_layers": fused,
    }
    found = read_json(path, RECOMPUTATION)
    if found and found["circumstances"] == circumstances:
        chosen, why = RecomputeConfig(found["vision"], found["language"]), "as before"
    elif gpu_memory == 0:
        chosen, why = RecomputeConfig(), "no GPU whose memory it could save"
    else:
        chosen, why = _choose(run, stage, world_size, gpu_memory * HEADROOM, fused)
    with must_write(path, "free some space or make the folder writable"):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, to_json(asdict(chosen) | {"circumstances": circumstances}, indent=2) + "\n")
    say(f"stage {stage.name}: recomputed layers: {chosen.words} (auto: {why})")
    return chosen


def _choose(
    run: Run, stage: StageConfig, world_size: int, available: float, fused: bool
) -> tuple[RecomputeConfig, str]:
    """(the least that fits so many bytes, why); all layers where nothing fits. Builds no weights."""
    recipe, export = run.recipe, run.folder_before(stage).export
    check_export(export)
    dtype = torch.bfloat16 if recipe.train.precision == "bf16" else torch.float32
    network = network_of(AlignVLMConfig.from_pretrained(export), dtype)
    if fused:
        fuse_on_meta(network.model)
    found = automatic(recipe, stage, network, world_size, available)
    chosen = RecomputeConfig(1, 1) if found is None else found
    needed = stage_memory(recipe, stage, network, read_strategy(stage), world_size).of(chosen).gpu_total
    numbers = f"by the estimate {needed / GIB:.1f} of {available / GIB:.1f} GiB usable per GPU"
    if found is None:
        return chosen, f"{numbers}, which may not fit: `alignvlm estimate` names a way out"
    return chosen, f"the least that fits, {numbers}"
