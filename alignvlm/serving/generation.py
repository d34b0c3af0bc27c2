"""One answer, token by token: what a prompt's continuation says so far, and when nobody needs more of it."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

from alignvlm.evaluation.answering import ModelAnswerer

LOWEST_TEMPERATURE = 1e-5
"""Logits divided by less may overflow, which on a GPU ends the whole process; vLLM takes the same bound."""

Finish = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class Settings:
    """How one answer is generated."""

    max_new_tokens: int
    temperature: float = 0.0
    """At LOWEST_TEMPERATURE and above tokens are drawn; below it the likeliest one is taken."""
    top_p: float = 1.0
    seed: int | None = None
    """Seed of the draws; None takes another one each time."""
    stop: tuple[str, ...] = ()
    """The answer ends before the first of these texts."""


@dataclass(frozen=True)
class Outcome:
    """An answer as a whole."""

    text: str
    finish: Finish
    """`stop`: it ended by itself or at a stop text; `length`: there was no room for more; `cancelled`: see `answer`."""
    prompt_tokens: int
    """Visual tokens included."""
    completion_tokens: int


def answer(
    answerer: ModelAnswerer,
    inputs: Any,
    settings: Settings,
    say: Callable[[str], None],
    is_cancelled: Callable[[], bool],
) -> Outcome:
    """Answer prepared inputs of one conversation (`ModelAnswerer.prepare`).

    Args:
        say: called with each piece of text as soon as no later token changes it; the pieces make up the answer.
        is_cancelled: asked before every layer; the answer ends where it is once this is true.
    """
    import torch
    from transformers.modeling_layers import GradientCheckpointingLayer

    def look(layer: torch.nn.Module, inputs: Any) -> None:
        if is_cancelled():
            raise _EnoughError

    spoken = _Spoken(answerer.processor.tokenizer, answerer.stop_ids, settings.stop, say, is_cancelled)
    sampling: dict[str, Any] = {}
    if settings.temperature >= LOWEST_TEMPERATURE:
        torch.manual_seed(secrets.randbits(63) if settings.seed is None else settings.seed)
        sampling = {"do_sample": True, "temperature": settings.temperature, "top_p": settings.top_p, "top_k": 0}
    # A long prompt is seconds of layers. Computed in chunks (`prefill_chunk_size`), it would have other last bits.
    layers = [module for module in answerer.model.modules() if isinstance(module, GradientCheckpointingLayer)]
    hooks = [layer.register_forward_pre_hook(look) for layer in layers]
    try:
        with suppress(_EnoughError):
            look(answerer.model, inputs)
            answerer.generate(inputs, settings.max_new_tokens, streamer=spoken, **sampling)
    finally:
        for hook in hooks:
            hook.remove()
    return spoken.outcome(inputs["input_ids"].shape[1])


class _EnoughError(Exception):
    """Ends `generate` from within: nobody needs the tokens that follow."""


class _Spoken:
    """A streamer of transformers: takes the tokens of an answer and says their text."""

    def __init__(
        self,
        tokenizer: Any,
        end_ids: Sequence[int],
        stop: Sequence[str],
        say: Callable[[str], None],
        is_cancelled: Callable[[], bool],
    ) -> None:
        self._tokenizer, self._end_ids, self._stop = tokenizer, set(end_ids), stop
        self._say, self._is_cancelled = say, is_cancelled
        self._ids: list[int] = []
        self._num_tokens = 0
        self._text = self._said = ""
        self._finish: Finish | None = None
        self._saw_prompt = False

    def put(self, value: Any) -> None:
        """The prompt first, then each token. Raises _EnoughError when no further one is needed."""
        if not self._saw_prompt:
            self._saw_prompt = True
        else:
            for token in value.flatten().tolist():
                self._add(token)
        if self._is_cancelled():
            self._finish = self._finish or "cancelled"
        if self._finish is not None:
            raise _EnoughError

    def end(self) -> None:
        """Do nothing: `outcome` says the rest."""

    def outcome(self, prompt_tokens: int) -> Outcome:
        """Say what was held back, and sum up."""
        if self._finish is None:
            self._finish = "cancelled" if self._is_cancelled() else "length"
        self._say_up_to(len(self._text))
        return Outcome(self._text, self._finish, prompt_tokens, self._num_tokens)

    def _add(self, token: int) -> None:
        if self._finish is not None:
            return
        self._num_tokens += 1
        if token in self._end_ids:
            self._finish = "stop"
            return
        self._ids.append(token)
        # The whole answer each time: a token's text may depend on those before it. Milliseconds for thousands of them.
        self._text = self._tokenizer.decode(self._ids, skip_special_tokens=True)
        places = [place for text in self._stop if (place := self._text.find(text)) >= 0]
        if places:
            self._text, self._finish = self._text[: min(places)], "stop"
        self._say_up_to(len(self._text) - self._uncertain())

    def _uncertain(self) -> int:
        """Characters at the end that may still change: half of a character, or the beginning of a stop text."""
        whole = len(self._text.rstrip("\ufffd"))
        begun = (n for text in self._stop for n in range(1, len(text)) if self._text.endswith(text[:n]))
        return max(len(self._text) - whole, max(begun, default=0))

    def _say_up_to(self, end: int) -> None:
        if end > len(self._said) and self._text.startswith(self._said):
            self._say(self._text[len(self._said) : end])
            self._said = self._text[:end]
