"""What transformers, its pipelines and servers expect of any vision-language model, after its own testers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM, CompileConfig

from alignvlm.model import AlignVLMForConditionalGeneration, AlignVLMModel
from alignvlm.model.inputs.processing import AlignVLMProcessor
from alignvlm.model.modeling.base import CACHE
from tests.tiny import WORDS, alone, samples, tiny_model

Batch = dict[str, torch.Tensor]
GREEDY = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}


@pytest.fixture(scope="module")
def made() -> tuple[AlignVLMForConditionalGeneration, AlignVLMProcessor]:
    model, processor = tiny_model()
    return model.eval(), processor


@pytest.fixture
def model(made: tuple[AlignVLMForConditionalGeneration, AlignVLMProcessor]) -> AlignVLMForConditionalGeneration:
    return made[0]


@pytest.fixture
def batch(made: tuple[AlignVLMForConditionalGeneration, AlignVLMProcessor]) -> Batch:
    """One document with two images, and its labels."""
    return alone(made[1].encode(samples()[2]))


@pytest.fixture
def inputs(batch: Batch) -> Batch:
    return {name: tensor for name, tensor in batch.items() if name != "labels"}


@torch.no_grad()
def test_the_base_model_has_no_head_and_loads_by_itself(
    model: AlignVLMForConditionalGeneration, inputs: Batch, tmp_path: Path
) -> None:
    assert model.base_model is model.model
    assert model.get_decoder() is model.model.get_decoder() is model.model.language_model
    assert model.get_encoder("image") is model.model.vision_tower
    assert model.get_input_embeddings() is model.model.language_model.embed_tokens
    assert model.model.get_output_embeddings() is None
    model.save_pretrained(tmp_path / "whole")
    model.model.save_pretrained(tmp_path / "base")
    assert isinstance(AutoModel.from_config(model.config), AlignVLMModel)
    base = AutoModel.from_pretrained(tmp_path / "whole")
    assert isinstance(base, AlignVLMModel)
    assert torch.equal(base(**inputs).last_hidden_state, model.model(**inputs).last_hidden_state)
    for kind, folder in ((AutoModelForMultimodalLM, "whole"), (AutoModelForImageTextToText, "base")):
        again = kind.from_pretrained(tmp_path / folder)  # tied: the base model has the head's weight too
        assert torch.equal(again(**inputs).logits, model(**inputs).logits)


@torch.no_grad()
def test_hidden_states_and_attentions_where_they_are_asked_for(
    model: AlignVLMForConditionalGeneration, inputs: Batch
) -> None:
    model = copy.deepcopy(model)
    model.set_attn_implementation("eager")
    output = model(**inputs, output_hidden_states=True, output_attentions=True)
    length, width = inputs["input_ids"].shape[1], model.config.text_config.hidden_size
    assert [tuple(state.shape) for state in output.hidden_states] == [(1, length, width)] * 3
    assert torch.equal(output.hidden_states[0], model.model.embed(inputs["input_ids"], inputs["pixel_values"]))
    assert torch.equal(model.lm_head(output.hidden_states[-1]), output.logits)
    assert [tuple(attention.shape) for attention in output.attentions] == [(1, 4, length, length)] * 2
    plain = model(**inputs)
    assert plain.hidden_states is plain.attentions is None


@torch.no_grad()
@pytest.mark.parametrize("with_head", [True, False])
def test_a_tuple_has_the_fields_in_their_order(
    model: AlignVLMForConditionalGeneration, inputs: Batch, with_head: bool
) -> None:
    module: Any = model if with_head else model.model
    fields, values = module(**inputs, use_cache=False), module(**inputs, use_cache=False, return_dict=False)
    assert isinstance(values, tuple)
    assert len(values) == len(fields.to_tuple()) == 1
    assert torch.equal(values[0], fields[0])


@torch.no_grad()
def test_labels_give_logits_unless_training_asks_for_none(
    model: AlignVLMForConditionalGeneration, batch: Batch, inputs: Batch
) -> None:
    output, logits = model(**batch), model(**inputs).logits
    assert torch.equal(output.logits, logits)
    expected = torch.nn.functional.cross_entropy(logits[0, :-1], batch["labels"][0, 1:], ignore_index=-100)
    torch.testing.assert_close(output.loss, expected)
    shifted = torch.nn.functional.pad(batch["labels"], (0, 1), value=-100)[:, 1:]
    assert torch.equal(model(**inputs, shift_labels=shifted).loss, output.loss)
    for asked in ({"skip_logits": True}, {"num_items_in_batch": 3}):
        assert model(**batch, **asked).logits is None
    assert model(**batch, num_items_in_batch=3, skip_logits=False).logits is not None
    ignored = model.config.keys_to_ignore_at_inference  # what Trainer.evaluate does not take for predictions
    assert set(output.keys()) - set(ignored) == {"loss", "logits"}


@torch.no_grad()
def test_image_features_are_an_output_of_the_vision_encoder(
    model: AlignVLMForConditionalGeneration, inputs: Batch
) -> None:
    tiles, tokens = len(inputs["pixel_values"]), model.config.tiling.tokens_per_tile
    features = model.get_image_features(inputs["pixel_values"], output_hidden_states=True)
    assert features.pooler_output.shape == (tiles, tokens, model.config.text_config.hidden_size)
    assert features.last_hidden_state.shape == (tiles, 16, 32)
    assert len(features.hidden_states) == 3
    values = model.get_image_features(inputs["pixel_values"], return_dict=False)
    assert torch.equal(values[0], features.last_hidden_state)
    assert torch.equal(values[1], features.pooler_output)


@torch.no_grad()
def test_features_computed_before_stand_for_pixels(model: AlignVLMForConditionalGeneration, inputs: Batch) -> None:
    seen = {"image": model.get_image_features(inputs["pixel_values"])}
    again = model(input_ids=inputs["input_ids"], mm_encoder_outputs=seen)
    assert torch.equal(again.logits, model(**inputs).logits)
    with pytest.raises(ValueError, match="give pixel_values or mm_encoder_outputs, not both"):
        model(**inputs, mm_encoder_outputs=seen)
    for wrong in ({}, {"input_ids": inputs["input_ids"], "inputs_embeds": torch.zeros(1, 3, 32)}):
        with pytest.raises(ValueError, match="give either input_ids or inputs_embeds"):
            model(**wrong)


@torch.no_grad()
def test_images_go_to_their_placeholders_in_embeddings_too(
    model: AlignVLMForConditionalGeneration, inputs: Batch
) -> None:
    expected, embedding = model(**inputs).logits, model.get_input_embeddings()
    embeds = {"inputs_embeds": embedding(inputs["input_ids"])}
    assert torch.equal(model(**embeds, pixel_values=inputs["pixel_values"]).logits, expected)
    seen = {"image": model.get_image_features(inputs["pixel_values"])}
    assert torch.equal(model(**embeds, mm_encoder_outputs=seen).logits, expected)
    with pytest.raises(ValueError, match="0 visual tokens in the input, but the tiles give"):
        model(inputs_embeds=torch.zeros(1, 3, 32), pixel_values=inputs["pixel_values"])
    outside = copy.deepcopy(model)
    outside.config.image_token_id = embedding.num_embeddings
    with pytest.raises(ValueError, match="no row for image_token_id"):
        outside(**embeds, pixel_values=inputs["pixel_values"])


def test_images_and_their_tokens_must_be_as_many(model: AlignVLMForConditionalGeneration, inputs: Batch) -> None:
    visual = int((inputs["input_ids"] == model.config.image_token_id).sum())
    with pytest.raises(ValueError, match=f"{visual} visual tokens in the input, but no tiles in pixel_values"):
        model(input_ids=inputs["input_ids"])
    with pytest.raises(ValueError, match=f"{visual} visual tokens in the input, but the tiles give 16"):
        model(input_ids=inputs["input_ids"], pixel_values=inputs["pixel_values"][:1])


def test_prefill_in_chunks_and_from_embeddings_gives_the_same_tokens(
    model: AlignVLMForConditionalGeneration, inputs: Batch
) -> None:
    expected = model.generate(**inputs, **GREEDY)
    assert torch.equal(model.generate(**inputs, **GREEDY, prefill_chunk_size=7), expected)
    with torch.no_grad():
        embeds = model.model.embed(inputs["input_ids"], inputs["pixel_values"])
    length = inputs["input_ids"].shape[1]
    assert torch.equal(model.generate(inputs_embeds=embeds, **GREEDY), expected[:, length:])
    beams = model.generate(**inputs, **GREEDY | {"num_beams": 3, "num_return_sequences": 2})
    assert beams.shape == (2, length + 5)


def test_an_assistant_sees_the_images(model: AlignVLMForConditionalGeneration, inputs: Batch) -> None:
    """Assisted decoding gives the same tokens, and a copy as assistant guesses all of them."""
    assistant = copy.deepcopy(model)
    assistant.generation_config.assistant_confidence_threshold = 0.0
    passes: list[int] = []
    hook = model.register_forward_hook(lambda *_: passes.append(1))
    assisted = model.generate(**inputs, **GREEDY, assistant_model=assistant)
    hook.remove()
    assert torch.equal(assisted, model.generate(**inputs, **GREEDY))
    assert len(passes) == 1


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_a_cache_goes_on_with_another_image(
    made: tuple[AlignVLMForConditionalGeneration, AlignVLMProcessor], name: str
) -> None:
    """Whichever of its names a call uses, in every version of transformers."""
    model, processor = made
    first, second = (alone(processor.encode(samples()[number])) for number in (1, 2))
    cached = model.generate(
        input_ids=first["input_ids"], pixel_values=first["pixel_values"], **GREEDY, return_dict_in_generate=True
    )
    ids = torch.cat([cached.sequences, second["input_ids"]], dim=1)
    going_on = model.generate(input_ids=ids, pixel_values=second["pixel_values"], **{name: cached[CACHE]}, **GREEDY)
    pixels = torch.cat([first["pixel_values"], second["pixel_values"]])
    assert torch.equal(going_on, model.generate(input_ids=ids, pixel_values=pixels, **GREEDY))


@torch.no_grad()
@pytest.mark.parametrize("with_head", [True, False])
def test_a_pass_goes_on_from_a_cache_of_either_name(
    model: AlignVLMForConditionalGeneration, inputs: Batch, with_head: bool
) -> None:
    module: Any = model if with_head else model.model
    expected = module(**inputs)[0][:, -1]
    for name in ("cache", "past_key_values"):
        seen = module(input_ids=inputs["input_ids"][:, :-1], pixel_values=inputs["pixel_values"], use_cache=True)[CACHE]
        torch.testing.assert_close(module(input_ids=inputs["input_ids"][:, -1:], **{name: seen})[0][:, -1], expected)
    with pytest.raises(ValueError, match="give cache or past_key_values, not both"):
        module(input_ids=inputs["input_ids"][:, -1:], cache=seen, past_key_values=seen)


def test_generate_gives_what_it_is_asked_for(model: AlignVLMForConditionalGeneration, inputs: Batch) -> None:
    output: Any = model.generate(
        **inputs, **GREEDY, return_dict_in_generate=True, output_hidden_states=True, output_logits=True
    )
    assert len(output.hidden_states) == len(output.logits) == 5
    assert [len(states) for states in output.hidden_states] == [3] * 5
    assert torch.equal(output.sequences, model.generate(**inputs, **GREEDY, use_cache=False))


def test_it_compiles_as_one_graph(
    made: tuple[AlignVLMForConditionalGeneration, AlignVLMProcessor],
) -> None:
    model, processor = made
    inputs = {"input_ids": torch.tensor([processor.tokenizer(WORDS[0])["input_ids"]])}
    with torch.no_grad():
        compiled: Any = torch.compile(model, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(**inputs, use_cache=False).logits, model(**inputs).logits)


def test_a_training_step_with_images_compiles_as_one_graph(
    model: AlignVLMForConditionalGeneration, batch: Batch
) -> None:
    compiled: Any = torch.compile(model, backend="aot_eager", fullgraph=True)
    outputs, gradients = [], []
    for module in (model, compiled):
        outputs.append(module(**batch))
        outputs[-1].loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
        model.zero_grad()
    for field in ("loss", "logits"):
        torch.testing.assert_close(outputs[1][field], outputs[0][field])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-6)


def test_generating_compiles_once_for_all_inputs(
    made: tuple[AlignVLMForConditionalGeneration, AlignVLMProcessor],
) -> None:
    model, processor = made
    settings = CompileConfig(backend="aot_eager", mode=None, fullgraph=True, dynamic=None)
    settings._compile_all_devices = True  # transformers compiles on GPUs only, unless told
    torch._dynamo.reset()
    counters.clear()
    for number in (2, 1, 2):  # five tiles, one tile
        inputs = {
            name: tensor for name, tensor in alone(processor.encode(samples()[number])).items() if name != "labels"
        }
        compiled = model.generate(**inputs, **GREEDY, cache_implementation="static", compile_config=settings)
        assert torch.equal(compiled, model.generate(**inputs, **GREEDY))
    assert counters["stats"]["unique_graphs"] == 1


@torch.no_grad()
def test_more_rows_of_the_embedding_change_nothing_for_images(
    model: AlignVLMForConditionalGeneration, inputs: Batch, tmp_path: Path
) -> None:
    model = copy.deepcopy(model)
    before = model(**inputs).logits
    rows = before.shape[-1]
    model.resize_token_embeddings(rows + 10, mean_resizing=False)
    model.save_pretrained(tmp_path)
    for resized in (model, AlignVLMForConditionalGeneration.from_pretrained(tmp_path)):
        after = resized(**inputs).logits
        assert after.shape[-1] == rows + 10 == resized.config.text_config.vocab_size
        assert torch.equal(after[..., :rows], before)
        assert resized.lm_head.weight is resized.get_input_embeddings().weight
        with pytest.raises(ValueError, match=f"the connector was built for {rows}, keep at least these"):
            resized.resize_token_embeddings(rows - 1)
        resized.resize_token_embeddings(rows)
        assert resized.config.connector_vocab_size is None
        assert torch.equal(resized(**inputs).logits, before)
