"""From an export folder to a DeepSpeed engine that trains it: partitioned loading, freezing, groups, attention."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import nn

from alignvlm.config.deepspeed import deepspeed_config, fit_reduce_bucket
from alignvlm.config.schema import Recipe, RecomputeConfig, StageConfig
from alignvlm.kernels.fused_layers import choose_fused_layers, fuse_layers
from alignvlm.kernels.linear import keep_parameters
from alignvlm.model import AlignVLMConfig, AlignVLMForConditionalGeneration
from alignvlm.model.attention import choose_attention
from alignvlm.model.lora import add_adapters
from alignvlm.model.network import largest_list
from alignvlm.training.distributed import World
from alignvlm.training.optim import Group, optimizer_groups, parameter_groups, set_trainable
from data_pipeline.order.hashing import hash_key


@dataclass
class Trainer:
    """A DeepSpeed engine with what the training loop asks about it."""

    engine: Any
    groups: list[Group]
    attention: str
    """transformers' name of the attention implementation in use."""
    fused_layers: dict[str, int] = field(default_factory=dict)
    """Kind of layer -> how many of them Liger's kernels compute; empty where none is asked to."""
    seed: int = 0
    """Of what is random in a forward pass (dropout), together with the step and the micro-batch."""

    @property
    def model(self) -> AlignVLMForConditionalGeneration:
        return self.engine.module

    @property
    def config(self) -> AlignVLMConfig:
        return self.engine.module.config

    def same_weights(self) -> AbstractContextManager[None]:
        """For the micro-batches of one optimizer step: no weight changes while this is open."""
        return self.model.model.connector.same_weights()

    def close(self) -> None:
        """Free the engine's memory and hooks, so that the next stage can build its own."""
        self.engine.destroy()
        self.engine = None
        release_modules()
        free_memory()


def build_trainer(
    recipe: Recipe,
    stage: StageConfig,
    export: Path,
    world: World,
    extra: dict[str, Any] | None = None,
    whole_layers: bool = True,
) -> Trainer:
    """The engine of a stage, starting from the weights in `export` (under ZeRO-3 never whole on one rank's GPU).

    Args:
        extra: added to DeepSpeed's configuration.
        whole_layers: under ZeRO-3, gather the layers of the backbones as wholes.
    """
    import deepspeed

    config = deepspeed_config(recipe, stage, world.size) | (extra or {})
    dtype = torch.bfloat16 if recipe.train.precision == "bf16" else torch.float32
    torch.manual_seed(recipe.seed)
    attention = choose_attention(recipe.model.attention, world.device, recipe.train.precision)
    with zero3_construction(config):
        model = AlignVLMForConditionalGeneration.from_pretrained(
            export, dtype=dtype, attn_implementation={"text_config": attention, "vision_config": "sdpa"}
        )
    model.train()
    model.loss_chunk = recipe.train.loss_chunk
    model.model.connector.kept_bytes = int(recipe.train.kept_logits_gib * 2**30)
    recompute_layers(model, recipe.train.recompute)
    fused = fuse_layers(model) if choose_fused_layers(recipe.model.fused_layers, world.device) else {}
    if stage.lora is not None:
        add_adapters(model, stage, recipe.seed)
    set_trainable(model, stage)
    groups = parameter_groups(model, stage)
    fit_reduce_bucket(config, sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters() if p.requires_grad))
    if config["zero_optimization"].get("stage") == 3:
        if config["zero_optimization"].get("memory_efficient_linear") is False:
            keep_parameters(model)
        if whole_layers:
            gather_whole_layers(model)
    with without_compiler():
        engine, *_ = deepspeed.initialize(
            model=model, model_parameters=optimizer_groups(model, groups), config=config, dist_init_required=False
        )
    look_at_the_norm_only(engine.optimizer)
    share_embeddings(model)
    return Trainer(engine, groups, attention, fused, hash_key(recipe.seed, stage.name))


def free_memory() -> None:
    """Give back the device's memory of what is no longer used, also of objects that refer to each other."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def recompute_layers(model: AlignVLMForConditionalGeneration, recompute: RecomputeConfig) -> None:
    """Let every n-th layer of a backbone, the first included, recompute its activations in the backward pass."""
    for backbone, every in (
        (model.model.vision_tower, recompute.vision),
        (model.model.language_model, recompute.language),
    ):
        if every:
            backbone.activation_checkpointing_enable({"use_reentrant": False}, every_n_layers=every)


@contextmanager
def zero3_construction(config: dict[str, Any]) -> Iterator[None]:
    """Let transformers build and load models in partitions while this is open; without ZeRO-3 it changes nothing."""
    if config["zero_optimization"].get("stage") != 3:
        yield
        return
    from transformers.integrations import HfDeepSpeedConfig
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    keep_alive = HfDeepSpeedConfig(config)
    try:
        yield
    finally:
        del keep_alive
        unset_hf_deepspeed_config()


@contextmanager
def without_compiler() -> Iterator[None]:
    """Let DeepSpeed import its Muon optimizer without torch.compile while this is open.

    DeepSpeed 0.19.8 imports it to see that another optimizer is in use. It decorates three functions, which loads
    TorchInductor: 1.8 s of CPU time in every process that starts.
    """
    from deepspeed.runtime import compiler

    original = compiler.compile
    compiler.compile = lambda: lambda function: function
    try:
        yield
    finally:
        compiler.compile = original


def release_modules() -> None:
    """Undo what engines that are gone have left in globals: their modules, which keep all their memory, and a function.

    DeepSpeed 0.19.8 keeps modules in two places: the stack of modules in the forward pass, on which the model stays,
    and the `functools.lru_cache` of a method, whose keys hold each layer. `tests/integration/test_zero3.py` passes
    without this when a release has neither. And it replaces `torch.nn.functional.linear` for good, so that what
    follows in the process, be it a stage without ZeRO-3 or an evaluation, would compute otherwise than in a new one.
    """
    from deepspeed.runtime.zero import parameter_offload, partition_parameters
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

    getattr(parameter_offload, "FWD_MODULE_STACK", []).clear()
    method = getattr(PartitionedParameterCoordinator, "_PartitionedParameterCoordinator__params_to_release", None)
    for cell in getattr(method, "__closure__", None) or ():  # the decorator around the cache keeps it there
        clear = getattr(cell.cell_contents, "cache_clear", None)
        if clear is not None:
            clear()
    original = getattr(partition_parameters.InsertPostInitMethodToModuleSubClasses, "linear_bk", None)
    if original is not None:
        torch.nn.functional.linear = original


def gather_whole_layers(model: AlignVLMForConditionalGeneration) -> None:
    """Let ZeRO-3 gather and release a backbone's layer at once, not each of the dozen modules in it by itself.

    It takes a fraction of the host's time (`benchmarks/step_overhead.py`) and of the collectives.
    """
    from deepspeed.utils import set_z3_leaf_module

    for layer in whole_layers(model):
        set_z3_leaf_module(layer, True)
        remember_parameters(layer)


def remember_parameters(layer: nn.Module) -> None:
    """Let a layer name its parameters without walking through its modules; from then on it gets and loses none.

    DeepSpeed asks each whole layer at every gather and every release, half a dozen times in a micro-batch.
    """
    found = list(layer.named_parameters())

    def named_parameters(self: nn.Module, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True) -> Any:
        if prefix or not recurse or not remove_duplicate:
            return type(self).named_parameters(self, prefix, recurse, remove_duplicate)
        return iter(found)

    layer.named_parameters = MethodType(named_parameters, layer)  # type: ignore[method-assign]


def whole_layers(model: AlignVLMForConditionalGeneration) -> list[nn.Module]:
    """The layers that ZeRO-3 may gather as wholes: all but a trained one before which nothing is trained.

    DeepSpeed takes the gradients of such a layer when that of its input is there. Where the input needs none, PyTorch
    calls the hook before the layer's backward pass, and DeepSpeed would take zeros.
    """
    base, embedding = model.model, model.get_input_embeddings()
    before = {
        base.vision_tower: [base.vision_tower.get_input_embeddings()],
        base.language_model: [base.vision_tower, base.connector, embedding],
    }
    found = []
    for part, modules in before.items():
        is_fed = any(map(_is_trained, modules))
        for layer in largest_list(part)[2]:
            if is_fed or not _is_trained(layer):
                found.append(layer)
            is_fed = is_fed or _is_trained(layer)
    return found


def _is_trained(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def look_at_the_norm_only(optimizer: Any) -> None:
    """Let ZeRO-1 and 2 find gradients that are not finite in their norm, without looking at each one before it.

    Both skip the step for either. The norm of a gradient that holds a NaN or an infinity is none that is finite, and
    it is computed anyway; to look at the gradients of 600 parameters before costs several kernels for each of them, and
    the host waits for the device. DeepSpeed 0.19.8 can switch off both or none (`bf16.check_grad_overflow`).
    """
    if getattr(optimizer, "check_grad_overflow", False) and optimizer.compute_grad_norm and not optimizer.cpu_offload:
        optimizer.check_overflow = lambda **_: None


def share_embeddings(model: AlignVLMForConditionalGeneration) -> None:
    """Register with ZeRO-3 the parameters that a module uses and another one owns, so that it gathers them for both.

    The connector reads the input embedding; the loss reads the LM head's weight without calling the head.
    """
    from deepspeed.runtime.zero.partition_parameters import is_zero_param, register_external_parameter

    head = model.lm_head
    uses = [(model.model.connector, model.get_input_embeddings().weight), (model, head.weight)]
    if getattr(head, "bias", None) is not None:
        uses.append((model, head.bias))
    for module, parameter in uses:
        if is_zero_param(parameter):
            register_external_parameter(module, parameter)
