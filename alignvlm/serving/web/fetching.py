"""Images from web servers that whoever started this server named: within a time and a size, and from nowhere else."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx2

from alignvlm.errors import UserError
from alignvlm.serving.web.errors import RequestError
from alignvlm.serving.web.limits import Limits

PORTS = {"http": 80, "https": 443}


class Fetcher:
    """Fetches what URLs name. Neither redirections nor proxies are followed, no cookie is kept.

    Raises:
        UserError: one of `limits.image_hosts` is no host.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._allowed = {place for text in limits.image_hosts for place in _places(text)}
        self._transport = (
            # A connection belongs to one name: another name of the same address is asked by its own.
            httpx2.AsyncHTTPTransport(limits=httpx2.Limits(max_keepalive_connections=0)) if self._allowed else None
        )

    async def fetch(self, urls: dict[str, str]) -> dict[str, bytes]:
        """The contents of URLs by their places in the request, `limits.max_body` bytes of them.

        Raises:
            RequestError: one of them may not be asked, does not answer in time, or has too much; its place is `param`.
        """
        found: dict[str, bytes] = {}
        param = ""
        try:
            async with asyncio.timeout(self._limits.fetch_seconds):
                for param, url in urls.items():
                    found[param] = await self._one(url, param, self._limits.max_body - sum(map(len, found.values())))
        except TimeoutError as error:
            reason = f"it did not arrive within {self._limits.fetch_seconds:g} s, the most for all images together"
            raise RequestError(_unreadable(reason), param=param, code="invalid_image") from error
        except (OSError, httpx2.HTTPError, httpx2.InvalidURL, ValueError) as error:  # of names, servers, strange URLs
            reason = " ".join(str(error).split()) or type(error).__name__
            raise RequestError(_unreadable(reason[:200]), param=param, code="invalid_image") from error
        return found

    async def _one(self, text: str, param: str, most: int) -> bytes:
        url = httpx2.URL(text)
        host = _name(url)
        if self._transport is None or url.userinfo or (host, url.port or PORTS.get(url.scheme)) not in self._allowed:
            raise not_allowed(param)
        data = bytearray()
        async with self._answer(url, host) as answer:
            if answer.status_code != 200:
                raise ValueError(f"{host} answers with status {answer.status_code}")
            async for piece in answer.aiter_raw():
                data += piece
                if len(data) > most:
                    raise too_many_bytes(self._limits, param)
        return bytes(data)

    @asynccontextmanager
    async def _answer(self, url: httpx2.URL, host: str) -> AsyncIterator[httpx2.Response]:
        """The response of the first checked address that can be reached; the name is not looked up again."""
        assert self._transport is not None
        unreached: httpx2.ConnectError | None = None
        for address in await _addresses(host, url.port or PORTS[url.scheme]):
            request = httpx2.Request(
                "GET",
                url.copy_with(host=address),
                headers={"Host": url.netloc.decode(), "Accept": "image/*", "Accept-Encoding": "identity"},
                extensions={"sni_hostname": host},
            )
            try:
                answer = await self._transport.handle_async_request(request)
            except httpx2.ConnectError as error:
                unreached = error
                continue
            try:
                yield answer
            finally:
                await answer.aclose()
            return
        raise unreached or OSError(f"{host} has no address")


def not_allowed(param: str) -> RequestError:
    """The error for an image that this server does not take from the place that the request names."""
    return RequestError(
        "this server fetches no such URL and opens no such file: send the image itself as "
        "data:image/png;base64,… (or image/jpeg, …)",
        param=param,
        code="image_url_not_allowed",
    )


def too_many_bytes(limits: Limits, param: str) -> RequestError:
    """The error for an image that is too large together with those before it."""
    return RequestError(
        f"more than {limits.max_body:,} bytes up to here, the most for all images of a request together",
        param=param,
        code="image_too_large",
    )


def _unreadable(reason: str) -> str:
    return f"the image cannot be read: {reason}"


def _places(text: str) -> list[tuple[str, int]]:
    """(host, port) that HOST or HOST:PORT stands for."""
    try:
        url = httpx2.URL(f"any://{text}")
        if not url.host or url.userinfo or text.endswith(":") or url.raw_path not in (b"", b"/"):
            raise ValueError
    except (httpx2.InvalidURL, ValueError) as error:
        raise UserError(f"image host {text!r}: give HOST or HOST:PORT, such as images.example or [::1]:8080") from error
    return [(_name(url), port) for port in ([url.port] if url.port else PORTS.values())]


def _name(url: httpx2.URL) -> str:
    """A URL's host as it is compared: in small letters, without the dot that ends a full name, in ASCII."""
    return url.raw_host.decode().rstrip(".")


async def _addresses(host: str, port: int) -> list[str]:
    """What a name means now. Raises OSError for a name that leads where only the machine itself gets.

    Its own services, and those that a cloud offers to it (link-local), trust whoever reaches them; a name of somebody
    else's may begin to mean them at any time. Whoever wants them asked gives an address, or localhost, as the host.
    """
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = list(dict.fromkeys(str(info[4][0]) for info in found))
    if host != "localhost" and host not in addresses:
        for text in addresses:
            address = ipaddress.ip_address(text)
            address = getattr(address, "ipv4_mapped", None) or address
            if address.is_loopback or address.is_link_local or address.is_unspecified:
                raise OSError(f"{host} leads to {address}, which is this machine's own")
    return addresses
