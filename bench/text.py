"""Real text without a download: the Python files of this installation, tokenised by a byte-level BPE that is trained on them.

A file is held out, or not, by a hash of its content, so that copies of a file in two packages land on the same side; copies are read once.
The order of the files is that of their hashes: a mixture of packages, the same wherever the same files are installed.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from smollm2.tokenizer import Tokenizer, train_tokenizer

HELD_OUT_SHARE = 0.1
LARGEST_FILE = 200_000  # bytes; larger ones are generated tables
END_OF_TEXT = 0


@dataclass(frozen=True)
class Documents:
    """Texts to train on, and texts that are never trained on."""

    training: list[str]
    held_out: list[str]
    bytes: int


def read_documents(limit: int) -> Documents:
    """Python files of the standard library and of site-packages, up to `limit` bytes."""
    found: dict[bytes, str] = {}
    size = 0
    for path in _python_files():
        try:
            content = path.read_bytes()
            text = content.decode("utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        digest = hashlib.blake2b(content, digest_size=8).digest()
        if not 200 <= len(content) <= LARGEST_FILE or digest in found:
            continue
        found[digest] = text
        size += len(content)
        if size >= limit:
            break
    ordered = sorted(found)
    held_out = {digest for digest in ordered if digest[0] < 256 * HELD_OUT_SHARE}
    return Documents(
        [found[digest] for digest in ordered if digest not in held_out], [found[digest] for digest in ordered if digest in held_out], size
    )


def _python_files() -> Iterator[Path]:
    """Paths in an order that mixes packages, so that a part of them is a sample of all."""
    folders = {Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib")}
    paths = {path for folder in folders for path in folder.rglob("*.py")}
    return iter(sorted(paths, key=lambda path: hashlib.blake2b(path.name.encode() + path.parent.name.encode(), digest_size=8).digest()))


def learn_tokenizer(documents: Documents, vocabulary: int, limit: int) -> Tokenizer:
    """A BPE of at most that many tokens, from the first `limit` characters of the training texts."""
    sample, size = [], 0
    for text in documents.training:
        sample.append(text)
        size += len(text)
        if size >= limit:
            break
    return train_tokenizer(sample, vocabulary)


def tokenise(tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    """All texts as one row of ids, each ended by <|endoftext|>."""
    pieces = []
    for start in range(0, len(texts), 256):
        for ids in tokenizer.encode_batch(texts[start : start + 256], special=False):
            pieces.append(np.array([*ids, END_OF_TEXT], dtype=np.int32))
    return np.concatenate(pieces) if pieces else np.zeros(0, dtype=np.int32)


def document_starts(rows: np.ndarray) -> np.ndarray:
    """rows [B, T] -> for every position the index in its row at which its document begins: one after the last end of text before it."""
    index = np.arange(rows.shape[1])
    begins = np.zeros_like(rows)
    begins[:, 1:] = np.where(rows[:, :-1] == END_OF_TEXT, index[1:], 0)
    return np.maximum.accumulate(begins, axis=1)


class Batches:
    """Consecutive rows of a token stream, over and over. batch(i) is a function of i alone."""

    def __init__(self, tokens: np.ndarray, batch: int, length: int, device: torch.device) -> None:
        """Raises ValueError when the stream does not fill one batch."""
        rows = len(tokens) // length
        if rows < batch:
            raise ValueError(f"text: expected at least {batch * length} tokens, got {len(tokens)}")
        self._rows = tokens[: rows * length].reshape(rows, length)
        self._batch, self._device = batch, device

    @property
    def per_epoch(self) -> int:
        """Batches until the text begins again."""
        return len(self._rows) // self._batch

    def __call__(self, index: int) -> tuple[Tensor, Tensor]:
        """ids [B, T] int64 and the document starts [B, T] int32."""
        first = index % self.per_epoch * self._batch
        rows = self._rows[first : first + self._batch]
        return self._move(rows.astype(np.int64)), self._move(document_starts(rows).astype(np.int32))

    def _move(self, array: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(array)
        if self._device.type != "cuda":
            return tensor
        return tensor.pin_memory().to(self._device, non_blocking=True)  # from pageable memory the host would wait for the step before
