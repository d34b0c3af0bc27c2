"""The arguments that the processor takes by name; an unknown one is an error, where transformers would only warn."""

# No `from __future__ import annotations`: transformers checks arguments against these annotations.

from collections.abc import Iterable, Mapping
from typing import Any, TypedDict

from transformers import TensorType
from transformers.processing_utils import ImagesKwargs, ProcessingKwargs, VideosKwargs

from data_pipeline.errors import did_you_mean


class AlignVLMImagesKwargs(TypedDict, total=False):
    """What a call may say about its images: other limits on their tiles than those of training."""

    max_tiles: int | None
    min_coverage: float | None
    overview: bool | None
    return_tensors: str | TensorType | None


class AlignVLMProcessorKwargs(ProcessingKwargs, total=False):
    """What `AlignVLMProcessor.__call__` takes besides images and text; `text_kwargs` are those of any tokenizer."""

    images_kwargs: AlignVLMImagesKwargs  # type: ignore[misc]
    # The template has written all tokens that training saw, and `generate` wants rows that end together.
    _defaults = {"text_kwargs": {"add_special_tokens": False, "padding_side": "left"}}  # type: ignore[misc]  # noqa: RUF012


VIDEOS_ONLY = VideosKwargs.__annotations__.keys() - ImagesKwargs.__annotations__.keys()
"""What callers say of videos in case there are some (`num_frames`): there are none."""


def check_arguments(arguments: Mapping[str, Any]) -> None:
    """Raises TypeError when the processor knows no argument of one of these names, flat or within its kind."""
    fields = AlignVLMProcessorKwargs.__annotations__
    kinds = {kind: set(fields[kind].__annotations__) for kind in ("text_kwargs", "images_kwargs")}
    flat = {*fields, "common_kwargs"} - {"videos_kwargs", "audio_kwargs"}
    check_names("AlignVLMProcessor", arguments, flat.union(VIDEOS_ONLY, *kinds.values()))
    for kind, known in kinds.items():
        check_names(kind, arguments.get(kind) or {}, known)


def check_names(owner: str, names: Iterable[str], known: Iterable[str]) -> None:
    """Raises TypeError for a name that is not known, with the nearest one that is."""
    known = sorted(known)
    for name in names:
        if name not in known:
            hint = did_you_mean(name, known)
            if name in ImagesKwargs.__annotations__:
                hint = "images become tiles of one size, uint8, and the model normalises these"
            raise TypeError(f"{owner} has no argument {name!r}" + (f": {hint}" if hint else ""))
