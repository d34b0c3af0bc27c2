"""Secrets out of text: one function for whatever is printed, logged or written. Standard library only."""

from __future__ import annotations

import re

MASK = "***"
MIN_LENGTH = 4
"""A known secret that is shorter is not looked for in text: it would be found in every word."""

# A password ends at the last "@" before a blank: users write "@", "/" and "#" without their percent codes.
_PASSWORD = re.compile(r"([a-z][a-z0-9+.-]*:/{1,3}[^\s:@/?#]*):(?!\d+[/?#])\S*@", re.IGNORECASE)
_WITHOUT_SCHEME = re.compile(r"(?<![\w/:.+-])(?!mailto:)([a-z][\w.+-]*):[^\s/@:]+@(?=\w)(?!\d+\b(?!\.))", re.IGNORECASE)
_TOKEN_AS_USER = re.compile(r"(https?://)[^\s:@/?#]+@", re.IGNORECASE)
_QUERY = re.compile(
    r"([?&;#][^\s=&;#]*(?:token|pass|pwd|secret|key|sig|auth|cred|jwt|session|odbc_connect)[^\s=&;#]*=)[^\s&;#]*",
    re.IGNORECASE,
)


def mask(text: str, *known: str) -> str:
    """The text with `***` for the passwords and tokens of every URL in it, and for the `known` secrets.

    User names stay, except where HTTP has nothing else: a lone one is a token. Masking twice changes nothing.
    """
    for secret in sorted(known, key=len, reverse=True):
        if len(secret) >= MIN_LENGTH:
            text = text.replace(secret, MASK)
    text = _PASSWORD.sub(rf"\1:{MASK}@", text)
    text = _WITHOUT_SCHEME.sub(rf"\1:{MASK}@", text)
    text = _TOKEN_AS_USER.sub(rf"\1{MASK}@", text)
    return _QUERY.sub(rf"\1{MASK}", text)


def is_masked(url: str) -> bool:
    """Whether a URL was read from a file that keeps no secrets."""
    return MASK in url
