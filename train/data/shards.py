"""The files of one shard of tokenised documents, read through memory maps and verified.

    shard-00012.tokens    ids, raw uint16 or uint32, block after block in the order in which they were stored
    shard-00012.docs      for each document its digest (uint64) and its length (uint32), likewise
    shard-00012.jsonl     the manifest: a line for each block, with the places of its tokens and documents and
                          their sha256; a line with the number of blocks, once the shard was read to its end

Files only grow. A block counts once its line is written, and a later line for the same block wins. Each line
has a seal, a sha256 of itself, of the number of the shard and of what is cached, so that a changed digit or
the file of another shard is found. What a killed process left half written, and what follows a damaged line,
is cut off by the next process that writes the shard (under flock).
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from smollm2.file_lock import lock
from train.data.tokenise import TokenBlock

DOCUMENT = np.dtype([("digest", "<u8"), ("length", "<u4")])


@dataclass(frozen=True)
class Entry:
    """Where a block lies: first byte and count of its tokens and of its documents."""

    tokens: int
    token_count: int
    docs: int
    doc_count: int
    sha256: str


class Shard:
    """Reads the three files of a shard, which may grow meanwhile.

    damage: what is wrong with the manifest, in words; None if nothing is. What follows there is not read.
    """

    def __init__(self, stem: Path, dtype: np.dtype, identity: str) -> None:
        """identity: what is cached; a manifest of anything else counts as damaged."""
        self.stem, self.dtype, self._seal = stem, dtype, Seal(identity, stem)
        self.damaged: set[Entry] = set()
        self.damage: str | None = None
        self._blocks: int | None = None
        self._entries: dict[int, Entry] = {}
        self._read_to = self._lines = 0
        self._maps: dict[str, np.ndarray] = {}

    def path(self, suffix: str) -> Path:
        return self.stem.with_name(self.stem.name + suffix)

    @property
    def blocks(self) -> int | None:
        self._refresh()
        return self._blocks

    def entry(self, block: int) -> Entry | None:
        if block not in self._entries or self._entries[block] in self.damaged:
            self._refresh()
        entry = self._entries.get(block)
        return None if entry in self.damaged else entry

    def stored(self) -> list[int]:
        self._refresh()
        return sorted(self._entries)

    def read(self, entry: Entry) -> TokenBlock | None:
        """The documents of an entry; None if they are not what was stored."""
        tokens = self._slice(".tokens", self.dtype, entry.tokens, entry.token_count)
        docs = self._slice(".docs", DOCUMENT, entry.docs, entry.doc_count)
        if tokens is None or docs is None or _checksum(tokens, docs) != entry.sha256:
            return None
        return TokenBlock(tokens, docs["length"].astype(np.int64), docs["digest"].astype(np.uint64))

    def _slice(self, suffix: str, dtype: np.dtype, offset: int, count: int) -> np.ndarray | None:
        end = offset + count * dtype.itemsize
        if count == 0:
            return np.empty(0, dtype)
        try:
            if suffix not in self._maps or len(self._maps[suffix]) < end:
                self._maps[suffix] = np.memmap(self.path(suffix), np.uint8, mode="r")
        except (OSError, ValueError):  # not there, or empty
            return None
        data = self._maps[suffix]
        return np.frombuffer(data, dtype, count, offset) if len(data) >= end else None

    def _refresh(self) -> None:
        """Takes in the lines that were added to the manifest since."""
        try:
            with self.path(".jsonl").open("rb") as stream:
                if os.fstat(stream.fileno()).st_size <= self._read_to:
                    return
                stream.seek(self._read_to)
                self.damage = None
                for line in stream:
                    record = self._seal.opened(line)
                    if record is None:
                        self.damage = self._damage(line)
                        return
                    self._read_to += len(line)
                    self._lines += 1
                    if "block" in record:
                        place = *record["tokens"], *record["docs"], record["sha256"]
                        self._entries[record["block"]] = Entry(*place)
                    else:
                        self._blocks = record["blocks"]
        except OSError:  # not there, or nothing that can be read
            return

    def _damage(self, line: bytes) -> str | None:
        """What is wrong with a line that cannot be read; None for one that is still being written."""
        if not line.endswith(b"\n"):
            return None
        if b'"sha256"' in line and b'"seal"' not in line:
            return f"{self.stem.parent} was written by an earlier version; its blocks are tokenised again"
        what = f"line {self._lines + 1} is damaged or of another cache"
        return f"{self.path('.jsonl')}: {what}; the blocks from there on are tokenised again"


class Seal:
    """Writes the lines of a shard's manifest, and recognises them."""

    def __init__(self, identity: str, stem: Path) -> None:
        self._key = f"{identity}\n{stem.name}\n".encode(errors="backslashreplace")

    def line(self, record: dict[str, Any]) -> bytes:
        return json.dumps({**record, "seal": self._of(record)}).encode() + b"\n"

    def opened(self, line: bytes) -> dict[str, Any] | None:
        """What the line says; None unless it is one of this shard's, whole and as it was written."""
        try:
            record = json.loads(line)
            return record if line == self.line({k: v for k, v in record.items() if k != "seal"}) else None
        except (ValueError, AttributeError, RecursionError):
            return None

    def _of(self, record: dict[str, Any]) -> str:
        return hashlib.sha256(self._key + json.dumps(record).encode()).hexdigest()


def _checksum(tokens: np.ndarray, docs: np.ndarray) -> str:
    digest = hashlib.sha256(tokens.view(np.uint8).data)
    digest.update(docs.view(np.uint8).data)
    return digest.hexdigest()


class Locked(OSError):
    """Another process is writing the shard."""


class ShardWriter:
    """Appends to a shard that no other process writes meanwhile."""

    def __init__(self, stem: Path, dtype: np.dtype, identity: str) -> None:
        """Raises Locked, or OSError when the files cannot be written."""
        self.stem, self._seal = stem, Seal(identity, stem)
        paths = [stem.with_name(stem.name + suffix) for suffix in (".jsonl", ".tokens", ".docs")]
        self._files = [path.open("ab", buffering=0) for path in paths]
        try:
            self._lock()
            self._cut_torn_tail(dtype)
        except BaseException:
            self.close()
            raise

    def append(self, block: int, tokens: np.ndarray, lengths: np.ndarray, digests: np.ndarray) -> None:
        docs = np.empty(len(lengths), DOCUMENT)
        docs["digest"], docs["length"] = digests, lengths
        places = [self._write(1, tokens.view(np.uint8)), self._write(2, docs.view(np.uint8))]
        where = {"tokens": [places[0], len(tokens)], "docs": [places[1], len(docs)]}
        self.line({"block": block, **where, "sha256": _checksum(tokens, docs)})

    def line(self, record: dict[str, Any]) -> None:
        self._write(0, self._seal.line(record))

    def close(self) -> None:
        for file in reversed(self._files):  # the manifest, which holds the lock, last
            file.close()

    def _write(self, index: int, data: Any) -> int:
        """Appends all of data, or nothing: -> where it begins."""
        file, view = self._files[index], memoryview(data)
        begin = os.fstat(file.fileno()).st_size
        try:
            while len(view):
                view = view[file.write(view) :]
        except OSError:
            file.truncate(begin)
            raise
        return begin

    def _lock(self) -> None:
        try:
            if not lock(self._files[0].fileno()):
                raise OSError(0, "no file locks here")
        except BlockingIOError:
            raise Locked from None

    def _cut_torn_tail(self, dtype: np.dtype) -> None:
        """Cuts off what a killed process did not finish, half a line and data that no line names; and what
        follows a damaged line.
        """
        whole = 0
        ends = [0, 0]
        with open(self._files[0].name, "rb") as stream:
            for line in stream:
                record = self._seal.opened(line)
                if record is None:
                    break
                whole += len(line)
                if "block" in record:
                    (tokens, count), (docs, documents) = record["tokens"], record["docs"]
                    ends[0] = max(ends[0], tokens + count * dtype.itemsize)
                    ends[1] = max(ends[1], docs + documents * DOCUMENT.itemsize)
        for file, end in zip(self._files, (whole, *ends), strict=True):
            if os.fstat(file.fileno()).st_size > end:
                file.truncate(end)
