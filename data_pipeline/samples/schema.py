"""What a sample is: messages with image placeholders, the encoder's interface, and the rules that make records uniform.

No reading of shards here (shards/reader.py) and no tokens (the encoder's business).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from reprlib import repr as brief
from typing import Any, Protocol, runtime_checkable

import numpy as np
from PIL import Image

IMAGE_PLACEHOLDER = "<image>"
ROLES = ("system", "user", "assistant", "tool")
MAX_JSON_BYTES = 16 * 1024**2
"""Largest .json or .txt member that is read."""
MAX_IMAGES = 256
"""Most images of one sample."""
MAX_MESSAGES = 1000
"""Most messages of one sample: rendering them takes time that grows with their square."""
IGNORE_INDEX = -100
"""Label of a token that is not supervised, as torch's cross entropy has it."""
_OBJECT, _LIST = (dict, Mapping), (list, Sequence)
"""What JSON gives is told first: asking an abstract class takes 0.3 µs, and a conversation is asked ten times."""
_KEY = re.compile(r"[^\s./\\][^\s.\\]*(?<!/)\Z")
_META = re.compile(r"__[^/]*__/|(?:.*/)?__[^/.]*__(?:\.[^/]*)?\Z")
_UNSAFE = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")


class SampleError(Exception):
    """A single sample that cannot be used; it goes to the quarantine ledger and training goes on."""


@dataclass(frozen=True)
class Sample:
    """One conversation with its images.

    `messages` is normalised: `content` is always a list of {"type": "image"} and {"type": "text", "text": str}; there
    are as many image parts as `images`, which are RGB, upright, in order.
    """

    key: str
    source: str
    messages: list[dict[str, Any]]
    images: list[Image.Image]
    meta: dict[str, Any]


@dataclass(frozen=True)
class Encoded:
    """A sample as the model takes it.

    `input_ids` int64 [T]; `labels` int64 [T], -100 where unsupervised and not shifted (labels[i] is input_ids[i]);
    `tiles` uint8 [K, 3, S, S], K may be 0; `visual_positions` int64 [V], ascending: where in `input_ids` the visual
    tokens of the tiles are.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    tiles: np.ndarray
    visual_positions: np.ndarray


@runtime_checkable
class Encoder(Protocol):
    """Turns samples into tokens and tiles. Must be picklable."""

    @property
    def fingerprint(self) -> str:
        """Changes with everything that changes token or tile counts."""
        ...

    @property
    def tile_size(self) -> int:
        """Side of a tile, pixels."""
        ...

    def measure(self, messages: Sequence[Mapping[str, Any]], image_sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
        """(tokens, visual ones included; tiles) of a sample, without its pixels. Sizes are (width, height)."""
        ...

    def encode(self, sample: Sample) -> Encoded:
        """The sample's tokens and tiles: exactly as many as `measure` said. Raises SampleError."""
        ...


def is_meta(name: str) -> bool:
    """Whether a file's path or key is no sample's: `__meta__`, with any extension, or in a folder of such a name."""
    return "__" in name and _META.match(name) is not None


def check_key(key: str) -> str:
    """The key itself. Raises SampleError when WebDataset cannot hold it.

    A dot would start the extension; blanks, control characters, lone surrogates, absolute paths and `..` are refused
    too, and names like `__meta__`, which are passed over when shards are read.
    """
    if not isinstance(key, str) or not _KEY.match(key) or _UNSAFE.search(key) or is_meta(key) or len(key) > 200:
        raise SampleError(
            f"key {brief(key)} does not fit: no dots, blanks, control characters, leading slash or name like "
            "__meta__, at most 200 characters"
        )
    return key


def normalise_messages(messages: Any, num_images: int) -> list[dict[str, Any]]:
    """Messages whose content is always a list of parts.

    A string content is cut at `<image>`; a list is checked. Raises SampleError when the record is not a conversation or
    its image placeholders are not as many as `num_images`.
    """
    if not isinstance(messages, _LIST) or isinstance(messages, str) or not messages:
        raise SampleError("'messages' is not a list of messages")
    if len(messages) > MAX_MESSAGES:
        raise SampleError(f"{len(messages):,} messages; at most {MAX_MESSAGES:,} are read")
    normal = [_normalise_message(message, number) for number, message in enumerate(messages)]
    placeholders = [part["type"] for message in normal for part in message["content"]].count("image")
    if placeholders != num_images:
        raise SampleError(f"{placeholders} image placeholder(s) in the messages but {num_images} image(s)")
    return normal


def caption_messages(caption: str, prompt: str = "") -> list[dict[str, Any]]:
    """An image-caption pair as a conversation: the image and `prompt` from the user, the caption from the assistant."""
    caption = check_text(caption).strip()
    if not caption:
        raise SampleError("the caption is empty")
    content: list[dict[str, Any]] = [{"type": "image"}]
    if prompt:
        content.append({"type": "text", "text": prompt})
    return [
        {"role": "user", "content": content},
        {"role": "assistant", "content": [{"type": "text", "text": caption}]},
    ]


def check_role(message: Any, number: int) -> str:
    """The role of a message. Raises SampleError when it is none of ROLES."""
    role = message.get("role") if isinstance(message, _OBJECT) else message
    if not isinstance(message, _OBJECT) or role not in ROLES:
        raise SampleError(f"message {number}: role {brief(role)} is none of {', '.join(ROLES)}")
    return role


def check_text(text: str) -> str:
    """The text itself. Raises SampleError when it holds a lone surrogate, which cannot be encoded."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        surrogate = f"U+{ord(text[error.start]):04X}"
        raise SampleError(f"a text is not Unicode: lone surrogate {surrogate} at character {error.start}") from error
    return text


def encode_as_measured(encoder: Encoder, sample: Sample, tokens: int, tiles: int) -> Encoded:
    """The sample, encoded. Raises SampleError when it cannot be used or was measured as another length."""
    encoded = encoder.encode(sample)
    found = (len(encoded.input_ids), len(encoded.labels), len(encoded.tiles))
    if found != (tokens, tokens, tiles):
        raise SampleError(
            f"encoded to {found[0]} tokens, {found[1]} labels and {found[2]} tiles, "
            f"but measured as {tokens} tokens and {tiles} tiles"
        )
    if encoded.tiles.shape[1:] != (3, encoder.tile_size, encoder.tile_size):
        raise SampleError(f"encoded to tiles of shape {encoded.tiles.shape[1:]}, not of side {encoder.tile_size}")
    return encoded


def _normalise_message(message: Any, number: int) -> dict[str, Any]:
    role = check_role(message, number)
    content = message.get("content")
    if isinstance(content, str):
        parts: list[dict[str, Any]] = []
        for i, text in enumerate(content.split(IMAGE_PLACEHOLDER)):
            if i:
                parts.append({"type": "image"})
            if text:
                parts.append({"type": "text", "text": check_text(text)})
    elif isinstance(content, list):
        parts = [_normalise_part(part, number) for part in content]
    else:
        raise SampleError(f"message {number}: content is {type(content).__name__}, neither text nor a list of parts")
    return {"role": role, "content": parts}


def _normalise_part(part: Any, number: int) -> dict[str, Any]:
    if isinstance(part, _OBJECT):
        kind, text = part.get("type"), part.get("text")
        if kind == "text" and isinstance(text, str):
            return {"type": "text", "text": check_text(text)}
        if kind == "image":
            return {"type": "image"}
    raise SampleError(f"message {number}: a part is neither an image nor a text: {brief(part)}")
