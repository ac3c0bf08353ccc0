"""The end of a decode step: final norm and head in one launch, logits in fp32.

    logits = x (w * scale)^T * rstd,   rstd = 1 / sqrt(mean(x^2) + eps)

x [N, E], norm weight scale [E], head w [V, E], logits [N, V]; N rows (1 to 16), E hidden width, V vocabulary.
No backward pass.

The kernel reads the head once, whatever N is: V E elements, 56.6 MB of the 135M model in 16 bits, 19 us at
3.0 TB/s, the largest single read of a decode step (an 8-bit head would save 12 us of the step's floor of 98).
A program owns four columns and keeps their weights in registers while it loops over the rows: 12,288 programs
of one warp, 4.6 kB each. About sixteen run on a multiprocessor at a time, so 70 kB are in flight, where 20
suffice. Each program computes the norm again, from a row that L1 holds. At 16 rows an H100 took 78 us.

Rounding: only that of the result to fp32. The composition rounds the normalised row, and the logits to the
model's dtype: bfloat16 logits near 20 are 1/8 apart, so several may share the maximum. Batch invariance as in
decode_layer.py: one compiled kernel for every N.

Check: pytest tests -k decode_head
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import checks
from kernels.launch_config import launch_config
from kernels.layout import dense_rows
from kernels.tracing import traceable

MAX_ROWS = 16


@triton.jit(do_not_specialize=["rows", "vocabulary"])
def _norm_head_kernel(
    x_ptr, scale_ptr, w_ptr, logits_ptr, rows, vocabulary, x_stride, w_stride,
    EPS: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A program owns COLUMNS columns of the logits [N, V] for all rows. Grid: ceil(V / COLUMNS)."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    k = tl.arange(0, BLOCK_K)
    inside = k < WIDTH
    scale = tl.load(scale_ptr + k, mask=inside, other=0.0)
    mask = (column < vocabulary)[:, None] & inside[None, :]  # [COLUMNS, BLOCK_K]
    w = tl.load(w_ptr + column.to(tl.int64)[:, None] * w_stride + k[None, :], mask=mask, other=0.0)
    x = tl.load(x_ptr + k, mask=inside, other=0.0)
    w = w.to(tl.float32) * scale.to(tl.float32)[None, :]
    for row in range(0, rows):
        ahead = tl.load(
            x_ptr + tl.cast(tl.minimum(row + 1, rows - 1), tl.int64) * x_stride + k, mask=inside, other=0.0
        )
        wide = x.to(tl.float32)
        rstd = tl.rsqrt(tl.sum(wide * wide, axis=0) / WIDTH + EPS)
        logits = tl.sum(w * wide[None, :], axis=1) * rstd  # [COLUMNS]
        tl.store(logits_ptr + tl.cast(row, tl.int64) * vocabulary + column, logits, mask=column < vocabulary)
        x = ahead


@traceable(lambda x, scale, weight, eps: x.new_empty((x.shape[0], weight.shape[0]), dtype=torch.float32))
def _decode_head(x: Tensor, scale: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [N, E], scale [E], weight [V, E], each with a column stride of 1 -> [N, V] in fp32."""
    rows, width = x.shape
    vocabulary = weight.shape[0]
    logits = torch.empty((rows, vocabulary), dtype=torch.float32, device=x.device)
    if logits.numel():
        config = launch_config("decode_head", x.dtype, x.device, width)
        _norm_head_kernel[(triton.cdiv(vocabulary, config.block_n),)](
            x, scale, weight, logits, rows, vocabulary, x.stride(0), weight.stride(0), EPS=eps, WIDTH=width,
            COLUMNS=config.block_n, BLOCK_K=triton.next_power_of_2(width), num_warps=config.num_warps,
        )  # fmt: skip
    return logits


def supports(x: Tensor) -> bool:
    """Whether x [..., E] has few enough rows for the kernel."""
    return x.numel() <= MAX_ROWS * x.shape[-1]


def decode_head(x: Tensor, norm_weight: Tensor, head_weight: Tensor, eps: float) -> Tensor:
    """fp32 logits of the last block's output: rms_norm(x, norm_weight, eps) @ head_weight.T, without rounding
    the norm.

    x [..., E] of at most 16 rows (float32, float16, bfloat16), norm_weight [E], head_weight [V, E] with a
    last stride of 1, all of one dtype; E up to 16384 -> [..., V] in float32, contiguous. A row's logits do
    not depend on the other rows. No gradient. Raises ValueError naming what was expected.
    """
    op = "decode_head"
    checks.decode_head(x, norm_weight, head_weight)
    checks.kernel_dtype(op, x)
    stride = head_weight.stride(1)
    supports(x) or checks.refuse(op, f"at most {MAX_ROWS} rows", x.numel() // max(1, x.shape[-1]))
    (stride == 1) or checks.refuse(op, "head_weight with a last stride of 1", stride)
    logits = _decode_head(dense_rows(x), norm_weight.contiguous(), head_weight, eps)
    return logits.view(*x.shape[:-1], head_weight.shape[0])
