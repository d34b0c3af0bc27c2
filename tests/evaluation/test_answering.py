"""Generation and the vocabulary view with a tiny real model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from alignvlm.evaluation.answering import ModelAnswerer
from alignvlm.evaluation.batches import ahead
from alignvlm.evaluation.items import Item, items_of
from alignvlm.evaluation.vocabulary_view import tile_boxes, token_text, top_tokens, vocabulary_view
from alignvlm.model.inputs.tiling import TilingSpec
from alignvlm.report.overlay import draw_view
from data_pipeline.errors import DataError
from tests.tiny import picture, samples, tiny_model


@pytest.fixture(scope="module")
def answerer() -> ModelAnswerer:
    model, processor = tiny_model(text={"tie_word_embeddings": False, "initializer_range": 0.5})  # says various things
    return ModelAnswerer(model, processor, "cpu")


@pytest.fixture(scope="module")
def items() -> list[Item]:
    return [item for sample in samples() for item in items_of(sample)]


def test_a_batch_answers_as_its_items_alone(answerer: ModelAnswerer, items: list[Item]) -> None:
    together = answerer.answer(items, 6)
    assert len(set(together)) > 1
    assert together == [answerer.answer([item], 6)[0] for item in items]


def test_answers_end_at_the_stop_token(answerer: ModelAnswerer) -> None:
    tokenizer = answerer.processor.tokenizer
    ids = tokenizer("the total", add_special_tokens=False)["input_ids"]
    assert answerer._decode([*ids, answerer.stop_ids[0], *ids]) == "the total"


def test_a_row_ends_at_a_text_and_the_others_go_on(answerer: ModelAnswerer, items: list[Item]) -> None:
    """What comes before the text is what comes without stopping; behind it at most the rest of a token is said."""
    inputs = answerer.prepare(items)
    whole = answerer.generate(inputs, 12)
    pairs = [whole[0][start : start + 2] for start in range(2, len(whole[0]) - 4)]
    mark = next(pair for pair in pairs if not any(pair in reply for reply in whole[1:]))
    stopped = answerer.generate(inputs, 12, [mark, "not said"])
    assert [reply.partition(mark)[0] for reply in stopped] == [reply.partition(mark)[0] for reply in whole]
    assert mark in stopped[0]
    assert len(stopped[0]) < len(whole[0])
    assert any(mark not in reply and len(reply) > len(stopped[0]) for reply in stopped)


def test_batches_are_made_one_ahead_and_pass_errors_on() -> None:
    made: list[int] = []

    def numbers() -> Iterator[int]:
        for number in range(4):
            if number == 3:
                raise DataError("the file ends here")
            made.append(number)
            yield number

    coming = ahead(numbers())
    for number in range(3):
        assert next(coming) == number
        assert len(made) <= number + 2
    with pytest.raises(DataError, match="ends here"):
        next(coming)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_model_never_says_an_image(items: list[Item], sign: int) -> None:
    """With one of the signs the placeholder is the most likely token of all."""
    model, processor = tiny_model(text={"tie_word_embeddings": False})
    with torch.no_grad():
        head = model.get_output_embeddings().weight.zero_()
        head[processor.image_token_id] = sign
    inputs = processor.prepare_generation([item.messages for item in items], [item.images for item in items])
    said = model.generate(**inputs, max_new_tokens=3)[:, -3:]
    assert (said != processor.image_token_id).all()


def test_an_export_answers_as_the_model_it_came_from(
    answerer: ModelAnswerer, items: list[Item], tmp_path: Path
) -> None:
    answerer.model.save_pretrained(tmp_path)
    answerer.processor.save_pretrained(tmp_path)
    assert ModelAnswerer.load(tmp_path, "cpu").answer(items, 6) == answerer.answer(items, 6)


@pytest.mark.parametrize("options", [{}, {"temperature": 0.5, "norm_vocab": False}, {"norm_hidden": False}])
def test_top_tokens_carry_the_connectors_weights(options: dict[str, float]) -> None:
    model, _ = tiny_model(connector=options)
    embedding = model.get_input_embeddings().weight
    features = torch.randn(7, 32, generator=torch.Generator().manual_seed(0))
    p, ids, entropy = top_tokens(model.model.connector, features, embedding.shape[0])
    torch.testing.assert_close(p.sum(-1), torch.ones(7))
    mixed = (p[..., None] * embedding[ids]).sum(1)  # [7, D]: all V tokens, so the whole average
    torch.testing.assert_close(mixed, model.model.connector(features[None], embedding)[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(entropy, -(p * p.log()).sum(-1))


def test_the_view_covers_the_image_and_can_be_drawn(answerer: ModelAnswerer) -> None:
    image = picture(70, 40)
    view = vocabulary_view(answerer.model, answerer.processor, image, k=3)
    assert view is not None
    rows, columns = answerer.processor.spec.grid(*image.size)
    assert len(view["tiles"]) == rows * columns > 1
    assert all(len(tile["cells"]) == tile["side"] ** 2 == 16 for tile in view["tiles"])
    assert all(len(cell["top"]) == 3 for tile in view["tiles"] for cell in tile["cells"])
    assert view["vocabulary"] == answerer.model.config.text_config.vocab_size
    svg = draw_view(view, "data:image/png;base64,", image.size)
    assert 0 < svg.count('class="cell"') <= rows * columns * 16


def test_blocks_that_reach_beyond_a_tile_are_shown_where_their_patches_are() -> None:
    model, processor = tiny_model(merge=3)  # 4 patches in two blocks, the second of which is one patch wide
    view = vocabulary_view(model, processor, picture(32, 32))
    assert view is not None
    assert [(tile["side"], tile["box"]) for tile in view["tiles"]] == [(2, [0, 0, 1.5, 1.5])]


def test_other_connectors_have_no_view() -> None:
    model, processor = tiny_model(connector={"kind": "mlp"})
    assert vocabulary_view(model, processor, picture(32, 32)) is None


@pytest.mark.parametrize("size", [(64, 64), (200, 50), (130, 300), (31, 77)])
def test_boxes_say_where_a_tiles_pixels_come_from(size: tuple[int, int]) -> None:
    """A picture whose red and green tell the place: what a tile shows must lie inside its box."""
    x, y = np.meshgrid(np.linspace(1, 250, size[0]), np.linspace(1, 250, size[1]))
    image = Image.fromarray(np.stack([x, y, np.zeros_like(x)], -1).astype(np.uint8))
    spec = TilingSpec(tile_size=64, tokens_per_tile=64)
    tiles, boxes = spec.cut(image), tile_boxes(spec, *size)
    assert len(tiles) == len(boxes)
    for tile, (x0, y0, x1, y1) in zip(tiles, boxes, strict=True):
        shown = tile[2] < 100  # the margin is white
        red, green = tile[0][shown] / 250, tile[1][shown] / 250
        slack = 4 / 64
        assert x0 - slack <= red.min() <= red.max() <= x1 + slack
        assert y0 - slack <= green.min() <= green.max() <= y1 + slack
        assert red.max() - red.min() >= min(1, x1) - max(0, x0) - 2 * slack


def test_white_space_tokens_can_be_told_apart(answerer: ModelAnswerer) -> None:
    tokenizer = answerer.processor.tokenizer
    shown = [token_text(tokenizer, token) for token in range(len(tokenizer))]
    assert all(text.isprintable() and text.strip() for text in shown)
    assert "\\xc5" in shown  # the first byte of a two-byte character, not the letter that byte-level BPE writes for it
