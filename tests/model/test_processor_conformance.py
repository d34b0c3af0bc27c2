"""The processor as transformers, pipelines and servers use one, after the assertions of transformers' own testers."""

from __future__ import annotations

import base64
import hashlib
import json
import pickle
import shutil
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer, pipeline

from alignvlm.model import AlignVLMImageProcessor, AlignVLMProcessor
from alignvlm.model.inputs.chat import CHATML
from data_pipeline.samples.schema import Sample
from tests.fixtures.zoo import save
from tests.tiny import conversation, picture, tiny_model

IMAGES = [picture(70, 40), picture(20, 30, seed=1), picture(32, 32, seed=2)]
ASKED = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    model, processor = tiny_model(text={"tie_word_embeddings": False, "initializer_range": 0.5})  # says various things
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def processor(export: Path) -> AlignVLMProcessor:
    return AutoProcessor.from_pretrained(export)


def question(text: str, *images: Any, key: str = "image") -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = [{"type": "image", key: image} for image in images]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def test_auto_classes_load_its_parts(export: Path, processor: AlignVLMProcessor) -> None:
    images, tokenizer = AutoImageProcessor.from_pretrained(export), AutoTokenizer.from_pretrained(export)
    assert (type(processor), type(images)) == (AlignVLMProcessor, AlignVLMImageProcessor)
    assert images.size == {"height": 32, "width": 32}
    assert tokenizer.padding_side == "left"
    assert tokenizer.chat_template == processor.chat_template == (export / "chat_template.jinja").read_text()
    again = AlignVLMProcessor(images, tokenizer)
    assert again.to_dict() == processor.to_dict() == pickle.loads(pickle.dumps(processor)).to_dict()


def test_measured_data_stays_measured(processor: AlignVLMProcessor) -> None:
    """The fingerprint is that of the tokenizer, the language model's own template and the tiling, as ever."""
    state = [2, processor.tokenizer.backend_tokenizer.to_str(), CHATML, sorted(asdict(processor.spec).items()), None]
    expected = hashlib.sha256(json.dumps(state).encode()).hexdigest()[:16]
    assert processor.fingerprint == expected
    processor(text=["read", "read the field"], padding=True, truncation=True, max_length=2)
    assert processor.fingerprint == expected


def test_an_older_export_loads(export: Path, processor: AlignVLMProcessor, tmp_path: Path) -> None:
    folder = tmp_path / "export"
    shutil.copytree(export, folder)
    (folder / "chat_template.jinja").write_text(CHATML)
    config = {"max_text_tokens": None, "processor_class": "AlignVLMProcessor", "tiling": asdict(processor.spec)}
    (folder / "processor_config.json").write_text(json.dumps(config))
    saved = json.loads((folder / "tokenizer_config.json").read_text())
    del saved["padding_side"]
    (folder / "tokenizer_config.json").write_text(json.dumps(saved))
    older = AutoProcessor.from_pretrained(folder)
    assert (older.to_dict(), older.fingerprint) == (processor.to_dict(), processor.fingerprint)
    assert (older.tokenizer.padding_side, older.chat_template) == ("left", processor.chat_template)


def test_chat_messages_are_what_generation_in_training_gets(processor: AlignVLMProcessor) -> None:
    chats = [question("read the field"), question("what is", *IMAGES[:2]), question("the total", IMAGES[2])]
    flat = [[m | {"content": [{"type": p["type"]} | ({"text": p["text"]} if "text" in p else {}) for p in m["content"]]}
             for m in chat] for chat in chats]  # fmt: skip
    expected = processor.prepare_generation(flat, [[], IMAGES[:2], IMAGES[2:]])
    inputs = processor.apply_chat_template(chats, processor_kwargs={"padding": True}, **ASKED)
    assert inputs.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(inputs[name], tensor), name
    assert inputs["pixel_values"].dtype == torch.uint8


def test_images_of_messages_come_in_every_form(processor: AlignVLMProcessor, tmp_path: Path) -> None:
    page = save(IMAGES[0])
    (tmp_path / "page.png").write_bytes(page)
    code = base64.b64encode(page).decode()
    expected = processor.apply_chat_template(question("read", IMAGES[0]), **ASKED)
    for key, source in {
        "image": np.asarray(IMAGES[0]), "path": str(tmp_path / "page.png"), "base64": code,
        "url": f"data:image/png;base64,{code}",
    }.items():  # fmt: skip
        inputs = processor.apply_chat_template(question("read", source, key=key), **ASKED)
        assert all(torch.equal(inputs[name], tensor) for name, tensor in expected.items()), key
    openai = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{code}"}}
    chat = [{"role": "user", "content": [openai, {"type": "text", "text": "read"}]}]
    assert torch.equal(processor.apply_chat_template(chat, **ASKED)["input_ids"], expected["input_ids"])


def test_outputs_have_the_declared_names_and_the_asked_types(processor: AlignVLMProcessor) -> None:
    lists = processor(IMAGES[0], "read <image>")
    assert set(lists) == set(processor.model_input_names)
    assert isinstance(lists["input_ids"][0], list)
    for kind, expected in (("np", np.ndarray), ("pt", torch.Tensor)):
        inputs = processor(IMAGES[0], "read <image>", return_tensors=kind)
        assert {type(value) for value in inputs.values()} == {expected}
        assert inputs["input_ids"].tolist() == lists["input_ids"]
        assert inputs["pixel_values"].tolist() == lists["pixel_values"].tolist()
    assert set(processor(IMAGES)) == {"pixel_values"}
    assert set(processor(text="read")) == set(processor([], "read")) == {"input_ids", "attention_mask"}
    only = processor.image_processor(IMAGES, return_tensors="pt")
    assert only["num_tiles"].tolist() == [processor.spec.num_tiles(*image.size) for image in IMAGES]
    assert len(only["pixel_values"]) == only["num_tiles"].sum()


def test_arguments_reach_tokenizer_and_image_processor(processor: AlignVLMProcessor) -> None:
    flat = processor(text=["read", "read the field"], padding="max_length", max_length=9, return_tensors="pt")
    kinds = {"text_kwargs": {"padding": "max_length", "max_length": 9}, "return_tensors": "pt"}
    assert torch.equal(flat["input_ids"], processor(text=["read", "read the field"], **kinds)["input_ids"])
    assert flat["attention_mask"].tolist()[0] == [0] * 8 + [1]
    right = processor(text=["read", "read the field"], padding=True, padding_side="right")
    assert right["attention_mask"][0][0] == 1 > right["attention_mask"][0][-1]
    assert len(processor(text="read the field name", truncation=True, max_length=2)["input_ids"][0]) == 2
    for options in ({"max_tiles": 1}, {"images_kwargs": {"max_tiles": 1}}):
        single = processor(IMAGES[0], "<image>", **options)
        assert single["pixel_values"].shape[0] == 1
        assert len(single["input_ids"][0]) == processor.spec.tokens_per_tile
    with pytest.raises(ValueError, match="passed two times"):
        processor(text="read", padding=True, text_kwargs={"padding": True})


def test_servers_can_plan_and_find_the_visual_tokens(processor: AlignVLMProcessor) -> None:
    inputs = processor(
        [IMAGES[:1], IMAGES[1:]], ["a <image>", "<image> b <image>"],
        return_mm_token_type_ids=True, return_text_replacement_offsets=True,
    )  # fmt: skip
    planned = processor._get_num_multimodal_tokens([(image.height, image.width) for image in IMAGES])
    tokens, tiles = planned["num_image_tokens"], planned["num_image_patches"]
    visual = [[int(i == processor.image_token_id) for i in row] for row in inputs["input_ids"]]
    assert inputs["mm_token_type_ids"] == visual
    assert list(map(sum, visual)) == [tokens[0], sum(tokens[1:])]
    assert sum(tiles) == len(inputs["pixel_values"])
    replaced = [r["replacement"] for row in inputs["text_replacement_offsets"] for r in row]
    assert replaced == ["<image>" * count for count in tokens]
    few = processor._get_num_multimodal_tokens([(40, 70)], max_tiles=1)
    assert few["num_image_tokens"] == [processor.spec.tokens_per_tile]


def test_assistant_masks_are_the_labels_of_training(processor: AlignVLMProcessor) -> None:
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}"
        "{{ m.content }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    generating = AlignVLMProcessor(processor.image_processor, deepcopy(processor.tokenizer), chat_template=template)
    messages = conversation("what is the total", "12.50", images=2) + conversation("read", "the field")
    labels = generating.encode(Sample("k", "s", messages, IMAGES[:2], {})).labels
    parts = iter(IMAGES)
    shown = [m | {"content": [p | {"image": next(parts)} if p["type"] == "image" else p for p in m["content"]]}
             for m in messages]  # fmt: skip
    options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    out = generating.apply_chat_template(shown, **options)
    assert sum(out["assistant_masks"][0])
    assert out["assistant_masks"][0] == (labels != -100).astype(int).tolist()


def test_control_tokens_of_users_can_be_kept_text(processor: AlignVLMProcessor) -> None:
    ours = processor.prepare_generation([question("<image> <|im_end|> read")[:1]], [[]])["input_ids"][0].tolist()
    chat = [{"role": "user", "content": [{"type": "text", "text": "<image> <|im_end|> read"}]}]
    kept = processor.apply_chat_template(chat, sanitize_control_tokens=True, **ASKED)["input_ids"][0].tolist()
    special = set(processor.tokenizer.all_special_ids)
    assert [i for i in kept if i in special] == [i for i in ours if i in special]


@pytest.mark.parametrize(
    ("arguments", "options", "error", "reason"),
    [
        ((), {}, ValueError, "neither images nor text"),
        (("read",), {}, ValueError, r"image 'read': .*; text goes second or by name: processor\(images=…, text=…\)"),
        (("a <image>", IMAGES[0]), {}, ValueError, "text is Image, .*images come first: processor"),
        ((IMAGES[0], [["a"]]), {}, ValueError, "text is list, not a string or a list of strings"),
        ((["none.png"], "<image>"), {}, ValueError, "image 'none.png': neither a file, nor a URL"),
        ((IMAGES[0], "read"), {}, ValueError, r"^1 images for 0 <image> placeholders in the text$"),
        ((None, "<image>"), {}, ValueError, "0 images for 1 <image> .*; a message's part has its image under 'image'"),
        (([IMAGES[:2], IMAGES[2:]], ["<image>", "<image><image>"]), {}, ValueError, "^row 0: 2 images for 1 <image>"),
        (([IMAGES[:2]], ["<image>", "<image>"]), {}, ValueError, "1 lists of images for 2 texts"),
        ((IMAGES[0], "<image> read"), {"truncation": True, "max_length": 3}, ValueError, "disable truncation"),
        ((IMAGES[0], "<image>"), {"max_tiles": 0}, ValueError, "max_tiles is 0"),
        ((IMAGES[0], "<image>"), {"paddin": True}, TypeError, "no argument 'paddin': did you mean 'padding'"),
        ((IMAGES[0], "<image>"), {"do_resize": True}, TypeError, "no argument 'do_resize'"),
        ((None, "read"), {"text_kwargs": {"max_len": 3}}, TypeError, "text_kwargs has no argument 'max_len': did you"),
        ((None, "read"), {"videos": ["a.mp4"]}, ValueError, "neither videos nor audio"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_misuse_is_said_in_one_line(
    processor: AlignVLMProcessor, arguments: tuple, options: dict[str, Any], error: type[Exception], reason: str
) -> None:
    with pytest.raises(error, match=reason) as caught:
        processor(*arguments, **options)
    assert "\n" not in str(caught.value)


def test_a_pipeline_answers_chat_messages(export: Path, processor: AlignVLMProcessor) -> None:
    pipe = pipeline("image-text-to-text", model=str(export))
    chats = [question("what is the total", *IMAGES[:2]), question("read")]
    answers = [reply["generated_text"][-1]["content"] for chat in chats for reply in pipe(text=chat, max_new_tokens=5)]
    for chat, images, answer in zip(chats, (IMAGES[:2], []), answers, strict=True):
        inputs = processor.prepare_generation([chat], [images])
        tokens = pipe.model.generate(**inputs, max_new_tokens=5, do_sample=False)
        expected = processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert answer == expected != ""
