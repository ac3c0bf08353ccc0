"""The memory layout that kernels read: elements of the last dimension side by side."""

from __future__ import annotations

from torch import Tensor


def dense_lanes(x: Tensor) -> Tensor:
    """x with a last stride of 1; a copy only if its own is another."""
    return x if x.stride(-1) == 1 else x.contiguous()


def dense_rows(x: Tensor) -> Tensor:
    """[..., D] -> [rows, D] with columns of stride 1; a copy only where no such view exists."""
    flat = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    return flat if flat.stride(1) == 1 or flat.shape[1] == 1 else flat.contiguous()
