"""What is left to choose around the library's matrix products: the dtype in which they are computed, that of
a weight's gradient, and the size of a chunk.
"""

from __future__ import annotations

import functools
import platform
from pathlib import Path

import torch
from torch import Tensor

# Rows of a product from which its operands are worth converting. On two cores of an EPYC 7003 (Zen 3, AVX2)
# x [rows, 576] times a bf16 weight [3072, 576] takes, as it is and by fp32: 4 rows 0.9 and 1.9 ms, 8 rows 1.8
# and 1.2 ms, 512 rows 109 and 15 ms.
WIDE_ROWS = 8
# The same on Intel's processors that have AVX-512's instructions for bf16 and no matrix unit, or hide it from
# a virtual machine. GFLOP/s of two cores (Emerald Rapids): 32 rows 137 and 131, 64 rows 149 and 161, 512 rows
# 166 and 268.
WIDE_ROWS_INTEL = 64


def processor_vendor() -> str:
    """As it calls itself: "AuthenticAMD", "GenuineIntel"; "" if it cannot be found."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        # on Windows "AMD64 Family 25 Model 17 Stepping 1, AuthenticAMD"
        return platform.processor().rpartition(", ")[2]
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")), "")


@functools.cache
def multiplies_bf16() -> bool:
    """Whether an x86 processor has instructions for bf16 that oneDNN uses, and does not imitate them."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


@functools.cache
def rows_in_fp32(dtype: torch.dtype) -> int | None:
    """Rows of a product in this dtype from which a CPU computes it faster in fp32; None if it never does.

    On x86 torch multiplies in 16 bits by oneDNN, which imitates bf16 where AVX-512 has no instructions for
    it, at a fifth of the rate of fp32, and by a loop of its own where oneDNN refuses the dtype, at a tenth:
    bf16 with AVX2 and nothing newer, fp16 without instructions for that.
    """
    capability = torch.backends.cpu.get_cpu_capability()
    if dtype not in (torch.bfloat16, torch.float16) or capability not in ("AVX2", "AVX512"):
        return None
    if dtype == torch.float16:
        return None if torch.ops.mkldnn._is_mkldnn_fp16_supported() else WIDE_ROWS
    if not multiplies_bf16():
        return WIDE_ROWS
    if capability == "AVX2" or torch.cpu._is_amx_tile_supported():
        return None
    return WIDE_ROWS_INTEL if processor_vendor() == "GenuineIntel" else None


def faster_in_fp32(x: Tensor, rows: int) -> bool:
    """Whether a product with so many rows of 16-bit x is better computed in fp32, and then rounded. Not in a
    trace, nor under autocast, which would convert it back.
    """
    if torch.compiler.is_compiling():  # first: a trace cannot ask for the processor
        return False
    if x.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        return False
    least = rows_in_fp32(x.dtype)
    return least is not None and rows >= least


def weight_gradient(dy: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """dy^T x in `dtype`, for dy [N, R] and x [N, D] of one dtype -> [R, D].

    On CUDA a 16-bit product is written in fp32, as it was accumulated: it is not rounded to 16 bits first,
    and not cast afterwards. Elsewhere torch has no product of mixed dtypes: the result is rounded, then cast,
    unless it is computed in fp32.
    """
    dy, x = _near(dy), _near(x)
    if x.is_cuda and dtype == torch.float32 and x.dtype != torch.float32:
        return torch.mm(dy.t(), x, out_dtype=torch.float32)
    if faster_in_fp32(x, x.shape[0]):  # as the product whose gradient it is
        dy, x = dy.float(), x.float()
    return torch.mm(dy.t(), x).to(dtype)


def _near(x: Tensor) -> Tensor:
    """x [N, D]; a copy if its rows lie too far apart for the 32-bit offsets of cuBLAS."""
    return x.contiguous() if x.shape[0] * x.stride(0) >= 1 << 31 else x


def add_weight_gradient(total: Tensor, dy: Tensor, x: Tensor, first: bool) -> None:
    """total [R, D] in fp32 += dy^T x: 16-bit operands, fp32 accumulation. The first product overwrites total,
    which is neither zeroed nor read.

    Since torch 2.11, where this ran on an H100, addmm accepts the added matrix in out_dtype ("self dtype must
    match either out_dtype or mat1 dtype") and writes the sum over it; 2.13 has the same overload,
    `dtype_out`. Older versions require the operands' dtype.
    """
    beta = 0 if first else 1
    if x.is_cuda and x.dtype != torch.float32:
        torch.addmm(total, dy.t(), x, beta=beta, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(dy.t().float(), x.float(), beta=beta)


FULL = 0.95  # part of the multiprocessors that must be busy in a wave
TILE_ROWS, TILE_COLUMNS = 128, (256, 192, 128)
FEWEST_TOKENS, MOST_TOKENS, MOST_LOGITS = 4096, 8192, 1 << 29


def tokens_per_chunk(hidden_size: int, vocabulary: int, processors: int) -> int:
    """The smallest number of tokens whose product dh = dz W [tokens, hidden_size] fills whole waves of tiles,
    one tile for each of `processors`.

    A tile has 128 rows and 256, 192 or 128 columns, whichever wastes least of the width: 5,632 tokens x 576
    are 44 x 3 tiles of 128 x 192, one wave of the 132 multiprocessors of an H100. A wave is full if it leaves
    at most 5 % of them idle. The result is at least 4,096 tokens, because each chunk reads and writes dW
    (8 V D bytes), and at most 8,192 tokens or 2^29 logits (1 GiB in 16 bits), whichever is less: the memory
    of a chunk does not depend on the batch. If no number in between fills its waves, it is the largest.
    """
    most = max(TILE_ROWS, min(MOST_TOKENS, MOST_LOGITS // vocabulary) // TILE_ROWS * TILE_ROWS)
    across = -(-hidden_size // min(TILE_COLUMNS, key=lambda columns: -hidden_size % columns))
    for waves in range(1, most // TILE_ROWS * across // processors + 1):
        down = waves * processors // across  # rows of tiles that fit
        if down * TILE_ROWS >= min(FEWEST_TOKENS, most) and down * across >= FULL * waves * processors:
            return down * TILE_ROWS
    return most
