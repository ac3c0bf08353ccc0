"""The standard streams of a command: closed, full, of another encoding or without a reader, they end no work
in silence.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from typing import Any, TextIO


class StandardStream:
    """A text stream that remembers, as `failure`, the first error of the operating system.

    needed: the text is what the command was asked for, so that the error is raised. Otherwise it is
    swallowed. Either way what is written afterwards goes nowhere. Characters outside the stream's encoding
    become "?".
    """

    def __init__(self, stream: TextIO, *, needed: bool) -> None:
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="replace")
        self.stream, self.needed = stream, needed
        self.failure: OSError | None = None

    def write(self, text: str) -> int:
        try:
            self.stream.write(text)
        except OSError as error:
            self._fail(error)
        return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except OSError as error:
            self._fail(error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def _fail(self, error: OSError) -> None:
        self.failure = self.failure or error
        # What waits in the buffer is written once more when Python exits: into something that accepts it.
        with contextlib.suppress(OSError), open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), self.stream.fileno())
        if self.needed:
            raise error


def open_missing() -> None:
    """Opens the standard streams that the command was started without (`<&-`, `>&-`).

    Otherwise the next file to be opened takes the number of the missing one, and what a library prints goes
    into that file. stdin is then empty, stderr goes nowhere, and stdout is one that cannot be written:
    whoever asks for text there learns that it is lost.
    """
    for name, flags in (("stdin", os.O_RDONLY), ("stdout", os.O_RDONLY), ("stderr", os.O_WRONLY)):
        if getattr(sys, name) is None:
            mode = "r" if name == "stdin" else "w"
            setattr(sys, name, open(os.open(os.devnull, flags), mode, encoding="utf-8"))
