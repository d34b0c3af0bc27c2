"""The processor: labels from spans, counts, cutting of text, padding, round trips through disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoProcessor

from alignvlm.model.inputs.chat import render_supervised
from data_pipeline.samples.schema import Encoder, Sample, SampleError
from tests.tiny import conversation, picture, samples, tiny_model

LLAMA_3 = (
    "{{ '<|im_start|>' }}{% for m in messages %}{{ '[' + m['role'] + ']\\n\\n' + m['content'] + '<|im_end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '[assistant]\\n\\n' }}{% endif %}"
)
FORGETFUL = (
    "{% for m in messages %}{% if loop.last or m['role'] == 'user' %}{{ m['content'] }}{% endif %}{{ '|' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '>' }}{% endif %}"
)


@pytest.fixture(scope="module")
def processor():
    return tiny_model()[1]


def test_it_is_an_encoder_whose_measure_is_what_encode_gives(processor) -> None:
    assert isinstance(processor, Encoder)
    for sample in samples():
        encoded = processor.encode(sample)
        sizes = [image.size for image in sample.images]
        assert processor.measure(sample.messages, sizes) == (len(encoded.input_ids), len(encoded.tiles))
        assert len(encoded.labels) == len(encoded.input_ids)


@pytest.mark.parametrize("template", [None, LLAMA_3])
def test_labels_are_exactly_what_the_assistant_says(template: str | None) -> None:
    processor = tiny_model()[1]
    if template:
        processor.tokenizer.chat_template = processor.chat_template = template
    turns = conversation("what is the total", "12.50", images=1) + conversation("read", "the field is 7")
    encoded = processor.encode(Sample("k", "s", turns, [picture(40, 70)], {}))
    said = processor.tokenizer.decode(encoded.labels[encoded.labels != -100])
    assert said == "12.50<|im_end|>the field is 7<|im_end|>"
    supervised = encoded.labels != -100
    assert np.array_equal(encoded.labels[supervised], encoded.input_ids[supervised])


def test_a_template_that_rewrites_the_past_is_refused() -> None:
    processor = tiny_model()[1]
    processor.tokenizer.chat_template = FORGETFUL
    with pytest.raises(SampleError, match="chat template changes earlier text"):
        render_supervised(processor.tokenizer, conversation("a", "b") + conversation("c", "d"))


def test_what_a_part_of_a_sample_names_is_neither_opened_nor_fetched(processor, monkeypatch, tmp_path: Path) -> None:
    def refuse(source: object) -> None:
        raise AssertionError(f"read: {source}")

    monkeypatch.setattr("alignvlm.model.inputs.images.read_image", refuse)
    monkeypatch.setattr("alignvlm.model.inputs.images.image_bytes", refuse)
    picture(9, 9).save(tmp_path / "own.png")
    plain = [*conversation("what is the total", "12.50", images=1), {"role": "user", "content": "and <b>?"}]
    named = [dict(message) for message in plain]
    places = {"path": str(tmp_path / "own.png"), "url": "http://127.0.0.1:9/own.png", "image": "../own.png"}
    named[0]["content"] = [{**part, **(places if part["type"] == "image" else {})} for part in plain[0]["content"]]
    image = picture(40, 70)
    first, second = (processor.encode(Sample("k", "s", each, [image], {})) for each in (plain, named))
    for name in ("input_ids", "labels", "tiles"):
        assert np.array_equal(getattr(first, name), getattr(second, name))
    asked = processor.prepare_generation([named[:1]], [[image]])
    assert np.array_equal(asked["pixel_values"].numpy(), first.tiles)


def test_text_is_cut_but_never_an_image(processor) -> None:
    sample = samples()[2]
    whole = processor.encode(sample)
    visual = int((whole.input_ids == processor.image_token_id).sum())
    text = len(whole.input_ids) - visual
    limited = processor.with_text_limit(text - 3)
    encoded = limited.encode(sample)
    assert len(encoded.input_ids) == visual + text - 3
    assert int((encoded.input_ids == processor.image_token_id).sum()) == visual
    assert limited.measure(sample.messages, [i.size for i in sample.images])[0] == len(encoded.input_ids)
    assert limited.fingerprint != processor.fingerprint
    with pytest.raises(SampleError, match="no supervised token"):
        processor.with_text_limit(3).encode(sample)


def test_generation_inputs_are_left_padded_prompts(processor) -> None:
    chats = [s.messages[:1] for s in samples()]
    inputs = processor.prepare_generation(chats, [s.images for s in samples()])
    assert inputs["pixel_values"].dtype == torch.uint8
    tiles = sum(processor.spec.num_tiles(*i.size) for s in samples() for i in s.images)
    assert len(inputs["pixel_values"]) == tiles
    assert inputs["attention_mask"][:, -1].all()
    text = processor.tokenizer.decode(inputs["input_ids"][0][inputs["attention_mask"][0] == 1])
    assert text == "<|im_start|>user\nwhat is the total<|im_end|>\n<|im_start|>assistant\n"


def test_images_without_placeholder_and_the_reverse_are_refused(processor) -> None:
    with pytest.raises(ValueError, match="1 images for 0 <image> placeholders"):
        processor([picture(8, 8)], ["no placeholder"])
    with pytest.raises(ValueError, match="0 images for 1 <image> placeholders"):
        processor([], ["<image> none"])
    with pytest.raises(SampleError, match="0 <image> placeholders in the text for 1 images"):
        processor.encode(Sample("k", "s", conversation("a", "b"), [picture(8, 8)], {}))


def test_round_trip_through_disk(processor, tmp_path: Path) -> None:
    processor.save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path)
    assert type(again) is type(processor)
    assert again.fingerprint == processor.fingerprint
    for sample in samples():
        a, b = processor.encode(sample), again.encode(sample)
        assert np.array_equal(a.input_ids, b.input_ids)
        assert np.array_equal(a.tiles, b.tiles)
