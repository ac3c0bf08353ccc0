"""Documents to arrays of token ids, one block of them at a time, and what identifies a document.

This is what a worker process loads (train/data/worker_pool.py): numpy and tokenizers, not torch. The training
process calls the same functions when it has no workers, so that where a block is tokenised does not change a
single id.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

PIECE = 1 << 20  # characters tokenised at once: bounds the memory that one enormous document takes
# Which documents are tokenised: the fraction that is held out, and whether those or the others are wanted.
Select = tuple[float, bool]


@dataclass(frozen=True)
class TokenBlock:
    """The documents of one stored block, in stored order.

    tokens: all ids, uint16 where the vocabulary fits, else uint32. lengths [n] int64: ids
    of each document, its end-of-text included; 0 where there are none. digests [n] uint64: what identifies
    its text; 0 for an unusable document. (A document that was not asked for has its digest, and no tokens.)
    """

    tokens: np.ndarray
    lengths: np.ndarray
    digests: np.ndarray

    @property
    def unusable(self) -> np.ndarray:
        """[n] bool: documents that are empty, blank or not text."""
        return (self.lengths == 0) & (self.digests == 0)


def join(blocks: Sequence[TokenBlock], dtype: str) -> TokenBlock:
    """Consecutive parts of a block as one. dtype: that of the tokens, for a block without parts."""
    if len(blocks) == 1:
        return blocks[0]
    return TokenBlock(
        np.concatenate([np.empty(0, dtype), *(block.tokens for block in blocks)]),
        np.concatenate([np.empty(0, np.int64), *(block.lengths for block in blocks)]),
        np.concatenate([np.empty(0, np.uint64), *(block.digests for block in blocks)]),
    )


def digest(text: str) -> int:
    """A 64-bit number that identifies a text, the same on every machine (unlike hash())."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def is_held_out(digests: Any, fraction: float) -> Any:
    """Whether documents are kept for evaluation. digests: one, or an array of them.

    A property of the text alone: a duplicate never lies on the other side.
    """
    return (digests >> 32) < fraction * 2**32


def as_text(document: Any) -> str | None:
    """The document if it can be trained on: text, or bytes that are UTF-8, and not blank. Else None.

    Lone surrogates, which UTF-8 cannot encode, make a text unusable too.
    """
    try:
        if isinstance(document, bytes):
            document = document.decode()
        if not isinstance(document, str) or not document.strip():
            return None
        document.encode()
    except UnicodeError:
        return None
    return document


def pieces(text: str) -> Iterator[str]:
    """The text in pieces of at most PIECE characters, cut behind the last line end in each, or anywhere in a
    line that is longer.
    """
    begin = 0
    while len(text) - begin > PIECE:
        end = text.rfind("\n", begin, begin + PIECE) + 1
        end = end if end > begin else begin + PIECE
        yield text[begin:end]
        begin = end
    yield text[begin:] if begin else text


class Encoder:
    """Documents -> TokenBlock. The end-of-text id is put behind each; special tokens written out in a text
    stay ordinary text.

    tokenizer_json: the content of a tokenizer.json. end: the end-of-text id. dtype: of the ids, "uint16" or
    "uint32".
    """

    def __init__(self, tokenizer_json: str, end: int, dtype: str) -> None:
        import tokenizers

        backend = tokenizers.Tokenizer.from_str(tokenizer_json)
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True
        # the same ids, without their offsets
        self._encode_batch = getattr(backend, "encode_batch_fast", backend.encode_batch)
        self._end, self.dtype = np.array([end], dtype), dtype

    def __call__(self, documents: Iterable[Any], select: Select | None = None) -> TokenBlock:
        """select: which documents are tokenised; all usable ones if None."""
        texts = [as_text(document) for document in documents]
        digests = np.array([0 if text is None else digest(text) for text in texts], np.uint64)
        lengths = np.zeros(len(texts), np.int64)
        wanted = np.array([text is not None for text in texts], bool)
        if select is not None:
            wanted &= is_held_out(digests, select[0]) == select[1]
        arrays: list[np.ndarray] = []
        for owners, ids in self._encoded(
            (index, texts[index] or "") for index in np.flatnonzero(wanted).tolist()
        ):
            for owner, last, part in zip(*owners, ids, strict=True):
                arrays.append(part)
                lengths[owner] += len(part)
                if last:
                    arrays.append(self._end)
                    lengths[owner] += 1
        return TokenBlock(np.concatenate(arrays) if arrays else np.empty(0, self.dtype), lengths, digests)

    def _encoded(
        self, texts: Iterable[tuple[int, str]]
    ) -> Iterator[tuple[tuple[list[int], list[bool]], list[np.ndarray]]]:
        """Groups of pieces of at most PIECE characters: whose they are and whether they are its last, and the
        ids of each.
        """
        group: list[str] = []
        owners: list[int] = []
        lasts: list[bool] = []
        size = 0
        for index, text in texts:
            rest = len(text)
            for piece in pieces(text):
                if group and size + len(piece) > PIECE:
                    yield (owners, lasts), self._ids(group)
                    group, owners, lasts, size = [], [], [], 0
                rest -= len(piece)
                group.append(piece)
                owners.append(index)
                lasts.append(rest == 0)
                size += len(piece)
        if group:
            yield (owners, lasts), self._ids(group)

    def _ids(self, texts: list[str]) -> list[np.ndarray]:
        return [
            np.array(encoding.ids, self.dtype)
            for encoding in self._encode_batch(texts, add_special_tokens=False)
        ]
