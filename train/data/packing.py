"""Runs of documents to packed batches, with numpy: no step of it is paid per token or per document in Python.

Rows are cut from one long stream of tokens: nothing is padded and nothing is thrown away. A document may
continue in the next row, where it counts as a new one that begins at 0. A batch is a function of the stream
alone; a rank cuts its own rows out of it.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Cursor:
    """The first token that has not been read yet. shard and document count in the shuffled order, block in
    the stored one.
    """

    epoch: int = 0
    shard: int = 0
    block: int = 0
    document: int = 0
    token: int = 0


START = Cursor()


@dataclass(frozen=True)
class Segment:
    """The documents of one block that are read, in the order in which they are read.

    tokens: of all of them, behind one another. For each document: begins, where it begins in `tokens` (below
    0 for a first one that is continued), index, its place in the shuffled block, digests, invalid, the
    unusable documents passed on the way to it, and epochs, the passes over the corpus up to it.
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
class Batch:
    """The rows of one step, or one rank's share of them, and what was read to make them all."""

    input_ids: Tensor  # [rows / world, T] int64
    # [rows / world, T] int32: index in the row of the first token of the document that a token belongs to
    doc_start: Tensor
    # documents that begin at a column > 0, in all rows of the step: the targets that document masking takes
    # away
    inner_starts: int
    tokens: int  # in all rows of the step
    cursor: Cursor  # after the last token
    digests: np.ndarray  # uint64: of the documents that begin in the step
    invalid: int  # documents passed over because they are empty or not text
    epochs: float  # passes over the corpus, up to here


def pack(
    segments: Iterable[Segment], rows: int, length: int, rank: int = 0, world: int = 1, pin: bool = False
) -> Generator[Batch, None, None]:
    """Cuts the stream of documents into steps of rows x length tokens; what does not fill a last one is not
    yielded.

    Of each, rank r of world gets rows [r * rows / world, (r + 1) * rows / world). pin: in page-locked memory,
    for a GPU.
    """
    size, filled = rows * length, 0
    parts: list[tuple[Segment, int, int]] = []
    own = slice(rank * rows // world, (rank + 1) * rows // world)
    for segment in segments:
        used = 0
        while used < len(segment.tokens):
            take = min(size - filled, len(segment.tokens) - used)
            parts.append((segment, used, used + take))
            used, filled = used + take, filled + take
            if filled == size:
                yield _batch(parts, rows, length, own, pin)
                parts, filled = [], 0


def _batch(parts: list[tuple[Segment, int, int]], rows: int, length: int, own: slice, pin: bool) -> Batch:
    begins, digests, filled, invalid = [], [], 0, 0
    for segment, start, end in parts:
        first, last = np.searchsorted(segment.begins, (start, end))
        begins.append(segment.begins[first:last] - start + filled)
        digests.append(segment.digests[first:last])
        invalid += int(segment.invalid[first:last].sum())
        filled += end - start
    columns = np.concatenate(begins) % length
    starts = np.zeros(rows * length, np.int32)
    starts[np.concatenate(begins)] = columns
    tokens = np.concatenate([segment.tokens[start:end] for segment, start, end in parts]).reshape(
        rows, length
    )
    ids = torch.from_numpy(tokens[own].astype(np.int64))
    doc_start = torch.from_numpy(np.maximum.accumulate(starts.reshape(rows, length)[own], axis=1))
    if pin and torch.cuda.is_available():
        ids, doc_start = ids.pin_memory(), doc_start.pin_memory()
    cursor, epochs = parts[-1][0].cursor_after(parts[-1][2])
    return Batch(
        ids,
        doc_start,
        int(np.count_nonzero(columns)),
        rows * length,
        cursor,
        np.concatenate(digests),
        invalid,
        epochs,
    )


def gather(tokens: np.ndarray, begins: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The runs tokens[begin : begin + length] behind one another."""
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    # The index of each token is its place in the result, moved by the same amount for all tokens of a run.
    return np.asarray(tokens[np.arange(total) + np.repeat(begins - (ends - lengths), lengths)])
