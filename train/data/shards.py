"""The files of one shard of tokenised documents, read through memory maps and verified.

    shard-00012.tokens    ids, raw uint16 or uint32, block after block in the order in which they were stored
    shard-00012.docs      for each document its digest (uint64) and its length (uint32), likewise
    shard-00012.jsonl     the manifest: a line for each block, with the places of its tokens and documents and
                          their sha256; a line with the number of blocks, once the shard was read to its end

Files only grow. A block counts once its line is written, and a later line for the same block wins. What a
killed process left half written is cut off by the next one that writes the shard (under flock).
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from train.data.tokenise import TokenBlock

BLOCK_KEYS = {"block", "tokens", "docs", "sha256"}  # of a block's line in the manifest
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
    """Reads the three files of a shard, which may grow meanwhile."""

    def __init__(self, stem: Path, dtype: np.dtype) -> None:
        self.stem, self.dtype = stem, dtype
        self.damaged: set[Entry] = set()
        self._blocks: int | None = None
        self._entries: dict[int, Entry] = {}
        self._read_to = 0
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
                for line in stream:
                    record = _parse(line)
                    if record is None:
                        return
                    self._read_to += len(line)
                    if "block" in record:
                        place = *record["tokens"], *record["docs"], record["sha256"]
                        self._entries[record["block"]] = Entry(*place)
                    else:
                        self._blocks = record["blocks"]
        except FileNotFoundError:
            return


def _parse(line: bytes) -> dict[str, Any] | None:
    """A manifest line; None for one that was not written to its end."""
    if not line.endswith(b"\n"):
        return None
    try:
        record = json.loads(line)
    except ValueError:
        return None
    if isinstance(record, dict) and (BLOCK_KEYS <= record.keys() or "blocks" in record):
        return record
    return None


def _checksum(tokens: np.ndarray, docs: np.ndarray) -> str:
    digest = hashlib.sha256(tokens.view(np.uint8).data)
    digest.update(docs.view(np.uint8).data)
    return digest.hexdigest()


class Locked(OSError):
    """Another process is writing the shard."""


class ShardWriter:
    """Appends to a shard that no other process writes meanwhile."""

    def __init__(self, stem: Path, dtype: np.dtype) -> None:
        """Raises Locked, or OSError when the files cannot be written."""
        self.stem = stem
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
        self._write(0, memoryview(json.dumps(record).encode() + b"\n"))

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
            import fcntl
        except ModuleNotFoundError:
            raise OSError(0, "this system has no flock") from None
        try:
            fcntl.flock(self._files[0], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Locked from None

    def _cut_torn_tail(self, dtype: np.dtype) -> None:
        """Cuts off what a killed process did not finish: half a line, and data that no line names."""
        whole = 0
        ends = [0, 0]
        with open(self._files[0].name, "rb") as stream:
            for line in stream:
                record = _parse(line)
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
