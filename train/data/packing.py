"""Runs of documents to rows of tokens, with numpy: no loop of Python goes over tokens or documents.

Rows are cut from one long stream of tokens: nothing is padded and nothing is thrown away. A document may
continue in the next row, where it counts as a new one that begins at 0. Rows are a function of the stream
alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

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

    def cursor_after(self, position: int) -> tuple[Cursor, float]:
        """The cursor behind the first `position` > 0 tokens, and the epochs of the document that the last of
        them belongs to.
        """
        document = int(np.searchsorted(self.begins, position - 1, "right")) - 1
        end = self.begins[document + 1] if document + 1 < len(self.begins) else len(self.tokens)
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


@dataclass(frozen=True)
class Rows:
    """Rows of one source. starts: 0, and where a document begins, its column."""

    tokens: np.ndarray  # [rows, T] uint16 or uint32
    starts: np.ndarray  # [rows, T] int32
    share: Share


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
    starts = np.zeros(rows * length, np.int32)
    tokens, digests = [np.empty(0, np.uint16)], [np.empty(0, np.uint64)]
    filled, invalid, epochs = 0, 0, 0.0
    for segment, start, end in parts:
        first, last = np.searchsorted(segment.begins, (start, end))
        begins = segment.begins[first:last] - start + filled
        starts[begins] = begins % length
        tokens.append(segment.tokens[start:end])
        digests.append(segment.digests[first:last])
        invalid += int(segment.invalid[first:last].sum())
        filled += end - start
    if parts:
        segment, _, end = parts[-1]
        cursor, epochs = segment.cursor_after(end)
    share = Share(rows, cursor, np.concatenate(digests), invalid, epochs)
    return Rows(np.concatenate(tokens).reshape(rows, length), starts.reshape(rows, length), share)


def tensors(tokens: np.ndarray, starts: np.ndarray) -> tuple[Tensor, Tensor]:
    """Rows as the model takes them: ids [R, T] int64 and doc_start [R, T] int32."""
    return torch.from_numpy(tokens.astype(np.int64)), torch.from_numpy(np.maximum.accumulate(starts, axis=1))


def gather(tokens: np.ndarray, begins: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The runs tokens[begin : begin + length], one after the other."""
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    # The index of each token is its place in the result, moved by the same amount for all tokens of a run.
    return np.asarray(tokens[np.arange(total) + np.repeat(begins - (ends - lengths), lengths)])
