"""`benchmarks/train.py`: the time of kernels is put where it belongs; tests/test_gpu_check.py has its tiny run."""

from __future__ import annotations

import _thread
import threading
import time
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
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
        return import_module(name)

    return load


@pytest.mark.parametrize("model", ["1b", "3b", "8b"])
def test_recipes_and_packs_of_the_real_shapes(benchmark_module: Any, model: str) -> None:
    variants, steps = benchmark_module("steps.variants"), benchmark_module("steps.bench")
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


PEAK = 1e12


def event(name: str, parent: Any = None, *, kernels: dict[str, float] | None = None, **fields: Any) -> Any:
    """An event as torch's profiler has them; kernels of an operator by name, in microseconds."""
    launched = [SimpleNamespace(name=name, duration=us) for name, us in (kernels or {}).items()]
    defaults = {"device_type": DeviceType.CPU, "thread": 1, "fwd_thread": 0, "sequence_nr": -1, "scope": 0}
    defaults |= {"is_user_annotation": False, "input_shapes": []}
    return SimpleNamespace(name=name, cpu_parent=parent, kernels=launched, **(defaults | fields))


def on_device(name: str, us: float, **fields: Any) -> Any:
    """A kernel, or what a range looks like there."""
    duration = SimpleNamespace(elapsed_us=lambda: us)
    return event(name, time_range=duration, device_type=DeviceType.CUDA, **fields)


def test_kernels_of_the_parts(benchmark_module: Any) -> None:
    """An operator of a forward, its backward node on another thread, and a node of the same number elsewhere."""
    kernels = benchmark_module("steps.kernels")
    named = kernels.RANGE + "connector"
    outer = event(named, kernels={named: 99.0}, is_user_annotation=True)
    operator = event("aten::mm", outer, sequence_nr=7, kernels={"nvjet_a": 10.0})
    vision = event("aten::mm", event(kernels.RANGE + "vision"), sequence_nr=8, kernels={"nvjet_a": 60.0})
    other = event("aten::mm", sequence_nr=9, kernels={"nvjet_a": 40.0})
    node = event("MmBackward0", thread=2, fwd_thread=1, sequence_nr=7, scope=1)
    inner = event("aten::mm", node, thread=2, kernels={"flash_bwd": 20.0})
    recomputed = event("MulBackward0", thread=2, fwd_thread=2, sequence_nr=7, scope=1, kernels={"nccl_x": 200.0})
    waits = event("cudaStreamSynchronize", node, time_range=SimpleNamespace(elapsed_us=lambda: 3000.0))
    launched = [on_device("nvjet_a", 110.0), on_device("flash_bwd", 20.0), on_device("nccl_x", 200.0)]
    annotation = on_device(named, 99.0, is_user_annotation=True)
    events = [outer, operator, vision, other, node, inner, recomputed, waits, *launched, annotation]
    table = kernels.time_table(events, PEAK, cuda=True)
    assert table["total_ms"] == pytest.approx(0.33)
    assert table["launches"] == 3
    assert table["connector_share"] == pytest.approx(30 / 330)
    assert {name: round(1e3 * part["ms"]) for name, part in table["parts"].items()} == {
        kernels.REST: 240, "vision": 60, "connector": 30
    }  # fmt: skip
    assert list(table["kinds"]) == ["NCCL", "GEMM", "attention"]
    assert table["waits"] == {"cudaStreamSynchronize": {"ms": 3.0, "count": 1}}


@pytest.mark.parametrize(
    ("operator", "shapes", "flops"),
    [
        ("aten::mm", [[3, 5], [5, 7]], 2 * 3 * 5 * 7),
        ("aten::mm", [[3, 5], [5, 7], [], [3, 7]], 2 * 3 * 5 * 7),  # with `out`
        ("aten::addmm", [[7], [3, 5], [5, 7], [], []], 2 * 3 * 5 * 7),
        ("aten::bmm", [[4, 3, 5], [4, 5, 7]], 4 * 2 * 3 * 5 * 7),
        ("aten::mul", [[3, 5], [5]], None),
        ("aten::mm", [], None),
    ],
)
def test_flops_of_a_product(benchmark_module: Any, operator: str, shapes: list[list[int]], flops: int | None) -> None:
    assert benchmark_module("steps.shapes").product_flops(event(operator, input_shapes=shapes)) == flops


def test_products_by_shape_against_the_peak(benchmark_module: Any) -> None:
    """Two products of 2 GFLOP in 5 and 3 ms where 2 ms would do, one of another shape, and an operator that is none."""
    large, small = [[1000, 1000], [1000, 1000]], [[1000, 100], [100, 1000]]
    launches = [
        (event("aten::mm", input_shapes=large), [("nvjet_a", 4000.0), ("splitk", 1000.0)]),
        (event("aten::mm", input_shapes=large), [("nvjet_a", 3000.0)]),
        (event("aten::mm", input_shapes=small), [("nvjet_b", 300.0)]),
        (event("aten::mul", input_shapes=[[2, 2], []]), [("elementwise", 100.0)]),
    ]
    table = benchmark_module("steps.shapes").operator_table(launches, PEAK)
    first, second, third = table["shapes"]
    assert first == {
        "operator": "aten::mm", "shapes": "1000x1000 1000x1000", "ms": pytest.approx(8), "count": 2,
        "kernel": "nvjet_a", "tflop": pytest.approx(0.004), "tflops": pytest.approx(0.5), "lost_ms": pytest.approx(4),
    }  # fmt: skip
    assert second["lost_ms"] == pytest.approx(0.1)
    assert third == {
        "operator": "aten::mul", "shapes": "2x2", "ms": pytest.approx(0.1), "count": 1, "kernel": "elementwise"
    }  # fmt: skip
    assert table["products"] == {
        "ms": pytest.approx(8.3), "tflop": pytest.approx(0.0042), "tflops": pytest.approx(4.2 / 8.3),
        "peak_tflops": pytest.approx(1), "lost_ms": pytest.approx(4.1),
    }  # fmt: skip
    assert {name: row["count"] for name, row in table["operators"].items()} == {"aten::mm": 3, "aten::mul": 1}


def test_samples_of_the_host_are_those_of_the_thread_that_works(benchmark_module: Any) -> None:
    """The caller's own, and that of a thread which Python does not know, as autograd's, while the caller waits."""
    host = benchmark_module("steps.host")

    def busy(seconds: float) -> None:
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            pass

    def run() -> None:
        done = threading.Lock()
        done.acquire()

        def in_a_thread_of_c() -> None:
            busy(0.3)
            done.release()

        _thread.start_new_thread(in_a_thread_of_c, ())
        done.acquire()
        busy(0.1)

    found = host.sample_host(run, micro_batches=4)
    assert 100 <= found["ms_per_micro_batch"] < 1000
    assert found["samples"] > 20
    assert found["caller"]["tests"] > 0.9
    (name, milliseconds), *_ = found["functions"].items()
    assert name == "tests/benchmarks/test_train.py:busy"
    assert 0.7 * found["ms_per_micro_batch"] < milliseconds <= found["ms_per_micro_batch"]


def test_packages_are_found_in_any_folder_of_the_search_path(
    benchmark_module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`pip install --target FOLDER` puts them beside no `site-packages`."""
    package_of = benchmark_module("steps.host")._package
    file = tmp_path / "deepspeed" / "runtime" / "engine.py"
    assert package_of(str(file)) == ("python", "engine.py")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert package_of(str(file)) == ("deepspeed", "deepspeed/runtime/engine.py")
    assert package_of(threading.__file__) == ("python", "threading.py")
    assert package_of(torch.__file__) == ("torch", "torch/__init__.py")
    assert package_of(__file__) == ("tests", "tests/benchmarks/test_train.py")


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
    assert benchmark_module("steps.kernels").kind_of(name) == kind


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


def test_results_without_git_say_so(benchmark_module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine for measuring it may be missing, and results are written after all the work."""
    monkeypatch.setenv("PATH", "")
    assert benchmark_module("_common").environment()["commit"] == "unknown"
