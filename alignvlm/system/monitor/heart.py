"""What a rank tells its monitor, through 4 KiB of shared memory: a few stores, and a look whether it is still there.

Both sides use this file. The rank never looks at a clock: its monitor sees when something has changed.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

SIZE = 4096
_BEATS, _LIMIT, _WAITING, _TEXT, _SETTING, _HUB = 0, 8, 16, 64, 2816, 3072
"""Where each field begins; texts have their length in front."""


class Limit(NamedTuple):
    """How long a section may go without progress."""

    seconds: float
    """0: for ever."""
    setting: str
    """What sets it, for the user: "resilience.save_minutes is 7"."""


FOR_EVER = Limit(0.0, "")


class Heart:
    """A rank's side."""

    def __init__(
        self,
        limits: Mapping[str, Limit] | None = None,
        file: int = -1,
        look: Callable[[], None] = lambda: None,
        port: int = 0,
    ) -> None:
        """Tell a monitor that has the same file; without one it is memory that nobody reads.

        Args:
            limits: of each section; those that it lacks may go on for ever.
            look: called with all progress, to see that the monitor is there.
            port: where it hears those of the other ranks, if it is rank 0's.
        """
        self.limits = dict(limits or {})
        self.port = port
        self._look = look
        self._memory = mmap.mmap(file, SIZE)
        self._beats = 0
        self._section = ""

    def enter(self, section: str) -> None:
        """From now on the rank is in this section."""
        self._section = section
        self.note("")

    def note(self, text: str) -> None:
        """Say in words what it is at within its section; this is progress."""
        limit = self.limits.get(self._section, FOR_EVER)
        struct.pack_into("<d", self._memory, _LIMIT, limit.seconds)
        _write(self._memory, _SETTING, limit.setting, _HUB - _SETTING)
        _write(self._memory, _TEXT, f"{self._section}\n{text}", _SETTING - _TEXT)
        self.beat()

    def beat(self) -> None:
        """It has made progress."""
        self._beats += 1
        struct.pack_into("<Q", self._memory, _BEATS, self._beats)
        self._look()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """It waits for other ranks meanwhile, and may do so as long as one of them makes progress."""
        before = self._memory[_WAITING]
        self._memory[_WAITING] = 1
        try:
            yield
        finally:
            self._memory[_WAITING] = before

    def join(self, host: str, port: int, token: str) -> None:
        """Tell the monitor where that of rank 0 listens, and the word by which they know each other."""
        _write(self._memory, _HUB, f"{host} {port} {token}", SIZE - _HUB)


class Pulse:
    """A monitor's side of the same memory."""

    def __init__(self, file: int) -> None:
        self._memory = mmap.mmap(file, SIZE)

    @property
    def beats(self) -> int:
        """Changes with all that the rank does."""
        return struct.unpack_from("<Q", self._memory, _BEATS)[0]

    @property
    def limit(self) -> float:
        """Seconds that it may go without progress; 0: for ever."""
        return struct.unpack_from("<d", self._memory, _LIMIT)[0]

    @property
    def setting(self) -> str:
        """What sets the limit."""
        return _read(self._memory, _SETTING)

    @property
    def waiting(self) -> bool:
        """Whether it waits for other ranks."""
        return bool(self._memory[_WAITING])

    @property
    def text(self) -> tuple[str, str]:
        """Its section, and what it is at there."""
        section, _, text = _read(self._memory, _TEXT).partition("\n")
        return section, text

    @property
    def hub(self) -> tuple[str, int, str] | None:
        """Host, port and token of rank 0's monitor; None while there is only one rank or they have not met."""
        words = _read(self._memory, _HUB).split(" ")
        return (words[0], int(words[1]), words[2]) if len(words) == 3 else None


def _write(memory: mmap.mmap, place: int, text: str, room: int) -> None:
    data = text.encode(errors="replace")[: room - 4]
    struct.pack_into("<I", memory, place, 0)
    memory[place + 4 : place + 4 + len(data)] = data
    struct.pack_into("<I", memory, place, len(data))


def _read(memory: mmap.mmap, place: int) -> str:
    (length,) = struct.unpack_from("<I", memory, place)
    return memory[place + 4 : place + 4 + min(length, SIZE)].decode(errors="replace")
