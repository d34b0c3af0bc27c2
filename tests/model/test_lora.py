"""LoRA adapters: where they go, what they compute, and what PEFT makes of the folder that is exported."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from alignvlm.config.schema import RecomputeConfig, StageConfig
from alignvlm.config.sections.stages import LoraConfig
from alignvlm.exports import save_export
from alignvlm.kernels.linear import keep_parameters
from alignvlm.model import AlignVLMForConditionalGeneration
from alignvlm.model.lora import Adapters, LoraError, add_adapters, find_targets, take_out
from alignvlm.parts import public_name
from alignvlm.training.engine import recompute_layers
from tests.tiny import alone, samples, tiny_model

RANK, ALPHA = 4, 12.0


def stage_of(trainable: list[str], **lora: Any) -> StageConfig:
    return StageConfig(name="tune", trainable=trainable, lora=LoraConfig(**{"rank": RANK, "alpha": ALPHA} | lora))


def trained(model: Any, stage: StageConfig, seed: int = 1) -> Any:
    """The model with adapters that are no longer zero, and with other weights where the stage trains them."""
    add_adapters(model, stage)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or public_name(name).startswith(tuple(g.rstrip("*") for g in stage.trainable)):
                parameter.add_(torch.randn(parameter.shape, generator=draw) * 0.1)
    return model


def adapters_of(model: Any, stage: StageConfig, base: Path = Path("base")) -> Adapters:
    return Adapters(stage, base, {name: (a.detach(), b.detach()) for name, (a, b) in take_out(model).items()})


def test_an_adapted_layer_computes_the_formula() -> None:
    """`x Wᵀ + alpha/rank x Aᵀ Bᵀ`, with nothing else in the model changed; at the start it computes what it did."""
    model, _ = tiny_model()
    layer = model.model.language_model.layers[1].mlp.down_proj
    x = torch.randn(3, layer.in_features)
    plain = layer(x)
    add_adapters(model, stage_of([], dropout=0.0))
    adapted: Any = model.model.language_model.layers[1].mlp.down_proj
    assert torch.equal(adapted(x), plain)
    a, b = adapted.lora_A["default"].weight, adapted.lora_B["default"].weight
    nn.init.normal_(b)
    torch.testing.assert_close(adapted(x), plain + ALPHA / RANK * (x @ a.T) @ b.T)


def test_the_same_adapters_whatever_was_drawn_before() -> None:
    """They depend on the seed and the stage, not on how a rank has loaded the model, and disturb no other stream."""
    drawn = []
    for skipped in (0, 5):
        model, _ = tiny_model()
        torch.rand(skipped)
        torch.manual_seed(3)
        add_adapters(model, stage_of([]), seed=7)
        drawn.append(([p.clone() for n, p in model.named_parameters() if "lora_A" in n], torch.rand(1)))
    assert all(torch.equal(one, other) for one, other in zip(drawn[0][0], drawn[1][0], strict=True))
    torch.manual_seed(3)
    assert drawn[0][1] == drawn[1][1] == torch.rand(1)


@pytest.mark.parametrize("keep", [False, True], ids=["torch's linear", "ours"])
def test_every_adapter_takes_part_in_the_loss(keep: bool) -> None:
    """No layer's adapter is passed over: the gradient of each B, which begins with zeros, is there and not zero."""
    model, processor = tiny_model()
    add_adapters(model, stage_of([], targets=["language.*", "vision.*"]))
    if keep:
        assert keep_parameters(model) > 3 * len(list(find_adapters(model)))  # a layer and its two factors
    model(**alone(processor.encode(samples()[2]))).loss.backward()
    norms = {name: b.grad.norm() for name, b in find_adapters(model)}
    assert len(norms) == 2 * 7 + 2 * 6
    assert [name for name, norm in norms.items() if not norm > 0] == []


def find_adapters(model: nn.Module) -> list[tuple[str, Any]]:
    return [(name, parameter) for name, parameter in model.named_parameters() if "lora_B" in name]


@pytest.mark.parametrize(
    ("trainable", "tied"),
    [([], False), (["connector.*", "language.model.norm.*"], False), (["language.model.embed_tokens.*"], True)],
    ids=["alone", "and the connector", "and tied embeddings"],
)
def test_merged_weights_and_peft_compute_what_training_did(trainable: list[str], tied: bool, tmp_path: Path) -> None:
    """Three ways to the same logits: the model in training, the export, and PEFT's own reading of `adapter/`."""
    from peft import PeftModel

    stage = stage_of(trainable, targets=["language.*", "vision.*mlp.fc1"])
    model, processor = tiny_model(text={"tie_word_embeddings": tied})
    save_export(model, model.state_dict(), processor, tmp_path / "base")
    batch = alone(processor.encode(samples()[2]))
    in_training = trained(model, stage).eval()(**batch).logits
    adapters = adapters_of(model, stage, tmp_path / "base")
    weights = {name: adapters.merge(name, weight) for name, weight in model.state_dict().items()}
    export = tmp_path / "export"
    save_export(model, weights, processor, export, adapters)

    merged = AlignVLMForConditionalGeneration.from_pretrained(export).eval()
    torch.testing.assert_close(merged(**batch).logits, in_training)
    base = AlignVLMForConditionalGeneration.from_pretrained(tmp_path / "base").eval()
    assert (base(**batch).logits - in_training).abs().max() > 0.1
    peft = PeftModel.from_pretrained(base, export / "adapter").eval()
    torch.testing.assert_close(peft(**batch).logits, in_training)

    config = json.loads((export / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["bias"], config["peft_type"]) == (RANK, ALPHA, "none", "LORA")
    others = (
        ["model.language_model.embed_tokens", "lm_head"] if tied else ["model.language_model.norm", "model.connector"]
    )
    assert config["modules_to_save"] == (others if trainable else None)
    plain = tiny_model()[0]
    # What vLLM's loader looks at: names that end with a factor, of layers of the model, factors of the rank.
    for name, tensor in load_file(export / "adapter" / "adapter_model.safetensors").items():
        layer, _, factor = name.removeprefix("base_model.model.").rpartition(".lora_")
        if layer:
            assert factor in ("A.weight", "B.weight")
            assert tensor.shape["AB".index(factor[0])] == RANK
            assert isinstance(plain.get_submodule(layer), nn.Linear)
        else:
            assert trainable


@pytest.mark.parametrize(
    ("targets", "reason"),
    [
        ("language.lm_head", "is 'language.lm_head', the LM head: the loss reads its weight without calling it"),
        ("language.model.embed_tokens", "an embedding, whose weight is read as a table"),
        ("language.*norm", "is 'language.*norm', which matches no linear layer"),
        ("vision.*out_prj", "is 'vision.*out_prj', which matches no linear layer"),
    ],
)
def test_what_cannot_have_an_adapter_is_refused(targets: str, reason: str) -> None:
    model, _ = tiny_model()
    with pytest.raises(LoraError) as error:
        find_targets(model, stage_of([], targets=["language.*q_proj", targets]))
    assert reason in str(error.value)
    assert error.value.key == "stages.tune.lora.targets[1]"


def test_a_weight_that_two_layers_share_has_no_adapter() -> None:
    """Merged, it could be only one of two sums; layers beside them have theirs."""
    model, _ = tiny_model()
    first, second = (layer.mlp for layer in model.model.language_model.layers)
    second.up_proj.weight = first.up_proj.weight
    assert len(find_targets(model, stage_of([]))) == 12
    with pytest.raises(LoraError, match=r"is 'language\.\*up_proj', a layer that shares its weight with another one"):
        find_targets(model, stage_of([], targets=["language.*up_proj"]))


def test_recomputed_layers_draw_the_same_dropout() -> None:
    """Gradients of a pass whose layers are computed again in the backward pass are those of one that keeps them."""
    stage, gradients = stage_of([], dropout=0.5, targets=["language.*", "vision.*"]), []
    for recompute in (RecomputeConfig(), RecomputeConfig(vision=1, language=2)):
        model, processor = tiny_model()
        trained(model, stage).train()
        recompute_layers(model, recompute)
        torch.manual_seed(5)
        model(**alone(processor.encode(samples()[2]))).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if "lora_" in name})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name


def test_a_weight_is_trained_in_one_way_only() -> None:
    model, _ = tiny_model()
    with pytest.raises(LoraError, match=r"stages\.tune\.trainable has 'language\.\*q_proj\.\*', which trains language"):
        add_adapters(model, stage_of(["connector.*", "language.*q_proj.*"]))


def test_some_layers_only() -> None:
    """Globs choose; PEFT finds the same layers by the pattern in its configuration, and no others."""
    model, _ = tiny_model()
    stage = stage_of([], targets=["language.model.layers.1.*proj"])
    names = find_targets(model, stage)
    add_adapters(model, stage)
    assert list(take_out(model)) == names
    assert len(names) == 7
    assert {name.split(".")[3] for name in names} == {"1"}


def test_without_peft_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(LoraError, match=r"stages\.tune\.lora needs the package peft: pip install 'alignvlm\[train\]'"):
        add_adapters(tiny_model()[0], stage_of([]))
