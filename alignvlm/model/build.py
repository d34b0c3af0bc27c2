"""From a recipe to its processor and its initial model: pretrained or new backbones, a tokenizer trained if asked."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from alignvlm.config.schema import Recipe
from alignvlm.errors import UserError
from alignvlm.model.backbones import language_config, vision_config
from alignvlm.model.chat import IMAGE
from alignvlm.model.configuration import AlignVLMConfig
from alignvlm.model.modeling import AlignVLMForConditionalGeneration
from alignvlm.model.processing import AlignVLMProcessor
from alignvlm.stage_data import source_folder
from data_pipeline.shards.reader import SourceReader

PAD, START, END = "<|pad|>", "<|im_start|>", "<|im_end|>"
"""Special tokens of a trained tokenizer, besides `<image>`; END closes a turn."""


def load_processor(recipe: Recipe) -> AlignVLMProcessor:
    """The recipe's processor: a trained tokenizer is made from the shards' text once and kept in `data.root`."""
    language = recipe.model.language
    if language.tokenizer is not None:
        tokenizer = _trained_tokenizer(recipe)
    elif language.path is not None:
        tokenizer = AutoTokenizer.from_pretrained(language.path)
    else:
        raise UserError("model.language: give a path (pretrained weights and tokenizer) or a tokenizer to train")
    spec = AlignVLMConfig(
        vision_config=vision_config(recipe), connector_config=asdict(recipe.model.connector),
        tiles_config=asdict(recipe.model.tiles),
    ).tiling  # fmt: skip
    template = language.chat_template
    if template is not None and template.endswith(".jinja"):
        template = Path(template).read_text()
    return AlignVLMProcessor(tokenizer, tiling=asdict(spec), chat_template=template)


def build_model(recipe: Recipe, processor: AlignVLMProcessor) -> AlignVLMForConditionalGeneration:
    """The model before any training, on the CPU: pretrained backbones where the recipe names them, new ones elsewhere.

    The connector's share of the LM head (ALIGN's W2) is copied from it.
    """
    torch.manual_seed(recipe.seed)
    vision, language = recipe.model.vision, recipe.model.language
    tower_config = vision_config(recipe)
    if vision.path is not None:
        tower = AutoModel.from_pretrained(vision.path, config=tower_config)
    else:
        tower = AutoModel.from_config(tower_config)
        if vision.position_std is not None:
            _spread_positions(tower, vision.position_std)
    if language.path is not None:
        lm = AutoModelForCausalLM.from_pretrained(language.path)
    else:
        lm = AutoModelForCausalLM.from_config(language_config(recipe, processor))
    config = AlignVLMConfig(
        vision_config=tower.config,
        text_config=lm.config,
        connector_config=asdict(recipe.model.connector),
        tiles_config=asdict(recipe.model.tiles),
        image_token_id=processor.image_token_id,
        image_mean=vision.image_mean,
        image_std=vision.image_std,
        tie_word_embeddings=bool(lm.config.tie_word_embeddings),
    )
    model = AlignVLMForConditionalGeneration(config, tower, lm)
    model.connector.copy_lm_head(lm.get_output_embeddings().weight)
    tokenizer = processor.tokenizer
    end = tokenizer.convert_tokens_to_ids(END) if END in tokenizer.get_vocab() else tokenizer.eos_token_id
    model.generation_config.eos_token_id = end
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


def _spread_positions(tower: torch.nn.Module, std: float) -> None:
    """Draw the position embeddings of a new encoder with this standard deviation."""
    weights = [p for name, p in tower.named_parameters() if name.endswith("position_embedding.weight")]
    if not weights:
        raise UserError("model.vision.position_std: this encoder has no `position_embedding.weight` to draw")
    for weight in weights:
        torch.nn.init.normal_(weight, std=std)


def _trained_tokenizer(recipe: Recipe) -> Any:
    """Load the tokenizer kept in `data.root`, or train it on the text of all sources that any stage mixes."""
    options = recipe.model.language.tokenizer
    assert options is not None
    folder = Path(recipe.data.root) / "tokenizer"
    names = sorted({name for stage in recipe.stages.values() for name in stage.mixture})
    readers = [SourceReader(source_folder(recipe, n), n) for n in names]
    made_from = {"vocab_size": options.vocab_size, "sources": {r.name: r.fingerprint for r in readers}}
    stamp = folder / "made_from.json"
    if stamp.exists() and json.loads(stamp.read_text()) == made_from:
        return AutoTokenizer.from_pretrained(folder)
    tokenizer = train_tokenizer(_texts(readers), options.vocab_size)
    partial = folder.with_name("tokenizer.partial")
    shutil.rmtree(partial, ignore_errors=True)
    tokenizer.save_pretrained(partial)
    (partial / "made_from.json").write_text(json.dumps(made_from, indent=2))
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    return AutoTokenizer.from_pretrained(folder)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Any:
    """A byte-level BPE tokenizer in which every digit is a token of its own."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, START, END, IMAGE],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=PAD, eos_token=END, additional_special_tokens=[START, IMAGE]
    )


def _texts(readers: list[SourceReader]) -> Iterator[str]:
    for reader in readers:
        for messages in reader.messages():
            for message in messages:
                yield message["role"]
                yield from (part["text"] for part in message["content"] if part["type"] == "text")
