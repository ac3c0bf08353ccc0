"""Keys and values that outlive a generation: a conversation goes on without reading itself again."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from smollm2.engine.cache import KVCache
from smollm2.engine.eager import Engine
from smollm2.errors import UsageError


class PromptCache:
    """The keys and values of one text. A next prompt is read from where it differs.

    engine: whose cache it is. capacity: the most tokens, prompt and answer, by default all that the model
    has positions for. tokens: what the cache holds. found: how many tokens of the last prompt it held.

    What is kept counts for the weights that made it: call `clear` when they change. A captured engine reads
    every prompt anew, in its own loops, which takes a GPU milliseconds.
    """

    def __init__(self, engine: Engine, capacity: int | None = None) -> None:
        self.engine = engine
        self.capacity = capacity or engine.model.config.max_position_embeddings
        self.tokens: list[int] = []
        self.found = 0
        self._cache: KVCache | None = None

    def open(self, prompt: Sequence[int], new_tokens: int) -> tuple[KVCache, int]:
        """The cache for a prompt and that many new tokens, and how many tokens of the prompt it holds: all
        but the last at most, since what follows is wanted of that. The caller appends to `tokens` what it
        adds to the cache. Raises UsageError beyond the capacity, and where the memory does not suffice.
        """
        if len(prompt) + new_tokens > self.capacity:
            expected = f"expected at most {self.capacity} tokens, prompt and new ones together"
            raise UsageError(f"prompt cache: {expected}, got {len(prompt)} + {new_tokens}")
        if self._cache is None:
            self._cache = self.engine.allocate(1, self.capacity)
        self.found = common(prompt[:-1], self.tokens)
        del self.tokens[self.found :]
        self._cache.truncate(self.found)
        return self._cache, self.found

    def clear(self) -> None:
        """Forgets the text."""
        self.tokens, self._cache = [], None


def common(first: Sequence[int] | np.ndarray, second: Sequence[int] | np.ndarray) -> int:
    """How many tokens two texts begin with together."""
    length = min(len(first), len(second))
    differs = np.asarray(first[:length]) != np.asarray(second[:length])
    return int(differs.argmax()) if differs.any() else length
