"""The keys and values of past tokens, allocated once for a whole generation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from smollm2.config import SmolLM2Config


@dataclass
class KVCache:
    """Keys and values [layers, B, S, KV heads, head dim], and how far each row is filled.

    Row b holds positions 0 .. lengths[b] - 1 without gaps: prompts are compacted into it, so there is no padding to mask.
    `longest` is an upper bound of `lengths` known on the host; it bounds what attention reads without asking the device.
    """

    keys: Tensor
    values: Tensor
    lengths: Tensor  # [B] int64
    longest: int = 0

    @classmethod
    def allocate(cls, config: SmolLM2Config, batch: int, capacity: int, device: torch.device, dtype: torch.dtype) -> KVCache:
        """An empty cache for `batch` rows of up to `capacity` tokens."""
        shape = (config.num_hidden_layers, batch, capacity, config.num_key_value_heads, config.head_dim)
        # zeros, not empty: attention multiplies masked positions by zero, and 0 * NaN from fresh memory is NaN.
        return cls(
            torch.zeros(shape, device=device, dtype=dtype),
            torch.zeros(shape, device=device, dtype=dtype),
            torch.zeros(batch, device=device, dtype=torch.int64),
        )

    @property
    def capacity(self) -> int:
        return self.keys.shape[2]

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """Keys and values of one layer, cut to the filled part: two views [B, longest, KV heads, head dim]."""
        return self.keys[index, :, : self.longest], self.values[index, :, : self.longest]

    def advance(self, tokens: int) -> None:
        """Makes room for that many more tokens in every row. Raises ValueError when the capacity does not suffice."""
        if self.longest + tokens > self.capacity:
            raise ValueError(f"cache: expected at most {self.capacity} tokens, got {self.longest} + {tokens}")
        self.lengths += tokens
        self.longest += tokens
