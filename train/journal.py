"""The files of a run that only grow, metrics.jsonl and samples.txt, and what a checkpoint counts on in them.

A checkpoint keeps the size and sha256 of both, as they were when it was taken. A run that continues from it
cuts them back to that: what was written afterwards is written again.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any


class Journal:
    """A text file that is appended to.

    A full disk does not end a training run: what could not be written waits, and goes out with a later text.
    error: why the last one could not be written, or None.
    """

    def __init__(self, path: Path) -> None:
        content = path.read_bytes() if path.is_file() else b""
        self._digest, self._size = hashlib.sha256(content), len(content)
        self._file = path.open("ab", buffering=0)
        self._waiting = b""
        self.error: OSError | None = None

    def write(self, text: str) -> None:
        self._waiting += text.encode(errors="replace")
        try:
            while self._waiting:
                count = self._file.write(self._waiting)
                self._digest.update(self._waiting[:count])
                self._size += count
                self._waiting = self._waiting[count:]
            self.error = None
        except OSError as error:
            self.error = error

    def mark(self) -> dict[str, Any]:
        """Size and sha256 of what is written so far."""
        return {"bytes": self._size, "sha256": self._digest.hexdigest()}

    def close(self) -> None:
        self._file.close()


BEGINNING = {"bytes": 0, "sha256": hashlib.sha256().hexdigest()}


def cut_back(path: Path, mark: dict[str, Any]) -> str | None:
    """Cuts a journal back to a mark, and a line that a full disk has torn with it. Returns what is wrong with
    a file that does not begin with what was marked, and leaves it as it is; else None.
    """
    content = path.read_bytes() if path.is_file() else b""
    size = mark["bytes"]
    if len(content) < size:
        return f"{path}: expected the {size:,} bytes that the checkpoint counts on, found {len(content):,}"
    if hashlib.sha256(content[:size]).hexdigest() != mark["sha256"]:
        return f"{path}: its first {size:,} bytes are not those that the checkpoint counts on"
    whole = content.rfind(b"\n", 0, size) + 1
    if whole < len(content):
        os.truncate(path, whole)
    return None
