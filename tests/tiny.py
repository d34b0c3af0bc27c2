"""Tiny real models and samples that several tests share: seconds on one core, nothing mocked."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from alignvlm.model import AlignVLMConfig, AlignVLMForConditionalGeneration, AlignVLMProcessor
from alignvlm.model.inputs.image_processor import AlignVLMImageProcessor
from alignvlm.model.inputs.tokenizer import train_tokenizer
from data_pipeline.samples.schema import Encoded, Sample

CONNECTORS: dict[str, dict[str, Any]] = {
    "align": {"kind": "align"},
    "align as released": {"kind": "align", "activation": "relu", "norm_output": True, "w2_start": "random"},
    "mlp": {"kind": "mlp"},
    "ovis": {"kind": "ovis", "visual_vocab_size": 37, "indicators": True},
    "perceiver": {"kind": "perceiver", "num_latents": 5, "num_heads": 2, "head_dim": 8},
    "h_reducer": {"kind": "h_reducer", "window": [1, 3]},
    "c_abstractor": {"kind": "c_abstractor", "num_queries": 9, "hidden_size": 24, "depth": 1},
}
"""Every kind of connector of the package, with options that fit the tiny model."""
WORDS = ["what is the total", "read the field", "the answer is 12.50", "user assistant system", "name date amount"]


def tiny_model(
    connector: dict[str, Any] | None = None,
    text: dict[str, Any] | None = None,
    merge: int = 1,
    vision: dict[str, Any] | None = None,
) -> tuple[AlignVLMForConditionalGeneration, AlignVLMProcessor]:
    """A two-layer SigLIP and a two-layer LM (Llama unless `text` says otherwise) with their processor."""
    torch.manual_seed(0)
    tokenizer = train_tokenizer(WORDS * 20, 320)
    sizes = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32,
        "patch_size": 8, "vision_use_head": False,
    } | (vision or {})  # fmt: skip
    vision_config = AutoConfig.for_model("siglip_vision_model", **sizes)
    fields = {
        "model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": len(tokenizer), "tie_word_embeddings": True,
        "pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None,
    } | (text or {})  # fmt: skip
    config = AlignVLMConfig(
        vision_config=vision_config,
        text_config=fields,
        connector_config={"kind": "align", "gain": 5.0} | (connector or {}),
        tiles_config={"max_tiles": 4, "merge": merge},
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
    )
    lm = AutoModelForCausalLM.from_config(config.text_config)
    model = AlignVLMForConditionalGeneration(config, AutoModel.from_config(vision_config), lm)
    model.model.connector.start_from(lm.get_input_embeddings().weight, lm.get_output_embeddings().weight)
    return model, AlignVLMProcessor(AlignVLMImageProcessor(**asdict(config.tiling)), tokenizer)


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Noise of that size."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), np.uint8))


def conversation(question: str, answer: str, images: int = 0) -> list[dict[str, Any]]:
    """One turn each, the images first."""
    parts: list[dict[str, str]] = [{"type": "image"}] * images
    return [
        {"role": "user", "content": [*parts, {"type": "text", "text": question}]},
        {"role": "assistant", "content": [{"type": "text", "text": answer}]},
    ]


def samples() -> list[Sample]:
    """No image, one small image, two images of which one takes several tiles."""
    sizes = [[], [(32, 32)], [(70, 40), (20, 30)]]
    return [
        Sample(f"k{i}", "s", conversation(WORDS[i], WORDS[2 - i], len(s)), [picture(*size, seed=i) for size in s], {})
        for i, s in enumerate(sizes)
    ]


def pack(documents: list[Encoded]) -> dict[str, Any]:
    """Documents as one flat micro-batch, as the loader would make it."""
    lengths = [len(d.input_ids) for d in documents]
    return {
        "input_ids": torch.from_numpy(np.concatenate([d.input_ids for d in documents]))[None],
        "labels": torch.from_numpy(np.concatenate([d.labels for d in documents]))[None],
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
        "cu_seqlens": torch.tensor(np.cumsum([0, *lengths]), dtype=torch.int32),
        "max_seqlen": max(lengths),
        "pixel_values": torch.from_numpy(np.concatenate([d.tiles for d in documents])),
    }


def alone(document: Encoded) -> dict[str, Any]:
    """One document as an ordinary batch of one."""
    return {
        "input_ids": torch.from_numpy(document.input_ids)[None],
        "labels": torch.from_numpy(document.labels)[None],
        "pixel_values": torch.from_numpy(document.tiles),
    }
