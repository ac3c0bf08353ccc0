"""Runs of documents to rows of tokens, with numpy: no loop of Python goes over tokens. (Conversations:
train/data/whole.py.)

Rows are cut from one long stream of tokens: nothing is padded and nothing is thrown away. A document may
continue in the next row, where it counts as a new one that begins at 0. Rows are a function of the stream
alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from smollm2.model import IGNORE_INDEX
from train.data.conversations import NOT_LEARNED
from train.data.source import START, Cursor, Position


@dataclass(frozen=True)
class Segment:
    """The documents of one block that are read, in the order in which they are read.

    tokens: of all of them, one after the other. For each document: begins, its first token in `tokens` (below
    0 for a first one that is continued); index, its place in the shuffled block; digests; invalid, the
    unusable documents between the one before and it; epochs, the passes over the corpus up to it.
    """

    cursor: Cursor  # of the block
    tokens: np.ndarray
    begins: np.ndarray
    index: np.ndarray
    digests: np.ndarray
    invalid: np.ndarray
    epochs: np.ndarray

    def bounds(self, document: int) -> tuple[int, int]:
        """Where a document begins and ends in `tokens`."""
        last = document + 1 == len(self.begins)
        return int(self.begins[document]), len(self.tokens) if last else int(self.begins[document + 1])

    def cursor_after(self, position: int) -> tuple[Cursor, float]:
        """The cursor behind the first `position` > 0 tokens, and the epochs of the document that the last of
        them belongs to.
        """
        document = int(np.searchsorted(self.begins, position - 1, "right")) - 1
        end = self.bounds(document)[1]
        index, used = int(self.index[document]), position - int(self.begins[document])
        place = (index + 1, 0) if position == end else (index, used)
        return Cursor(self.cursor.epoch, self.cursor.shard, self.cursor.block, *place), float(
            self.epochs[document]
        )


@dataclass(frozen=True)
class Share:
    """What one source gave to a step: how many rows, and what was read to make them."""

    rows: int
    cursor: Cursor  # after the last token
    digests: np.ndarray  # uint64: of the documents that begin in them
    invalid: int  # documents passed over because they are empty or not text
    epochs: float  # passes over the source, up to here; 0 without rows
    padding: int = 0  # tokens of the rows that stand for nothing
    truncated: int = 0  # documents that are longer than a row, of which the rest is lost


@dataclass(frozen=True)
class Rows:
    """Rows of one source. doc_start, inner_starts, learned: as in Batch, of these rows."""

    tokens: np.ndarray  # [rows, T] uint16 or uint32, of conversations with NOT_LEARNED
    doc_start: np.ndarray  # [rows, T] int32
    inner_starts: int
    share: Share
    learned: int | None = None


class Tensors(NamedTuple):
    """Rows as the model takes them. labels: [R, T] int64, -100 where nothing is learned; None: ids."""

    ids: Tensor  # [R, T] int64
    # [R, T] int32: index in the row of the first token of the document that a token belongs to
    doc_start: Tensor
    labels: Tensor | None

    @property
    def learned(self) -> Tensor:
        """The ids that are learned, one after the other."""
        return self.ids.flatten() if self.labels is None else self.labels[self.labels != IGNORE_INDEX]

    @property
    def targets(self) -> Tensor:
        """[R, T]: what the loss is told to predict."""
        return self.ids if self.labels is None else self.labels


@dataclass(frozen=True)
class Batch:
    """The rows of one step, or one rank's share of them, and what was read to make them all."""

    input_ids: Tensor  # [rows / world, T] int64
    # [rows / world, T] int32: index in the row of the first token of the document that a token belongs to
    doc_start: Tensor
    # documents that begin at a column > 0, in all rows of the step: the targets that document masking takes
    # away
    inner_starts: int
    tokens: int  # in all rows of the step
    cursor: Position  # after the last token
    digests: np.ndarray  # uint64: of the documents that begin in the step, source by source
    invalid: int  # documents passed over because they are empty or not text
    epochs: float  # passes over the source that was repeated most, up to here
    shares: tuple[Share, ...]
    # of conversations; -100 where nothing is learned, as at the first token of each
    labels: Tensor | None = None  # [rows / world, T] int64
    learned: int | None = None  # their tokens that are learned, in all rows of the step


class Packer:
    """Cuts a stream of documents into rows of `length` tokens."""

    def __init__(self, segments: Iterator[Segment], length: int) -> None:
        self._segments, self._length = segments, length
        self._segment: Segment | None = None
        self._used = 0  # tokens of it

    def take(self, rows: int, before: Cursor = START) -> Rows | None:
        """The next rows, or None when the documents end before they are full. before: the cursor, which 0
        rows do not move.
        """
        size, filled = rows * self._length, 0
        parts: list[tuple[Segment, int, int]] = []
        while filled < size:
            if self._segment is None or self._used == len(self._segment.tokens):
                self._segment, self._used = next(self._segments, None), 0
                if self._segment is None:
                    return None
            end = min(self._used + size - filled, len(self._segment.tokens))
            if end > self._used:
                parts.append((self._segment, self._used, end))
            filled, self._used = filled + end - self._used, end
        return _rows(parts, rows, self._length, before)


def _rows(parts: Sequence[tuple[Segment, int, int]], rows: int, length: int, cursor: Cursor) -> Rows:
    tokens, digests, begins = [np.empty(0, np.uint16)], [np.empty(0, np.uint64)], [np.empty(0, np.int64)]
    filled, invalid, epochs = 0, 0, 0.0
    for segment, start, end in parts:
        first, last = np.searchsorted(segment.begins, (start, end))
        begins.append(segment.begins[first:last] - start + filled)
        tokens.append(segment.tokens[start:end])
        digests.append(segment.digests[first:last])
        invalid += int(segment.invalid[first:last].sum())
        filled += end - start
    if parts:
        segment, _, end = parts[-1]
        cursor, epochs = segment.cursor_after(end)
    # A document begins where one is stored, and at the first column of every row.
    edges = np.union1d(np.concatenate(begins), np.arange(0, filled, length))
    doc_start = np.repeat((edges % length).astype(np.int32), np.append(edges[1:], filled) - edges)
    share = Share(rows, cursor, np.concatenate(digests), invalid, epochs)
    shape = (rows, length)
    return Rows(np.concatenate(tokens).reshape(shape), doc_start.reshape(shape), len(edges) - rows, share)


def tensors(rows: Sequence[Rows], chosen: slice | np.ndarray = slice(None)) -> Tensors:
    """Rows as the model takes them, or those chosen."""
    tokens = np.concatenate([one.tokens for one in rows])[chosen]
    doc_start = torch.from_numpy(np.concatenate([one.doc_start for one in rows])[chosen])
    ids = tokens.astype(np.int64)
    if rows[0].learned is None:
        return Tensors(torch.from_numpy(ids), doc_start, None)
    ids &= int(NOT_LEARNED) - 1
    labels = np.where(tokens < NOT_LEARNED, ids, IGNORE_INDEX)
    return Tensors(torch.from_numpy(ids), doc_start, torch.from_numpy(labels))
