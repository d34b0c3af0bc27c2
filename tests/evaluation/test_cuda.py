"""Evaluation on a GPU: in bf16, and nothing of it left in the GPU's memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from alignvlm.evaluation.answering import ModelAnswerer
from alignvlm.evaluation.items import items_of
from alignvlm.model import AlignVLMForConditionalGeneration
from tests.tiny import samples, tiny_model


@pytest.mark.cuda
def test_an_fp32_export_answers_in_bf16_and_leaves_no_memory(tmp_path: Path) -> None:
    model, processor = tiny_model(text={"tie_word_embeddings": False, "initializer_range": 0.5})
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    before = torch.cuda.memory_allocated()
    answerer = ModelAnswerer.load(tmp_path, "cuda")
    assert {parameter.dtype for parameter in answerer.model.parameters()} == {torch.bfloat16}
    frequencies = answerer.model.language.get_decoder().rotary_emb.inv_freq
    assert frequencies.dtype == torch.float32  # bf16 cannot tell distant positions apart
    items = [item for sample in samples() for item in items_of(sample)]
    answers = answerer.answer(items, 6)
    assert len(answers) == len(items)
    assert any(answers)
    view = answerer.vocabulary_view(items[1])
    assert view is not None
    shares = [sum(share for _, share in cell["top"]) for tile in view["tiles"] for cell in tile["cells"]]
    assert all(0 < share <= 1.01 for share in shares)
    batch = processor.prepare_generation([items[1].messages], [items[1].images])
    with torch.inference_mode():
        exact, rounded = (
            AlignVLMForConditionalGeneration.from_pretrained(tmp_path, dtype=dtype).eval()(**batch).logits.double()
            for dtype in (torch.float32, torch.bfloat16)
        )
        got = answerer.model(**{name: value.cuda() for name, value in batch.items()}).logits.cpu().double()
    assert (got - exact).norm() < 2 * (rounded - exact).norm() < 0.3 * exact.norm()  # bf16 on a CPU
    del answerer, got, frequencies
    torch.cuda.empty_cache()
    assert torch.cuda.memory_allocated() - before < 2**20
