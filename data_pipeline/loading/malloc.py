"""The C library's allocator in loader processes."""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


def keep_memory() -> None:
    """Keep freed memory in the process for the next image instead of returning it to the system. glibc only.

    By default glibc maps every block of some megabytes anew, so each decoded A4 page is written into fresh pages: their
    faults cost about half as much as the decoding itself (measured on two Xeon cores, 1240 x 1754 pixels).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_TRIM_THRESHOLD, 2**30)
        mallopt(_M_MMAP_THRESHOLD, 2**25)  # the largest that glibc takes
