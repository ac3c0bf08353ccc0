"""The keys and values of past tokens, allocated once per generation, and whether they fit the memory."""

from __future__ import annotations

import math
import mmap
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from smollm2.config import SmolLM2Config
from smollm2.errors import UsageError

# Of the free memory, for a cache: the rest is for activations, logits and other programs.
USABLE_PERCENT = 90


@dataclass
class KVCache:
    """Keys and values [layers, B, S, KV heads, head dim], and how far each row is filled.

    Row b holds positions 0 .. lengths[b] - 1 without gaps: prompts are compacted into it, so there is no
    padding to mask. `longest` is an upper bound of `lengths` that the host knows; it bounds what attention
    reads without asking the device. `fixed`: the host does not count. Every view then spans the whole
    capacity, so that shapes and addresses never change, as a captured graph needs. Attention masks by
    `lengths`, and the caller makes sure that the capacity suffices.
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
        """An empty cache for `batch` rows of `capacity` tokens. Raises UsageError if it does not fit."""
        require_memory(config, batch, capacity, device, dtype)
        shape = (config.num_hidden_layers, batch, capacity, config.num_key_value_heads, config.head_dim)
        # Zeros, not empty: attention multiplies masked positions by zero, and 0 * NaN is NaN.
        zeros = _untouched_zeros if device.type == "cpu" and batch * capacity else torch.zeros
        keys, values = (zeros(shape, device=device, dtype=dtype) for _ in range(2))
        return cls(keys, values, torch.zeros(batch, device=device, dtype=torch.int64))

    @property
    def capacity(self) -> int:
        return self.keys.shape[2]

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """Keys and values of one layer, cut to the filled part unless fixed: views [B, S, K, D]."""
        end = self.capacity if self.fixed else self.longest
        return self.keys[index, :, :end], self.values[index, :, :end]

    def part(self, first: int, stop: int, longest: int) -> KVCache:
        """Some of its rows, as views: what is written to one is written to both."""
        rows = slice(first, stop)
        return KVCache(self.keys[:, rows], self.values[:, rows], self.lengths[rows], longest)

    def advance(self, tokens: int) -> None:
        """Counts that many more tokens in every row. Raises ValueError beyond the capacity, unless fixed."""
        self.reserve(tokens)
        self.lengths += tokens

    def reserve(self, tokens: int) -> None:
        """The host's part of `advance`, where the device advances `lengths` itself."""
        if not self.fixed:
            if self.longest + tokens > self.capacity:
                room = f"expected at most {self.capacity} tokens"
                raise ValueError(f"cache: {room}, got {self.longest} + {tokens}")
            self.longest += tokens

    def truncate(self, length: int) -> None:
        """Forgets the tokens of every row from `length` on: they are masked, and overwritten next."""
        self.lengths.fill_(length)
        self.longest = length

    def clear(self) -> None:
        """Back to a new cache in the same memory. Zeros, because the text before may have left infinities."""
        for tensor in (self.keys, self.values, self.lengths):
            tensor.zero_()
        self.longest, self.fixed = 0, False


def _untouched_zeros(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Zeros in fresh pages, of which the system provides those that are used: a capacity costs nothing."""
    memory = mmap.mmap(-1, math.prod(shape) * dtype.itemsize, access=mmap.ACCESS_COPY)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


def cache_bytes(config: SmolLM2Config, batch: int, capacity: int, dtype: torch.dtype) -> int:
    """Bytes of the keys and values of `batch` rows of `capacity` tokens."""
    token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * dtype.itemsize
    return batch * capacity * token


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be allocated on the device; None where that is unknown.

    CUDA: what the driver has, and what torch has reserved and does not use. MPS: the recommended limit less
    what is allocated. CPU: what Linux calls available, or free pages elsewhere; less in a container with a
    limit.
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
    """Raises UsageError, with what is needed and what would fit, for a cache beyond the free memory."""
    needed, free = cache_bytes(config, batch, capacity, dtype), free_memory(device)
    if free is None or needed <= (usable := free * USABLE_PERCENT // 100):
        return
    rows = usable // cache_bytes(config, 1, capacity, dtype)
    tokens = usable // cache_bytes(config, batch, 1, dtype)
    each = f" (prompt and new ones) for each of the {batch}" if batch > 1 else ""
    fits = ", or ".join([f"a batch of {rows}"] * bool(rows) + [f"{tokens} tokens{each}"] * bool(tokens))
    advice = f"what fits: {fits}" if fits else "not even one token fits: free some memory"
    size = f"{batch} x {capacity} tokens in {str(dtype).removeprefix('torch.')} need {megabytes(needed)}"
    share = f"{megabytes(usable)} are available on {device} ({USABLE_PERCENT} % of what is free)"
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
    names = "memory.max", "memory.current", "memory.stat"
    try:
        limit, used, statistics = ((group / name).read_text(encoding="ascii") for name in names)
        # the page cache counts as used, and is given up first
        cached = dict(line.split() for line in statistics.splitlines()).get("inactive_file", 0)
        return int(limit) - int(used) + int(cached)  # a limit "max" is none
    except (OSError, ValueError):
        return None
