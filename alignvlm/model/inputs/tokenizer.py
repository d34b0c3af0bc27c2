"""Tokenizers: one trained from scratch (which text it sees is stage_data's business), and text that stays text."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any

from alignvlm.model.inputs.chat import IMAGE

PAD, START, END = "<|pad|>", "<|im_start|>", "<|im_end|>"
"""Special tokens, besides `<image>`; END closes a turn."""
MARK = "\ufdd0"
"""Begins what stands for a character in an escaped text: a noncharacter, which Unicode keeps for internal use."""


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Any:
    """A byte-level BPE tokenizer in which every digit is a separate token."""
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


class ControlTokens:
    """The tokens that only a chat template may write, and text that spells them without being them.

    They are the special tokens and all others that were added to the model's own vocabulary, white space apart.
    `escape` marks the first character of each that a text spells, so that a rendered conversation holds the template's
    own only. `encode` takes the marks away behind the step that looks for control tokens: what was marked is then
    encoded as any other text. A conversation without marks is encoded by the tokenizer itself.

    Args:
        tokenizer: a fast tokenizer to which no token is added any more.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        own = tokenizer.backend_tokenizer.get_vocab_size(with_added_tokens=False)
        self._ids = {
            token.content: number
            for number, token in tokenizer.added_tokens_decoder.items()
            if token.special or token.content == IMAGE or (number >= own and not token.content.isspace())
        }
        rests: dict[str, list[str]] = {}
        for name in sorted(self._ids):
            rests.setdefault(name[0], []).append(re.escape(name[1:]))
        self._codes = {first: chr(ord("0") + n) for n, first in enumerate([MARK, *rests])}
        spelt = [f"{re.escape(first)}(?={'|'.join(rest)})" for first, rest in rests.items()]
        self._spelt = re.compile("|".join([MARK, *spelt]))
        self._beginnings = {MARK} | {name[:4] for name in self._ids}
        self._numbers = set(self._ids.values()) - {tokenizer.unk_token_id}
        self._normalises = tokenizer.backend_tokenizer.normalizer is not None

    def escape(self, text: str) -> str:
        """The text with the first character of every control token in it replaced by MARK and a code."""
        if not any(beginning in text for beginning in self._beginnings):  # HTML has many <
            return text
        return self._spelt.sub(lambda found: MARK + self._codes[found[0]], text)

    def encode(self, text: str) -> list[int]:
        """Token ids of a rendered conversation whose contents are escaped."""
        if MARK not in text:
            ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
            if self._are_written(ids, text):
                return ids
        return self._encode_escaped(text)[0]

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """`encode`, and where each token begins and ends in the text."""
        if MARK not in text:
            encoding = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            if self._are_written(encoding["input_ids"], text):
                return encoding["input_ids"], encoding["offset_mapping"]
        return self._encode_escaped(text)

    def _are_written(self, ids: list[int], text: str) -> bool:
        """Whether all control tokens stand in the text: normalising can make `<s>` of wide characters."""
        if not self._normalises:
            return True
        return sum(map(self._numbers.__contains__, ids)) == len(self._spelt.findall(text))

    def _encode_escaped(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        encoding = self._twin.encode(text, add_special_tokens=False)
        return [self._twin_ids.get(number, number) for number in encoding.ids], encoding.offsets

    @cached_property
    def _twin(self) -> Any:
        """The tokenizer, except that normalising a text unmarks it, and that its model has no control tokens.

        Control tokens are looked for before a text is normalised, so those that were marked are found no more.
        """
        from tokenizers import Tokenizer

        state = json.loads(self._tokenizer.backend_tokenizer.to_str())
        unmark = [
            {"type": "Replace", "pattern": {"String": MARK + code}, "content": first}
            for first, code in reversed(self._codes.items())  # MARK's own comes last
        ]
        state["normalizer"] = {"type": "Sequence", "normalizers": [*unmark, *filter(None, [state["normalizer"]])]}
        for token in state["added_tokens"]:
            if token["content"] in self._ids:
                token["normalized"] = False
        state["truncation"] = state["padding"] = state["post_processor"] = None
        _hide(state["model"], self._ids)
        return Tokenizer.from_str(json.dumps(state))

    @cached_property
    def _twin_ids(self) -> dict[int, int]:
        """Ids of added tokens in the twin, which numbers them anew -> their ids."""
        added = self._tokenizer.added_tokens_decoder
        return {self._twin.token_to_id(token.content): number for number, token in added.items()}


def _hide(model: dict[str, Any], names: Mapping[str, int]) -> None:
    """Rename these tokens in a model's vocabulary: it would find them in a text by itself, as Unigram does."""
    secret = uuid.uuid4().hex  # no text can spell it

    def hidden(piece: str) -> str:
        return secret + piece if piece in names else piece

    vocabulary = model["vocab"]
    if isinstance(vocabulary, dict):
        model["vocab"] = {hidden(piece): number for piece, number in vocabulary.items()}
    else:
        model["vocab"] = [[hidden(piece), score] for piece, score in vocabulary]
    if "merges" in model:
        model["merges"] = [(a, b) for a, b in model["merges"] if not {a, b, a + b} & names.keys()]
    if model.get("unk_token"):
        model["unk_token"] = hidden(model["unk_token"])
