"""Requests that are made again until the store answers or patience ends, and pauses that a server asks for.

A web server or the Hub that refuses a request for its number says when it wants to be asked again; until then this
process asks it nothing. S3 and its like say nothing: obstore makes their requests again, ever later (remote.py). Of a
store that does not answer at all one request of a process asks, every few seconds; the others wait for its answer.
"""

from __future__ import annotations

import asyncio
import http.client
import os
import re
import time
import urllib.request
from base64 import b64encode
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar
from urllib.error import HTTPError
from urllib.parse import unquote, urlsplit

from data_pipeline.errors import UnreachableError
from data_pipeline.stores import remote
from data_pipeline.stores.failures import BusyError, TransientError
from data_pipeline.stores.folders import MANIFEST, store_of
from data_pipeline.stores.waiting.node_notes import note_given_up, warn_once_a_minute

T = TypeVar("T")
PATIENCE = "ALIGNVLM_PATIENCE"
"""Environment variable: seconds to wait for a store that does not answer (default 300)."""
RETRY_SECONDS = 2.0
MOST_SECONDS = 900.0
"""Longest pause that a server may ask for."""
_RESET = re.compile(r";\s*t=(\d+)")
_closed: dict[str, float] = {}
"""Store -> when it wants to be asked again, by this process' monotonic clock."""
_outages: dict[str, asyncio.Event] = {}
"""Store that does not answer -> set when it does again, or when the request that asks ends without an answer."""


def patience_seconds() -> float:
    """How long a store that does not answer is waited for."""
    return float(os.environ.get(PATIENCE, "300"))


async def patiently(url: str, work: Callable[[], Awaitable[T]], failed: TransientError | None = None) -> T:
    """What `work` gives, tried again for some minutes while the store does not answer.

    Args:
        failed: what a try in another thread has just ended with; it is the first one.

    Raises:
        UnreachableError: it never did.
    """
    began, patience, store = time.monotonic(), patience_seconds(), store_of(url)
    mine: asyncio.Event | None = None  # the outage of which this request asks whether it is over
    try:
        while True:
            try:
                if failed is not None:
                    raise failed
                await _turn(store, mine, began + patience)
                result = await work()
            except TransientError as error:
                failed = None
                waited = time.monotonic() - began
                if waited >= patience:
                    why = f"{error}; no answer for {waited:.0f} s; the same command goes on when the store is back"
                    note_given_up(url, why)
                    raise UnreachableError(why) from error
                warn_once_a_minute(store, f"{error}; waiting for the store, at most {patience:.0f} s")
                if isinstance(error, BusyError):
                    if _closed.get(store, 0.0) <= time.monotonic():
                        _closed[store] = time.monotonic() + RETRY_SECONDS  # while it is asked for how long
                        _closed[store] += max(await asyncio.to_thread(asked_pause, url) - RETRY_SECONDS, 0.0)
                    continue
                if store not in _outages:
                    mine = _outages[store] = asyncio.Event()
                if _outages[store] is mine:
                    await asyncio.sleep(min(RETRY_SECONDS, max(patience - waited, 0.05)))
            else:
                _end(store, _outages.get(store))
                return result
    finally:
        _end(store, mine)


def is_open(url: str) -> bool:
    """Whether a store may be asked now, as far as this process knows."""
    store = store_of(url)
    return store not in _outages and _closed.get(store, 0.0) <= time.monotonic()


async def _turn(store: str, mine: asyncio.Event | None, until: float) -> None:
    """Wait while a store wants to be asked nothing, or another request asks for its outage; `until` at the latest."""
    while (closed := _closed.get(store, 0.0) - time.monotonic()) > 0:
        await asyncio.sleep(min(closed, max(until - time.monotonic(), 0.05)))
        if time.monotonic() >= until:
            return
    while (outage := _outages.get(store)) and outage is not mine and (left := until - time.monotonic()) > 0:
        with suppress(TimeoutError):
            await asyncio.wait_for(outage.wait(), left)


def _end(store: str, outage: asyncio.Event | None) -> None:
    """Let all requests that wait for the end of this outage go on, where it is the store's present one."""
    if outage is not None and _outages.get(store) is outage:
        del _outages[store]
        outage.set()


def asked_pause(url: str) -> float:
    """Seconds after which a web server or the Hub wants to be asked again; 0 where it does not say, and for others.

    By one request without a body, since obstore's errors have no headers: `Retry-After` (RFC 9110), and the `RateLimit`
    of the Hub (draft-ietf-httpapi-ratelimit-headers).
    """
    address, headers = remote.address(url)
    parts = urlsplit(address)
    if not parts.hostname:
        return 0.0
    if parts.username:
        login = b64encode(f"{unquote(parts.username)}:{unquote(parts.password or '')}".encode()).decode()
        headers = {"authorization": f"Basic {login}", **headers}
    place = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
    opener = urllib.request.build_opener(_NoRedirect)  # by a proxy where obstore takes one
    request = urllib.request.Request(f"{place}/{MANIFEST}", headers=headers, method="HEAD")
    try:
        opener.open(request, timeout=10).close()
    except HTTPError as refusal:
        refusal.close()
        found = {name.lower(): value for name, value in refusal.headers.items()}
        return seconds_asked(found) if refusal.code in (429, 503) else 0.0
    except (OSError, http.client.HTTPException):
        pass
    return 0.0


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        """None is made: the headers are for this server."""


def seconds_asked(headers: Mapping[str, str]) -> float:
    """Seconds to wait by the headers (in small letters) of a refusal, at most MOST_SECONDS; 0 where they do not say."""
    asked, limit = headers.get("retry-after", "").strip(), _RESET.search(headers.get("ratelimit", ""))
    seconds = float(limit[1]) if limit else 0.0
    if asked.isdecimal():
        seconds = float(asked)
    elif asked:
        with suppress(ValueError):
            seconds = parsedate_to_datetime(asked).timestamp() - time.time()
    return min(max(seconds, 0.0), MOST_SECONDS)
