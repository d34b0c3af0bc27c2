"""Single requests to S3, Google Cloud Storage, Azure, the Hub and HTTP servers: the only module that imports obstore.

Functions are coroutines for engine.py where nothing else is said. A name is relative to the folder that a URL names.
"""

from __future__ import annotations

import os
import re
import threading
from base64 import b64encode
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import quote, unquote

from data_pipeline.errors import LoadError
from data_pipeline.masking import mask
from data_pipeline.stores import hub
from data_pipeline.stores.failures import (
    ALLOW_HTTP,
    KINDS,
    AccessError,
    BusyError,
    NoRangesError,
    TooLargeError,
    TransientError,
    credentials,
    first_line,
    knows_no_conditions,
    meaning,
    scheme_of,
)
from data_pipeline.stores.waiting.variables import number

if TYPE_CHECKING:
    from obstore import ObjectMeta
    from obstore.store import ObjectStore

READ_TIMEOUT = "ALIGNVLM_READ_TIMEOUT"
"""Environment variable: seconds without a byte after which a request is made again (default 10)."""
RETRIES = "ALIGNVLM_RETRIES"
"""Environment variable: how often the client repeats a request that fails, within 30 s, before the store is waited for
(default 5; 2 for web servers and the Hub, whose refusals say when to ask again: waiting/patience.py reads that)."""
_RETRIES, _FEW_RETRIES = 5, {"http": 2, "hf": 2}
SCHEMES = tuple(KINDS)
_WRITE_TIMEOUT = 120.0
"""Seconds: a store may say nothing until it has taken a whole object."""
_DOWNLOAD_TIMEOUT = 3600.0
"""Seconds that a part of a whole object may take while bytes come: sixteen share a line, perhaps of 2 MB/s."""
Use = Literal["read", "write", "download"]
_ENDPOINTS = {
    "s3": ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT"),
    "az": ("AZURE_STORAGE_ENDPOINT",),
    "gs": ("GOOGLE_BASE_URL",),
}
"""What a store speaks -> environment variables that the client takes for it, and for no other."""
_CHUNK_BYTES = 256 * 1024
"""Piece of an object on its way to a file: so much is held in memory, and copied while Python's lock is held."""
_PART_BYTES, _PARTS, _MOST_PARTS = 16 * 1024**2, 4, 10_000
"""Upload of a file: the least size of a part, how many parts are on their way, and how many a store takes."""

_making = threading.Lock()


@dataclass(frozen=True)
class ObjectInfo:
    """Size in bytes, ETag and time of an object; the ETag is empty, and the time 0, where a store has none."""

    size: int
    etag: str = ""
    modified: float = field(default=0.0, compare=False)
    """Seconds since 1970 by the store's clock."""

    def matches(self, etag: str) -> bool:
        """Whether this is the ETag, which Azure lists without its quotes; not where a store lists none, or another."""
        return bool(etag) and self.etag.strip('"') == etag.strip('"')


async def get(
    url: str,
    name: str,
    begin: int = 0,
    end: int | None = None,
    *,
    etag: str = "",
    unless: str = "",
    most: int | None = None,
) -> tuple[bytes, ObjectInfo]:
    """Bytes [begin, end) of an object, or all of it, and what it is now.

    Args:
        etag: the ETag that it must have, else ReplacedError. Of no account on the Hub, where a URL names the commit.
        unless: the ETag that it must not have, else NotModifiedError.
        most: bytes that the object may have, else TooLargeError.
    """
    options = _options(url, begin, end, etag)
    if unless := _known(url, unless):
        options["if_none_match"] = unless
    with _errors(url, name, whole=end is None) as (obstore, store):
        result = await obstore.get_async(store, name, options=options)
        info = _info(url, result.meta)
        if most is not None and info.size > most:
            raise TooLargeError(f"{info.size:,} bytes; at most {most:,} are read")
        data = bytes(await result.bytes_async())
    if end is not None and len(data) != (due := max(min(end, info.size) - begin, 0)):
        raise TransientError(f"{mask(url)}/{name}: {len(data):,} of {due:,} bytes came")
    return data, info


def get_range(url: str, name: str, begin: int, end: int, *, etag: str = "") -> tuple[memoryview, ObjectInfo]:
    """What `get` gives, by a thread that waits for it; engine.py has begun."""
    with _errors(url, name) as (obstore, store):
        result = obstore.get(store, name, options=_options(url, begin, end, etag))
        return memoryview(result.bytes()), _info(url, result.meta)


def get_into(
    url: str,
    name: str,
    begin: int,
    end: int,
    write: Callable[[memoryview, int], None],
    *,
    etag: str = "",
    whole: bool = False,
) -> ObjectInfo:
    """Hand bytes [begin, end) of an object over as they come, with the place of each piece; what the object is now.

    By a thread that waits for it, as `get_range`; raises what `get` does.

    Args:
        whole: they are all of it, which is asked for without a range; nothing is handed over of one of another size.
    """
    place = begin
    with _errors(url, name, "download", whole) as (obstore, store):
        result = obstore.get(store, name, options=_options(url, begin, None if whole else end, etag))
        info = _info(url, result.meta)
        if whole and info.size != end:
            return info
        for chunk in result.stream(min_chunk_size=_CHUNK_BYTES):
            write(memoryview(chunk)[: max(end - place, 0)], place)
            place += len(chunk)
    if place != end:
        raise TransientError(f"{mask(url)}/{name}: {place - begin:,} of {end - begin:,} bytes came")
    return info


def _options(url: str, begin: int, end: int | None, etag: str) -> dict[str, Any]:
    options: dict[str, Any] = {} if end is None else {"range": (begin, end)}
    if names_content(etag := _known(url, etag)):
        options["if_match"] = etag
    return options


def _info(url: str, meta: ObjectMeta) -> ObjectInfo:
    return ObjectInfo(int(meta["size"]), _known(url, meta.get("e_tag")), meta["last_modified"].timestamp())


def _known(url: str, etag: str | None) -> str:
    """An ETag that says which object it is; on the Hub the commit does, and servers behind it have others."""
    return "" if etag is None or scheme_of(url) == "hf" else etag


def names_content(etag: str) -> bool:
    """Whether an ETag says which bytes an object has. Weak ones do not: by RFC 9110 no condition on a read meets them.

    Of an object with another ETag only size and checksums tell that it was replaced.
    """
    return bool(etag) and not etag.startswith("W/")


async def head(url: str, name: str) -> ObjectInfo:
    """Size and ETag of an object, as `get` sees them."""
    with _errors(url, name) as (obstore, store):
        meta = await obstore.head_async(store, name)
    return _info(url, meta)


async def put(url: str, name: str, data: bytes, over: str | None = None) -> str:
    """Write an object as a whole, and return its ETag.

    Args:
        over: the ETag of the object that may be replaced, else ReplacedError; empty: none, else ExistsError. Null: any,
            as with stores that know no such conditions; Google's goes by generations instead of ETags.
    """
    check_writable(url)
    if over and KINDS[scheme_of(url)] == "gs":
        over = None
    mode: Any = "overwrite" if over is None else {"e_tag": over} if over else "create"
    with _errors(url, name, "write") as (obstore, store):
        try:
            result = await obstore.put_async(store, name, data, use_multipart=False, mode=mode)
        except (obstore.exceptions.BaseError, NotImplementedError) as error:
            if over is None or not knows_no_conditions(error):
                raise
            result = await obstore.put_async(store, name, data, use_multipart=False)
    return result.get("e_tag") or ""


async def put_file(url: str, name: str, path: str) -> None:
    """Write a file as an object, over one that is there: a large one in parts, which count when all have come."""
    check_writable(url)
    with _errors(url, name, "write") as (obstore, store):
        part = max(_PART_BYTES, -(-os.path.getsize(path) // _MOST_PARTS))
        await obstore.put_async(store, name, Path(path), chunk_size=part, max_concurrency=_PARTS)


async def delete(url: str, name: str) -> None:
    """Delete an object."""
    with _errors(url, name, "write") as (obstore, store):
        await obstore.delete_async(store, name)


def check_writable(url: str) -> None:
    """Raise AccessError for a store that nothing is ever written to."""
    if KINDS[scheme_of(url)] in ("http", "hf"):
        raise AccessError(f"{mask(url)}: {'the Hub is' if scheme_of(url) == 'hf' else 'HTTP servers are'} only read")


async def listing(url: str, suffix: str, most: int | None = None) -> dict[str, ObjectInfo]:
    """The folder's objects whose names end in `suffix`, sorted by name; all, or about the first `most`.

    An ETag may be written in another way than `get` has it: see `ObjectInfo.matches`.
    """
    found: dict[str, ObjectInfo] = {}
    with _errors(url, "") as (obstore, store):
        async for chunk in obstore.list(store, chunk_size=1000):
            found |= {meta["path"]: _info(url, meta) for meta in chunk if meta["path"].endswith(suffix)}
            if most is not None and len(found) >= most:
                break
    return dict(sorted(found.items()))


async def tree(url: str) -> tuple[str, dict[str, ObjectInfo]]:
    """The files of a folder on the Hub, and its URL with the commit that has them."""
    try:
        pinned, files = await hub.tree(url)
    except hub.HubAccessError as error:
        raise AccessError(f"{error}; {credentials(url)}") from error
    except hub.HubBusyError as error:
        raise BusyError(mask(str(error))) from error
    return pinned, {name: ObjectInfo(size, content) for name, (size, content) in files.items()}


def address(url: str) -> tuple[str, dict[str, str]]:
    """The HTTP folder behind a URL of a web server or the Hub, and the headers of every request there; else empty."""
    kind = KINDS[scheme_of(url)]
    if kind != "http":
        return hub.address(url) if kind == "hf" else ("", {})
    scheme, separator, rest = url.partition("://")
    host, slash, path = rest.partition("/")
    login, _, host = host.rpartition("@")
    if not login:
        return url, {}
    name, _, word = login.partition(":")  # the client leaves out what stands in a URL
    basic = b64encode(f"{unquote(name)}:{unquote(word)}".encode()).decode()
    return f"{scheme}{separator}{host}{slash}{path}", {"authorization": f"Basic {basic}"}


@contextmanager
def _errors(url: str, name: str, use: Use = "read", whole: bool = False) -> Iterator[Any]:
    """Turn what obstore raises into our errors: one line each, without secrets.

    Args:
        whole: no range is asked for, except by the client itself when the answer breaks off.
    """
    store = _store(url, use)
    import obstore
    from obstore import exceptions

    try:
        yield obstore, store
    except (exceptions.BaseError, OSError, ValueError) as error:
        ours = meaning(exceptions, error, url, name)
        if whole and isinstance(ours, NoRangesError):
            ours = TransientError(f"{mask(url)}/{name}: the answer broke off, and the server sends no rest of it")
        raise ours from error


def _store(url: str, use: Use = "read") -> ObjectStore:
    """The store of a folder; made once in a process, though many threads ask for it first."""
    with _making:
        return _make_store(url, use)


@cache
def _make_store(url: str, use: Use) -> ObjectStore:
    try:
        from obstore.exceptions import BaseError
        from obstore.store import from_url
    except ImportError as error:
        raise LoadError(f"{mask(url)}: object stores need `pip install 'alignvlm[remote]'`") from error

    scheme, timeout = scheme_of(url), number(READ_TIMEOUT, 10, least=0.1)
    kind = KINDS[scheme]
    _check_endpoints(kind)
    headers: dict[str, str] = {}
    if kind in ("http", "hf"):
        url, headers = address(url)
    client: dict[str, Any] = {
        "connect_timeout": timedelta(seconds=5),
        "read_timeout": timedelta(seconds=_WRITE_TIMEOUT if use == "write" else timeout),
        "timeout": timedelta(seconds=max(12 * timeout, _DOWNLOAD_TIMEOUT if use == "download" else _WRITE_TIMEOUT)),
        **({"default_headers": headers} if headers else {}),
    }
    if url.startswith("http:") or os.environ.get(ALLOW_HTTP.get(kind, ""), "").lower() in ("1", "true"):
        client["allow_http"] = True  # options given here hide those of the environment
    more: dict[str, Any] = {"disable_bulk_delete": True} if kind == "s3" else {}  # not all of them know it
    if kind == "s3" and not any(name.startswith(("AWS_ACCESS", "AWS_SKIP", "AWS_WEB")) for name in os.environ):
        more |= _profile()
    retries = {
        "max_retries": int(number(RETRIES, _FEW_RETRIES.get(kind, _RETRIES))),
        "retry_timeout": timedelta(seconds=30),
        "backoff": {"init_backoff": timedelta(milliseconds=100), "max_backoff": timedelta(seconds=5), "base": 2},
    }
    try:
        return from_url(_quoted(url), client_options=client, retry_config=retries, **more)  # type: ignore[call-overload]
    except (BaseError, ValueError) as error:
        raise LoadError(f"{mask(url)}: {first_line(error)}") from error


def _quoted(url: str) -> str:
    """A URL as obstore reads it: names in buckets may have any character, and are written as they are."""
    scheme, separator, rest = url.partition("://")
    return url if KINDS[scheme_of(url)] in ("http", "hf") else f"{scheme}{separator}{quote(rest, safe='/:@')}"


def _check_endpoints(kind: str) -> None:
    """Raise LoadError for an endpoint of this kind of store that would make the client panic."""
    for name in _ENDPOINTS.get(kind, ()):
        endpoint = os.environ.get(name, "")
        if endpoint and not re.match(r"https?://([\w.-]+|\[[\da-fA-F:.]+\])(:\d{1,5})?(/\S*)?$", endpoint):
            raise LoadError(f"{name}={mask(endpoint)!r} is not http://HOST:PORT or https://HOST")


def _profile() -> dict[str, Any]:
    """Credentials from ~/.aws, where boto3 is installed and finds any."""
    try:
        from obstore.auth.boto3 import Boto3CredentialProvider

        return {"credential_provider": Boto3CredentialProvider()}
    except (ImportError, ValueError):
        return {}
