"""Training on a GPU (`make gpu-check`): one rank, NCCL, bf16, the real engine and step, against a CPU in fp32."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from alignvlm.model import AlignVLMForConditionalGeneration
from alignvlm.model.attention import SDPA
from alignvlm.training.callbacks.health.replay import loss_and_norm
from alignvlm.training.distributed import World
from alignvlm.training.engine import Trainer
from alignvlm.training.zero3 import shortcuts
from data_pipeline.loading.collate import collate
from tests.integration.shortcuts_worker import CASES, observed, trainer_by
from tests.one_rank import differing, masters, micro_batches, take_bad_step, take_step, trainer_of
from tests.tiny import samples, tiny_model

pytestmark = pytest.mark.cuda

STRATEGIES = ("zero1", "zero2", "zero3")
LEARN_FAST = [f"stages.connector.lr.{part}=1.0e-2" for part in ("vision", "connector", "language")]


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose attention has heads that flash attention takes."""
    folder = tmp_path_factory.mktemp("export")
    tiny_model(text={"hidden_size": 64, "head_dim": 16})[0].save_pretrained(folder)
    return folder


@contextmanager
def training(export: Path, strategy: str, world: World, *settings: str) -> Iterator[Trainer]:
    trainer = trainer_of(export, strategy, world, *settings)
    try:
        yield trainer
    finally:
        trainer.close()


@pytest.fixture(scope="module")
def reference(export: Path) -> tuple[float, float]:
    """Loss per supervised token of `micro_batches(4)` and its gradient's norm: a CPU, fp32, without DeepSpeed."""
    model = AlignVLMForConditionalGeneration.from_pretrained(
        export, dtype=torch.float32, attn_implementation={"text_config": SDPA, "vision_config": "sdpa"}
    ).train()
    batches = micro_batches(4)
    tokens, total = sum(b.num_supervised for b in batches), 0.0
    for b in batches:
        loss = model(
            input_ids=b.input_ids, pixel_values=b.tiles, position_ids=b.position_ids, cu_seqlens=b.cu_seqlens,
            max_seqlen=b.max_seqlen, visual_positions=b.visual_positions, target_positions=b.target_positions,
            targets=b.targets, num_items_in_batch=tokens,
        ).loss  # fmt: skip
        loss.backward()
        total += loss.item()
    return total, math.sqrt(sum(float(p.grad.double().square().sum()) for p in model.parameters()))


@pytest.mark.parametrize(
    ("strategy", "precision", "checkpointing"),
    [*((strategy, "bf16", False) for strategy in STRATEGIES), ("zero3", "bf16", True), ("zero3", "fp32", False)],
)
def test_a_step_is_that_of_a_cpu(
    strategy: str, precision: str, checkpointing: bool, export: Path, world: World, reference: tuple[float, float]
) -> None:
    settings = (f"train.precision={precision}", f"train.gradient_checkpointing={str(checkpointing).lower()}")
    with training(export, strategy, world, *settings) as trainer:
        result = take_step(trainer, micro_batches(4), world)
        inner = trainer.engine.optimizer.optimizer
        assert type(inner) is torch.optim.AdamW  # DeepSpeed's own would be compiled with nvcc
        assert all(group["fused"] for group in inner.param_groups)
    loss, norm = reference
    assert result.loss == pytest.approx(loss, rel=1e-2 if precision == "bf16" else 1e-4)
    assert result.grad_norm == pytest.approx(
        norm, rel=3e-2 if precision == "bf16" else 1e-3
    )  # convolutions round to TF32


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_training_learns(strategy: str, export: Path, world: World) -> None:
    with training(export, strategy, world, *LEARN_FAST) as trainer:
        results = [take_step(trainer, micro_batches(4), world) for _ in range(30)]
    assert not any(result.skipped for result in results)
    assert results[-1].loss < 0.2 * results[0].loss


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_step_with_nan_changes_no_weight(strategy: str, export: Path, world: World) -> None:
    with training(export, strategy, world) as trainer:
        found = take_bad_step(trainer, micro_batches(4), world)
    assert found["skipped"] == [True, False]
    assert found["changed"][0] == 0 < found["changed"][1]


@pytest.mark.parametrize("case", [case for case, (strategy, *_) in CASES.items() if strategy == "zero3"])
def test_the_shortcuts_through_zero3_change_no_bit(case: str, export: Path, world: World) -> None:
    """Where DeepSpeed's own way does not give the same bits twice, on some GPUs' attention, nothing more differs."""
    found = []
    for version in (shortcuts.VERSION, "another", "another"):
        trainer = trainer_by(version, case, export, world)
        try:
            found.append(observed(trainer, world))
        finally:
            trainer.close()
    (ours, seen), (theirs, seen_by_them), (again, seen_again) = found
    assert set(differing(ours, theirs)) <= set(differing(theirs, again))
    assert seen == seen_by_them or seen_by_them != seen_again


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_replay_gives_the_same_bits_and_leaves_no_trace(strategy: str, export: Path, world: World) -> None:
    with training(export, strategy, world) as trainer:
        expected = [take_step(trainer, micro_batches(4), world).loss for _ in range(2)]
    with training(export, strategy, world) as trainer:
        found, losses = [], []
        for _ in range(2):
            found += [{loss_and_norm(trainer, batch, world.device) for _ in range(3)} for batch in micro_batches(3)]
            losses.append(take_step(trainer, micro_batches(4), world).loss)
    assert [len(same) for same in found] == [1] * 6
    assert losses == expected


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_lora_stage_changes_its_adapters_only_and_its_dropout_repeats(
    strategy: str, export: Path, world: World
) -> None:
    """Three steps with one seed of the dropout, with it again, and with another."""
    settings = (
        "stages.connector.lora={rank: 4, dropout: 0.3}", "stages.connector.trainable=[connector.*]",
        "stages.connector.lr={connector: 1.0e-3, language: 1.0e-2}",
    )  # fmt: skip
    losses = []
    for another in (False, False, True):
        with training(export, strategy, world, *settings) as trainer:
            trainer.seed += another
            frozen, learned = frozen_weights(trainer), masters(trainer)
            assert any("lora" in name for name in learned)
            losses.append([take_step(trainer, micro_batches(4), world).loss for _ in range(3)])
            assert differing(frozen_weights(trainer), frozen) == []
            assert set(differing(masters(trainer), learned)) == set(learned)
    first, again, other = losses
    assert first == again
    assert first[0] == other[0]  # adapters begin with zeros
    assert first[1:] != other[1:]


def frozen_weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    """The language model's own weights, where this rank's part of them lies."""
    named = trainer.model.model.language_model.named_parameters()
    parts = {name: getattr(p, "ds_tensor", p) for name, p in named if not p.requires_grad}
    assert parts
    return {name: part.detach().clone() for name, part in parts.items()}


def test_a_stage_gives_its_memory_back(export: Path, world: World) -> None:
    """Of three stages, the second and the third need what the first needed, and leave no more than it left."""
    held, left = [], []
    for _ in range(3):
        with training(export, "zero3", world) as trainer:
            take_step(trainer, micro_batches(4), world)
            states = trainer.engine.optimizer.optimizer.state.values()
            moments = [weakref.ref(value) for state in states for value in state.values()]
            del states
            held.append(torch.cuda.memory_allocated())
        del trainer
        gc.collect()
        assert moments
        assert not any(reference() is not None for reference in moments)
        left.append(torch.cuda.memory_allocated())
    slack = 2**20
    assert max(held) - held[0] < slack
    assert max(left) - left[0] < slack


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_micro_batches_never_wait_for_the_gpu(
    strategy: str, checkpointing: bool, export: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch raises at every operation for which the host would wait, until the last micro-batch's gradient is there.

    The first step is not watched: DeepSpeed records the order of the layers in it. Under ZeRO-3 DeepSpeed 0.19.8 itself
    waits once at the end of a backward pass, for the stream on which it reduces gradients.
    """
    wait, waits = torch.cuda.Stream.synchronize, []

    def wait_unwatched(stream: torch.cuda.Stream) -> None:
        mode = torch.cuda.get_sync_debug_mode()
        waits.append(mode)
        torch.cuda.set_sync_debug_mode("default")
        wait(stream)
        torch.cuda.set_sync_debug_mode(mode)

    monkeypatch.setattr(torch.cuda.Stream, "synchronize", wait_unwatched)
    documents = [tiny_model()[1].encode(sample) for sample in samples()]
    batches = [
        collate([documents[i] for i in chosen], ["a/b/c"] * len(chosen), step=0, epoch=0)
        for chosen in ([0, 1, 2], [0, 0], [], [2, 1])  # with images, text only, filler
    ]
    batches = [batch.pin_memory() for batch in batches]
    setting = f"train.gradient_checkpointing={str(checkpointing).lower()}"
    with training(export, strategy, world, setting) as trainer:
        take_step(trainer, batches, world)
        step, watched = trainer.engine.step, []

        def stop_watching() -> None:
            watched.append(torch.cuda.get_sync_debug_mode())
            if trainer.engine.is_gradient_accumulation_boundary():
                torch.cuda.set_sync_debug_mode("default")
            step()

        trainer.engine.step = stop_watching
        torch.cuda.set_sync_debug_mode("error")
        try:
            with pytest.raises(RuntimeError, match="synchroniz"):  # the mode is on
                torch.ones(1, device=world.device).item()
            take_step(trainer, batches, world)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert watched == [2] * len(batches)
    assert waits.count(2) == (len(batches) if strategy == "zero3" else 0)
