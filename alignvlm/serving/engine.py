"""An exported model and the thread in which it computes, one request after the other."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from alignvlm.evaluation.answering import ModelAnswerer
from alignvlm.exports import name_of_export
from alignvlm.serving.generation import Outcome, Settings, answer

T = TypeVar("T")

FALLBACK_CONTEXT = 32_768
"""Most tokens for a language model without a number of positions."""


class Engine:
    """A model for use from an event loop. What is asked of it waits its turn; `stop` ends what runs and what waits.

    Args:
        answerer: the model.
        name: what clients call it.
        max_context: most tokens of a prompt and its answer; default: as many as the language model has positions.
    """

    def __init__(self, answerer: ModelAnswerer, name: str, max_context: int | None = None) -> None:
        self.answerer, self.name = answerer, name
        config = answerer.model.config.text_config
        positions = getattr(config, "max_position_embeddings", None) or FALLBACK_CONTEXT
        self.max_context: int = min(max_context or positions, positions)
        self.loaded_at = int(time.time())
        self._model = ThreadPoolExecutor(1, "model")
        self._images = ThreadPoolExecutor(1, "images")
        self._stopping = threading.Event()

    @classmethod
    def load(cls, export: Path, device: str | None = None, max_context: int | None = None) -> Engine:
        """The model of an export folder, named after its run. Raises UserError or DataError, as `check_export`."""
        return cls(ModelAnswerer.load(export, device), name_of_export(export), max_context)

    @property
    def is_stopping(self) -> bool:
        """Whether `stop` was called."""
        return self._stopping.is_set()

    async def prepare(self, function: Callable[..., T], *arguments: Any) -> T:
        """The function's result, computed beside the model: images are decoded one request at a time."""
        return await asyncio.get_running_loop().run_in_executor(self._images, function, *arguments)

    async def run(self, function: Callable[..., T], *arguments: Any) -> T:
        """The function's result, computed where the model computes, when those that came before are done."""
        return await asyncio.get_running_loop().run_in_executor(self._model, function, *arguments)

    def answer(self, inputs: Any, settings: Settings) -> Answer:
        """Have an answer to prepared inputs generated."""
        return Answer(self, inputs, settings)

    def stop(self) -> None:
        """End all answers before the next layer; none begins any more. A signal handler may call it."""
        self._stopping.set()


class Answer:
    """An answer that is on its way: `async for piece in answer` gives its text as it comes, `outcome` the end."""

    def __init__(self, engine: Engine, inputs: Any, settings: Settings) -> None:
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[str | Outcome | Exception] = asyncio.Queue()
        self._cancelled = threading.Event()
        self._outcome: Outcome | None = None
        engine._model.submit(self._work, engine, inputs, settings)

    def cancel(self) -> None:
        """Nobody waits for it any more: the model is free after the layer that it computes."""
        self._cancelled.set()

    async def __aiter__(self) -> AsyncIterator[str]:
        while self._outcome is None:
            event = await self._events.get()
            if isinstance(event, Exception):
                raise event
            if isinstance(event, Outcome):
                self._outcome = event
            else:
                yield event

    async def outcome(self) -> Outcome:
        """The whole answer, when it is there. Raises what the model raised."""
        async for _ in self:
            pass
        assert self._outcome is not None
        return self._outcome

    def _work(self, engine: Engine, inputs: Any, settings: Settings) -> None:
        """Generate the answer, in the model's thread."""

        def is_cancelled() -> bool:
            return self._cancelled.is_set() or engine.is_stopping

        try:
            self._tell(answer(engine.answerer, inputs, settings, self._tell, is_cancelled))
        except Exception as error:  # whatever it is, it is this request's, which raises it
            self._tell(error)

    def _tell(self, event: str | Outcome | Exception) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)
