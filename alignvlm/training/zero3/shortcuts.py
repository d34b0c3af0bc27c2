"""What DeepSpeed does for each of some 600 parameters in every micro-batch, with fewer steps and the same bits.

Each function puts something in the place of one method or attribute of one engine's own objects, nothing global. They
rely on what the methods of one version of DeepSpeed do, so any other version keeps its own, as do settings that give
these methods more to do. `benchmarks/step_overhead.py` has the host's time with them and without.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict
from typing import Any

import torch
from torch import nn

from alignvlm.model.network import largest_list
from alignvlm.training.zero3.layers import remember_parameters

VERSION = "0.19.8"
"""The version of DeepSpeed whose methods these functions replace."""


def take_shortcuts(engine: Any) -> bool:
    """Shorten ZeRO-3's work in an engine just built; false where it stays DeepSpeed's own."""
    import deepspeed
    from deepspeed.runtime.torch_autocast import is_autocast_initialized
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.utils import z3_leaf_module

    optimizer, model = engine.optimizer, engine.module
    if deepspeed.__version__ != VERSION or type(optimizer) is not DeepSpeedZeroOptimizer_Stage3:
        return False
    offload = optimizer.parameter_offload
    if optimizer.offload_optimizer or offload.offload_device is not None or is_autocast_initialized():
        return False
    if offload.zero_quantized_weights or offload.zero_quantized_nontrainable_weights:
        return False
    if engine.zero_hpz_partition_size() > 1:
        return False
    for backbone in (model.model.vision_tower, model.model.language_model):
        keep_gathered(backbone)
        for layer in filter(z3_leaf_module, largest_list(backbone)[2]):  # a strategy may name other whole modules
            name_what_is_gathered(layer)
            access_directly(layer)
    remember_modules(model)
    if not offload.fast_sharding_for_leaf_module:  # there a layer's parameters keep their memory when they are released
        release_directly(offload.param_coordinator)
    add_at_once(optimizer)
    if not optimizer.contiguous_gradients:
        collect_in_place(optimizer)
    return True


def keep_gathered(backbone: nn.Module) -> None:
    """Gather at once, before the backbone runs, those of its parameters that are to stay gathered and are not.

    They are always there but after the start, a skipped step, and whatever looks at the weights.
    """
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    kept: list[Any] = [p for p in backbone.parameters() if p.ds_persist]  # type: ignore[attr-defined]

    @torch.no_grad()
    def gather(*_: Any) -> None:
        missing = [p for p in kept if p.ds_status is ZeroParamStatus.NOT_AVAILABLE]
        if missing:
            missing[0].all_gather(missing)

    backbone.register_forward_pre_hook(gather)


def name_what_is_gathered(layer: nn.Module) -> None:
    """Let a whole layer name only the parameters that are gathered and released with it: not its vectors, which stay.

    Ask the model, not a layer, for all of them.
    """
    found = type(layer).named_parameters(layer)
    remember_parameters(layer, [(name, p) for name, p in found if not p.ds_persist])  # type: ignore[attr-defined]


def access_directly(layer: nn.Module) -> None:
    """Let the modules of a whole layer take their parameters from a dictionary that asks nothing.

    DeepSpeed's looks at each access whether the parameter must be gathered first; here the layer has gathered it.
    """
    from deepspeed.runtime.zero.parameter_offload import ZeROOrderedDict

    class Gathered(ZeROOrderedDict):
        __getitem__ = OrderedDict.__getitem__

    for module in layer.modules():
        found = Gathered(module)
        found.update(module._parameters.items())
        module._parameters = found


def remember_modules(model: nn.Module) -> None:
    """Let the model name its modules from a list, and the functions around each their signature.

    DeepSpeed walks through all modules before and after each forward pass, and PyTorch looks at the signature of a
    function with a `setup_context` at each call.
    """
    modules = list(model.modules())
    model.modules = lambda: iter(modules)  # type: ignore[method-assign,assignment,misc]
    for module in modules:
        for name in ("pre_bwd_fn", "post_bwd_fn"):
            if (function := module.__dict__.get(name)) is not None:
                function.forward.__signature__ = inspect.signature(function.forward)


def release_directly(coordinator: Any) -> None:
    """Let a layer release a parameter without DeepSpeed's texts for a log that nobody reads and its decorators."""
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus, free_param

    prefix = "_PartitionedParameterCoordinator"
    available = f"{prefix}__n_available_params"

    def release(parameter: Any, free_data: bool = True) -> None:
        if parameter.ds_status is ZeroParamStatus.AVAILABLE and not parameter.ds_active_sub_modules:
            free_param(parameter)
            setattr(coordinator, available, getattr(coordinator, available) - parameter.ds_numel)

    setattr(coordinator, f"{prefix}__release_param", release)


def add_at_once(optimizer: Any) -> None:
    """Add the reduced gradients of a bucket to their sums by one operation instead of one for each."""
    from deepspeed import comm
    from deepspeed.accelerator import get_accelerator

    def partition_grads(parameters: list[Any], partitions: list[torch.Tensor]) -> list[torch.Tensor]:
        sums = optimizer._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition
        rank = comm.get_rank(group=parameters[0].ds_process_group)
        # A parameter of fewer elements than ranks has none for the last ranks.
        real = [(p, g) for p, g in zip(parameters, partitions, strict=True) if p.partition_numel() * rank < p.ds_numel]
        found = [sums[parameter.ds_id].narrow(0, 0, gradient.numel()) for parameter, gradient in real]
        added = [gradient for _, gradient in real]
        if found:
            (torch._foreach_copy_ if optimizer.micro_step_id == 0 else torch._foreach_add_)(found, added)
        is_asynchronous = not get_accelerator().is_synchronized_device()
        for parameter in parameters:
            if is_asynchronous and parameter.grad is not None:
                parameter.grad.record_stream(get_accelerator().current_stream())
            parameter.grad = None
        return found

    optimizer.partition_grads = partition_grads


def collect_in_place(optimizer: Any) -> None:
    """Put a gradient on the list of the bucket without further questions, where it fits and is not the first."""
    from deepspeed.accelerator import get_accelerator

    reduce = optimizer.reduce_ready_partitions_and_remove_grads
    is_asynchronous = not get_accelerator().resolves_data_dependency()

    def collect(parameter: Any) -> None:
        bucket = optimizer.ipg_buckets[optimizer.communication_data_type]
        elements = bucket.elements + parameter.ds_numel
        fits = bucket.params and elements <= optimizer.reduce_bucket_size
        if not fits or bucket.process_group is not parameter.ds_process_group or optimizer._coalesce_grad_reduction:
            reduce(parameter)
            return
        if is_asynchronous:
            optimizer.reduce_and_partition_stream.wait_stream(get_accelerator().current_stream())
        bucket.params.append(parameter)
        bucket.elements = elements

    optimizer.reduce_ready_partitions_and_remove_grads = collect
