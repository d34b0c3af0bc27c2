"""Answers of an exported model to batches of items. Others choose the items and score the answers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from alignvlm.errors import UserError
from alignvlm.evaluation.items import Item
from alignvlm.evaluation.likelihood import Likelihood, log_likelihoods
from alignvlm.exports import check_export


class Answerer(Protocol):
    """What answers items: a model, or a stand-in for one in tests."""

    def prepare(self, items: Sequence[Item]) -> Any:
        """What `generate` takes for these items; called in another thread. Raises SampleError when one is unusable."""
        ...

    def generate(self, inputs: Any, max_new_tokens: int, until: Sequence[str] = (), **sampling: Any) -> list[str]:
        """One answer per item that was prepared, in order, as it was generated; greedy without `sampling`.

        What follows one of the texts of `until` may be missing. `sampling` is of transformers' `generate`.
        """
        ...

    def visual_tokens(self, width: int, height: int) -> int:
        """How many tokens a picture takes: prompts of like length are answered together."""
        ...

    def log_likelihoods(self, asked: Sequence[tuple[str, Sequence[str]]]) -> list[list[Likelihood]]:
        """How likely each continuation of each plain text is (likelihood.py)."""
        ...

    def vocabulary_view(self, item: Item) -> dict[str, Any] | None:
        """Top vocabulary tokens on the item's first image (vocabulary_view.py); None where there are none to show."""
        ...


class ModelAnswerer:
    """An export folder, loaded for inference on one device."""

    def __init__(self, model: Any, processor: Any, device: Any) -> None:
        self.model = model.to(device).eval()
        self.processor = processor
        self.device = device
        self.stop_ids = sorted(_token_ids(model.generation_config.eos_token_id, processor.tokenizer.eos_token_id))
        pad = processor.tokenizer.pad_token_id
        self.pad_id = pad if pad is not None else self.stop_ids[0]

    @classmethod
    def load(cls, folder: str | Path, device: Any = None) -> ModelAnswerer:
        """Load model and processor of an export; `device` defaults to this process's GPU, else the CPU."""
        device = find_device(device)
        return cls(*load_export(Path(folder), device), device)

    def prepare(self, items: Sequence[Item]) -> Any:
        """Inputs on the host; padding is on the left, so that all prompts of a batch end at the same position."""
        return self.processor.prepare_generation([item.messages for item in items], [item.images for item in items])

    def generate(self, inputs: Any, max_new_tokens: int, until: Sequence[str] = (), **sampling: Any) -> list[str]:
        """Answers to prepared items, greedy without `sampling`."""
        import torch

        from alignvlm.evaluation.stopping import StopAtText

        batch = {name: value.to(self.device) for name, value in inputs.items()}
        length = batch["input_ids"].shape[1]
        stop = [StopAtText(self.processor.tokenizer, until, length)] if until else []
        with torch.inference_mode():
            output = self.model.generate(
                **batch,
                max_new_tokens=max_new_tokens,
                eos_token_id=self.stop_ids,
                pad_token_id=self.pad_id,
                stopping_criteria=stop,
                **{"do_sample": False, "num_beams": 1, **sampling},
            )
        return [self._decode(row) for row in output[:, length:].tolist()]

    def answer(self, items: Sequence[Item], max_new_tokens: int) -> list[str]:
        """Greedy answers to the items. Raises SampleError when one of them cannot be asked."""
        return self.generate(self.prepare(items), max_new_tokens)

    def visual_tokens(self, width: int, height: int) -> int:
        """How many tokens a picture takes."""
        return self.processor.spec.num_tokens(width, height)

    def log_likelihoods(self, asked: Sequence[tuple[str, Sequence[str]]]) -> list[list[Likelihood]]:
        """How likely each continuation of each plain text is."""
        return log_likelihoods(self.model, self.processor.tokenizer, self.device, asked)

    def vocabulary_view(self, item: Item) -> dict[str, Any] | None:
        """Top tokens per visual token of the item's first image."""
        from alignvlm.evaluation.vocabulary_view import vocabulary_view

        return vocabulary_view(self.model, self.processor, item.images[0]) if item.images else None

    def _decode(self, row: list[int]) -> str:
        end = next((i for i, token in enumerate(row) if token in self.stop_ids), len(row))
        return self.processor.tokenizer.decode(row[:end], skip_special_tokens=True)


def load_export(folder: Path, device: Any) -> tuple[Any, Any]:
    """Model, for inference on `device`, and processor of an export folder.

    On a GPU that computes in bf16 the model is in bf16, whatever the export is in; elsewhere in the export's dtype.
    """
    import torch

    from alignvlm.model import AlignVLMForConditionalGeneration, AlignVLMProcessor

    check_export(folder)
    is_bf16 = torch.device(device).type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    model: Any = AlignVLMForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16 if is_bf16 else "auto")
    return model.to(device).eval(), AlignVLMProcessor.from_pretrained(folder)


def find_device(name: Any = None) -> Any:
    """A torch device or its name, when it can compute; without one `cuda:<LOCAL_RANK>` where there is CUDA, else `cpu`.

    Raises:
        UserError: there is no such device here.
    """
    import os

    import torch

    if name is None:
        return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
    try:
        torch.ones(1, device=name).item()
    except (RuntimeError, AssertionError, ImportError) as error:  # each kind of device refuses in its own way
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"device {str(name)!r} cannot be used here ({reason}); give cpu, or cuda:0 for a GPU"
        ) from error
    return name


def _token_ids(*values: int | Sequence[int] | None) -> set[int]:
    ids: set[int] = set()
    for value in values:
        ids |= set() if value is None else {value} if isinstance(value, int) else set(value)
    return ids
