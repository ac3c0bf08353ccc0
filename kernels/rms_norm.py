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

One warp works on a row, so a row's sum needs no shared memory and no barrier. A tile is a whole row padded
to a power of two, or a part of its columns (block_n of the launch table). The compiler drops loads that are
masked as a whole, but not the arithmetic on their zeros: at 576 columns of 16 bits tiles of 256 compute 24
elements a lane, and not 32. 32 lanes of 16 bytes fill such a tile, so a warp has rows of its own.

The backward pass is persistent: a program owns a range of rows, keeps its share of dw in registers and
writes it once. With several stages it requests rows before it has done those in front of them. A second
kernel adds the shares in a fixed order, so gradients are bit-identical from run to run. It reads them from L2
and is bound by load latency, so it adds hundreds of shares at a time.

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
from kernels.launch_config import LaunchConfig, launch_config, programs, resident
from kernels.layout import dense_rows
from kernels.tracing import traceable


@triton.jit
def _tiles(x_ptr, row, stride, there, WIDTH: tl.constexpr, SPAN: tl.constexpr):
    """Rows of WIDTH columns as tiles [ROWS, SPAN], all of them requested. row, there [ROWS, 1]; there: which
    of them exist.
    """
    found = tl.tuple([])
    for start in tl.static_range(0, WIDTH, SPAN):
        column = start + tl.arange(0, SPAN)[None, :]
        mask = there & (column < WIDTH)
        found = found + (tl.load(x_ptr + row * stride + column, mask=mask, other=0.0),)
    return found


@triton.jit(do_not_specialize=["rows"])
def _rms_norm_fwd_kernel(
    x_ptr, residual_ptr, weight_ptr, y_ptr, sum_ptr, rstd_ptr, rows, x_stride, residual_stride,
    WIDTH: tl.constexpr, EPS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, ROWS: tl.constexpr,
    SPAN: tl.constexpr,
):  # fmt: skip
    """A program owns ROWS rows. Grid: ceil(rows / ROWS). Outputs are contiguous; inputs have a column stride
    of 1.
    """
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    there = row < rows
    xs = _tiles(x_ptr, row, x_stride, there, WIDTH, SPAN)
    if HAS_RESIDUAL:
        residuals = _tiles(residual_ptr, row, residual_stride, there, WIDTH, SPAN)
    weights = _tiles(weight_ptr, 0 * row, 0, row >= 0, WIDTH, SPAN)
    squares = tl.zeros([ROWS, SPAN], tl.float32)
    wides = tl.tuple([])
    for tile in tl.static_range((WIDTH + SPAN - 1) // SPAN):
        x = xs[tile]
        if HAS_RESIDUAL:
            x = (x.to(tl.float32) + residuals[tile].to(tl.float32)).to(x.dtype)
            column = tile * SPAN + tl.arange(0, SPAN)[None, :]
            tl.store(sum_ptr + row * WIDTH + column, x, mask=there & (column < WIDTH))
        wide = x.to(tl.float32)
        wides = wides + (wide,)
        squares += wide * wide
    rstd = tl.rsqrt(tl.sum(squares, axis=1)[:, None] / WIDTH + EPS)  # [ROWS, 1]
    for tile in tl.static_range((WIDTH + SPAN - 1) // SPAN):
        column = tile * SPAN + tl.arange(0, SPAN)[None, :]
        y = (wides[tile] * rstd).to(xs[tile].dtype).to(tl.float32)
        y *= weights[tile].to(xs[tile].dtype).to(tl.float32)
        tl.store(y_ptr + row * WIDTH + column, y.to(xs[tile].dtype), mask=there & (column < WIDTH))
    tl.store(rstd_ptr + row, rstd, mask=there)


@triton.jit(do_not_specialize=["rows", "rows_per_program"])
def _rms_norm_bwd_dx_kernel(
    dy_ptr, dsum_ptr, sum_ptr, weight_ptr, rstd_ptr, dx_ptr, partial_ptr,
    rows, rows_per_program, dy_stride, dsum_stride, sum_stride,
    WIDTH: tl.constexpr, HAS_DSUM: tl.constexpr, ROWS: tl.constexpr, SPAN: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """A program owns rows_per_program consecutive rows, ROWS at a time, and one row of partial
    [programs, WIDTH].
    """
    TILES: tl.constexpr = (WIDTH + SPAN - 1) // SPAN
    first = tl.program_id(0).to(tl.int64) * rows_per_program
    last = tl.minimum(first + rows_per_program, rows)
    weights = _tiles(weight_ptr, tl.zeros([1, 1], tl.int32), 0, tl.full([1, 1], True, tl.int1), WIDTH, SPAN)
    dw = tl.tuple([])
    for _ in tl.static_range(TILES):
        dw = dw + (tl.zeros([ROWS, SPAN], tl.float32),)
    for start in tl.range(first, last, ROWS, num_stages=STAGES):
        row = (start + tl.arange(0, ROWS).to(tl.int64))[:, None]
        there = row < last
        dys = _tiles(dy_ptr, row, dy_stride, there, WIDTH, SPAN)
        xs = _tiles(sum_ptr, row, sum_stride, there, WIDTH, SPAN)
        rstd = tl.load(rstd_ptr + row, mask=there, other=0.0)  # [ROWS, 1]
        if HAS_DSUM:
            dsums = _tiles(dsum_ptr, row, dsum_stride, there, WIDTH, SPAN)
        products = tl.zeros([ROWS, SPAN], tl.float32)
        for tile in tl.static_range(TILES):
            weight = weights[tile].to(sum_ptr.dtype.element_ty).to(tl.float32)
            products += (dys[tile].to(tl.float32) * weight) * (xs[tile].to(tl.float32) * rstd)
        mean = tl.sum(products, axis=1)[:, None] / WIDTH  # [ROWS, 1]
        shares = tl.tuple([])
        for tile in tl.static_range(TILES):
            x, dy = xs[tile], dys[tile].to(tl.float32)
            normed = x.to(tl.float32) * rstd
            dx = rstd * (dy * weights[tile].to(x.dtype).to(tl.float32) - normed * mean)
            if HAS_DSUM:
                dx += dsums[tile].to(tl.float32)
            column = tile * SPAN + tl.arange(0, SPAN)[None, :]
            tl.store(dx_ptr + row * WIDTH + column, dx.to(x.dtype), mask=there & (column < WIDTH))
            shares = shares + (dw[tile] + dy * normed.to(x.dtype).to(tl.float32),)
        dw = shares
    for tile in tl.static_range(TILES):
        column = tile * SPAN + tl.arange(0, SPAN)
        target = partial_ptr + tl.program_id(0) * WIDTH + column
        tl.store(target, tl.sum(dw[tile], axis=0), mask=column < WIDTH)


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


def _span(config: LaunchConfig, width: int) -> int:
    """The columns of a tile: block_n, or 0 for a whole row."""
    return config.block_n or triton.next_power_of_2(width)


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
            HAS_RESIDUAL=residual is not None, ROWS=config.block_m, SPAN=_span(config, width),
            num_warps=config.num_warps,
        )  # fmt: skip
    return y, total, rstd


def _fake_backward(
    dy: Tensor, dsum: Tensor | None, total: Tensor, weight: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    return total.new_empty(total.shape), weight.new_empty(weight.shape)


@traceable(_fake_backward)
def _rms_norm_backward(
    dy: Tensor, dsum: Tensor | None, total: Tensor, weight: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    """dy, dsum, sum [rows, D] -> dx [rows, D], dw [D]."""
    rows, width = total.shape
    dx = torch.empty((rows, width), dtype=total.dtype, device=total.device)
    if rows == 0 or width == 0:
        return dx, torch.zeros_like(weight)
    dw = torch.empty(width, dtype=weight.dtype, device=weight.device)
    config = launch_config("rms_norm_bwd", total.dtype, total.device, width)
    # The grid and the buffer of partial sums have one size; a program that owns no row writes zeros.
    at_once = programs(total.device, config.programs)
    rows_per_program = config.block_m * triton.cdiv(rows, config.block_m * at_once)
    parts = triton.cdiv(rows, rows_per_program)
    partial = torch.empty((parts, width), dtype=torch.float32, device=total.device)
    _rms_norm_bwd_dx_kernel[(parts,)](
        dy, dy if dsum is None else dsum, total, weight, rstd, dx, partial,
        rows, rows_per_program, dy.stride(0), 0 if dsum is None else dsum.stride(0), total.stride(0),
        WIDTH=width, HAS_DSUM=dsum is not None, ROWS=config.block_m, SPAN=_span(config, width),
        STAGES=config.num_stages, num_warps=config.num_warps, **resident(total.device, config),
    )  # fmt: skip
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
        x, weight, rstd = ctx.saved_tensors
        dx, dw = _rms_norm_backward(dense_rows(dy), None, x, weight, rstd)
        return dx, dw, None


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        y, total, rstd = _rms_norm_forward(dense_rows(x), dense_rows(residual), weight, eps)
        ctx.save_for_backward(total, weight, rstd)
        ctx.set_materialize_grads(False)  # the last norm's sum has no gradient: no zeros are read for it
        return y.view(x.shape), total.view(x.shape)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dsum: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy is None:  # only the sum was used
            return dsum, dsum, None, None
        total, weight, rstd = ctx.saved_tensors
        dsum = None if dsum is None else dense_rows(dsum)
        dx, dw = _rms_norm_backward(dense_rows(dy), dsum, total, weight, rstd)
        dx = dx.view(dy.shape)  # returned twice: autograd copies it if x and residual both keep it as .grad
        return dx, dx, dw, None


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
