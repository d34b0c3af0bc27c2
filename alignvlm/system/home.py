"""A home for libraries where this user has none: containers often run as users without a name or a home.

MLflow, Triton, DeepSpeed and PyTorch look for one when they are imported, and end with an error when there is none.
"""

from __future__ import annotations

import os
import pwd
import stat
import tempfile
from collections.abc import MutableMapping
from pathlib import Path

CACHES = ("TRITON_HOME", "TORCH_EXTENSIONS_DIR", "MPLCONFIGDIR")
"""What libraries write into a home and cannot do without; what they only read stays where it is."""
NAMES = ("LOGNAME", "USER", "LNAME", "USERNAME")
"""Where `getpass` looks for the user's name before it asks the system."""


def ensure_home(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set HOME to a folder of this user's for temporary files when it is missing; only the caches when it is read-only.

    A second call changes nothing.
    """
    home = os.path.expanduser("~")
    if not os.path.isdir(home):
        environment["HOME"] = _own_folder()
    elif not os.access(home, os.W_OK | os.X_OK):
        own = _own_folder()
        for name in CACHES:
            environment.setdefault(name, own)
    if not any(environment.get(name) for name in NAMES) and not _has_name():
        environment["USER"] = str(os.getuid())


def _own_folder() -> str:
    """A folder that only this user can enter, the same at every start."""
    folder = Path(tempfile.gettempdir()) / f"alignvlm-home-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022:
        return str(folder)
    return tempfile.mkdtemp(prefix="alignvlm-home-")  # someone else made it first


def _has_name() -> bool:
    try:
        pwd.getpwuid(os.getuid())
    except KeyError:
        return False
    return True
