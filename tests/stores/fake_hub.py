"""A hub on loopback: commits, trees, and files that lie here or, as the real Hub's large ones, on another server."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import unquote, urlsplit

from tests.stores.servers import Answer, MemoryS3, serve_memory

TOKEN = "hf_test-token-0123456789"


class FakeHub:
    """One private dataset `org/name`: its branch `main`, and commits as folders of files, name -> bytes."""

    def __init__(self) -> None:
        self.commits: dict[str, dict[str, bytes]] = {}
        self.main = ""
        self.files = MemoryS3()
        """Where tars lie: a store of content by its hash."""
        self.files_at = ""
        self.log: list[tuple[str, str]] = []
        self.keys_seen: list[str] = []

    def commit(self, files: dict[str, bytes]) -> str:
        """Put files over those of `main`; the new commit."""
        everything = {**self.commits.get(self.main, {}), **files}
        number = hashlib.sha1(repr(sorted((name, _hash(data)) for name, data in everything.items())).encode())
        self.main = number.hexdigest()
        self.commits[self.main] = everything
        self.files.objects |= {f"files/{_hash(data)}": data for data in everything.values()}
        return self.main

    def answer(self, method: str, target: str, headers: dict[str, str], body: bytes) -> Answer:
        path = unquote(urlsplit(target).path)
        self.log.append((method, path))
        if headers.get("authorization") != f"Bearer {TOKEN}":
            return 401, {"x-error-code": "GatedRepo", "x-error-message": "Access is restricted."}, b""
        base = "/api/datasets/org/name/"
        if path.startswith(f"{base}revision/"):
            commit = self._commit(path.removeprefix(f"{base}revision/"))
            if commit is None:
                return 404, {"x-error-code": "RevisionNotFound"}, b""
            return 200, {"content-type": "application/json"}, json.dumps({"id": "org/name", "sha": commit}).encode()
        if path.startswith(f"{base}tree/"):
            revision, _, folder = path.removeprefix(f"{base}tree/").partition("/")
            return self._tree(self.commits[self._commit(revision) or ""], folder)
        if path.startswith("/datasets/org/name/resolve/"):
            revision, _, name = path.removeprefix("/datasets/org/name/resolve/").partition("/")
            return self._file(self.commits[self._commit(revision) or ""], name, method, headers)
        return 404, {"x-error-code": "RepoNotFound"}, b""

    def _commit(self, revision: str) -> str | None:
        commit = self.main if revision == "main" else revision
        return commit if commit in self.commits else None

    def _tree(self, files: dict[str, bytes], folder: str) -> Answer:
        inside = [
            (name, data) for name, data in sorted(files.items()) if name.startswith(f"{folder}/" if folder else "")
        ]
        if not inside:
            return 404, {"x-error-code": "EntryNotFound"}, b""
        rows = []
        for name, data in inside:
            lfs = {"oid": _hash(data), "size": len(data), "pointerSize": 130}
            row = {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
            rows.append({**row, "lfs": lfs} if name.endswith(".tar") else row)
        return 200, {"content-type": "application/json"}, json.dumps(rows).encode()

    def _file(self, files: dict[str, bytes], name: str, method: str, headers: dict[str, str]) -> Answer:
        data = files.get(name)
        if data is None:
            return 404, {"x-error-code": "EntryNotFound"}, b""
        if name.endswith(".tar"):
            return 302, {"location": f"{self.files_at}/files/{_hash(data)}?X-Signature=secret-of-the-link"}, b""
        here = MemoryS3()
        here.objects["x"] = data
        return here.answer(method, "/x", headers, b"")


class _Files(MemoryS3):
    """The server of large files; it never gets the Hub's token."""

    def __init__(self, hub: FakeHub) -> None:
        super().__init__()
        self.objects, self._hub = hub.files.objects, hub

    def answer(self, method: str, target: str, headers: dict[str, str], body: bytes) -> Answer:
        self._hub.keys_seen += [headers["authorization"]] if "authorization" in headers else []
        self._hub.log.append((method, urlsplit(target).path))
        return super().answer(method, target, headers, body)


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@contextmanager
def fake_hub() -> Iterator[tuple[FakeHub, dict[str, str]]]:
    """A hub and the environment that finds it, while the block runs."""
    hub = FakeHub()
    with serve_memory(_Files(hub)) as files, serve_memory(hub) as endpoint:
        hub.files_at = files
        yield hub, {"HF_ENDPOINT": endpoint, "HF_TOKEN": TOKEN}
