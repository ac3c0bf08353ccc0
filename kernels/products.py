"""Matrix products of 16-bit activations with fp32 master weights, whose gradients keep the precision of their fp32 accumulators."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels import checks, cpu_linear


def weight_gradient(dy: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """dy^T x in `dtype`, for dy [N, R] and x [N, D] of one dtype -> [R, D].

    On CUDA a 16-bit product is written in fp32 as it was accumulated: no rounding to 16 bits in between, and no cast afterwards. Elsewhere
    torch has no product of two dtypes: it is rounded, then cast.
    """
    if x.is_cuda and dtype == torch.float32 and x.dtype != torch.float32:
        return torch.mm(dy.t(), x, out_dtype=torch.float32)
    return torch.mm(dy.t(), x).to(dtype)


def add_weight_gradient(total: Tensor, dy: Tensor, x: Tensor, first: bool) -> None:
    """total [R, D] in fp32 += dy^T x: 16-bit operands, fp32 accumulation. The first product is written, not added: what stood there is
    neither zeroed nor read.

    That addmm takes the added matrix in out_dtype, and writes the sum in its place, holds since torch 2.11 ("self dtype must match either
    out_dtype or mat1 dtype"), where it ran on an H100; 2.13 has the same overload, `dtype_out`. Older versions want the operands' dtype.
    """
    beta = 0 if first else 1
    if x.is_cuda and x.dtype != torch.float32:
        torch.addmm(total, dy.t(), x, beta=beta, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(dy.t().float(), x.float(), beta=beta)


class _Linear(torch.autograd.Function):
    """x @ copy.T, where copy is the weight in the dtype of x. The gradient of the weight has the weight's dtype."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, copy: Tensor) -> Tensor:
        ctx.save_for_backward(x, copy)
        ctx.dtype = weight.dtype
        return torch.nn.functional.linear(x, copy)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        checks.first_derivative("linear")
        x, copy = ctx.saved_tensors
        rows = dy.reshape(-1, dy.shape[-1])
        dweight = weight_gradient(rows, x.reshape(-1, x.shape[-1]), ctx.dtype) if ctx.needs_input_grad[1] else None
        dx = torch.mm(rows, copy).view(x.shape) if ctx.needs_input_grad[0] else None
        return dx, dweight, None


def linear(x: Tensor, weight: Tensor, copy: Tensor | None = None) -> Tensor:
    """x [..., D] @ weight [R, D].T -> [..., R], in the dtype of x, to which a weight of another one is cast.

    copy: the weight in the dtype of x, if it exists already; what it holds is multiplied, and the gradient goes to the weight. A trace
    of a training step casts the weight instead. Raises what F.linear raises, and RuntimeError for create_graph=True where a copy is used.
    """
    if not torch.is_grad_enabled():
        return cpu_linear.linear(x, weight.to(x.dtype) if copy is None else copy)
    if not torch.compiler.is_compiling() and (copy is not None or (x.is_cuda and weight.dtype != x.dtype)):
        return _Linear.apply(x, weight, weight.detach().to(x.dtype) if copy is None else copy)
    return cpu_linear.linear(x, weight.to(x.dtype))


FULL = 0.95  # of the multiprocessors that the last wave keeps busy
TILE_ROWS, TILE_COLUMNS = 128, (256, 192, 128)
FEWEST_TOKENS, MOST_TOKENS, MOST_LOGITS = 4096, 8192, 1 << 29


def tokens_per_chunk(hidden_size: int, vocabulary: int, processors: int) -> int:
    """The smallest number of tokens whose dh = dz W [tokens, hidden_size] fills whole waves of tiles, a tile for each of `processors`.

    A tile has 128 rows and the one of 256, 192 or 128 columns that wastes least of the width: 5,632 tokens x 576 are 44 x 3 tiles of
    128 x 192, one wave of the 132 multiprocessors of an H100. Full is what leaves at most 5 % of them idle.
    At least 4,096 tokens, because each chunk reads and writes dW (8 V D bytes), and at most 8,192 or 2^29 logits (1 GiB in 16 bits),
    whichever is less: the memory of a chunk stays a constant, whatever the batch. Where no number in between is full, it is the most.
    """
    most = max(TILE_ROWS, min(MOST_TOKENS, MOST_LOGITS // vocabulary) // TILE_ROWS * TILE_ROWS)
    across = -(-hidden_size // min(TILE_COLUMNS, key=lambda columns: -hidden_size % columns))
    for waves in range(1, most // TILE_ROWS * across // processors + 1):
        down = waves * processors // across  # rows of tiles that fit in
        if down * TILE_ROWS >= min(FEWEST_TOKENS, most) and down * across >= FULL * waves * processors:
            return down * TILE_ROWS
    return most
