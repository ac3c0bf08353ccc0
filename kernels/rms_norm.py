"""RMSNorm, alone or fused with the addition of the residual stream; forward and backward.

    forward    s = x + r  (rounded to the dtype; without a residual s = x)
               rstd = 1 / sqrt(mean(s^2) + eps)             fp32, one per row, saved
               y = round(s * rstd) * w                      rounds as Hugging Face Llama does
    backward   n = s * rstd,  g = dy * w
               ds = rstd * (g - n * mean(g * n)) + dsum     dsum: the gradient of s along the residual stream
               dw = sum over rows of dy * round(n)
               dx = dr = ds

x, r, s, y [rows, D], w [D]. The kernels round w to the dtype of x as they load it, so fp32 master weights
need no cast, and their gradient keeps the fp32 in which it was summed.

Saved: s (an output anyway), w, rstd.
Bytes per element of a 16-bit tensor: rms_norm 4 forward, 6 backward; add_rms_norm 8 forward (2 reads, 2
writes), 8 backward. Floor at 16,384 tokens x 576 and 3.0 TB/s: 13 us and 19 us; with the residual 25 us
each.

One warp works on a row, so a row's sum needs no shared memory and no barrier. The block is the width padded
to a power of two. The width is a compile-time constant, so the compiler drops loads that are masked as a
whole: 576 columns of 16 bits are three 16-byte loads a lane. A split in 512 + 64 columns or a program of four
warps takes up to twice as many instructions (sm_90, counted in the SASS).

The backward pass is persistent: a program owns a range of rows, keeps its share of dw in registers and
writes it once. A second kernel adds the shares in a fixed order, so gradients are bit-identical from run to
run. It reads them from L2 and is bound by load latency, so it adds hundreds of shares at a time.

Source: Zhang and Sennrich 2019 (arXiv 1910.07467).
Check: pytest tests -k rms_norm
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import checks
from kernels.launch_config import launch_config, programs
from kernels.layout import dense_rows
from kernels.tracing import traceable


@triton.jit(do_not_specialize=["rows"])
def _rms_norm_fwd_kernel(
    x_ptr, residual_ptr, weight_ptr, y_ptr, sum_ptr, rstd_ptr, rows, x_stride, residual_stride,
    WIDTH: tl.constexpr, EPS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """A program owns ROWS rows. Grid: ceil(rows / ROWS). Outputs are contiguous; inputs have a column stride
    of 1.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    mask = (row < rows)[:, None] & (column < WIDTH)[None, :]  # [ROWS, BLOCK]
    x = tl.load(x_ptr + row[:, None] * x_stride + column, mask=mask, other=0.0)
    weight = tl.load(weight_ptr + column, mask=column < WIDTH, other=0.0).to(x.dtype)
    out = row[:, None] * WIDTH + column
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + row[:, None] * residual_stride + column, mask=mask, other=0.0)
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(x.dtype)
        tl.store(sum_ptr + out, x, mask=mask)
    wide = x.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(wide * wide, axis=1) / WIDTH + EPS)  # [ROWS]
    y = (wide * rstd[:, None]).to(x.dtype).to(tl.float32) * weight.to(tl.float32)
    tl.store(y_ptr + out, y.to(x.dtype), mask=mask)
    tl.store(rstd_ptr + row, rstd, mask=row < rows)


@triton.jit(do_not_specialize=["rows", "rows_per_program"])
def _rms_norm_bwd_dx_kernel(
    dy_ptr, dsum_ptr, sum_ptr, weight_ptr, rstd_ptr, dx_ptr, partial_ptr,
    rows, rows_per_program, dy_stride, dsum_stride, sum_stride,
    WIDTH: tl.constexpr, HAS_DSUM: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program owns rows_per_program consecutive rows, ROWS at a time, and one row of partial
    [programs, WIDTH].
    """
    first = tl.program_id(0).to(tl.int64) * rows_per_program
    last = tl.minimum(first + rows_per_program, rows)
    column = tl.arange(0, BLOCK)
    weight = tl.load(weight_ptr + column, mask=column < WIDTH, other=0.0)
    weight = weight.to(sum_ptr.dtype.element_ty).to(tl.float32)
    dw = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(first, last, ROWS):
        row = start + tl.arange(0, ROWS).to(tl.int64)
        mask = (row < last)[:, None] & (column < WIDTH)[None, :]  # [ROWS, BLOCK]
        dy = tl.load(dy_ptr + row[:, None] * dy_stride + column, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(sum_ptr + row[:, None] * sum_stride + column, mask=mask, other=0.0)
        rstd = tl.load(rstd_ptr + row, mask=row < last, other=0.0)[:, None]  # [ROWS, 1]
        normed = x.to(tl.float32) * rstd
        grad = dy * weight
        mean = tl.sum(grad * normed, axis=1)[:, None] / WIDTH  # [ROWS, 1]
        dx = rstd * (grad - normed * mean)
        if HAS_DSUM:
            dx += tl.load(dsum_ptr + row[:, None] * dsum_stride + column, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx_ptr + row[:, None] * WIDTH + column, dx.to(x.dtype), mask=mask)
        dw += dy * normed.to(x.dtype).to(tl.float32)
    partial = tl.program_id(0) * WIDTH + column
    tl.store(partial_ptr + partial, tl.sum(dw, axis=0), mask=column < WIDTH)


@triton.jit(do_not_specialize=["parts"])
def _rms_norm_bwd_dw_kernel(
    partial_ptr, dw_ptr, parts, WIDTH: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr
):
    """A program owns BLOCK columns of dw and adds all parts in ascending order, PARTS at a time."""
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([PARTS, BLOCK], tl.float32)
    for start in range(0, parts, PARTS):
        part = start + tl.arange(0, PARTS)
        mask = (part < parts)[:, None] & (column < WIDTH)[None, :]  # [PARTS, BLOCK]
        total += tl.load(partial_ptr + part[:, None] * WIDTH + column, mask=mask, other=0.0)
    tl.store(dw_ptr + column, tl.sum(total, axis=0).to(dw_ptr.dtype.element_ty), mask=column < WIDTH)


def _fake_forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    total = x.new_empty(0 if residual is None else x.shape)
    return x.new_empty(x.shape), total, x.new_empty(x.shape[0], dtype=torch.float32)


@traceable(_fake_forward)
def _rms_norm_forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """x, residual [rows, D] -> y, sum (empty without a residual), rstd [rows]."""
    rows, width = x.shape
    y = torch.empty((rows, width), dtype=x.dtype, device=x.device)
    total = torch.empty(0 if residual is None else (rows, width), dtype=x.dtype, device=x.device)
    rstd = torch.empty(rows, dtype=torch.float32, device=x.device)
    config = launch_config("rms_norm_fwd", x.dtype, x.device, width)
    if rows and width:
        _rms_norm_fwd_kernel[(triton.cdiv(rows, config.block_m),)](
            x, x if residual is None else residual, weight, y, total, rstd, rows, x.stride(0),
            0 if residual is None else residual.stride(0), WIDTH=width, EPS=eps,
            HAS_RESIDUAL=residual is not None, ROWS=config.block_m, BLOCK=triton.next_power_of_2(width),
            num_warps=config.num_warps,
        )  # fmt: skip
    return y, total, rstd


def _fake_backward(
    dy: Tensor, dsum: Tensor | None, total: Tensor, weight: Tensor, rstd: Tensor, needs_weight: bool
) -> tuple[Tensor, Tensor]:
    return total.new_empty(total.shape), weight.new_empty(weight.shape if needs_weight else 0)


@traceable(_fake_backward)
def _rms_norm_backward(
    dy: Tensor, dsum: Tensor | None, total: Tensor, weight: Tensor, rstd: Tensor, needs_weight: bool
) -> tuple[Tensor, Tensor]:
    """dy, dsum, sum [rows, D] -> dx [rows, D], dw [D], which is empty if it is not needed."""
    rows, width = total.shape
    dx = torch.empty((rows, width), dtype=total.dtype, device=total.device)
    dw = torch.empty(width if needs_weight else 0, dtype=weight.dtype, device=weight.device)
    if rows == 0 or width == 0:
        return dx, dw.zero_()
    config = launch_config("rms_norm_bwd", total.dtype, total.device, width)
    # The grid and the buffer of partial sums have one size; a program that owns no row writes zeros.
    rows_per_program = config.block_m * triton.cdiv(rows, config.block_m * programs(total.device))
    parts = triton.cdiv(rows, rows_per_program)
    partial = torch.empty((parts, width), dtype=torch.float32, device=total.device)
    _rms_norm_bwd_dx_kernel[(parts,)](
        dy, dy if dsum is None else dsum, total, weight, rstd, dx, partial,
        rows, rows_per_program, dy.stride(0), 0 if dsum is None else dsum.stride(0), total.stride(0),
        WIDTH=width, HAS_DSUM=dsum is not None, ROWS=config.block_m, BLOCK=triton.next_power_of_2(width),
        num_warps=config.num_warps,
    )  # fmt: skip
    if not needs_weight:
        return dx, dw
    config = launch_config("rms_norm_dw", torch.float32, total.device, width)
    _rms_norm_bwd_dw_kernel[(triton.cdiv(width, config.block_n),)](
        partial, dw, parts,
        WIDTH=width, PARTS=config.block_m, BLOCK=config.block_n, num_warps=config.num_warps,
    )  # fmt: skip
    return dx, dw


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y, _, rstd = _rms_norm_forward(x, None, weight, eps)
        ctx.save_for_backward(x, weight, rstd)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        checks.first_derivative("rms_norm")
        x, weight, rstd = ctx.saved_tensors
        needed = ctx.needs_input_grad[1]
        dx, dw = _rms_norm_backward(dense_rows(dy), None, x, weight, rstd, needed)
        return dx, dw if needed else None, None


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        y, total, rstd = _rms_norm_forward(dense_rows(x), dense_rows(residual), weight, eps)
        ctx.save_for_backward(total, weight, rstd)
        ctx.set_materialize_grads(False)  # the last norm's sum has no gradient: no zeros are read for it
        return y.view(x.shape), total.view(x.shape)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dsum: Tensor | None) -> tuple[Tensor | None, ...]:
        checks.first_derivative("add_rms_norm")
        if dy is None:  # only the sum was used
            return dsum, dsum, None, None
        total, weight, rstd = ctx.saved_tensors
        dsum = None if dsum is None else dense_rows(dsum)
        needed = ctx.needs_input_grad[2]
        dx, dw = _rms_norm_backward(dense_rows(dy), dsum, total, weight, rstd, needed)
        dx = dx.view(dy.shape)  # returned twice: autograd copies it if x and residual both keep it as .grad
        return dx, dx, dw if needed else None, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """y = round(x / sqrt(mean(x^2) + eps)) * weight over the last dimension.

    x [..., D] in float32, float16 or bfloat16 with any strides; weight [D] in the dtype of x, or in float32
    and rounded to it -> [..., D], contiguous. The gradient of the weight has the weight's dtype. Raises
    ValueError naming what was expected. Same semantics as `kernels.reference.rms_norm`.
    """
    checks.rms_norm("rms_norm", x, weight)
    checks.kernel_dtype("rms_norm", x)
    return _RMSNorm.apply(dense_rows(x), weight.contiguous(), eps).view(x.shape)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(rms_norm(s), s) with s = x + residual, in one launch; all three gradients take two launches.

    x, residual [..., D] with any strides, weight [D] as in `rms_norm` -> two tensors [..., D], contiguous.
    Raises ValueError naming what was expected. Same semantics as `kernels.reference.add_rms_norm`.
    """
    checks.rms_norm("add_rms_norm", x, weight, residual)
    checks.kernel_dtype("add_rms_norm", x)
    return _AddRMSNorm.apply(x, residual, weight.contiguous(), eps)
