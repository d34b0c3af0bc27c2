"""Pieces of text are said when they are certain: together they are what decoding the whole answer gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from alignvlm.evaluation.answering import ModelAnswerer
from alignvlm.evaluation.items import Item
from alignvlm.model.inputs.tokenizer import train_tokenizer
from alignvlm.serving.generation import Settings, answer
from tests.tiny import WORDS, conversation, picture, tiny_model

TOKENIZER = train_tokenizer(WORDS * 20, 320)


class Recorded:
    """Stands in for a model: says the tokens of a text."""

    stop_ids = (TOKENIZER.eos_token_id,)

    def __init__(self, ids: list[int]) -> None:
        self.ids = ids
        self.processor: Any = self
        self.tokenizer = TOKENIZER
        self.asked = 0
        self.model = torch.nn.Module()

    def generate(self, inputs: Any, max_new_tokens: int, streamer: Any, **sampling: Any) -> None:
        streamer.put(inputs["input_ids"])
        for token in self.ids[:max_new_tokens]:
            self.asked += 1
            streamer.put(torch.tensor([token]))
        streamer.end()


def told(
    text: str, most: int = 1000, stop: tuple[str, ...] = (), cancel_after: int = 10**9
) -> tuple[list[str], Any, int]:
    """Pieces, outcome, and how many tokens the model computed, for the tokens of a text and an end."""
    model = Recorded([*TOKENIZER(text, add_special_tokens=False)["input_ids"], TOKENIZER.eos_token_id])
    pieces: list[str] = []
    prompt = {"input_ids": torch.zeros(1, 7, dtype=torch.long)}
    outcome = answer(model, prompt, Settings(most, stop=stop), pieces.append, lambda: len(pieces) >= cancel_after)  # type: ignore[arg-type]
    return pieces, outcome, model.asked


@pytest.mark.parametrize("text", ["the total is 12.50", "größe 🧾🧾 日本", " a\n\n b ", ""])
def test_pieces_make_up_the_answer_and_never_split_a_character(text: str) -> None:
    pieces, outcome, _ = told(text)
    assert "".join(pieces) == outcome.text == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert (outcome.finish, outcome.prompt_tokens) == ("stop", 7)
    assert outcome.completion_tokens == len(TOKENIZER(text)["input_ids"]) + 1


def test_a_character_cut_in_half_by_the_limit_is_said_as_decoding_says_it() -> None:
    pieces, outcome, asked = told("🧾", most=2)
    assert (outcome.finish, asked) == ("length", 2)
    assert "".join(pieces) == outcome.text == TOKENIZER.decode(TOKENIZER("🧾")["input_ids"][:2])


@pytest.mark.parametrize(
    ("stop", "said"),
    [
        (("total",), "the "), (("is", "total"), "the "), (("t",), ""),
        (("12.50",), "the total is "), (("12.51",), "the total is 12.50"),
    ],
)  # fmt: skip
def test_nothing_of_a_stop_text_is_said_and_the_model_ends_there(stop: tuple[str, ...], said: str) -> None:
    pieces, outcome, asked = told("the total is 12.50", stop=stop)
    assert "".join(pieces) == outcome.text == said
    whole = told("the total is 12.50")[2]
    assert outcome.finish == "stop"
    assert (asked < whole) == (said != "the total is 12.50")


def test_who_cancels_waits_for_one_token_at_most() -> None:
    pieces, outcome, asked = told("the total is 12.50", cancel_after=2)
    assert outcome.finish == "cancelled"
    assert asked <= 3 >= len(pieces)


@pytest.mark.parametrize("layers", [0, 1, 3])
def test_who_cancels_waits_for_one_layer_of_a_prompt_at_most(layers: int) -> None:
    """Two layers see the images and two the prompt; what is left of them knows nothing of it afterwards."""
    model = ModelAnswerer(*tiny_model(), "cpu")
    item = Item("k", 0, WORDS[0], [WORDS[1]], conversation(WORDS[0], "", images=1)[:1], [picture(40, 40)])
    inputs, seen, pieces = model.prepare([item]), [], []
    places = [*model.model.model.vision_tower.encoder.layers, *model.model.get_decoder().layers]
    for layer in places:
        layer.register_forward_hook(lambda layer, *_: seen.append(layer))
    outcome = answer(model, inputs, Settings(4), pieces.append, lambda: len(seen) >= layers)
    assert (outcome.finish, outcome.completion_tokens, len(seen)) == ("cancelled", 0, layers)
    whole = answer(model, inputs, Settings(4), pieces.append, lambda: False)
    assert whole.completion_tokens == 4
    assert whole.text == "".join(pieces) == model.answer([item], 4)[0]
