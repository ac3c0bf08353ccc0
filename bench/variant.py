"""One way to generate, whoever's it is: what `python -m bench.generate` measures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


class Turns(Protocol):
    """A batch of prompts and the cache that grows behind them, greedy."""

    def prefill(self) -> Tensor:
        """Begins anew, from the prompts -> the first new token of every row [B, 1]."""
        ...

    def decode(self, tokens: Tensor, steps: int) -> Tensor:
        """Appends tokens [B, 1] and, one by one, what follows -> the tokens of those steps [B, steps]."""
        ...


@dataclass(frozen=True)
class Variant:
    """One way to generate: what it is and how much it has to read."""

    dtype: str
    weight_bytes: int  # read once for a decode step
    cache_bytes: int  # keys and values of one position of one row, all layers
    begin: Callable[[Tensor, int], Turns]  # prompts [B, T], number of new tokens
