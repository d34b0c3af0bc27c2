"""Recomputed layers: which ones, and that they change no bit."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from alignvlm.config import load_recipe
from alignvlm.config.deepspeed import read_strategy
from alignvlm.config.schema import RecomputeConfig
from alignvlm.errors import UserError
from alignvlm.estimates.automatic import noted_recomputation
from alignvlm.estimates.memory import HEADROOM, stage_memory
from alignvlm.exports import save_export
from alignvlm.model import AlignVLMConfig
from alignvlm.model.attention import SDPA
from alignvlm.model.network import largest_list, network_of
from alignvlm.run_folder import Run
from alignvlm.training import stage as stage_module
from alignvlm.training.engine import recompute_layers
from alignvlm.training.stage import with_recomputation
from tests.jobs import TINY
from tests.tiny import pack, samples, tiny_model
from tests.training.fakes import FakeWorld


@pytest.fixture(scope="module")
def plain() -> tuple[Any, dict[str, Any], float, dict[str, torch.Tensor]]:
    """A model with five language layers, a packed batch, and its loss and gradients without recomputation."""
    model, processor = tiny_model(text={"num_hidden_layers": 5})
    batch = pack([processor.encode(s) for s in samples()])
    model.train().get_decoder().set_attn_implementation(SDPA)
    return model, batch, *step(model, batch)


def step(model: Any, batch: dict[str, Any]) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = model(**batch, num_items_in_batch=3).loss
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters()}


def runs_per_layer(model: Any) -> Iterator[tuple[str, list[int]]]:
    """How often each layer's first linear map runs in the next step, filled in as it happens."""
    for part in ("vision", "language"):
        layers = largest_list(model.model.part(part))[2]
        runs = [0] * len(layers)
        for number, layer in enumerate(layers):
            first = next(module for module in layer.modules() if isinstance(module, torch.nn.Linear))

            def count(*_: Any, number: int = number, runs: list[int] = runs) -> None:
                runs[number] += 1

            first.register_forward_hook(count)
        yield part, runs


@pytest.mark.parametrize(
    ("vision", "language", "twice"),
    [(1, 1, ([0, 1], [0, 1, 2, 3, 4])), (0, 2, ([], [0, 2, 4])), (2, 3, ([0], [0, 3])), (0, 9, ([], [0]))],
)
def test_every_nth_layer_runs_twice_and_no_bit_changes(
    plain: Any, vision: int, language: int, twice: tuple[list[int], list[int]]
) -> None:
    model, batch, expected, expected_gradients = plain
    recompute_layers(model, RecomputeConfig(vision, language))
    runs = dict(runs_per_layer(model))
    loss, gradients = step(model, batch)
    model.model.vision_tower.activation_checkpointing_disable()
    model.model.language_model.activation_checkpointing_disable()
    found = tuple([number for number, times in enumerate(runs[part]) if times == 2] for part in runs)
    assert found == twice
    assert all(times in (1, 2) for part in runs.values() for times in part)
    assert loss == expected
    assert all(torch.equal(gradient, expected_gradients[name]) for name, gradient in gradients.items())


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run whose first model is there."""
    run = Run(load_recipe(str(TINY), [f"runs={tmp_path_factory.mktemp('runs')}", "train.gradient_checkpointing=auto"]))
    model, processor = tiny_model(text={"num_hidden_layers": 5})
    save_export(model, model.state_dict(), processor, run.initial.export)
    return run


def test_auto_takes_the_least_that_fits_and_keeps_it(prepared: Run, capsys: pytest.CaptureFixture[str]) -> None:
    stage = prepared.recipe.stages["connector"]
    network = network_of(AlignVLMConfig.from_pretrained(prepared.initial.export), torch.float32)
    memory = stage_memory(prepared.recipe, stage, network, read_strategy(stage), 2)
    degrees = [RecomputeConfig(0, 0), RecomputeConfig(0, 2), RecomputeConfig(1, 1)]
    gpus = [int(memory.of(degree).gpu_total / HEADROOM) + 1 for degree in degrees]
    assert gpus == sorted(gpus, reverse=True)

    def take(world_size: int, gpu_memory: int) -> tuple[RecomputeConfig, str]:
        chosen = noted_recomputation(prepared, stage, world_size, gpu_memory, fused=False)
        return chosen, capsys.readouterr().out

    for gpu, degree in zip(gpus, degrees, strict=True):
        chosen, words = take(2, gpu)
        assert memory.of(chosen).gpu_total <= gpu * HEADROOM
        assert chosen == degree or memory.of(chosen).gpu_total < memory.of(degree).gpu_total
        assert "the least that fits, by the estimate" in words
    note = prepared.stage_folder(stage).recomputation
    changed = json.loads(note.read_text()) | {"vision": 7}
    note.write_text(json.dumps(changed))
    assert take(2, gpus[-1]) == (
        RecomputeConfig(7, 1), "stage connector: recomputed layers: vision one in 7, language all (auto: as before)\n"
    )  # fmt: skip
    assert take(3, gpus[0])[0] == RecomputeConfig(0, 0)  # another number of ranks chooses anew
    assert "may not fit" in take(1, gpus[-1] // 2)[1]
    assert take(1, 0)[0] == RecomputeConfig(0, 0)


def test_rank_0_chooses_for_all(prepared: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = prepared.recipe.stages["connector"]
    others: Any = FakeWorld(size=2, rank=1)
    monkeypatch.setattr(others, "broadcast", lambda value: RecomputeConfig(0, 3) if value is None else value)
    assert with_recomputation(prepared, stage, others).train.recompute == RecomputeConfig(0, 3)
    monkeypatch.setattr(stage_module, "noted_recomputation", lambda run, stage, size, gpu, fused: (size, gpu))
    first: Any = FakeWorld(size=2)
    monkeypatch.setattr(first, "all_gather", lambda value: [80, 40])
    assert with_recomputation(prepared, stage, first).train.gradient_checkpointing == (2, 40)


def test_a_run_may_resume_with_another_degree(tmp_path: Path) -> None:
    def run(*overrides: str) -> Run:
        return Run(load_recipe(str(TINY), [f"runs={tmp_path}", *overrides]))

    run("train.gradient_checkpointing=true").open()
    run("train.gradient_checkpointing.language=2").open()
    assert run().folder.read_config()["train"]["gradient_checkpointing"] == {"vision": 0, "language": 2}
    with pytest.raises(UserError, match=r"model.fused_layers: 'auto' → 'none'"):
        run("model.fused_layers=none").open()


def test_a_run_of_a_version_without_a_key_says_how_to_finish_it(tmp_path: Path) -> None:
    run = Run(load_recipe(str(TINY), [f"runs={tmp_path}"]))
    run.open()
    text = run.folder.config.read_text()
    assert "    feature_layer: -1\n" in text
    run.folder.config.write_text(text.replace("    feature_layer: -1\n", ""))
    with pytest.raises(UserError, match=r"feature_layer: \(absent\) → -1\).*with the version that began it"):
        run.open()


def test_a_run_of_a_version_without_a_key_goes_on_where_it_asks_for_nothing(tmp_path: Path) -> None:
    run = Run(load_recipe(str(TINY), [f"runs={tmp_path}"]))
    run.open()
    text = run.folder.config.read_text()
    assert "    lora: null\n" in text
    run.folder.config.write_text(text.replace("    lora: null\n", ""))
    run.open()
    wanted = ["stages.connector.lora={rank: 4}", "stages.connector.trainable=[connector.*]"]
    with pytest.raises(UserError, match=r"lora.rank: \(absent\) → 4"):
        Run(load_recipe(str(TINY), [f"runs={tmp_path}", *wanted])).open()


@pytest.mark.parametrize(
    ("setting", "change"),
    [
        ("rank=8", "rank: 4 → 8"), ("alpha=9", "alpha: 32.0 → 9.0"), ("dropout=0", "dropout: 0.05 → 0.0"),
        ("targets=['language.*q_proj']", r"targets: \['language.\*'\] → \['language.\*q_proj'\]"),
    ],
)  # fmt: skip
def test_a_run_does_not_resume_with_other_adapters(setting: str, change: str, tmp_path: Path) -> None:
    def run(*overrides: str) -> Run:
        stage = ["stages.connector.trainable=[connector.*]", "stages.connector.lora.rank=4"]
        return Run(load_recipe(str(TINY), [f"runs={tmp_path}", *stage, *overrides]))

    run().open()
    with pytest.raises(UserError, match=rf"another recipe \(stages.connector.lora.{change}\): "):
        run(f"stages.connector.lora.{setting}").open()
