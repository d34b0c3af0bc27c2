"""What one request, and all of them together, may take."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from data_pipeline.samples.images import MAX_IMAGE_PIXELS


@dataclass(frozen=True)
class Limits:
    """Limits of one route; routes count their requests apart."""

    max_requests: int = 16
    """Requests that are answered or wait; the next one is told to come back."""
    max_arriving: int = 64
    """Requests of which a part has arrived; when one more comes, the one that began first is given up."""
    max_body: int = 32 * 1024**2
    """Bytes of a request, and of all its images together wherever they come from."""
    max_images: int = 64
    max_pixels: int = MAX_IMAGE_PIXELS
    """Most pixels of all images of a request together; checked before any is decoded."""
    max_text: int = 4 * 1024**2
    """Most characters of all messages together."""
    body_seconds: float = 60.0
    """How long a client may take to send its request."""
    silent_seconds: float = 10.0
    """How long it may send nothing of it."""
    fetch_seconds: float = 20.0
    """How long web servers may take for all images of a request together."""
    image_hosts: tuple[str, ...] = ()
    """Web servers from which images are fetched that a request names by URL: HOST (ports 80 and 443) or HOST:PORT."""
    image_folder: Path | None = None
    """Where files lie that a request may name by `file:` URL."""
