"""Keys and values of texts that have ended, for those that begin alike: a system prompt, or earlier turns."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from smollm2.generation.prompt_cache import common


@dataclass(frozen=True, eq=False)
class Prefix:
    """A text and its keys and values [layers, tokens, KV heads, head dim]."""

    tokens: np.ndarray  # int64
    keys: Tensor
    values: Tensor

    @property
    def size(self) -> int:
        """Bytes."""
        return self.keys.nbytes + self.values.nbytes


class PrefixCache:
    """Texts in at most `limit` bytes; the ones not used for longest go first."""

    def __init__(self, limit: int) -> None:
        self.limit, self.size = limit, 0
        self._kept: list[Prefix] = []  # the one used last at the end

    def find(self, tokens: np.ndarray) -> tuple[Prefix | None, int]:
        """The text that begins like this one for longest, and for how many tokens."""
        best, length = None, 0
        for prefix in self._kept:
            if (found := common(tokens, prefix.tokens)) > length:
                best, length = prefix, found
        if best is not None:
            self._kept.remove(best)
            self._kept.append(best)
        return best, length

    def add(self, prefix: Prefix) -> None:
        """Keeps a text, in the place of those that are its beginning."""
        if prefix.size > self.limit or any(
            common(prefix.tokens, kept.tokens) == len(prefix.tokens) for kept in self._kept
        ):
            return
        for kept in list(self._kept):
            if common(prefix.tokens, kept.tokens) == len(kept.tokens):
                self._drop(kept)
        while self.size + prefix.size > self.limit:
            self._drop(self._kept[0])
        self._kept.append(prefix)
        self.size += prefix.size

    def _drop(self, prefix: Prefix) -> None:
        self._kept.remove(prefix)
        self.size -= prefix.size
