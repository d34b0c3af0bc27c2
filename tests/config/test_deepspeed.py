"""Where ds_configs/ and recipes meet."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from alignvlm.config import deepspeed_config, list_deepspeed_configs, load_recipe
from alignvlm.config.deepspeed import fit_reduce_bucket, read_strategy
from alignvlm.config.schema import StageConfig
from alignvlm.errors import UserError

STAGE = "alignment"


def merged(world_size: int, *overrides: str, cuda: bool = True) -> dict[str, Any]:
    recipe = load_recipe("paper_llama32_1b", overrides)
    return deepspeed_config(recipe, recipe.stages[STAGE], world_size, cuda=cuda)


def error_of(world_size: int, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        merged(world_size, *overrides)
    return str(caught.value)


def test_numbers_come_from_the_recipe() -> None:
    config = merged(8, f"stages.{STAGE}.micro_batch_packs=2", f"stages.{STAGE}.max_grad_norm=0")
    assert config["train_batch_size"] == 64
    assert config["train_micro_batch_size_per_gpu"] == 2
    assert config["gradient_accumulation_steps"] == 4
    assert config["gradient_clipping"] == 0.0
    assert config["bf16"] == {"enabled": True}
    assert config["data_types"] == {"grad_accum_dtype": "fp32"}
    assert config["wall_clock_breakdown"] is False
    assert config["timers"]["throughput"]["enabled"] is False
    assert config["zero_optimization"]["stage"] == 3


def test_the_optimizer_is_compiled_by_nobody_except_for_offloading() -> None:
    fused = {"torch_adam": True, "fused": True, "betas": [0.9, 0.95]}
    assert merged(8)["optimizer"] == {"type": "AdamW", "params": fused}
    assert merged(8, "train.deepspeed=zero3_offload")["optimizer"]["params"] == {"betas": [0.9, 0.95]}


def test_a_cpu_takes_pytorchs_optimizer() -> None:
    config = merged(2, "train.precision=fp32", "train.deepspeed=zero2", cuda=False)
    assert config["optimizer"]["params"] == {"torch_adam": True, "fused": True, "betas": [0.9, 0.95]}
    assert config["bf16"] == {"enabled": False}
    assert "data_types" not in config


@pytest.mark.parametrize("cuda", [True, False])
def test_zero3_leaves_linear_layers_to_alignvlm_unless_a_strategy_asks(cuda: bool, tmp_path: Path) -> None:
    assert merged(8, cuda=cuda)["zero_optimization"]["memory_efficient_linear"] is False
    assert "memory_efficient_linear" not in merged(8, "train.deepspeed=zero2", cuda=cuda)["zero_optimization"]
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 3, "memory_efficient_linear": True}}))
    assert merged(8, f"train.deepspeed={path}", cuda=cuda)["zero_optimization"]["memory_efficient_linear"] is True


def test_a_stage_may_choose_its_own_strategy() -> None:
    assert merged(8, f"stages.{STAGE}.deepspeed=zero1")["zero_optimization"]["stage"] == 1


def test_batches_that_cannot_be_shared_name_values_that_fit() -> None:
    message = error_of(48)
    assert f"stages.{STAGE}.global_batch_packs is 64" in message
    assert "set it to 48 or 96, or use 32 ranks" in message
    assert "set it to 100, or use 64 ranks" in error_of(100)


def test_unknown_strategies_name_the_nearest(tmp_path: Path) -> None:
    assert "did you mean 'zero3'?" in error_of(8, "train.deepspeed=zero4")
    assert "does not exist" in error_of(8, f"train.deepspeed={tmp_path}/none.json")


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ({"train_batch_size": 8}, "remove 'train_batch_size': the recipe's stages.*.global_batch_packs decides it"),
        ({"gradient_clipping": 1.0}, "stages.*.max_grad_norm"),
        ({"bf16": {"enabled": True}}, "train.precision"),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 1}}}, "remove 'optimizer.params.lr'"),
        ({"optimizer": {"type": "Lion"}}, "must be 'AdamW'"),
        ({"zero_optimization": {"stage": 3, "zero_quantized_gradients": True}}, "takes the bits of bf16"),
        ([], "a JSON object"),
    ],
)
def test_a_strategy_may_not_state_what_the_recipe_states(tmp_path: Path, content: Any, part: str) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(content))
    message = error_of(8, f"train.deepspeed={path}")
    assert message.startswith(f"{path}: ")
    assert part in message


def test_auto_is_deepspeeds_default(tmp_path: Path) -> None:
    """Files written for other trainers say "auto"; the bucket is no larger than what learns there too."""
    path = tmp_path / "zero2.json"
    path.write_text('{"zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}}', encoding="utf-8")
    strategy = read_strategy(StageConfig(deepspeed=str(path)))
    assert strategy == {"zero_optimization": {"stage": 2}}
    fit_reduce_bucket(strategy, 1000)
    assert strategy["zero_optimization"]["reduce_bucket_size"] == 1000


def test_zeropp_needs_whole_nodes() -> None:
    assert merged(16, "train.deepspeed=zeropp")["zero_optimization"]["zero_hpz_partition_size"] == 8
    assert "zero_hpz_partition_size 8, which does not divide 4 ranks" in error_of(4, "train.deepspeed=zeropp")


def test_deepspeed_accepts_every_strategy() -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    names = list_deepspeed_configs()
    assert {"zero1", "zero2", "zero3", "zero3_offload", "zeropp", "cpu_zero3"} <= set(names)
    for name in names:
        config = merged(8, f"train.deepspeed={name}", cuda=False)
        known = DeepSpeedConfig(alone(config))
        assert known.zero_config.stage == config["zero_optimization"]["stage"]
        assert known.gradient_clipping == 1.0


def alone(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration as one process would have it: DeepSpeed checks batches against the processes that run."""
    return config | {"train_batch_size": config["train_batch_size"] // 8}
