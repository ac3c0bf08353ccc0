"""The keys and values of past tokens, allocated once per generation, and whether they fit the memory."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from smollm2.config import SmolLM2Config
from smollm2.errors import UsageError

# Of the free memory, what a cache may take: the rest is for activations and logits, and for what other
# programs ask for meanwhile.
USABLE_PERCENT = 90


@dataclass
class KVCache:
    """Keys and values [layers, B, S, KV heads, head dim], and how far each row is filled.

    Row b holds positions 0 .. lengths[b] - 1 without gaps: prompts are compacted into it, so there is no
    padding to mask. `longest` is an upper bound of `lengths` that the host knows, and bounds what attention
    reads without asking the device. `fixed`: the host does not count. Every view then spans the whole
    capacity, so that shapes and addresses stay the same from step to step, as a captured graph needs.
    Attention masks by `lengths`, and the caller makes sure that the capacity suffices.
    """

    keys: Tensor
    values: Tensor
    lengths: Tensor  # [B] int64
    longest: int = 0
    fixed: bool = False

    @classmethod
    def allocate(
        cls, config: SmolLM2Config, batch: int, capacity: int, device: torch.device, dtype: torch.dtype
    ) -> KVCache:
        """An empty cache for `batch` rows of up to `capacity` tokens. Raises UsageError, before it tries, if
        it does not fit the memory.
        """
        require_memory(config, batch, capacity, device, dtype)
        shape = (config.num_hidden_layers, batch, capacity, config.num_key_value_heads, config.head_dim)
        # zeros, not empty: attention multiplies masked positions by zero, and 0 * NaN from fresh memory is
        # NaN.
        return cls(
            torch.zeros(shape, device=device, dtype=dtype),
            torch.zeros(shape, device=device, dtype=dtype),
            torch.zeros(batch, device=device, dtype=torch.int64),
        )

    @property
    def capacity(self) -> int:
        return self.keys.shape[2]

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """Keys and values of one layer, cut to the filled part: two views [B, longest, KV heads, head dim]
        (fixed: [B, S, ...]).
        """
        end = self.capacity if self.fixed else self.longest
        return self.keys[index, :, :end], self.values[index, :, :end]

    def advance(self, tokens: int) -> None:
        """Makes room for that many more tokens in every row. Raises ValueError when the capacity does not
        suffice (unless fixed).
        """
        if not self.fixed:
            if self.longest + tokens > self.capacity:
                found = f"{self.longest} + {tokens}"
                raise ValueError(f"cache: expected at most {self.capacity} tokens, got {found}")
            self.longest += tokens
        self.lengths += tokens

    def clear(self) -> None:
        """Back to a new cache in the same memory. Zeros, because the text before may have left infinities."""
        for tensor in (self.keys, self.values, self.lengths):
            tensor.zero_()
        self.longest, self.fixed = 0, False


def cache_bytes(config: SmolLM2Config, batch: int, capacity: int, dtype: torch.dtype) -> int:
    """Bytes of the keys and values of `batch` rows of `capacity` tokens."""
    token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * dtype.itemsize
    return batch * capacity * token


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be allocated on the device; None where that is unknown.

    CUDA: what the driver has, and what torch has reserved and does not use. MPS: the recommended limit less
    what is allocated. CPU: what Linux calls available (page cache that it would give up included), or free
    pages elsewhere; a container's limit if it is lower.
    """
    if device.type == "cuda":
        idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + idle
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    if device.type != "cpu":
        return None
    known = [size for size in (_host_memory(), _container_memory()) if size is not None]
    return min(known, default=None)


def require_memory(
    config: SmolLM2Config, batch: int, capacity: int, device: torch.device, dtype: torch.dtype
) -> None:
    """Raises UsageError, with what is needed, what is free and what fits, if a cache of that size does not
    fit the free memory.
    """
    needed, free = cache_bytes(config, batch, capacity, dtype), free_memory(device)
    if free is None or needed <= (usable := free * USABLE_PERCENT // 100):
        return
    rows = usable // cache_bytes(config, 1, capacity, dtype)
    tokens = usable // cache_bytes(config, batch, 1, dtype)
    each = (
        f"{tokens} tokens (prompt and new ones) for each of the {batch}" if batch > 1 else f"{tokens} tokens"
    )
    fits = ", or ".join([f"a batch of {rows}"] * bool(rows) + [each] * bool(tokens))
    advice = f"what fits: {fits}" if fits else "not even one token fits: free some memory"
    size = f"{batch} x {capacity} tokens in {str(dtype).removeprefix('torch.')} need {megabytes(needed)}"
    share = f"{megabytes(usable)} can be had on {device} ({USABLE_PERCENT} % of what is free)"
    raise UsageError(f"cache: {size}, and {share}; {advice}")


def megabytes(size: int) -> str:
    """A number of bytes for a reader."""
    return f"{size / 1e6:,.0f} MB" if size >= 1e7 else f"{size / 1e6:.2f} MB"


def _host_memory() -> int | None:
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass  # not Linux
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def _container_memory() -> int | None:
    """What the control group (version 2) still grants. The kernel kills a process that goes beyond it."""
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text(encoding="ascii").strip()
        if limit == "max":
            return None
        used = int((group / "memory.current").read_text(encoding="ascii"))
        lines = (group / "memory.stat").read_text(encoding="ascii").splitlines()
        statistics = dict(line.split() for line in lines)
        # the page cache counts as used, and is given up first
        return int(limit) - used + int(statistics.get("inactive_file", 0))
    except (OSError, ValueError):
        return None  # no such limit here
