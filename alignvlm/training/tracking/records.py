"""The lines of metrics.jsonl that a tracker has not had yet."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from data_pipeline.files import read_new_lines


class Records:
    """Reads on where it stopped; a file that was rewritten is read from its beginning again."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._inode, self._end = 0, 0
        self.unsent: dict[str, list[dict[str, Any]]] = {}
        """Stage -> its lines, in the order of the file; who has sent some takes them out."""

    def read(self) -> None:
        """Add new lines to what is unsent."""
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            inode = os.fstat(file.fileno()).st_ino
            if inode != self._inode:
                self._inode, self._end, self.unsent = inode, 0, {}
            lines, self._end = read_new_lines(file, self._end, {"stage": str, "step": int})
        for line in lines:
            self.unsent.setdefault(line["stage"], []).append(line)

    def take(self, stage: str) -> dict[int, dict[str, Any]]:
        """Step -> line of what a stage has unsent, taken out; of two lines of a step the last one counts."""
        return {line["step"]: line for line in self.unsent.pop(stage, [])}

    def forget(self) -> None:
        """Read everything anew the next time."""
        self._inode, self._end = 0, 0
