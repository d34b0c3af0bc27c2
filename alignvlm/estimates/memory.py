"""GPU memory of one rank, kind by kind, at the fullest moment of a step. Sizes in bytes.

Model states follow ZeRO (arXiv 1910.02054, section 3): 2 + 2 + 12 bytes per parameter in bf16 with AdamW, divided by
the world size as far as the stage partitions them; ZeRO-2 and ZeRO-3 sum gradients in fp32 here, 4 bytes. Activations
are what autograd saves on the meta device (activations.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from alignvlm.config.deepspeed import DEFAULT_BUCKET
from alignvlm.config.schema import PARTS, Recipe, RecomputeConfig, StageConfig
from alignvlm.estimates.activations import Activations
from alignvlm.kernels.align import default_block
from alignvlm.model.flops import Work
from alignvlm.model.network import Network, largest_list

GIB = 2**30
RUNTIME = 2 * GIB
"""CUDA context, NCCL's buffers and cuBLAS' workspace on an H100: our figure, rounded up."""
HEADROOM = 0.92
"""Part of a GPU's memory that a run may use: the rest is lost to fragmentation (our figure)."""


@dataclass(frozen=True)
class Memory:
    """Bytes by kind on the GPU, and what an offloading strategy keeps in the host's memory, per rank."""

    gpu: dict[str, float]
    host: dict[str, float]
    peak: str
    """The moment of a step in which the GPU holds the most, in words."""

    @property
    def gpu_total(self) -> float:
        return sum(self.gpu.values())

    @property
    def host_total(self) -> float:
        return sum(self.host.values())


@dataclass(frozen=True)
class StageMemory:
    """Memory of a rank in a stage, whatever the layers are that recompute their activations."""

    network: Network
    trained: tuple[str, ...]
    """Globs of the parameters that learn."""
    work: Work
    """What the micro-batch holds."""
    standing: dict[str, float]
    """Bytes by kind that live all the time."""
    host: dict[str, float]
    kept_logits: float
    loss: float
    whole_gradients: dict[str, float]
    """Part -> bytes of the gradients that its backward pass holds before they are reduced."""
    reduction: float
    """Bytes of a reduction of gradients: those of its bucket and what it makes of them."""
    until_reduction: float
    """How much of the language model's backward pass fills the first bucket; more than 1, where all of it does not."""
    update: float
    """Bytes that only the optimizer's step needs."""

    def of(self, recompute: RecomputeConfig) -> Memory:
        """The fullest moment of a step: the loss, the backward pass of a part, or the optimizer's update."""
        tiles, activations = int(self.work.tiles), Activations(self.network, recompute, self.trained)
        vision = activations.vision(tiles)
        connector, language = activations.connector(tiles), activations.language(int(self.work.tokens))
        before_language = vision.kept + connector.kept + self.kept_logits
        kept = before_language + language.kept
        # The first bucket is full when the backward pass has let go of what the layers that filled it had kept.
        in_language = self.reduction - self.until_reduction * language.kept if self.until_reduction <= 1 else 0.0
        moments = {
            "the loss": kept + self.loss,
            "language's backward": (
                before_language + language.at_work + self.whole_gradients["language"] + max(0.0, in_language)
            ),
            "connector's backward": (
                vision.kept + self.kept_logits + connector.at_work + self.whole_gradients["connector"] + self.reduction
            ),
            "vision's backward": vision.at_work + self.whole_gradients["vision"] + self.reduction,
            "the update": self.update,
        }
        peak = max(moments, key=lambda moment: moments[moment])
        pixels = tiles * 3 * self.network.dims.tile_size**2 * (1 + 4 + self.network.model.dtype.itemsize)
        gpu = self.standing | {
            "vision activations": pixels + vision.kept,  # uint8, normalised in fp32, and as the encoder's
            "language activations": language.kept,
            "connector activations": connector.kept,
            **({"kept logits": self.kept_logits} if self.kept_logits else {}),
            "at work": moments[peak] - kept,
        }
        return Memory(gpu, self.host, peak)


def stage_memory(
    recipe: Recipe,
    stage: StageConfig,
    network: Network,
    strategy: Mapping[str, Any],
    world_size: int,
    work: Work | None = None,
) -> StageMemory:
    """Memory of a rank in a stage.

    Args:
        strategy: the parsed DeepSpeed file.
        work: of a micro-batch; null takes the fullest one.
    """
    network = network.of_stage(stage)
    work = work or fullest_work(network, stage)
    bytes_each = network.model.dtype.itemsize
    standing, host = _states(network, stage.trained, strategy, world_size, bytes_each)
    buffers, update = _buffers(network, stage.trained, strategy, world_size, bytes_each)
    bucket, reduction = _reduction(network, stage.trained, strategy, world_size, bytes_each)
    standing |= {"gathered weights, buckets": buffers, "runtime": RUNTIME}
    num_visual, budget = int(work.tiles) * network.dims.tokens_per_tile, recipe.train.kept_logits_gib * GIB
    return StageMemory(
        network=network,
        trained=tuple(stage.trained),
        work=work,
        standing={kind: float(size) for kind, size in standing.items()},
        host={kind: float(size) for kind, size in host.items()},
        kept_logits=network.connector.kept_logits_bytes(num_visual, budget),
        loss=_loss(network, stage, work, recipe.train.loss_chunk, bytes_each),
        whole_gradients=_whole_gradients(network, stage.trained, strategy, bytes_each),
        reduction=reduction,
        until_reduction=bucket / max(1.0, network.parameters("language", stage.trained)),
        update=update,
    )


def estimate_memory(
    recipe: Recipe, stage: StageConfig, network: Network, strategy: Mapping[str, Any], world_size: int
) -> Memory:
    """Memory of a rank in a stage with the recipe's recomputation; see `stage_memory`."""
    return stage_memory(recipe, stage, network, strategy, world_size).of(recipe.train.recompute)


def fullest_work(network: Network, stage: StageConfig) -> Work:
    """The fullest micro-batch: nothing but visual tokens, one document, all tokens supervised."""
    tokens = stage.micro_batch_packs * stage.sequence_length
    tiles = max(1, tokens // network.dims.tokens_per_tile)
    return Work(tokens, tiles, tokens, stage.micro_batch_packs * stage.sequence_length**2)


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
) -> tuple[float, float]:
    """What ZeRO holds besides the partitioned states: (all the time, in the update only).

    ZeRO-3's gathered weights (live ones and those fetched ahead) and the buckets that gradients are copied to, of which
    ZeRO-3 has one, or none, and ZeRO-2 two where it overlaps them; in the update fp32 copies of the gradients of a
    sub-group.
    """
    zero = strategy.get("zero_optimization", {})
    level = zero.get("stage", 0)
    weights, learning = network.total(), network.total(trainable)
    if world_size == 1:
        gathered = 0.0
    elif level >= 3:
        live = zero.get("stage3_max_live_parameters", 1e9) + zero.get("stage3_prefetch_bucket_size", 5e7)
        gathered = min(weights, live) * bytes_each
    else:
        gathered = min(weights, zero.get("allgather_bucket_size", DEFAULT_BUCKET)) * bytes_each
    bucket = min(learning, zero.get("reduce_bucket_size", DEFAULT_BUCKET)) * bytes_each
    if level < 3 and zero.get("overlap_comm", False):
        bucket *= 2
    if level >= 3 and not zero.get("contiguous_gradients", True):
        bucket = 0.0
    partition = learning / world_size if level >= 1 else learning
    offloaded = zero.get("offload_optimizer", {}).get("device", "none") != "none"
    group = zero.get("sub_group_size", 1e9) if level >= 3 else partition
    update = 0.0 if offloaded else 4 * min(partition, group)
    return gathered + bucket, update


def _reduction(
    network: Network, trainable: Sequence[str], strategy: Mapping[str, Any], world_size: int, bytes_each: int
) -> tuple[float, float]:
    """(elements of a bucket, bytes of its reduction under ZeRO-3).

    The gradients wait for it, unless they have been copied to a bucket that stands, and are copied once in the order of
    the ranks; the sums of this rank are converted to fp32. DeepSpeed 0.19.8 lets up to three buckets wait for their
    reduction while the fourth fills, so there may be three times the gradients more. PyTorch's allocator waits for
    these before it gives up, so that they are not needed.
    """
    zero = strategy.get("zero_optimization", {})
    bucket = min(network.total(trainable), zero.get("reduce_bucket_size", DEFAULT_BUCKET))
    if zero.get("stage", 0) < 3:
        return bucket, 0.0
    waiting = 0 if zero.get("contiguous_gradients", True) else bytes_each
    sums = 0.0 if bytes_each == 4 else 4 / world_size
    return bucket, bucket * (waiting + bytes_each + sums)


def _whole_gradients(
    network: Network, trainable: Sequence[str], strategy: Mapping[str, Any], bytes_each: int
) -> dict[str, float]:
    """Part -> gradients that wait for their reduction while its backward pass runs.

    Of a layer, and of the tables of V rows. The embedding's gradient waits for the last of those that use it, which is
    looking tokens up, after the vision encoder; the first is a head tied to it, then ALIGN, with a gradient of its own.
    Below ZeRO-2 all gradients stay whole, and are counted among the states.
    """
    if strategy.get("zero_optimization", {}).get("stage", 0) < 2:
        return dict.fromkeys(PARTS, 0.0)
    found = {}
    head = network.head.numel() if network.learns(network.head, trainable) else 0
    for part in PARTS:
        layers = largest_list(network.part(part))[2]
        found[part] = float(max((network.learning(layer, trainable) for layer in layers), default=0))
    table = network.embedding.numel() if network.learns(network.embedding, trainable) else 0
    waiting = table if network.head is network.embedding else 0
    found["language"] += head
    found["connector"] += waiting + table + network.parameters("connector", trainable)
    found["vision"] += table
    return {part: size * bytes_each for part, size in found.items()}


def _loss(network: Network, stage: StageConfig, work: Work, chunk: int, bytes_each: int) -> float:
    """What the token loss holds at most.

    The hidden states' gradient; one chunk of logits (as computed, in fp32, and its gradient) with the LM head's
    gradient, where the head learns; then that gradient and the scaled one. Several chunks are summed in fp32.
    """
    head = network.head.numel() if network.learns(network.head, stage.trained) else 0
    rows = min(chunk, work.supervised)
    wide = bytes_each if work.supervised <= chunk else 4
    logits = rows * network.dims.vocab_size * (4 + 2 * bytes_each)
    scaled = head * (wide + (bytes_each if wide > bytes_each else 0))
    return 2 * work.tokens * network.dims.hidden_size * bytes_each + head * wide + max(logits, scaled)
