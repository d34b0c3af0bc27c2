"""Requests that are made again until the store answers or patience ends, and pauses that a server asks for.

A web server or the Hub that refuses a request for its number says when it wants to be asked again; until then this
process asks it nothing. S3 and its like say nothing: obstore makes their requests again, ever later (remote.py). Of a
store or an object that does not answer at all one request of a process asks, every few seconds (outages.py).
"""

from __future__ import annotations

import asyncio
import http.client
import re
import time
import urllib.request
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar
from urllib.error import HTTPError
from urllib.parse import quote, urlsplit

from data_pipeline.errors import DataError, UnreachableError
from data_pipeline.masking import mask
from data_pipeline.stores import remote
from data_pipeline.stores.failures import BrokenOffError, BusyError, TransientError
from data_pipeline.stores.folders import ETAGS, MANIFEST, place_of, store_of
from data_pipeline.stores.waiting import outages
from data_pipeline.stores.waiting.node_notes import note_given_up, warn_once_a_minute
from data_pipeline.stores.waiting.variables import number

T = TypeVar("T")
Failed = tuple[TransientError, float]
"""How a try ended, and when it began by this process' monotonic clock."""
PATIENCE = "ALIGNVLM_PATIENCE"
"""Environment variable: seconds to wait for a store that does not answer (default 300)."""
MOST_SECONDS = 900.0
"""Longest pause that a server may ask for."""
_OTHERS_SECONDS = 0.5
"""By which an object is asked for later than others, when its store was asked nothing because of it."""
_LAST_SECONDS = 3.0
"""How long a last question may take: whether the store answers anything but the request that is given up."""
_RESET = re.compile(r";\s*t=(\d+)")
_closed: dict[str, float] = {}
"""Store, or place of an object -> when it wants to be asked again, by this process' monotonic clock."""


def patience_seconds() -> float:
    """How long a store that does not answer is waited for."""
    return number(PATIENCE, 300)


async def patiently(
    url: str,
    name: str,
    work: Callable[[], Awaitable[T]],
    failed: Failed | None = None,
    is_long: bool = False,
) -> T:
    """What `work` gives, tried again for some minutes while the object or its store does not answer.

    After a BrokenOffError patience begins anew.

    Args:
        failed: the first try, which another thread has made.
        is_long: it may take longer than patience lasts. Patience counts from the end of the first try instead of its
            begin then, and a try that is under way when it ends may be the one that succeeds.

    Raises:
        UnreachableError: there was no answer for as long.
    """
    loop, patience = asyncio.get_running_loop(), patience_seconds()
    first, last = 0.0, None  # when patience began, and what the last try ended with
    try:
        async with asyncio.timeout(None) as limit:
            while True:
                began = time.monotonic()
                try:
                    if failed is not None:
                        began = failed[1]
                        raise failed[0]
                    return await _asked(url, name, work, limit if is_long else None)
                except TransientError as error:
                    now, failed = time.monotonic(), None
                    if last is None or isinstance(error, BrokenOffError):
                        first = now if is_long else began
                    last = error
                    limit.reschedule(loop.time() + first + patience - now)
                    await asyncio.sleep(0)  # where patience is over
                    warn_once_a_minute(store_of(url), f"{error}; waiting for the store, at most {patience:.0f} s")
                    if isinstance(error, BusyError):
                        await _close(url, name, is_alone=outages.refused(url, name))
                    elif not outages.failed(url, name, began):
                        await asyncio.sleep(outages.RETRY_SECONDS)
    except TimeoutError:
        if last is None or not limit.expired():
            raise
    waited = time.monotonic() - first
    why, store, goes_on = f"{last}; no answer for {waited:.0f} s", store_of(url), "the same command goes on when"
    if waited > outages.RETRY_SECONDS and await _answers(url, ETAGS if name == MANIFEST else MANIFEST):
        why = f"{why}, though {mask(store)} answers other requests; {goes_on} this one is answered"
        note_given_up(place_of(url, name), why)
    else:
        why = f"{why}; {goes_on} the store is back"
        note_given_up(store, why)
    raise UnreachableError(why) from last


async def _asked(url: str, name: str, work: Callable[[], Awaitable[T]], limit: asyncio.Timeout | None) -> T:
    """One try, as soon as it may be made; one that is not to be cut off takes the limit away."""
    while (pause := _opens(url, name) - time.monotonic()) > 0:
        await asyncio.sleep(pause)
    while outage := outages.current(url, name):
        async with outage.turn(place_of(url, name)):
            if outage.is_over:
                continue
            if limit is None:
                return await _noted(url, name, work)
            try:  # a short question: the others wait for the answer
                await _noted(url, name, lambda: remote.head(url, name or MANIFEST))
            except TransientError:
                raise
            except DataError:
                pass  # an answer, too
    if limit is not None:
        limit.reschedule(None)
    return await _noted(url, name, work)


async def _noted(url: str, name: str, work: Callable[[], Awaitable[T]]) -> T:
    try:
        result = await work()
    except TransientError:
        raise
    except DataError:
        outages.answered(url, name)
        raise
    outages.answered(url, name)
    return result


async def _answers(url: str, name: str) -> bool:
    """Whether the store says anything of this object, within some seconds."""
    try:
        async with asyncio.timeout(_LAST_SECONDS):
            await remote.head(url, name)
    except (TransientError, TimeoutError):
        return False
    except DataError:
        pass  # that there is none, or that it may not be read
    return True


async def _close(url: str, name: str, is_alone: bool) -> None:
    """Have this process ask a store nothing, or not for one object, for as long as it wants, or for some seconds."""
    place = place_of(url, name)
    key, asked = (place, name) if is_alone else (store_of(url), MANIFEST)
    if _closed.get(key, 0.0) <= time.monotonic():
        _closed[key] = time.monotonic() + outages.RETRY_SECONDS  # while it is asked for how long
        _closed[key] += max(await asyncio.to_thread(asked_pause, url, asked) - outages.RETRY_SECONDS, 0.0)
    if not is_alone:  # others first, whose answers tell
        _closed[place] = _closed[key] + _OTHERS_SECONDS


def _opens(url: str, name: str) -> float:
    """When an object may be asked for, as far as pauses are known."""
    return max(_closed.get(store_of(url), 0.0), _closed.get(place_of(url, name), 0.0)) if _closed else 0.0


def is_open(url: str, name: str) -> bool:
    """Whether an object may be asked for now, as far as this process knows."""
    return outages.current(url, name) is None and _opens(url, name) <= time.monotonic()


def asked_pause(url: str, name: str = MANIFEST) -> float:
    """Seconds after which a web server or the Hub wants to be asked again; 0 where it does not say, and for others.

    By one request without a body, since obstore's errors have no headers: `Retry-After` (RFC 9110), and the `RateLimit`
    of the Hub (draft-ietf-httpapi-ratelimit-headers).
    """
    address, headers = remote.address(url)
    parts = urlsplit(address)
    if not parts.hostname:
        return 0.0
    place = f"{parts.scheme}://{parts.netloc}{parts.path}"
    opener = urllib.request.build_opener(_NoRedirect)  # by a proxy where obstore takes one
    request = urllib.request.Request(f"{place}/{quote(name)}", headers=headers, method="HEAD")
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
        """Follow no redirect: the headers are meant for this server."""


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
