"""The one exception for users' mistakes: the CLI prints its message as one line and exits with code 2."""

from __future__ import annotations


class UserError(Exception):
    """Something the user can mend; the message names the file, the key, the value and the way out."""
