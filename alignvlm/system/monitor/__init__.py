"""A small process beside every rank, which ends it when it stands still: no thread survives a held GIL or SIGSTOP.

The rank tells through shared memory what it is at (`heart.py`); the process (`watch.py`), which imports nothing but the
standard library, looks at it once a second, and the processes of all ranks tell each other (`peers.py`).
"""
