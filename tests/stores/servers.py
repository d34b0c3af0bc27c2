"""Small HTTP servers on loopback: a store that speaks S3's dialect, in memory, and a proxy before a real one."""

from __future__ import annotations

import asyncio
import hashlib
import re
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from email.utils import formatdate
from functools import lru_cache
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

from tests.stores.faults import Faults

CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "test-key",
    "AWS_SECRET_ACCESS_KEY": "test-secret-0123456789",
    "AWS_REGION": "us-east-1",
    "AWS_ALLOW_HTTP": "true",
    "AWS_EC2_METADATA_DISABLED": "true",
}
"""Set in every test that touches a store: without any, a client asks the metadata address of a cloud."""
Head = tuple[str, str, dict[str, str]]
Answer = tuple[int, dict[str, str], bytes]


class MemoryS3:
    """Buckets as a dictionary: "bucket/key" -> bytes. Ranges, If-Match, If-None-Match, lists; no signatures.

    Args:
        read_only: PUT and DELETE are answered by 403; with `deletes` false DELETE alone.
        preconditions: False: ignored, as some stores do.
    """

    listed_etag = "{}"
    """How a list writes an ETag; Azure's has no quotes, and some stores' lists have others than their objects."""

    def __init__(self, read_only: bool = False, preconditions: bool = True) -> None:
        self.objects: dict[str, bytes] = {}
        self.times: dict[str, float] = {}
        """When objects were written by a request; others in 1970."""
        self.read_only, self.preconditions, self.deletes = read_only, preconditions, True
        self.log: list[tuple[str, str]] = []

    def answer(
        self, method: str, target: str, headers: dict[str, str], body: bytes
    ) -> tuple[int, dict[str, str], bytes]:
        parts = urlsplit(target)
        path, query = unquote(parts.path).lstrip("/"), parse_qs(parts.query, keep_blank_values=True)
        self.log.append(("LIST" if "list-type" in query else method, path))
        if "list-type" in query:
            return self._list(path.rstrip("/"), query.get("prefix", [""])[0])
        if method == "PUT":
            if self.read_only:
                return 403, {}, b"<Error><Code>AccessDenied</Code></Error>"
            there = path in self.objects
            if self.preconditions and headers.get("if-none-match") == "*" and there:
                return 412, {}, b""
            if self.preconditions and "if-match" in headers and not there:
                return 404, {}, b""
            if self.preconditions and there and headers.get("if-match", etag := _etag(self.objects[path])) != etag:
                return 412, {}, b""
            self.objects[path], self.times[path] = body, time.time()
            return 200, {"etag": _etag(body)}, b""
        if method == "DELETE":
            if self.read_only or not self.deletes:
                return 403, {}, b"<Error><Code>AccessDenied</Code></Error>"
            self.objects.pop(path, None)
            return 204, {}, b""
        if method == "PROPFIND":
            return 405, {}, b""
        data = self.objects.get(path)
        if data is None:
            return 404, {}, b"<Error><Code>NoSuchKey</Code></Error>"
        etag = _etag(data)
        answer = {
            "etag": etag,
            "last-modified": formatdate(self.times.get(path, 0), usegmt=True),
            "accept-ranges": "bytes",
        }
        if self.preconditions:
            if headers.get("if-match", etag) != etag:
                return 412, {}, b""
            if headers.get("if-none-match") == etag:
                return 304, answer, b""
        if match := re.fullmatch(r"bytes=(\d+)-(\d+)", headers.get("range", "")):
            begin, end = int(match[1]), min(int(match[2]) + 1, len(data))
            if begin >= len(data):
                return 416, {}, b""
            return 206, answer | {"content-range": f"bytes {begin}-{end - 1}/{len(data)}"}, data[begin:end]
        return 200, answer, data

    def _list(self, bucket: str, prefix: str) -> tuple[int, dict[str, str], bytes]:
        times = {
            key: time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(self.times.get(key, 0))) for key in self.objects
        }
        rows = "".join(
            f"<Contents><Key>{escape(key.removeprefix(bucket + '/'))}</Key><Size>{len(data)}</Size>"
            f"<LastModified>{times[key]}</LastModified>"
            f"<ETag>{escape(self.listed_etag.format(_etag(data)))}</ETag></Contents>"
            for key, data in sorted(self.objects.items())
            if key.startswith(f"{bucket}/{prefix}")
        )
        xml = f"<ListBucketResult><Name>{bucket}</Name><IsTruncated>false</IsTruncated>{rows}</ListBucketResult>"
        return 200, {"content-type": "application/xml"}, xml.encode()


@lru_cache(maxsize=1024)  # an object is hashed once, not with every range of it
def _etag(data: bytes) -> str:
    return f'"{hashlib.md5(data).hexdigest()}"'


@contextmanager
def serve_memory(store: MemoryS3, faults: Faults | None = None) -> Iterator[str]:
    """The endpoint of a store in memory, behind `faults`, while the block runs."""
    faults = faults or Faults()

    async def connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while (request := await _request(reader)) is not None:
            (method, target, headers), body = request
            status, more, data = store.answer(method, target, headers, body)
            size = len(data) if status != 304 else 0
            lines = "".join(f"{key}: {value}\r\n" for key, value in more.items())
            head = f"HTTP/1.1 {status} x\r\n{lines}content-length: {size}\r\n\r\n".encode()
            if not await faults.answer(writer, head, b"" if method == "HEAD" else data):
                return

    with _serving(connection) as endpoint:
        yield endpoint


@contextmanager
def proxy(upstream: str, faults: Faults, without: str = "") -> Iterator[str]:
    """The endpoint of a proxy before `http://host:port`, `faults`; the Host line is kept, so signatures stay valid.

    Args:
        without: a header of requests that is left out.
    """
    unwanted = re.compile(rb"(?i)\r\n%b:[^\r]*" % without.encode()) if without else None
    host, port = urlsplit(upstream).hostname, urlsplit(upstream).port

    async def connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        up_reader, up_writer = await asyncio.open_connection(host, port, limit=1 << 20)
        try:
            while (raw := await _raw_request(reader)) is not None:
                asked = asyncio.get_running_loop().time()
                up_writer.write(unwanted.sub(b"", raw, count=1) if unwanted else raw)
                await up_writer.drain()
                head, body = await _response(up_reader, raw.startswith(b"HEAD "))
                if not await faults.answer(writer, head, body, asked):
                    return
        finally:
            up_writer.close()

    with _serving(connection) as endpoint:
        yield endpoint


Connection = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Coroutine[Any, Any, None]]


@contextmanager
def _serving(connection: Connection) -> Iterator[str]:
    """A server in a thread of its own, on a free port of loopback."""
    loop, open_connections = asyncio.new_event_loop(), set()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        open_connections.add(task)  # the loop itself only has weak references
        try:
            await connection(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass  # the other side went away, or the server ends
        finally:
            writer.close()
            open_connections.discard(task)

    server = loop.run_until_complete(asyncio.start_server(handle, "127.0.0.1", 0, limit=1 << 20, backlog=500))
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:

        async def stop() -> None:
            server.close()
            tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(stop(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()


async def _raw_request(reader: asyncio.StreamReader) -> bytes | None:
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError:
        return None
    return head + await reader.readexactly(int(_headers(head).get("content-length", "0")))


async def _request(reader: asyncio.StreamReader) -> tuple[Head, bytes] | None:
    raw = await _raw_request(reader)
    if raw is None:
        return None
    head, _, body = raw.partition(b"\r\n\r\n")
    method, target, _ = head.split(b"\r\n", 1)[0].decode().split(" ")
    return (method, target, _headers(head)), body


async def _response(reader: asyncio.StreamReader, is_head: bool) -> tuple[bytes, bytes]:
    """Head and body of an answer; a chunked one is sent on with its length."""
    head = await reader.readuntil(b"\r\n\r\n")
    headers, status = _headers(head), head.split(b" ", 2)[1]
    if is_head or status in (b"204", b"304"):
        return head, b""
    if headers.get("transfer-encoding") != "chunked":
        return head, await reader.readexactly(int(headers.get("content-length", "0")))
    body = b""
    while size := int((await reader.readuntil(b"\r\n")).partition(b";")[0], 16):
        body += (await reader.readexactly(size + 2))[:-2]
    await reader.readuntil(b"\r\n")
    kept = [line for line in head.split(b"\r\n") if line and not line.lower().startswith(b"transfer-encoding")]
    return b"\r\n".join([*kept, b"content-length: %d" % len(body)]) + b"\r\n\r\n", body


def _headers(head: bytes) -> dict[str, str]:
    lines = head.decode("latin-1").split("\r\n")[1:]
    return {key.lower(): value.strip() for key, _, value in (line.partition(":") for line in lines if line)}
