"""Packed documents train exactly as they would alone, for several LMs and connectors."""

from __future__ import annotations

import pytest
import torch

from alignvlm.model.attention import SDPA, VARLEN, choose_attention
from alignvlm.parts import public_name
from tests.tiny import CONNECTORS, alone, pack, samples, tiny_model

LMS = {
    "llama": {},
    "llama-untied": {"tie_word_embeddings": False},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3", "head_dim": 8},
    "opt": {"model_type": "opt", "ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0},
}


def gradients(model: torch.nn.Module, batches: list[dict]) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = sum(model(**batch, num_items_in_batch=1).loss for batch in batches)
    loss.backward()
    return loss.item(), {public_name(n): p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("lm", LMS)
def test_packed_equals_unpacked_for_every_lm(lm: str) -> None:
    check_packed_equals_unpacked(*tiny_model(text=LMS[lm]))


@pytest.mark.parametrize("connector", CONNECTORS)
@pytest.mark.parametrize("merge", [1, 3])  # 3 does not divide the 4 patches of a side
def test_packed_equals_unpacked_for_every_connector(connector: str, merge: int) -> None:
    check_packed_equals_unpacked(*tiny_model(connector=CONNECTORS[connector], merge=merge))


def check_packed_equals_unpacked(model: torch.nn.Module, processor: object) -> None:
    model.double().train()
    documents = [processor.encode(s) for s in samples()]
    expected, expected_grads = gradients(model, [alone(d) for d in documents])
    assert all(expected_grads[f"connector.{name}"].any() for name, _ in model.model.connector.named_parameters())
    model.model.language_model.set_attn_implementation(SDPA)
    for order in ([0, 1, 2], [2, 0, 1]):
        loss, grads = gradients(model, [pack([documents[i] for i in order])])
        assert loss == pytest.approx(expected, rel=1e-9)
        assert grads.keys() == expected_grads.keys()
        for name, grad in grads.items():
            torch.testing.assert_close(
                grad, expected_grads[name], rtol=1e-6, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}"
            )


def test_a_document_cannot_see_another() -> None:
    model, processor = tiny_model()
    model.model.language_model.set_attn_implementation(SDPA)
    documents = [processor.encode(s) for s in samples()]
    batch = pack(documents)
    first = len(documents[0].input_ids)
    labels = batch["labels"].clone()
    labels[:, :first] = -100  # only later documents are supervised
    before = model(**batch | {"labels": labels}).loss
    changed = batch["input_ids"].clone()
    changed[:, : first // 2] = 7
    after = model(**batch | {"labels": labels, "input_ids": changed}).loss
    assert torch.equal(before, after)


@torch.no_grad()
def test_documents_stay_apart_without_targets_or_are_refused() -> None:
    model, processor = tiny_model()
    documents = [processor.encode(s) for s in samples()]
    inputs = lambda batch: {name: value for name, value in batch.items() if name != "labels"}
    expected = torch.cat([model.eval()(**inputs(alone(d))).logits for d in documents], dim=1)
    batch = inputs(pack(documents))
    for implementation in ("sdpa", "eager"):  # not all models have a mask for documents there: OPT has none
        model.get_decoder().set_attn_implementation(implementation)
        with pytest.raises(ValueError, match=rf"in the attention '{implementation}' .*\('alignvlm_sdpa'\)"):
            model(**batch)
        one = inputs(pack(documents[2:]))
        torch.testing.assert_close(model(**one).logits, expected[:, -one["max_seqlen"] :], rtol=1e-5, atol=1e-5)
    model.get_decoder().set_attn_implementation(SDPA)
    torch.testing.assert_close(model(**batch).logits, expected, rtol=1e-5, atol=1e-5)
    for wrong in ({"position_ids": None}, {"attention_mask": torch.ones_like(batch["input_ids"])}):
        with pytest.raises(ValueError, match="cu_seqlens comes with position_ids, without attention_mask"):
            model(**batch | wrong)
    with pytest.raises(ValueError, match="have no cache"):
        model(**batch, use_cache=True)
    other, _ = tiny_model(text={"model_type": "bloom", "n_layer": 1, "n_head": 4})
    with pytest.raises(ValueError, match="BloomModel has an attention of its own"):
        other(**batch)


@pytest.mark.parametrize("images", [True, False])
def test_vision_and_connector_run_once_whatever_the_batch_holds(images: bool) -> None:
    model, processor = tiny_model()
    model.train().get_decoder().set_attn_implementation(SDPA)
    calls = []
    model.model.vision_tower.register_forward_hook(lambda *a: calls.append("vision"))
    model.model.connector.register_forward_hook(lambda *a: calls.append("connector"))
    chosen = samples() if images else samples()[:1]
    _, grads = gradients(model, [pack([processor.encode(s) for s in chosen])])
    assert calls == ["vision", "connector"]
    assert {public_name(n) for n, p in model.named_parameters() if p.requires_grad} == set(grads)
    if not images:
        assert all(g.abs().max() == 0 for n, g in grads.items() if n.startswith(("vision.", "connector.")))


def test_fp32_does_not_get_a_kernel_of_16_bits() -> None:
    gpu = torch.device("cuda")
    assert choose_attention("auto", gpu, "bf16") != choose_attention("auto", gpu, "fp32") == SDPA
    with pytest.raises(ValueError, match="bf16"):
        choose_attention("varlen", gpu, "fp32")


@pytest.mark.cuda
@pytest.mark.parametrize("implementation", [VARLEN, SDPA])
def test_cuda_attention_agrees_with_float64_on_the_cpu(implementation: str) -> None:
    model, processor = tiny_model(text={"hidden_size": 64, "head_dim": 16})
    model.train()
    documents = [processor.encode(s) for s in samples()]
    expected, _ = gradients(model.double(), [alone(d) for d in documents])
    model.to("cuda", torch.bfloat16)
    model.model.language_model.set_attn_implementation(implementation)
    batch = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in pack(documents).items()}
    loss, _ = gradients(model, [batch])
    assert loss == pytest.approx(expected, rel=2e-2)
