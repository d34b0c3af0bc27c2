"""`benchmarks/train.py`: the time of kernels is put where it belongs; tests/test_gpu_check.py has its tiny run."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from torch.autograd import DeviceType

from alignvlm.config.deepspeed import deepspeed_config
from alignvlm.config.load import load_recipe
from alignvlm.model.network import build_network
from tests.checkout import ROOT

FOLDER = ROOT / "benchmarks"


@pytest.fixture
def benchmark_module(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(FOLDER))

    def load(name: str) -> ModuleType:
        return __import__(name)

    return load


@pytest.mark.parametrize("model", ["1b", "3b", "8b"])
def test_recipes_and_packs_of_the_real_shapes(benchmark_module: Any, model: str) -> None:
    variants, steps = benchmark_module("_variants"), benchmark_module("_steps")
    chosen = variants.MODELS[model]
    names = variants.ALL if model == "1b" else ("default", "connector-mlp")
    for variant in map(variants.find_variant, names):
        recipe = load_recipe(chosen.recipe, [*chosen.overrides, *variant.overrides])
        config = deepspeed_config(recipe, recipe.stages[steps.STAGE], 1, cuda=True)
        variants.merged(config, variant.deepspeed)
    config = build_network(load_recipe(chosen.recipe, list(chosen.overrides))).model.config
    for pack in (*chosen.packs.values(), steps.HOST_PACK):
        batch = steps.make_pack(pack, config, seed=0)
        assert batch.input_ids.shape == (1, pack.tokens)
        assert batch.num_samples == pack.documents
        assert batch.num_supervised == pack.supervised
        assert len(batch.visual_positions) == 729 * pack.tiles == 729 * len(batch.tiles)
        assert (batch.input_ids[0, batch.visual_positions] == config.image_token_id).all()


def event(name: str, parent: Any = None, *, kernels: dict[str, float] | None = None, **fields: Any) -> Any:
    """An event as torch's profiler has them; kernels of an operator by name, in microseconds."""
    launched = [SimpleNamespace(name=name, duration=us) for name, us in (kernels or {}).items()]
    defaults = {"device_type": DeviceType.CPU, "thread": 1, "fwd_thread": 0, "sequence_nr": -1, "scope": 0}
    defaults |= {"is_user_annotation": False}
    return SimpleNamespace(name=name, cpu_parent=parent, kernels=launched, **(defaults | fields))


def test_kernels_of_the_connector(benchmark_module: Any) -> None:
    """An operator of its forward, its backward node on another thread, and a node of the same number elsewhere."""
    kernels = benchmark_module("_kernels")
    outer = event(kernels.RANGE, kernels={kernels.RANGE: 99.0}, is_user_annotation=True)
    operator = event("aten::mm", outer, sequence_nr=7, kernels={"nvjet_a": 10.0})
    other = event("aten::mm", sequence_nr=8, kernels={"nvjet_a": 100.0})
    node = event("MmBackward0", thread=2, fwd_thread=1, sequence_nr=7, scope=1)
    inner = event("aten::mm", node, thread=2, kernels={"flash_bwd": 20.0})
    recomputed = event("MulBackward0", thread=2, fwd_thread=2, sequence_nr=7, scope=1, kernels={"nccl_x": 200.0})
    launched = {"nvjet_a": 110.0, "flash_bwd": 20.0, "nccl_x": 200.0}
    device: dict[str, Any] = {"device_type": DeviceType.CUDA}
    on_device = [
        event(name, time_range=SimpleNamespace(elapsed_us=lambda us=us: us), **device) for name, us in launched.items()
    ]
    annotation = event(kernels.RANGE, time_range=SimpleNamespace(elapsed_us=lambda: 99.0), **device)
    annotation.is_user_annotation = True
    events = [outer, operator, other, node, inner, recomputed, *on_device, annotation]
    table = kernels.time_table(events, cuda=True)
    assert table["total_ms"] == pytest.approx(0.33)
    assert table["launches"] == 3
    assert table["connector_share"] == pytest.approx(30 / 330)
    assert list(table["kinds"]) == ["NCCL", "GEMM", "attention"]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_NNT", "GEMM"),
        (
            "void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<Flash_bwd_traits<64>",
            "attention",
        ),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_3_64x128x128", "attention"),
        ("fmha_cutlassB_bf16_aligned_64x64_k65536_sm80(PyTorchMemEffAttention::Params)", "attention"),
        (
            "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>",
            "elementwise",
        ),
        ("void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<c10::BFloat16, float>", "reductions"),
        ("void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float, MeanOps>>", "reductions"),
        ("void at::native::(anonymous namespace)::multi_tensor_apply_kernel<FusedAdamMathFunctor>", "optimizer"),
        ("_swiglu_forward_kernel", "fused layers"),
        ("Memcpy DtoD (Device -> Device)", "memory"),
        ("ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "NCCL"),
    ],
)
def test_kinds_of_kernels(benchmark_module: Any, name: str, kind: str) -> None:
    assert benchmark_module("_kernels").kind_of(name) == kind


def test_an_unexpected_error_is_noted_and_gives_code_1(benchmark_module: Any) -> None:
    from alignvlm.errors import UserError

    train = benchmark_module("train")

    def bench(error: Exception) -> Any:
        def measure(variant: Any, row: dict[str, Any], *, profiled: bool) -> None:
            row["build_s"] = 1.0
            raise error

        return SimpleNamespace(measure=measure, release=lambda row: None)

    for error, code in ((UserError("no\nmemory"), 0), (ImportError("liger"), 0), (KeyError("x"), 1)):
        row: dict[str, Any] = {}
        assert train.attempt(bench(error), "default", row, False) == code
        assert row["failed"].startswith(type(error).__name__)
        assert "\n" not in row["failed"]
        assert row["build_s"] == 1.0
