"""Conversations to rows of tokens: each lies whole in one row, with its beginning.

Where the next one does not fit into what is left of a row, the rest of the row is padding, a document of its
own from which nothing is learned, and the conversation begins the next row. One that is longer than a row is
cut at the row's end, and counted. Rows are a function of the stream alone.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from train.data.conversations import NOT_LEARNED
from train.data.packing import Rows, Segment, Share
from train.data.source import START, Cursor
from train.data.tokenise import TokenBlock


def learnable(block: TokenBlock, length: int) -> TokenBlock:
    """The same block, in which conversations are unusable that teach nothing in a row of `length` tokens,
    because no token after their first `length` is seen, and their very first has nothing before it.
    """
    learned = np.concatenate([[0], np.cumsum(block.tokens < NOT_LEARNED)])
    ends = np.cumsum(block.lengths)
    begins = ends - block.lengths
    first, last = np.minimum(begins + 1, ends), np.minimum(begins + length, ends)
    useless = (block.lengths > 0) & (learned[last] == learned[first])
    if not useless.any():
        return block
    tokens = block.tokens[np.repeat(~useless, block.lengths)]
    return TokenBlock(tokens, np.where(useless, 0, block.lengths), np.where(useless, 0, block.digests))


class WholePacker:
    """Puts whole documents into rows of `length` tokens. A last row that is not full is padded too."""

    def __init__(self, segments: Iterator[Segment], length: int, filler: int) -> None:
        """filler: the id that padding is made of."""
        self._segments, self._length, self._filler = segments, length, filler | int(NOT_LEARNED)
        self._segment: Segment | None = None
        self._next = 0  # document of it

    def take(self, rows: int, before: Cursor = START) -> Rows | None:
        """The next rows, or None when the documents end before each of them has one. before: the cursor,
        which 0 rows do not move.
        """
        tokens = np.full((rows, self._length), self._filler, np.uint32)
        starts = np.zeros((rows, self._length), np.int32)
        digests: list[int] = []
        cursor, epochs, inner, invalid, padding, truncated = before, 0.0, 0, 0, 0, 0
        for row in range(rows):
            used = 0
            while used < self._length and (segment := self._ahead()) is not None:
                index = self._next
                begin, end = segment.bounds(index)
                size = min(end - begin, self._length)
                if used + size > self._length:
                    break
                tokens[row, used : used + size] = segment.tokens[begin : begin + size]
                tokens[row, used] |= NOT_LEARNED  # nothing lies before it
                starts[row, used : used + size] = used
                digests.append(int(segment.digests[index]))
                invalid += int(segment.invalid[index])
                truncated += size < end - begin
                inner += used > 0
                cursor, epochs = segment.cursor_after(end)
                used, self._next = used + size, index + 1
            if used == 0:
                return None
            starts[row, used:] = used
            padding += self._length - used
            inner += used < self._length
        share = Share(rows, cursor, np.array(digests, np.uint64), invalid, epochs, padding, truncated)
        return Rows(tokens, starts, inner, share, int((tokens < NOT_LEARNED).sum()))

    def _ahead(self) -> Segment | None:
        """The segment of the next document."""
        while self._segment is None or self._next == len(self._segment.begins):
            self._segment, self._next = next(self._segments, None), 0
            if self._segment is None:
                return None
        return self._segment
