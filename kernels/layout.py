"""What kernels read: elements of the last dimension side by side, indices in 32 bits."""

from __future__ import annotations

import torch
from torch import Tensor


def dense_lanes(x: Tensor) -> Tensor:
    """x with a last stride of 1; a copy only if its own is another."""
    return x if x.stride(-1) == 1 else x.contiguous()


def in_32_bits(index: Tensor, most: int) -> Tensor:
    """Positions of which all below 0 mean the same, as all above `most` do."""
    return index.clamp(0, most).int() if index.dtype == torch.int64 else index


def dense_rows(x: Tensor) -> Tensor:
    """[..., D] -> [rows, D] with columns of stride 1; a copy only where no such view exists."""
    flat = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    return flat if flat.stride(1) == 1 or flat.shape[1] == 1 else flat.contiguous()
