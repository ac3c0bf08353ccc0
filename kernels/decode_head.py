"""The end of a decode step: final norm and head in one launch, logits in fp32.

    logits = x (w * scale)^T * rstd,   rstd = 1 / sqrt(mean(x^2) + eps)

N rows (1 to 16), E hidden width, V vocabulary. Nothing is saved: no backward pass.

Reads the head once, whatever the rows: V E elements, 56.6 MB of the 135M model in 16 bits, 19 us at 3.0 TB/s,
the largest single read of a decode step (12 us of its floor of 98 would be saved by a head in 8 bits). A
program owns four columns and keeps their weights in registers while it loops over the rows: 12,288 programs
of one warp, 4.6 kB each, sixteen or so of them on a multiprocessor at a time, which is 70 kB in flight where
20 suffice. The norm, two reads of a row that L1 holds, is done again by each of them. At 16 rows an H100 took
78 us.

Rounding: none but that of the result to fp32. The composition rounds the normalised row, and the logits to
the model's dtype: in bfloat16 those near 20 are then 1/8 apart, and the largest may be several. Batch
invariance as in decode_layer.py: one compiled kernel for every N.

Check: pytest tests -k decode_head
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import checks
from kernels.launch_config import launch_config
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
    """x [N, E], scale [E], weight [V, E], columns side by side -> [N, V] in fp32."""
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
    """Whether the kernel takes so many rows: x [..., E]."""
    return x.numel() <= MAX_ROWS * x.shape[-1]


def decode_head(x: Tensor, norm_weight: Tensor, head_weight: Tensor, eps: float) -> Tensor:
    """fp32 logits of the last block's output: rms_norm(x, norm_weight, eps) @ head_weight.T, the norm not
    rounded in between.

    x [..., E] of at most 16 rows (float32, float16, bfloat16), norm_weight [E], head_weight [V, E] with a
    last stride of 1, all of one dtype; E up to 16384 -> [..., V] in float32, contiguous. A row's logits do
    not depend on the other rows. No gradient. Raises ValueError naming what was expected.
    """
    checks.decode_head(x, norm_weight, head_weight)
    checks.kernel_dtype("decode_head", x)
    rows = x.numel() // max(1, x.shape[-1])
    checks.require(supports(x), "decode_head", f"at most {MAX_ROWS} rows", rows)
    checks.require(
        head_weight.stride(1) == 1,
        "decode_head",
        "head_weight with a last stride of 1",
        head_weight.stride(1),
    )
    flat = x.reshape(-1, x.shape[-1])
    flat = flat if flat.stride(1) == 1 else flat.contiguous()
    return _decode_head(flat, norm_weight.contiguous(), head_weight, eps).view(
        *x.shape[:-1], head_weight.shape[0]
    )
