"""What lies in the cache folder, and how it is removed.

Only what this project writes there is recognised, by its name; other files are neither listed nor removed,
whatever SMOLLM2_CACHE points at. A symbolic link is removed itself, never what it leads to.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from smollm2.errors import LoadError
from smollm2.file_lock import lock
from smollm2.pretrained.cache import LOCK, MANIFEST, UNFINISHED, key_of_copies, looks_whole, sweep, unfinished
from smollm2.pretrained.files import read_json

KINDS = {
    "model": "GGUF files, converted",
    "copy": "weights in another dtype, or quantised",
    "compiled": "decode steps of the CPU",
    "tokens": "tokenised documents",
    "history": "what was typed in chats",
    "bench": "what measurements beside other libraries need",
    "unfinished": "what killed processes left",
}
_ENTRY = re.compile(r"(.+)-([0-9a-f]{12})-[0-9a-f]{12}")  # smollm2/pretrained/cache.py
_COPY = re.compile(r"(b?float\d+|int8-.*|int4-.*)")
_STEP = re.compile(r"decode_step-.*\.(library|sha256)")
_TOKENS = re.compile(r".*-[0-9a-f]{8}")  # train/data/source_record.py
_BENCH = re.compile(r"[0-9a-f]{16}\.\w+\.gguf|litgpt-venv")


@dataclass(frozen=True)
class Entry:
    """One thing that can be removed. size: bytes; changed: seconds since 1970."""

    kind: str
    name: str  # below the cache folder
    paths: tuple[Path, ...]
    size: int
    changed: float
    source: str | None = None  # what it was made from, where that was recorded
    parent: str | None = None  # the name of the entry that it was made from
    state: str = ""  # "damaged", "in use" by a running process, "link"


def contents(root: Path) -> list[Entry]:
    """Everything in the cache folder `root`, copies behind what they were made from. Raises LoadError for a
    folder that cannot be read.
    """
    try:
        found = sorted(root.iterdir()) if root.is_dir() else []
        return _ordered([entry for path in found for entry in _entries(path)])
    except OSError as error:
        raise LoadError(f"{root}: cannot be read ({error.strerror})") from None


def _entries(path: Path) -> Iterator[Entry]:
    """What a file or folder directly in the cache holds."""
    name, is_folder = path.name, path.is_dir()
    below = sorted(path.iterdir()) if is_folder and not path.is_symlink() else []
    if name.startswith(UNFINISHED) and is_folder and not path.is_symlink():
        yield _entry("unfinished", name, (path,), state="in use" if _is_locked(path / LOCK) else "")
    elif (match := _ENTRY.fullmatch(name)) and is_folder:
        kind = "copy" if _COPY.fullmatch(match[1]) else "model"
        yield _entry(kind, name, (path,), _source(path), "" if looks_whole(path) else "damaged")
    elif name == "chat_history":
        yield _entry("history", name, (path,))
    elif name in ("compiled", "bench") and is_folder:
        pattern = _STEP if name == "compiled" else _BENCH
        if parts := tuple(part for part in below if pattern.fullmatch(part.name)):
            yield _entry(name, name, parts)
    elif name == "tokens" and is_folder:
        for source in below:
            if _TOKENS.fullmatch(source.name) and source.is_dir():
                used = any(map(_is_locked, source.glob("*/*/shard-*.jsonl")))
                what = next((_source(record) for record in sorted(source.glob("*/source.json"))), None)
                yield _entry("tokens", f"{name}/{source.name}", (source,), what, "in use" if used else "")
    if path.is_symlink() and name in ("compiled", "bench", "tokens"):
        yield _entry(name, name, (path,))


def _entry(
    kind: str, name: str, paths: tuple[Path, ...], source: str | None = None, state: str = ""
) -> Entry:
    """With the size of all files below, and the newest of their times; links are not followed."""
    places = [place for path in paths for place in (path, *_below(path))]
    stats = [place.lstat() for place in places]
    size = sum(found.st_size for found in stats if stat.S_ISREG(found.st_mode))
    if any(path.is_symlink() for path in paths):
        state = "link"
    return Entry(kind, name, paths, size, max(found.st_mtime for found in stats), source, None, state)


def _below(path: Path) -> Iterator[Path]:
    if path.is_dir() and not path.is_symlink():
        for folder, folders, files in os.walk(path):  # follows no links
            yield from (Path(folder) / name for name in (*folders, *files))


def _source(path: Path) -> str | None:
    """What the record of an entry, or of tokenised documents, says that it was made from."""
    is_entry = path.is_dir()
    with contextlib.suppress(LoadError, OSError):
        said = read_json(path / MANIFEST if is_entry else path).get("source" if is_entry else "identity")
        return said if isinstance(said, str) else None
    return None


def _is_locked(path: Path) -> bool:
    """Whether a running process has locked a file."""
    try:
        with path.open("r+b") as file:
            lock(file.fileno())
    except BlockingIOError:
        return True
    except OSError:  # not there, or not ours
        return False
    return False


def _ordered(entries: Sequence[Entry]) -> list[Entry]:
    """The largest model first, and behind each entry those that were made from it."""
    keys = {key_of_copies(entry.paths[0]): entry.name for entry in entries if entry.kind == "model"}
    marked = []
    for entry in entries:
        match = _ENTRY.fullmatch(entry.name)
        parent = keys.get(match[2]) if match else None
        marked.append(entry if parent is None else replace(entry, parent=parent))
    order = {kind: index for index, kind in enumerate(KINDS)}
    heads = [entry for entry in marked if entry.parent is None]
    heads.sort(key=lambda entry: (order[entry.kind], -total(entry, marked), entry.name))
    return [one for head in heads for one in (head, *copies(head, marked))]


def copies(entry: Entry, entries: Sequence[Entry]) -> list[Entry]:
    """The entries that were made from this one."""
    return [one for one in entries if one.parent == entry.name]


def total(entry: Entry, entries: Sequence[Entry]) -> int:
    """Bytes of an entry and of its copies."""
    return sum(one.size for one in (entry, *copies(entry, entries)))


def remove(root: Path, entry: Entry) -> bool:
    """Removes an entry of the cache folder `root`; False where a running process is making or writing it.

    It vanishes at once, by a renaming: another process finds all of it or nothing, and what it has open or
    mapped stays until it closes it. Raises LoadError where the entry cannot be removed.
    """
    if entry.kind == "unfinished":
        sweep(root)
        return not os.path.lexists(entry.paths[0])
    if entry.kind == "tokens" and any(map(_is_locked, entry.paths[0].glob("*/*/shard-*.jsonl"))):
        return False
    try:
        with unfinished(root) as grave:
            for index, path in enumerate(entry.paths):
                with contextlib.suppress(FileNotFoundError):  # another process was faster
                    path.rename(grave / f"removed-{index}")
        if (parent := entry.paths[0].parent) != root:
            with contextlib.suppress(OSError):  # not empty
                parent.rmdir()
    except OSError as error:
        raise LoadError(f"{root / entry.name}: cannot be removed ({error.strerror})") from None
    return True
