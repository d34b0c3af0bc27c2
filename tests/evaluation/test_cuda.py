"""Evaluation on a GPU (`make gpu-check`): in bf16, nothing of it left in the GPU's memory; in fp32 as on a CPU."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch

from alignvlm.evaluation.answering import ModelAnswerer
from alignvlm.evaluation.items import items_of
from alignvlm.model import AlignVLMForConditionalGeneration, AlignVLMProcessor
from tests.tiny import samples, tiny_model


@pytest.mark.cuda
def test_an_fp32_export_answers_in_bf16_and_leaves_no_memory(tmp_path: Path) -> None:
    model, processor = tiny_model(text={"tie_word_embeddings": False, "initializer_range": 0.5})
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    check_answers(tmp_path, processor)  # the first products of a process also take cuBLAS' workspace, for good
    before = memory_left()
    check_answers(tmp_path, processor)
    assert memory_left() - before < 2**20


def memory_left() -> int:
    """Bytes that PyTorch still holds on the GPU."""
    gc.collect()
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated()


def check_answers(export: Path, processor: AlignVLMProcessor) -> None:
    """An export that was loaded on the GPU answers, and as near to fp32 as bf16 comes."""
    answerer = ModelAnswerer.load(export, "cuda")
    assert {parameter.dtype for parameter in answerer.model.parameters()} == {torch.bfloat16}
    frequencies = answerer.model.model.language_model.rotary_emb.inv_freq
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
            AlignVLMForConditionalGeneration.from_pretrained(export, dtype=dtype).eval()(**batch).logits.double()
            for dtype in (torch.float32, torch.bfloat16)
        )
        got = answerer.model(**{name: value.cuda() for name, value in batch.items()}).logits.cpu().double()
    assert (got - exact).norm() < 2 * (rounded - exact).norm() < 0.3 * exact.norm()  # bf16 on a CPU


@pytest.mark.cuda
def test_answers_and_views_in_fp32_are_those_of_a_cpu(device: torch.device) -> None:
    model, processor = tiny_model(text={"tie_word_embeddings": False, "initializer_range": 0.5})  # says various things
    items = [item for sample in samples() for item in items_of(sample)]
    on_cpu = ModelAnswerer(model, processor, "cpu")
    answers, view = on_cpu.answer(items, 6), on_cpu.vocabulary_view(items[1])
    there = ModelAnswerer(model, processor, device)
    assert len(set(answers)) > 1
    assert there.answer(items, 6) == answers
    assert [there.answer([item], 6)[0] for item in items] == answers
    found = there.vocabulary_view(items[1])
    assert found is not None
    assert view is not None
    first = [[[cell["top"][0][0] for cell in tile["cells"]] for tile in each["tiles"]] for each in (found, view)]
    assert first[0] == first[1]
