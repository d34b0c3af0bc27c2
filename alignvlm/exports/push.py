"""An export to a repository of the Hugging Face Hub: what would go there, and sending it as one commit."""

from __future__ import annotations

import fnmatch
import os
import re
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignvlm.errors import UserError
from alignvlm.exports.card import CARD, card_for
from alignvlm.exports.folder import ADAPTER, check_export
from alignvlm.progress import Progress
from data_pipeline.masking import mask

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, HfApi

REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
STALE = ("*.safetensors", "*.safetensors.index.json", f"{ADAPTER}/*")
"""Files of weights and adapters that are in the repository and not in the export: they might be loaded instead."""
MEGABYTE = 2**20


@dataclass(frozen=True)
class Push:
    """An export on its way to the Hub."""

    folder: Path
    repository: str
    """ORGANISATION/NAME."""
    private: bool = False
    """Create the repository as a private one; one that exists must be private then."""
    revision: str | None = None
    """A branch, created where it does not exist; None is `main`."""

    def __post_init__(self) -> None:
        from huggingface_hub.utils import HFValidationError, validate_repo_id

        if not REPOSITORY.fullmatch(self.repository):
            raise UserError(f"--push {self.repository!r} is not ORGANISATION/NAME, such as my-lab/invoices-1b")
        try:
            validate_repo_id(self.repository)
        except HFValidationError as error:
            raise UserError(f"--push {self.repository!r} is no name of a repository: {error}") from error

    @cached_property
    def files(self) -> dict[str, int]:
        """Name in the repository -> bytes; hidden files and what Python cached stay here."""
        found = {}
        for path in sorted(self.folder.rglob("*")):
            name = path.relative_to(self.folder)
            if path.is_file() and not any(part.startswith((".", "__")) for part in name.parts):
                found[name.as_posix()] = path.stat().st_size
        return found

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(self.files.values())

    @property
    def _again(self) -> str:
        """What to do when a push broke off."""
        command = ["alignvlm", "export", str(self.folder), "--push", self.repository]
        command += ["--private"] * self.private + (["--revision", self.revision] if self.revision else [])
        return f"`{shlex.join(command)}` goes on with what the Hub lacks"

    @property
    def target(self) -> str:
        """The repository and its branch, for people."""
        return self.repository + (f"@{self.revision}" if self.revision else "")

    def check(self) -> None:
        """Make sure that the folder is whole and that there is a token; asks nobody.

        Raises:
            UserError: it holds no export, or there is no token. DataError: a file of it is missing or damaged.
        """
        check_export(self.folder)
        check_token()

    def send(self) -> str:
        """Create repository and branch where they are missing, upload, commit; returns the commit's address.

        A model card that is there already stays. Weights that only the repository has are deleted.

        Raises:
            UserError: the Hub refuses, or is not reached. Sent again, what it has already is not uploaded again.
        """
        self.check()
        with self._explained():
            from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

            api = HfApi(os.environ.get("HF_ENDPOINT"))
            there = self._prepare(api)
            adding = [
                CommitOperationAdd(name, self._content(name))
                for name in self.files
                if name != CARD or name not in there
            ]
            stale = [n for n in there - self.files.keys() if any(fnmatch.fnmatchcase(n, glob) for glob in STALE)]
            self._upload(api, adding)
            commit: Any = api.create_commit(
                self.repository,
                [*adding, *(CommitOperationDelete(name) for name in sorted(stale))],
                commit_message="Model of alignvlm",
                revision=self.revision,
            )
            return str(commit.commit_url)

    def _prepare(self, api: HfApi) -> set[str]:
        """Names of the files that the branch has, after repository and branch were created where there were none."""
        from huggingface_hub.errors import RepositoryNotFoundError

        try:
            info = api.repo_info(self.repository)
        except RepositoryNotFoundError:
            api.create_repo(self.repository, private=self.private or None, exist_ok=True)
        else:
            if self.private and not info.private:
                raise UserError(
                    f"{self.repository} exists and is public: make it private on the Hub, or leave --private out"
                )
        if self.revision:
            api.create_branch(self.repository, branch=self.revision, exist_ok=True)
        return set(api.list_repo_files(self.repository, revision=self.revision))

    def _content(self, name: str) -> str | bytes:
        """A file's path, or the model card with the repository's name in its code."""
        path = self.folder / name
        return card_for(path.read_text(encoding="utf-8"), self.repository).encode() if name == CARD else str(path)

    def _upload(self, api: HfApi, adding: list[CommitOperationAdd]) -> None:
        """The large files, one after the other; the small ones are part of the commit.

        On a terminal the client draws the progress within each file.
        """
        title = f"push to {self.target} (MB)"
        with Progress(title, -(-self.size // MEGABYTE), enabled=not sys.stderr.isatty()) as bar:
            sent = 0
            for operation in adding:
                api.preupload_lfs_files(self.repository, [operation], revision=self.revision, free_memory=False)
                sent += self.files[operation.path_in_repo]
                bar.advance(sent // MEGABYTE - bar.done)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """The client's errors as ours."""
        from huggingface_hub import errors

        try:
            yield
        except errors.OfflineModeIsEnabled as error:
            raise UserError(f"{self.target}: HF_HUB_OFFLINE is set; unset it to push") from error
        # The client says of some failures, and its uploader of nearly all, nothing but RuntimeError or ValueError.
        except (errors.HTTPError, OSError, RuntimeError, ValueError) as error:
            raise UserError(f"{self.target}: {self._reason(error)}") from error

    def _reason(self, error: Exception) -> str:
        """Why a push failed, and the way out."""
        from huggingface_hub import errors, get_token

        if isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception):
            error = error.__cause__  # of a thread that uploads
        answer = error if isinstance(error, errors.HfHubHTTPError) else None
        said = (answer and answer.server_message) or str(error) or type(error).__name__
        said = mask(" ".join(said.split()), get_token() or "")
        if answer is None:
            # The uploader calls a refusal a network error too, and says the status.
            is_network = isinstance(error, (errors.HTTPError, ConnectionError)) and "HTTP status" not in said
            return f"{'the Hub is not reached' if is_network else 'the push broke off'} ({said}); {self._again}"
        status = answer.response.status_code
        needs_rights = status in (401, 403, 404)
        hint = "the token needs to write there (hf auth whoami)" if needs_rights else self._again
        return f"the Hub answers {status}: {said}; {hint}"


def check_token() -> None:
    """Raises UserError where huggingface_hub knows no token."""
    from huggingface_hub import get_token

    if not get_token():
        raise UserError("no token for the Hugging Face Hub: set HF_TOKEN to one that may write, or run `hf auth login`")
