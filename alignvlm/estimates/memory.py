"""GPU memory of one rank, kind by kind. Sizes in bytes; an upper estimate for the fullest micro-batch.

Model states follow ZeRO (arXiv 1910.02054, section 3): 2 + 2 + 12 bytes per parameter in bf16 with AdamW, divided by
the world size as far as the stage partitions them; ZeRO-2 and ZeRO-3 sum gradients in fp32 here, 4 bytes. Activations
are what autograd saves on the meta device (activations.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from alignvlm.config.schema import Recipe, StageConfig
from alignvlm.estimates.activations import Activations
from alignvlm.kernels.align import default_block
from alignvlm.model.network import Network

GIB = 2**30
RUNTIME = 2 * GIB
"""CUDA context, NCCL's buffers and cuBLAS' workspace on an H100: our figure, rounded up."""
DEFAULT_BUCKET = 500_000_000


@dataclass(frozen=True)
class Memory:
    """Bytes by kind on the GPU, and what an offloading strategy keeps in the host's memory, per rank."""

    gpu: dict[str, float]
    host: dict[str, float]

    @property
    def gpu_total(self) -> float:
        return sum(self.gpu.values())

    @property
    def host_total(self) -> float:
        return sum(self.host.values())


def estimate_memory(
    recipe: Recipe, stage: StageConfig, network: Network, strategy: Mapping[str, Any], world_size: int
) -> Memory:
    """Memory of a rank in a stage; `strategy` is the parsed DeepSpeed file."""
    dims = network.dims
    bytes_each = 2 if recipe.train.precision == "bf16" else 4
    tokens = stage.micro_batch_packs * stage.sequence_length
    tiles = fullest_tiles(network, stage)
    gpu, host = _states(network, stage.trainable, strategy, world_size, bytes_each)
    activations = Activations(network, recipe.train.recompute)
    pixels = tiles * 3 * dims.tile_size**2 * (1 + 4 + bytes_each)  # uint8, normalised in fp32, and as the encoder's
    gpu["vision activations"] = pixels + activations.vision(tiles, network.parameters("vision", stage.trainable) > 0)
    gpu["language activations"] = activations.language(tokens)
    gpu["connector"] = activations.connector(tiles)
    budget = recipe.train.kept_logits_gib * GIB
    if kept := network.model.connector.kept_logits_bytes(tiles * dims.tokens_per_tile, budget):
        gpu["kept logits"] = kept
    gpu["logits and loss"] = _loss(network, stage, min(recipe.train.loss_chunk, tokens), bytes_each)
    gpu["gathered weights, buckets"] = _buffers(network, stage.trainable, strategy, world_size, bytes_each)
    gpu["runtime"] = RUNTIME
    return Memory({kind: float(size) for kind, size in gpu.items()}, {kind: float(size) for kind, size in host.items()})


def fullest_tiles(network: Network, stage: StageConfig) -> int:
    """Tiles of the fullest micro-batch: nothing but visual tokens."""
    return max(1, stage.micro_batch_packs * stage.sequence_length // network.dims.tokens_per_tile)


def naive_vocabulary_bytes(w2: torch.Tensor, num_tokens: int) -> tuple[float, float]:
    """Bytes of (one N x V tensor of ALIGN's plain form, one N x block buffer of our operator) for W2 [V, D]."""
    block = default_block(num_tokens, len(w2), w2.dtype, torch.device("cuda"))
    return float(num_tokens * len(w2) * w2.dtype.itemsize), float(num_tokens * block * w2.dtype.itemsize)


def _states(
    network: Network, trainable: Sequence[str], strategy: Mapping[str, Any], world_size: int, bytes_each: int
) -> tuple[dict[str, float], dict[str, float]]:
    zero = strategy.get("zero_optimization", {})
    level = zero.get("stage", 0)
    weights, learning = network.total(), network.total(trainable)
    gpu = {
        "weights": weights * bytes_each / (world_size if level >= 3 else 1),
        "gradients": learning * (4 / world_size if level >= 2 else bytes_each),
        "fp32 masters": learning * 4 / (world_size if level >= 1 else 1),
        "optimizer states": learning * 8 / (world_size if level >= 1 else 1),
    }
    group = zero.get("zero_hpz_partition_size", 1)
    if group > 1:
        gpu["secondary weights (hpZ)"] = weights * bytes_each / group
    host: dict[str, float] = {}
    if zero.get("offload_param", {}).get("device", "none") != "none":
        host["weights"] = gpu.pop("weights")
    if zero.get("offload_optimizer", {}).get("device", "none") != "none":
        for kind in ("gradients", "fp32 masters", "optimizer states"):
            host[kind] = gpu.pop(kind)
    return gpu, host


def _buffers(
    network: Network, trainable: Sequence[str], strategy: Mapping[str, Any], world_size: int, bytes_each: int
) -> float:
    """What ZeRO holds besides the partitioned states.

    ZeRO-3's gathered weights (live ones and those fetched ahead), reduction buckets, whole gradients of the tables of
    V rows before they are reduced, and the fp32 gradients of the sub-group that is being updated.
    """
    zero = strategy.get("zero_optimization", {})
    level = zero.get("stage", 0)
    weights, learning = network.total(), network.total(trainable)
    dims = network.dims
    if world_size == 1:
        gathered = 0.0
    elif level >= 3:
        live = zero.get("stage3_max_live_parameters", 1e9) + zero.get("stage3_prefetch_bucket_size", 5e7)
        gathered = min(weights, live) * bytes_each
    else:
        gathered = min(weights, zero.get("allgather_bucket_size", DEFAULT_BUCKET)) * bytes_each
    buckets = 2 if zero.get("overlap_comm", level >= 3) else 1
    bucket = min(learning, zero.get("reduce_bucket_size", DEFAULT_BUCKET)) * bytes_each * buckets
    tables = sum(
        parameter.numel()
        for name, parameter in network.model.named_parameters()
        if parameter.shape[:1] == (dims.vocab_size,) and parameter.dim() == 2
    )
    whole = tables * bytes_each if level >= 2 and learning else 0.0
    partition = learning / world_size if level >= 1 else learning
    offloaded = zero.get("offload_optimizer", {}).get("device", "none") != "none"
    update = 0.0 if offloaded else 4 * min(partition, zero.get("sub_group_size", 1e9))
    return gathered + bucket + whole + update


def _loss(network: Network, stage: StageConfig, chunk: int, bytes_each: int) -> float:
    """What the token loss holds.

    One chunk of logits (as computed, in fp32, and its gradient), the hidden states' gradient, and the LM head's, which
    is summed in fp32 and then scaled, where the head is trained.
    """
    dims = network.dims
    head = network.head
    learns = network.learns(head, stage.trainable)
    tokens = stage.micro_batch_packs * stage.sequence_length
    logits = chunk * dims.vocab_size * (4 + 2 * bytes_each)
    return logits + 2 * tokens * dims.hidden_size * bytes_each + (8 * head.numel() if learns else 0)
