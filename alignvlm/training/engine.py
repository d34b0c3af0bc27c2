"""From an export folder to a DeepSpeed engine that trains it: partitioned loading, freezing, groups, attention."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from alignvlm.config.deepspeed import deepspeed_config, fit_reduce_bucket
from alignvlm.config.schema import Recipe, RecomputeConfig, StageConfig
from alignvlm.kernels.fused_layers import choose_fused_layers, fuse_layers
from alignvlm.kernels.linear import keep_parameters
from alignvlm.model import AlignVLMConfig, AlignVLMForConditionalGeneration
from alignvlm.model.attention import choose_attention
from alignvlm.model.lora import add_adapters
from alignvlm.training.distributed import World
from alignvlm.training.optim import Group, optimizer_groups, parameter_groups, set_trainable
from alignvlm.training.zero3.layers import gather_whole_layers
from alignvlm.training.zero3.shortcuts import take_shortcuts
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
    """Seeds what is random in a forward pass (dropout), together with the step and the micro-batch."""

    @property
    def model(self) -> AlignVLMForConditionalGeneration:
        return self.engine.module

    @property
    def config(self) -> AlignVLMConfig:
        return self.engine.module.config

    def same_weights(self) -> AbstractContextManager[None]:
        """To be open around the micro-batches of one optimizer step, in which no weight changes."""
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
    shortcuts: bool = True,
) -> Trainer:
    """The engine of a stage, starting from the weights in `export` (under ZeRO-3 never whole on one rank's GPU).

    Args:
        extra: added to DeepSpeed's configuration.
        whole_layers: under ZeRO-3, gather the layers of the backbones as wholes.
        shortcuts: under ZeRO-3, spare the host what DeepSpeed does by parameter.
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
    if shortcuts:
        take_shortcuts(engine)
    share_embeddings(model)
    return Trainer(engine, groups, attention, fused, hash_key(recipe.seed, stage.name))


def free_memory() -> None:
    """Give back the device's memory of what is no longer used, also of objects that refer to each other."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def recompute_layers(model: AlignVLMForConditionalGeneration, recompute: RecomputeConfig) -> None:
    """Let every n-th layer of a backbone, the first included, recompute its activations in the backward pass.

    PyTorch checks that as many tensors are saved as before. It does not compare their shapes, types and devices, which
    would cost the host time in every layer.
    """
    how = {"use_reentrant": False, "determinism_check": "none"}
    for backbone, every in (
        (model.model.vision_tower, recompute.vision),
        (model.model.language_model, recompute.language),
    ):
        if every:
            backbone.activation_checkpointing_enable(how, every_n_layers=every)


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
