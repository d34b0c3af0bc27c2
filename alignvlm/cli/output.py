"""What a command says reaches any terminal, pipe or file: encodings, messages of one line, output without a reader."""

from __future__ import annotations

import errno
import io
import os
import re
import select
import sys

from data_pipeline.masking import mask

LASTING = frozenset(
    {
        errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST,
        errno.ENOTEMPTY, errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL, errno.ENXIO, errno.ENODEV,
        errno.ENOSPC, errno.EDQUOT, errno.EFBIG,
    }
)  # fmt: skip
"""Errors of the system that come again when the same command is started again: of permissions, names and space."""
PASSING = frozenset(
    {errno.EIO, errno.ESTALE, errno.EAGAIN, errno.EBUSY, errno.EINTR, errno.ECONNRESET, errno.ETIMEDOUT}
)
"""Errors of disks and networks that another start may not meet."""


def prepare_streams() -> None:
    """Make stdout and stderr escape what their encoding lacks, and give them a file when the shell has closed them."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 (lives as long as the process)
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def one_line(text: str) -> str:
    """The text in one line, without passwords and characters that steer a terminal."""
    joined = " ".join(filter(None, (line.strip() for line in mask(text).splitlines())))
    return re.sub(r"[\x00-\x1f\x7f-\x9f]", lambda match: f"\\x{ord(match[0]):02x}", joined)


def describe(error: OSError) -> str | None:
    """The error in one line when the user can mend it; None for what another attempt may not meet again."""
    if error.errno is None and type(error) is OSError:  # a library's own message, such as transformers' on weights
        return one_line(str(error))
    if error.errno not in LASTING:
        return None
    names = [os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, str | bytes)]
    return one_line(f"{' → '.join(names)}: {error.strerror}" if names else f"cannot write: {error.strerror}")


def output_is_gone() -> bool:
    """Whether stdout takes no more; what waits for it is dropped, so that the interpreter ends without a complaint."""
    try:
        sys.stdout.flush()
        watch = select.poll()
        watch.register(sys.stdout, 0)  # a pipe whose reader has left is reported whatever is asked
        gone = bool(watch.poll(0))
    except io.UnsupportedOperation:  # no file, as in a program that catches our output
        return False
    except OSError:
        gone = True
    if gone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return gone
