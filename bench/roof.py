"""What a device can do: the bandwidth of its memory, and the rate of a large matrix product.

Where memory is only read, as a decode step reads its weights and its cache, one number is the limit:
`read_bandwidth`, of a buffer far larger than the caches, in order, measured in the run whose figures it
limits.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from bench import timing
from kernels.products import faster_in_fp32

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def read_bandwidth(device: torch.device, tiny: bool) -> float:
    """Bytes per second of a sum, which only reads: 1 GiB, in order."""
    source = torch.ones(1 << 18 if tiny else 1 << 28, device=device)
    return source.nbytes / _seconds(source.sum, device, tiny)


def bandwidths(device: torch.device, tiny: bool) -> dict[str, float]:
    """Bytes per second, read plus written, of a copy, of reading and of an update in place.

    The best of them is the roof of what both reads and writes: a CPU reads what a copy is about to overwrite,
    and the count leaves that out.
    """
    numbers = torch.ones(1 << 18 if tiny else 1 << 28, device=device)
    target = torch.empty_like(numbers)
    moved = 2 * numbers.nbytes
    return {
        "copy": moved / _seconds(lambda: target.copy_(numbers), device, tiny),
        "read": numbers.nbytes / _seconds(numbers.sum, device, tiny),
        "in_place": moved / _seconds(lambda: numbers.mul_(1.0), device, tiny),
    }


def matmul_rate(dtype: torch.dtype, device: torch.device, tiny: bool) -> float:
    """Floating-point operations per second of a large square product of random numbers: zeros run faster. In
    fp32 where the processor has no fast products in this dtype.
    """
    if faster_in_fp32(torch.empty(0, dtype=dtype, device=device), 2048):
        dtype = torch.float32
    # A product reaches its rate at 2048 on a CPU, where torch imitates fp16 a hundred times slower than it
    # has fp32.
    size = 64 if tiny else 8192 if device.type == "cuda" else 256 if dtype == torch.float16 else 2048
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / _seconds(lambda: a @ b, device, tiny, rounds=10)


def _seconds(call: Callable[[], object], device: torch.device, tiny: bool, rounds: int = 20) -> float:
    replay = timing.replayable(lambda: call, device)
    return timing.alternate({"": replay}, device, rounds=2 if tiny else rounds)[""].us / 1e6
