"""Images however a caller has them: PIL, array, tensor, bytes, file, URL, data URL or base64, as training sees them."""

from __future__ import annotations

import base64
import os
import urllib.request
from http.client import HTTPException
from reprlib import Repr
from typing import Any

import numpy as np
import torch
from PIL import Image

from alignvlm import __version__
from data_pipeline.samples.images import MAX_IMAGE_BYTES, decode_image, image_bytes
from data_pipeline.samples.schema import SampleError

TIMEOUT = 30
"""Seconds that a server may stay silent."""

_brief = Repr()
_brief.maxstring = _brief.maxother = 80


def read_images(images: Any) -> Any:
    """`read_image` of every image, in the lists in which they came; an array of four dimensions is a list too."""
    if isinstance(images, list | tuple):
        return [read_images(image) for image in images]
    if isinstance(images, np.ndarray | torch.Tensor) and images.ndim == 4:
        return [read_image(image) for image in images]
    return read_image(images)


def read_image(source: Any) -> Image.Image:
    """The upright RGB pixels of one image, the same ones as `decode_image` gives in training.

    Args:
        source: what PIL opened; bytes of a file; a path; a URL (http, https, data); base64 of a file; or an array or
            tensor [H, W], [H, W, C] or [C, H, W] of 1, 3 or 4 channels, integers from 0 to 255 or floats from 0 to 1.
            Where both ends could be channels, the first are.

    Raises:
        ValueError: it is none of these or cannot be read.
    """
    try:
        if isinstance(source, np.ndarray | torch.Tensor):
            return decode_image(_from_array(source))
        if isinstance(source, str):
            return _from_text(source)
        if isinstance(source, bytes | os.PathLike | Image.Image):
            return decode_image(source)
    except SampleError as error:
        raise ValueError(f"image {_name(source)}: {error}") from error
    raise ValueError(f"an image is given as {type(source).__name__}, not as PIL image, array, tensor, bytes or string")


def _name(source: Any) -> str:
    if isinstance(source, np.ndarray | torch.Tensor):
        return f"of shape {tuple(source.shape)}"
    return _brief.repr(str(source) if isinstance(source, os.PathLike) else source)


def _from_text(text: str) -> Image.Image:
    if text.startswith(("http://", "https://")):
        return decode_image(_download(text))
    if text.startswith("data:"):
        return decode_image(_from_base64(text.partition(",")[2]))
    if os.path.exists(text):
        return decode_image(image_bytes(text))
    try:
        return decode_image(_from_base64(text))
    except SampleError as error:
        raise SampleError("neither a file, nor a URL (http, https or data), nor an image in base64") from error


def _from_base64(text: str) -> bytes:
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except ValueError as error:
        raise SampleError("not base64") from error


def _download(url: str) -> bytes:
    request = urllib.request.Request(url, headers={"User-Agent": f"alignvlm/{__version__}"})
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
            data = answer.read(MAX_IMAGE_BYTES + 1)
    except (OSError, HTTPException, ValueError) as error:
        raise SampleError(f"cannot be fetched ({' '.join(str(error).split())})") from error
    if len(data) > MAX_IMAGE_BYTES:
        raise SampleError(f"more than {MAX_IMAGE_BYTES:,} bytes, the most that are read")
    return data


def _from_array(values: np.ndarray | torch.Tensor) -> Image.Image:
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
        values = (values.float() if values.is_floating_point() else values).numpy()
    channels = (1, 3, 4)
    if values.ndim == 3 and values.shape[0] in channels:
        values = np.moveaxis(values, 0, -1)
    if not (values.ndim == 2 or (values.ndim == 3 and values.shape[2] in channels)) or 0 in values.shape:
        raise SampleError("no image: give [H, W], [H, W, C] or [C, H, W] with 1, 3 or 4 channels")
    if values.dtype.kind not in "iuf":
        raise SampleError(f"of {values.dtype}; give integers from 0 to 255 or floats from 0 to 1")
    white = 1 if values.dtype.kind == "f" else 255
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= white):  # also with NaN
        raise SampleError(f"values from {low} to {high}; give integers from 0 to 255 or floats from 0 to 1")
    pixels = (values * 255 + 0.5 if white == 1 else values).astype(np.uint8)
    return Image.fromarray(np.ascontiguousarray(pixels[:, :, 0] if pixels.shape[2:] == (1,) else pixels))
