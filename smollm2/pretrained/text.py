"""Text that comes in files: prompts, chat templates, what perplexity scores."""

from __future__ import annotations

import codecs
from pathlib import Path

from smollm2.errors import LoadError

UTF16 = codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE  # UTF-32's begin with the same bytes, or with NUL


def read_text(path: Path) -> str:
    """The text of a file, see `decode_text`."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise LoadError(f"{path}: cannot be read ({error.strerror})") from None
    return decode_text(content, str(path))


def decode_text(content: bytes, name: str) -> str:
    """The text in the bytes of a file, without its byte order mark; line ends stay as they are.

    Raises LoadError, with the name and the line, for what is not UTF-8 and for a NUL, which only binary files
    and UTF-16 have.
    """
    content = content.removeprefix(codecs.BOM_UTF8)
    if content.startswith(UTF16):
        raise LoadError(f"{name}: expected text in UTF-8, got UTF-16; convert it: iconv -f UTF-16 -t UTF-8")
    try:
        text, wrong, what = content.decode("utf-8"), content.find(b"\0"), "a NUL byte, as in a binary file"
    except UnicodeDecodeError as error:
        text, wrong, what = "", error.start, f"the byte 0x{content[error.start]:02X} ({error})"
    if wrong >= 0:
        line = content.count(b"\n", 0, wrong) + 1
        raise LoadError(f"{name}, line {line}: expected text in UTF-8, got {what}")
    return text
