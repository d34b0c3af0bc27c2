"""How likely a language model finds given continuations of a text: for questions that are scored without generating."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Likelihood:
    """How likely a continuation is after its prompt."""

    log: float
    """Sum of the log-probabilities of its tokens, in nats."""
    tokens: int
    is_greedy: bool
    """Whether each of its tokens is the most likely one."""


def log_likelihoods(
    model: Any, tokenizer: Any, device: Any, asked: Sequence[tuple[str, Sequence[str]]]
) -> list[list[Likelihood]]:
    """How likely each continuation of each prompt is, all prompts in one pass.

    A prompt is plain text without the chat template. It is encoded together with a continuation, and what the
    encoding has behind the prompt's own tokens is the continuation. The pass has a row per different continuation up
    to its last token, padded on the left; continuations of one token share a row.

    Args:
        asked: prompts with their continuations.

    Raises:
        ValueError: a prompt has no token, or a continuation adds none to its prompt.
    """
    import torch

    texts = [(prompt, prompt + text) for prompt, continuations in asked for text in continuations]
    starts = [len(ids) for ids in tokenizer([prompt for prompt, _ in texts])["input_ids"]]
    rows = tokenizer([whole for _, whole in texts])["input_ids"]
    for row, start, (prompt, whole) in zip(rows, starts, texts, strict=True):
        if not 0 < start < len(row):
            continuation = whole[len(prompt) :]
            raise ValueError(f"prompt {prompt[-80:]!r}, continuation {continuation!r}: each must add a token")
    seen = {row: number for number, row in enumerate(dict.fromkeys(tuple(row[:-1]) for row in rows))}
    length = max(map(len, seen))
    input_ids = torch.tensor([[tokenizer.pad_token_id] * (length - len(row)) + list(row) for row in seen])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in seen])
    kept = max(len(row) - start for row, start in zip(rows, starts, strict=True))
    with torch.inference_mode():
        logits = model(
            input_ids=input_ids.to(device),
            attention_mask=mask.to(device),
            position_ids=(mask.cumsum(1) - 1).clamp(min=0).to(device),
            logits_to_keep=kept,
        ).logits
        logs = torch.log_softmax(logits.float(), dim=-1)  # [rows, the last tokens, V]; the last one is only predicted
        found = []
        for row, start in zip(rows, starts, strict=True):
            predicted = logs[seen[tuple(row[:-1])], kept - (len(row) - start) :]
            tokens = torch.tensor(row[start:], device=device)
            likely = predicted.gather(1, tokens[:, None]).sum()
            found.append(Likelihood(float(likely), len(tokens), bool((predicted.argmax(1) == tokens).all())))
    each = iter(found)
    return [[next(each) for _ in continuations] for _, continuations in asked]
