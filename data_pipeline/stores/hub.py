"""Folders of repositories on the Hugging Face Hub: where their files are read, and which there are at one commit.

The only module of this package that imports huggingface_hub. Files themselves are read by remote.py, as from any HTTP
server: the Hub answers ranges, or says which server does.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING
from urllib.parse import quote, unquote

from data_pipeline.errors import DataError, LoadError

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_URL = re.compile(
    r"hf://(datasets|models|spaces)/([^/@]+/[^/@]+)(?:@(refs/convert/[^/]+|refs/pr/\d+|[^/]+))?(?:/(.*))?",
    re.IGNORECASE,
)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_held: dict[str, str] | None = None


@dataclass(frozen=True)
class HubFolder:
    """A folder of a repository at a revision: a branch, a tag or a commit."""

    kind: str
    """datasets, models or spaces."""
    repository: str
    revision: str
    folder: str
    """Empty: the whole repository."""

    @property
    def branch(self) -> str:
        """What moves: the repository and its revision."""
        return f"{self.kind}/{self.repository}@{self.revision}"

    @property
    def url(self) -> str:
        return f"hf://{self.kind}/{self.repository}@{quote(self.revision, safe='')}/{self.folder}".rstrip("/")


class HubAccessError(LoadError):
    """The repository does not exist, or not for whom asks."""


class HubBusyError(DataError):
    """The Hub did not answer, or not as it should: worth another try."""


def parse(url: str) -> HubFolder:
    """The parts of a URL `hf://datasets/ORGANISATION/NAME[@REVISION][/FOLDER]`. Raises DataError for others."""
    found = _URL.fullmatch(url)
    if found is None:
        raise DataError(f"{url!r} is not hf://datasets/ORGANISATION/NAME[@REVISION][/FOLDER]")
    kind, repository, revision, folder = found.groups()
    return HubFolder(kind.lower(), repository, unquote(revision or "main"), (folder or "").strip("/"))


def address(url: str) -> tuple[str, dict[str, str]]:
    """The HTTP folder in which the files of a URL are read, and the headers of every request there."""
    from huggingface_hub import get_token

    at, token = parse(url), get_token()
    kind = "" if at.kind == "models" else f"{at.kind}/"
    folder = f"{_endpoint()}/{kind}{at.repository}/resolve/{quote(at.revision, safe='')}/{quote(at.folder)}"
    return folder.rstrip("/"), {"authorization": f"Bearer {token}"} if token else {}


def _endpoint() -> str:
    """The Hub's address by the environment of now; huggingface_hub keeps that of its import, also across forks."""
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


@contextmanager
def held() -> Iterator[dict[str, str]]:
    """While the block runs, this process reads each branch and tag at one commit.

    Gives them: `branch` of a folder -> the commit that it was when it was first looked up, those of a block around this
    one among them. Those of another process may be added, before any is looked up here.
    """
    global _held
    before, _held = _held, dict(_held or {})
    try:
        yield _held
    finally:
        _held = before


def held_commits() -> dict[str, str]:
    """`branch` of a folder -> the commit at which this process reads it, of those that it has looked up."""
    return dict(_held or {})


def at_commit(url: str) -> str:
    """The URL with the commit that is held for its revision, or as it is."""
    at = parse(url)
    return replace(at, revision=(_held or {}).get(at.branch, at.revision)).url


def hold(url: str, pinned: str) -> None:
    """Note the URL with a commit that a URL was found to be, where commits are held."""
    if _held is not None:
        _held.setdefault(parse(url).branch, parse(pinned).revision)


async def tree(url: str) -> tuple[str, dict[str, tuple[int, str]]]:
    """The URL with the commit that its revision is now, and name -> (bytes, hash of the content) of its files."""
    return await asyncio.to_thread(_tree, parse(url))


def _tree(at: HubFolder) -> tuple[str, dict[str, tuple[int, str]]]:
    from huggingface_hub import HfApi, errors

    where = f"hf://{at.kind}/{at.repository}"
    try:
        return _look(HfApi(_endpoint()), at)
    except errors.OfflineModeIsEnabled as error:
        raise LoadError(f"{where}: HF_HUB_OFFLINE is set, and the Hub would have to be asked") from error
    except errors.RevisionNotFoundError as error:
        raise LoadError(f"{where}: there is no revision {at.revision!r}") from error
    except errors.RepositoryNotFoundError as error:  # also of those that are gated or private
        raise HubAccessError(f"{where}: there is no such repository, or it needs another token") from error
    except errors.HfHubHTTPError as error:
        status, said = error.response.status_code, str(error).strip().splitlines()[0]
        if status in (401, 403):
            raise HubAccessError(f"{where}: access is denied ({said})") from error
        if status < 500 and status not in (408, 425, 429):
            raise LoadError(f"{where}: {said}") from error
        raise HubBusyError(f"{where}: {said}") from error
    except (errors.HTTPError, OSError) as error:
        raise HubBusyError(f"{where}: {type(error).__name__}: {error}") from error


def _look(api: HfApi, at: HubFolder) -> tuple[str, dict[str, tuple[int, str]]]:
    from huggingface_hub import RepoFile
    from huggingface_hub.errors import EntryNotFoundError

    kind = at.kind.removesuffix("s")
    commit = at.revision
    if not _COMMIT.fullmatch(commit):
        commit = api.repo_info(at.repository, revision=at.revision, repo_type=kind).sha or at.revision
    pinned = HubFolder(at.kind, at.repository, commit, at.folder)
    try:
        entries = list(
            api.list_repo_tree(at.repository, at.folder or None, recursive=True, revision=commit, repo_type=kind)
        )
    except EntryNotFoundError:
        return pinned.url, {}
    prefix = f"{at.folder}/" if at.folder else ""
    files = [entry for entry in entries if isinstance(entry, RepoFile)]
    return pinned.url, {
        file.path.removeprefix(prefix): (file.size, file.lfs.sha256 if file.lfs else file.blob_id) for file in files
    }
