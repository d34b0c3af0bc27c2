"""A step never waits for the GPU inside a micro-batch: it runs on PyTorch's meta device, where no value can be read."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from alignvlm.model import AlignVLMForConditionalGeneration
from alignvlm.model.attention import SDPA
from alignvlm.training import step
from alignvlm.training.optim import Group
from data_pipeline.loading.collate import collate
from data_pipeline.samples.schema import Encoded
from tests.tiny import CONNECTORS, samples, tiny_model
from tests.training.fakes import FakeWorld

META = torch.device("meta")


class Copies(TorchDispatchMode):
    """Counts copies from the host to the device for which the host waits."""

    def __init__(self) -> None:
        super().__init__()
        self.waiting = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        packet = func.overloadpacket
        if packet is torch.ops.aten._to_copy and args[0].device.type == "cpu" and kwargs.get("device") == META:
            self.waiting += not kwargs.get("non_blocking", False)
        if packet is torch.ops.aten.copy_ and args[1].device.type == "cpu" and args[0].device == META:
            self.waiting += 1
        return func(*args, **kwargs)


class MetaEngine:
    """The parts of DeepSpeed's engine that a step calls, around a model without values."""

    def __init__(self, model: AlignVLMForConditionalGeneration) -> None:
        self.model = model
        self.optimizer = SimpleNamespace(param_groups=[{"lr": 0.0}], overflow=False)
        self.steps = 0

    def __call__(self, **inputs: Any) -> Any:
        return self.model(**inputs)

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def step(self) -> None:
        self.steps += 1

    def get_global_grad_norm(self) -> torch.Tensor:
        return torch.zeros((), device=META)


class MetaWorld(FakeWorld):
    def all_reduce(self, tensor: torch.Tensor) -> None:
        self.reduced.append(0.0)


@pytest.mark.parametrize("connector", CONNECTORS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_no_value_is_read_within_a_step_and_one_at_its_end(
    connector: str, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = tiny_model(connector=CONNECTORS[connector])
    model.model.language_model.set_attn_implementation(SDPA)
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    model.to(META).train()
    encoded = [processor.encode(sample) for sample in samples()]
    batches = [
        collate([encoded[i] for i in documents], ["a/b/c"] * len(documents), step=0, epoch=0, sources=documents)
        for documents in ([0, 1, 2], [0, 0], [])  # with images, text only, filler
    ]
    reads = []
    monkeypatch.setattr(step, "_read", lambda *values: reads.append(values) or ([1.0] * 4, 1.0))
    groups = [Group("connector", 0.5, 0.1, ("connector.w",))]
    trainer: Any = SimpleNamespace(
        engine=MetaEngine(model), groups=groups, seed=0, same_weights=model.model.connector.same_weights
    )
    world: Any = MetaWorld(device=META)
    with Copies() as copies:
        result = step.train_step(trainer, batches, world, 1.0, step.Votes(), None, ["a", "b", "c"], [1.5, 2.5])
    assert copies.waiting == 0
    assert result.shared == [1.5, 2.5]
    assert len(reads) == len(world.sums) == len(world.reduced) == 1
    assert trainer.engine.steps == len(batches)
    assert result.counts.tiles == sum(len(each.tiles) for each in encoded)
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


def test_the_positions_that_collate_gives_are_those_that_the_model_would_find() -> None:
    model, processor = tiny_model()
    model.model.language_model.set_attn_implementation(SDPA)
    encoded = [processor.encode(sample) for sample in samples()]
    batch = collate(encoded, ["a/b/c"] * len(encoded), step=0, epoch=0)
    inputs = {"input_ids": batch.input_ids, "pixel_values": batch.tiles, "position_ids": batch.position_ids,
              "cu_seqlens": batch.cu_seqlens, "max_seqlen": batch.max_seqlen}  # fmt: skip
    given = {name: getattr(batch, name) for name in ("visual_positions", "target_positions", "targets")}
    labels = torch.from_numpy(np.concatenate([each.labels for each in encoded]))[None]
    assert torch.equal(model(**inputs, **given).loss, model(**inputs, labels=labels).loss)


def test_labels_without_a_target_give_no_loss_and_no_error() -> None:
    model, _ = tiny_model()
    none = np.zeros(0, np.int64)
    document = Encoded(np.full(4, 7), np.full(4, -100), np.zeros((0, 3, 32, 32), np.uint8), none)
    batch = collate([document], ["a/b/c"], step=0, epoch=0)
    loss = model(input_ids=batch.input_ids, target_positions=batch.target_positions, targets=batch.targets).loss
    assert loss.item() == 0.0
