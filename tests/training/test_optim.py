"""Trainable globs, parameter groups and the learning rate as a function of the step."""

from __future__ import annotations

import itertools

import pytest

from alignvlm.config.schema import StageConfig
from alignvlm.errors import UserError
from alignvlm.parts import public_name
from alignvlm.training.optim import lr_factor, parameter_groups, set_trainable
from tests.tiny import tiny_model


def test_every_trainable_parameter_is_in_exactly_one_group() -> None:
    model, _ = tiny_model()
    stage = StageConfig(
        trainable=["connector.*", "language.*"], lr={"connector": 2e-3, "default": 1e-3}, weight_decay=0.1
    )
    set_trainable(model, stage)
    groups = parameter_groups(model, stage)
    names = [name for group in groups for name in group.names]
    assert sorted(names) == sorted(public_name(n) for n, p in model.named_parameters() if p.requires_grad)
    assert not any(name.startswith("vision.") for name in names)
    assert {(g.part, g.lr, g.weight_decay) for g in groups} == {
        ("connector", 2e-3, 0.1), ("connector", 2e-3, 0.0), ("language", 1e-3, 0.1), ("language", 1e-3, 0.0),
    }  # fmt: skip
    undecayed = {name for g in groups if g.weight_decay == 0 for name in g.names}
    assert {"connector.gamma", "connector.beta", "connector.w1.bias"} <= undecayed
    assert "language.model.embed_tokens.weight" in undecayed
    assert "connector.w2" not in undecayed


def test_mistakes_name_the_key() -> None:
    model, _ = tiny_model()
    with pytest.raises(UserError, match=r"stages\.s\.trainable: 'conector\.\*' matches no parameter"):
        set_trainable(model, StageConfig(name="s", trainable=["conector.*"]))
    with pytest.raises(UserError, match=r"stages\.s\.lr has no entry for 'vision'"):
        parameter_groups(model, StageConfig(name="s", lr={"language": 1.0}))


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_schedule_rises_then_falls_to_its_floor(schedule: str) -> None:
    stage = StageConfig(warmup_steps=10, schedule=schedule, min_lr_ratio=0.1)
    factors = [lr_factor(stage, step, 100) for step in range(100)]
    assert factors[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert factors[10] == 1.0
    assert all(a >= b for a, b in itertools.pairwise(factors[10:]))
    assert lr_factor(stage, 100, 100) == pytest.approx(1.0 if schedule == "constant" else 0.1)


def test_schedules_equal_transformers() -> None:
    import torch
    from transformers import get_scheduler

    for schedule in ("cosine", "linear"):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        theirs = get_scheduler(schedule, optimizer, num_warmup_steps=5, num_training_steps=50)
        stage = StageConfig(warmup_steps=5, schedule=schedule)
        for step in range(4, 49):
            while theirs.last_epoch < step + 1:  # transformers' rate of step s + 1 is ours of step s while warming up
                optimizer.step()
                theirs.step()
            shifted = lr_factor(stage, step + 1 if step >= 5 else step, 50)
            assert shifted == pytest.approx(theirs.get_last_lr()[0], abs=1e-9)
