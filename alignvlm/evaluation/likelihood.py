"""How likely a language model finds given continuations of a text: for questions that are scored without generating."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def log_likelihoods(model: Any, tokenizer: Any, device: Any, prompt: str, continuations: Sequence[str]) -> list[float]:
    """Sum of the log-probabilities of each continuation's tokens behind the prompt, in nats.

    The prompt is plain text without the chat template. It is encoded together with a continuation, and what the
    encoding has behind the prompt's own tokens is the continuation. One pass, with a row per different continuation
    up to its last token; continuations of one token share a row.

    Raises:
        ValueError: a continuation adds no token to the prompt.
    """
    import torch

    start = len(tokenizer(prompt)["input_ids"])
    rows = [tokenizer(prompt + text)["input_ids"] for text in continuations]
    if any(len(row) <= start for row in rows):
        raise ValueError(f"a continuation of {list(continuations)} adds no token to the prompt")
    seen = list({tuple(row[:-1]): None for row in rows})  # the last token is only predicted
    length = max(map(len, seen))
    input_ids = torch.tensor([[*row, *[tokenizer.pad_token_id] * (length - len(row))] for row in seen], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in seen], device=device)
    with torch.inference_mode():
        kept = model(input_ids=input_ids, attention_mask=mask, logits_to_keep=length - start + 1).logits
    logs = torch.log_softmax(kept.float(), dim=-1)  # [rows, tokens from the prompt's last one on, V]
    return [
        sum(float(logs[seen.index(tuple(row[:-1])), i, token]) for i, token in enumerate(row[start:])) for row in rows
    ]
