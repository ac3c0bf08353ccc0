"""What the library's matrix products leave to decide: the dtype in which a weight's gradient is written, and
the size of a chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor


def weight_gradient(dy: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """dy^T x in `dtype`, for dy [N, R] and x [N, D] of one dtype -> [R, D].

    On CUDA a 16-bit product is written in fp32 as it was accumulated: no rounding to 16 bits in between, and
    no cast afterwards. Elsewhere torch has no product of two dtypes: it is rounded, then cast.
    """
    if x.is_cuda and dtype == torch.float32 and x.dtype != torch.float32:
        return torch.mm(dy.t(), x, out_dtype=torch.float32)
    return torch.mm(dy.t(), x).to(dtype)


def add_weight_gradient(total: Tensor, dy: Tensor, x: Tensor, first: bool) -> None:
    """total [R, D] in fp32 += dy^T x: 16-bit operands, fp32 accumulation. The first product is written, not
    added: what stood there is neither zeroed nor read.

    That addmm takes the added matrix in out_dtype, and writes the sum in its place, holds since torch 2.11
    ("self dtype must match either out_dtype or mat1 dtype"), where it ran on an H100; 2.13 has the same
    overload, `dtype_out`. Older versions want the operands' dtype.
    """
    beta = 0 if first else 1
    if x.is_cuda and x.dtype != torch.float32:
        torch.addmm(total, dy.t(), x, beta=beta, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(dy.t().float(), x.float(), beta=beta)


FULL = 0.95  # of the multiprocessors that the last wave keeps busy
TILE_ROWS, TILE_COLUMNS = 128, (256, 192, 128)
FEWEST_TOKENS, MOST_TOKENS, MOST_LOGITS = 4096, 8192, 1 << 29


def tokens_per_chunk(hidden_size: int, vocabulary: int, processors: int) -> int:
    """The smallest number of tokens whose dh = dz W [tokens, hidden_size] fills whole waves of tiles, a tile
    for each of `processors`.

    A tile has 128 rows and the one of 256, 192 or 128 columns that wastes least of the width: 5,632 tokens x
    576 are 44 x 3 tiles of 128 x 192, one wave of the 132 multiprocessors of an H100. Full is what leaves at
    most 5 % of them idle.
    At least 4,096 tokens, because each chunk reads and writes dW (8 V D bytes), and at most 8,192 or 2^29
    logits (1 GiB in 16 bits), whichever is less: the memory of a chunk stays a constant, whatever the batch.
    Where no number in between is full, it is the most.
    """
    most = max(TILE_ROWS, min(MOST_TOKENS, MOST_LOGITS // vocabulary) // TILE_ROWS * TILE_ROWS)
    across = -(-hidden_size // min(TILE_COLUMNS, key=lambda columns: -hidden_size % columns))
    for waves in range(1, most // TILE_ROWS * across // processors + 1):
        down = waves * processors // across  # rows of tiles that fit in
        if down * TILE_ROWS >= min(FEWEST_TOKENS, most) and down * across >= FULL * waves * processors:
            return down * TILE_ROWS
    return most
