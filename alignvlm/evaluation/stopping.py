"""Ends a row of a batch at a text, as at a stop token: where replies are cut there, nobody needs what follows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import StoppingCriteria


class StopAtText(StoppingCriteria):
    """A row is finished when the end of what it has said contains one of the texts."""

    def __init__(self, tokenizer: Any, texts: Sequence[str], prompt_length: int) -> None:
        self.tokenizer, self.texts, self.prompt_length = tokenizer, texts, prompt_length
        self.reach = max(len(text.encode()) for text in texts) + 1
        """Most tokens that one of the texts lies in: one per byte, and one more in which it may begin."""

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """bool [B]: which rows end here. `generate` remembers those that have ended; beams change places."""
        tails = input_ids[:, max(self.prompt_length, input_ids.shape[1] - self.reach) :].tolist()
        said = self.tokenizer.batch_decode(tails, skip_special_tokens=True)
        return torch.tensor([any(text in tail for text in self.texts) for tail in said], device=input_ids.device)
