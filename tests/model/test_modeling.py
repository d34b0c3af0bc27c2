"""The model as Hugging Face users meet it: save, load, Auto classes, generate with cache and mixed batches."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText

from alignvlm.errors import UserError
from alignvlm.model import AlignVLMForConditionalGeneration
from tests.tiny import CONNECTORS, alone, samples, tiny_model


@pytest.mark.parametrize("connector", CONNECTORS)
@pytest.mark.parametrize("tied", [True, False])
def test_save_and_load_give_the_same_model(connector: str, tied: bool, tmp_path: Path) -> None:
    model, processor = tiny_model(connector=CONNECTORS[connector], text={"tie_word_embeddings": tied})
    model.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert isinstance(again, AlignVLMForConditionalGeneration)
    assert again.config.tiling == model.config.tiling
    state = again.state_dict()
    assert model.state_dict().keys() == state.keys()
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name
    head, embedding = again.get_output_embeddings().weight, again.get_input_embeddings().weight
    assert (head.data_ptr() == embedding.data_ptr()) == tied
    batch = alone(processor.encode(samples()[2]))
    assert torch.equal(model.eval()(**batch).loss, again(**batch).loss)


def test_weights_of_another_connector_are_refused_in_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    older = {"kind": "ovis", "visual_vocab_size": 40, "norm_vocab": False}
    model, processor = tiny_model(connector=older)
    model.save_pretrained(tmp_path)
    text = (tmp_path / "config.json").read_text()
    without = re.sub(r'\n *"norm_vocab": false,', "", text)  # as exports were before there was a LayerNorm
    assert without != text
    (tmp_path / "config.json").write_text(without)
    with pytest.raises(UserError, match=r"'ovis', but its weights lack connector\.beta, connector\.gamma; one written"):
        AlignVLMForConditionalGeneration.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(text)  # what the error says
    again = AlignVLMForConditionalGeneration.from_pretrained(tmp_path)
    batch = alone(processor.encode(samples()[2]))
    assert torch.equal(model.eval()(**batch).loss, again(**batch).loss)

    (tmp_path / "config.json").write_text(re.sub(r'"kind": "ovis"', '"kind": "perceiver"', text))
    with pytest.raises(UserError, match=r"'perceiver', .* and \d+ more; those of earlier versions held other layers"):
        AlignVLMForConditionalGeneration.from_pretrained(tmp_path)
    assert not caplog.records


def test_backbones_keep_their_weights_and_w2_is_the_lm_head() -> None:
    model, _ = tiny_model(text={"tie_word_embeddings": False})
    assert torch.equal(model.model.connector.w2, model.lm_head.weight)
    assert model.model.connector.w2.data_ptr() != model.lm_head.weight.data_ptr()


def greedy_without_cache(model: torch.nn.Module, inputs: dict, steps: int) -> list[int]:
    ids, tokens = inputs["input_ids"], []
    for _ in range(steps):
        logits = model(input_ids=ids, pixel_values=inputs.get("pixel_values")).logits
        tokens.append(int(logits[0, -1].argmax()))
        ids = torch.cat([ids, torch.tensor([[tokens[-1]]])], dim=1)
    return tokens


def test_generate_batches_mixed_image_counts_and_uses_the_cache_rightly() -> None:
    model, processor = tiny_model()
    model.eval()
    chats, images = [s.messages[:1] for s in samples()], [s.images for s in samples()]
    together = processor.prepare_generation(chats, images)
    new = model.generate(**together, max_new_tokens=6, do_sample=False, eos_token_id=None)
    new = new[:, together["input_ids"].shape[1] :]
    for row, chat, pictures in zip(new, chats, images, strict=True):
        single = processor.prepare_generation([chat], [pictures])
        assert row.tolist() == greedy_without_cache(model, single, 6)


def test_loss_is_torchs_cross_entropy() -> None:
    model, processor = tiny_model()
    model.eval()
    batch = alone(processor.encode(samples()[2]))
    labels = batch.pop("labels")
    logits = model(**batch).logits
    expected = torch.nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:], ignore_index=-100)
    torch.testing.assert_close(model(**batch, labels=labels).loss, expected)


def test_frozen_vision_keeps_no_graph() -> None:
    model, processor = tiny_model()
    model.train()
    model.model.vision_tower.requires_grad_(False)
    assert not model.model.encode_tiles(torch.from_numpy(processor.encode(samples()[1]).tiles)).requires_grad


def test_no_layer_norm_of_the_vision_encoder_copies_its_input() -> None:
    model, processor = tiny_model()
    norms = [module for module in model.model.vision_tower.modules() if isinstance(module, torch.nn.LayerNorm)]
    contiguous = []
    for norm in norms:
        norm.register_forward_pre_hook(lambda module, inputs: contiguous.append(inputs[0].is_contiguous()))
    model.model.encode_tiles(torch.from_numpy(processor.encode(samples()[1]).tiles))
    assert contiguous == [True] * len(norms)
