"""The model before any training: one dtype, whatever the backbones are kept in."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from alignvlm.config import load_recipe
from alignvlm.exports import save_export
from alignvlm.model import AlignVLMForConditionalGeneration
from alignvlm.model.build import build_model, load_processor
from tests.tiny import tiny_model

TINY = Path(__file__).parents[1] / "recipes" / "tiny.yaml"


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_a_bf16_language_model_and_a_new_encoder_become_one_dtype(
    precision: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    made, made_processor = tiny_model()
    made.model.language_model.to(torch.bfloat16).save_pretrained(tmp_path / "lm")
    made_processor.tokenizer.save_pretrained(tmp_path / "lm")
    language = [f"model.language.path={tmp_path}/lm", "model.language.tokenizer=null", "model.language.config={}"]
    recipe = load_recipe(str(TINY), [*language, f"train.precision={precision}"])
    processor = load_processor(recipe)
    model = build_model(recipe, processor)
    save_export(model, model.state_dict(), processor, tmp_path / "export")
    assert json.loads((tmp_path / "export" / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    answers, tokenizer = json.loads((tmp_path / "export" / "generation_config.json").read_text()), processor.tokenizer
    assert answers["max_new_tokens"] == 256  # transformers' own is 20
    assert tokenizer.convert_ids_to_tokens(answers["eos_token_id"]) == "<|im_end|>"
    assert answers["pad_token_id"] == tokenizer.pad_token_id
    loaded = AlignVLMForConditionalGeneration.from_pretrained(tmp_path / "export")
    assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}
    for name, weight in made.model.language_model.named_parameters():
        assert torch.equal(loaded.get_parameter(f"model.language_model.{name}"), weight.to(dtype)), name
