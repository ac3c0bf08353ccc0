"""SwiGLU inside its matrix products: the gate and up projection writes silu(gate) * up itself.

    forward    gate, up = x Wg^T, x Wu^T      one kernel; act = silu(gate) * up in its epilogue
               y = act Wd^T                   library product
    backward   dact = dy Wd                   one kernel; dgate and dup in its epilogue, dact is never stored
               dx = [dgate dup] Wgu           library products, as dWgu = [dgate dup]^T x and dWd = dy^T act

x, y [N, D], Wgu = [Wg; Wu] [2F, D], Wd [D, F], gate, up, act [N, F]. Saved: x, the weights in the dtype of x,
gate and up side by side [N, 2F], and act. The backward epilogue could compute act again, but would have to
store it for the product dWd: saving it costs no extra bytes, and the composed form saves it too.

Bytes a token, against products around kernels/swiglu.py: 2F elements fewer are read in the forward pass, F
fewer read and F fewer written in the backward pass, 4F in all. At 16,384 tokens of the 135M model in 16 bits
that is 201 MB a layer, 67 us at 3.0 TB/s, or 2.0 ms a step of 30 layers if the products were as fast as the
library's; every 10 % by which they are slower costs 0.45 ms of it. Measured on an H200, a step took 32.9 ms
with this and 33.1 without: `launch_config.FUSED_MLP` names no target.

Gate and up of a tile are one product with twice as many columns; its accumulator is split in registers.
Triton flattens the loops over tiles and over k into one, so that the next tile's loads run during an
epilogue. With an accumulator each for gate and up, that loop would clear one while the other's product is
running, and ptxas then serializes all products of sm_90 (its note C7515).

Rounding: gate and up are rounded to the dtype, and act is computed from the rounded values, as in the
composed form. dact stays in fp32, where the composed form rounds it. A program sums over the whole of k: no
atomics, the same bits in every run.

The grid is one program a multiprocessor. Tiles are ordered in bands, GROUP tiles of rows by all tiles of
columns, so that concurrent tiles share rows and columns in L2. Where the GPU has TMA, tiles are copied
through tensor descriptors made on the host. TMA needs rows that begin at multiples of 16 bytes: a tensor with
other strides is copied, and widths that cannot have such rows use the masked loads and stores of all other
GPUs.

Source: Shazeer 2020 (arXiv 2002.05202); persistent products with tensor descriptors: Triton's tutorial 09.
Check: pytest tests -k mlp
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels import checks, launch_config
from kernels.layout import dense_rows
from kernels.products import weight_gradient
from kernels.tracing import traceable

GROUP = 8  # tiles of rows in a band
BLOCK_K = 64  # in 16 bits 128 bytes: one swizzled row of shared memory


@triton.jit
def _tile(
    index, rows, COLUMNS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr
):
    """First row and column of a tile. Order: GROUP tiles of rows, then the next tile of columns."""
    band: tl.constexpr = GROUP * tl.cdiv(COLUMNS, BLOCK_N)
    first = index // band * GROUP
    height = tl.minimum(tl.cdiv(rows, BLOCK_M) - first, GROUP)
    return (first + index % band % height) * BLOCK_M, index % band // height * BLOCK_N


@triton.jit
def _inside(row, column, rows, COLUMNS: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    """Rows [M, 1] and columns [1, N] of a tile, and the mask of its elements that lie in the matrix."""
    m, n = row + tl.arange(0, M)[:, None], column + tl.arange(0, N)[None, :]
    return m.to(tl.int64), n, (m < rows) & (n < COLUMNS) if COLUMNS % N else m < rows


@triton.jit
def _load(
    matrix, stride, row, column, rows,
    COLUMNS: tl.constexpr, M: tl.constexpr, N: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """The tile [M, N] at (row, column) of a matrix [rows, COLUMNS], zero outside of it. The matrix is a
    descriptor with TMA, a pointer without.
    """
    if TMA:
        tile = matrix.load([row, column])
    else:
        m, n, inside = _inside(row, column, rows, COLUMNS, M, N)
        tile = tl.load(matrix + m * stride + n, mask=inside, other=0.0)
    return tile


@triton.jit
def _load_halves(
    matrix, stride, row, column,
    HALF: tl.constexpr, COLUMNS: tl.constexpr, M: tl.constexpr, N: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """[2 M, N]: the same M rows of both halves of a matrix [2 HALF, COLUMNS]; as `_load` otherwise. Its
    descriptor has the shape [2, HALF, COLUMNS].
    """
    if TMA:
        tile = matrix.load([0, row, column]).reshape(2 * M, N)
    else:
        index = tl.arange(0, 2 * M)[:, None]
        m, n = row + index % M, column + tl.arange(0, N)[None, :]
        inside = (m < HALF) & (n < COLUMNS) if COLUMNS % N else m < HALF
        tile = tl.load(matrix + (index // M * HALF + m).to(tl.int64) * stride + n, mask=inside, other=0.0)
    return tile


@triton.jit
def _store(
    matrix, stride, tile, row, column, rows,
    COLUMNS: tl.constexpr, M: tl.constexpr, N: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """The reverse of `_load`: elements outside of the matrix are not written."""
    if TMA:
        matrix.store([row, column], tile)
    else:
        m, n, inside = _inside(row, column, rows, COLUMNS, M, N)
        tl.store(matrix + m * stride + n, tile, mask=inside)


@triton.jit
def _add_product(total, a, b):
    """total + a b. In fp32 a product is a chain of fmas for each element, and one chain over the whole of k
    has several times the error of a sum of short ones. As a plain addition the compiler would chain them.
    """
    if a.dtype == tl.float32:
        total = tl.fma(tl.dot(a, b, input_precision="ieee"), 1.0, total)
    else:
        total = tl.dot(a, b, total)
    return total


@triton.jit(do_not_specialize=["rows"])
def _mlp_fwd_kernel(
    x, weight, gate, up, act, rows, x_stride, weight_stride, WIDTH: tl.constexpr, FFN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """A program owns every grid-th tile, BLOCK_M rows by BLOCK_N columns of gate, up and act. Any grid.

    x [rows, WIDTH], weight [2 FFN, WIDTH]; gate and up [rows, FFN] are the halves of one buffer; act
    [rows, FFN] is contiguous.
    """
    dtype: tl.constexpr = act.dtype if TMA else act.dtype.element_ty
    tiles = tl.cdiv(rows, BLOCK_M) * tl.cdiv(FFN, BLOCK_N)
    for index in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
        row, column = _tile(index, rows, FFN, BLOCK_M, BLOCK_N, GROUP)
        total = tl.zeros([BLOCK_M, 2 * BLOCK_N], tl.float32)
        for k in range(0, WIDTH, BLOCK_K):
            a = _load(x, x_stride, row, k, rows, WIDTH, BLOCK_M, BLOCK_K, TMA)  # [BLOCK_M, BLOCK_K]
            # [2 BLOCK_N, BLOCK_K]
            b = _load_halves(weight, weight_stride, column, k, FFN, WIDTH, BLOCK_N, BLOCK_K, TMA)
            total = _add_product(total, a, b.T)
        # [BLOCK_M, BLOCK_N] each
        gate_sum, up_sum = total.reshape(BLOCK_M, 2, BLOCK_N).permute(0, 2, 1).split()
        rounded_gate, rounded_up = gate_sum.to(dtype), up_sum.to(dtype)
        _store(gate, 2 * FFN, rounded_gate, row, column, rows, FFN, BLOCK_M, BLOCK_N, TMA)
        _store(up, 2 * FFN, rounded_up, row, column, rows, FFN, BLOCK_M, BLOCK_N, TMA)
        wide = rounded_gate.to(tl.float32)
        product = wide * tl.sigmoid(wide) * rounded_up.to(tl.float32)
        _store(act, FFN, product.to(dtype), row, column, rows, FFN, BLOCK_M, BLOCK_N, TMA)


@triton.jit(do_not_specialize=["rows"])
def _mlp_bwd_kernel(
    dy, weight, gate, up, dgate, dup, rows, dy_stride, weight_stride, WIDTH: tl.constexpr, FFN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """A program owns every grid-th tile, BLOCK_M rows by BLOCK_N columns of dgate and dup. Any grid.

    dy [rows, WIDTH], weight [WIDTH, FFN]; gate and up [rows, FFN] are the halves of one buffer, dgate and
    dup those of another.
    """
    dtype: tl.constexpr = dup.dtype if TMA else dup.dtype.element_ty
    tiles = tl.cdiv(rows, BLOCK_M) * tl.cdiv(FFN, BLOCK_N)
    for index in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
        row, column = _tile(index, rows, FFN, BLOCK_M, BLOCK_N, GROUP)
        dact = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for k in range(0, WIDTH, BLOCK_K):
            a = _load(dy, dy_stride, row, k, rows, WIDTH, BLOCK_M, BLOCK_K, TMA)  # [BLOCK_M, BLOCK_K]
            # [BLOCK_K, BLOCK_N]
            b = _load(weight, weight_stride, k, column, WIDTH, FFN, BLOCK_K, BLOCK_N, TMA)
            dact = _add_product(dact, a, b)
        wide = _load(gate, 2 * FFN, row, column, rows, FFN, BLOCK_M, BLOCK_N, TMA).to(tl.float32)
        factor = _load(up, 2 * FFN, row, column, rows, FFN, BLOCK_M, BLOCK_N, TMA).to(tl.float32)
        sigmoid = tl.sigmoid(wide)
        silu = wide * sigmoid
        grad = dact * factor * (sigmoid + silu * (1.0 - sigmoid))
        _store(dgate, 2 * FFN, grad.to(dtype), row, column, rows, FFN, BLOCK_M, BLOCK_N, TMA)
        _store(dup, 2 * FFN, (dact * silu).to(dtype), row, column, rows, FFN, BLOCK_M, BLOCK_N, TMA)


def _operand(matrix: Tensor, block: list[int], tma: bool) -> Tensor | TensorDescriptor:
    """A matrix as a kernel takes it: itself, or with TMA a descriptor of its tiles. A matrix that TMA cannot
    address is copied.
    """
    if not tma:
        return matrix
    stride = matrix.stride(-2)
    if stride < matrix.shape[-1] or stride * matrix.element_size() % 16 or matrix.data_ptr() % 16:
        matrix = matrix.clone(memory_format=torch.contiguous_format)
    return TensorDescriptor.from_tensor(matrix, block)


def _plan(op: str, x: Tensor, ffn: int) -> tuple[tuple[int], dict[str, Any]]:
    """The grid and the options of a launch for x [rows, width] and ffn columns."""
    rows, width = x.shape
    config = launch_config.launch_config(op, x.dtype, x.device, ffn)
    tiles = triton.cdiv(rows, config.block_m) * triton.cdiv(ffn, config.block_n)
    aligned = all(n * x.element_size() % 16 == 0 for n in (width, ffn))
    return (min(tiles, launch_config.multiprocessors(x.device)),), dict(
        WIDTH=width, FFN=ffn, BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=BLOCK_K, GROUP=GROUP,
        TMA=aligned and launch_config.has_descriptors(x.device), num_warps=config.num_warps,
        num_stages=config.num_stages,
    )  # fmt: skip


@traceable(
    lambda x, gate_up: (
        x.new_empty((x.shape[0], gate_up.shape[0])),
        x.new_empty((x.shape[0], gate_up.shape[0] // 2)),
    )
)
def _mlp_forward(x: Tensor, gate_up: Tensor) -> tuple[Tensor, Tensor]:
    """x [rows, D], gate_up [2F, D] -> gate and up side by side [rows, 2F], silu(gate) * up [rows, F]."""
    rows, ffn = x.shape[0], gate_up.shape[0] // 2
    packed = torch.empty((rows, 2 * ffn), dtype=x.dtype, device=x.device)
    act = torch.empty((rows, ffn), dtype=x.dtype, device=x.device)
    if act.numel():
        grid, options = _plan("mlp_fwd", x, ffn)
        m, n, k, tma = (options[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "TMA"))
        outputs = (_operand(out, [m, n], tma) for out in (packed[:, :ffn], packed[:, ffn:], act))
        _mlp_fwd_kernel[grid](
            _operand(x, [m, k], tma), _operand(gate_up.unflatten(0, (2, ffn)), [2, n, k], tma), *outputs,
            rows, x.stride(0), gate_up.stride(0), **options,
        )  # fmt: skip
    return packed, act


@traceable(lambda dy, down, packed: torch.empty_like(packed))
def _mlp_backward(dy: Tensor, down: Tensor, packed: Tensor) -> Tensor:
    """dy [rows, D], down [D, F], packed [rows, 2F] contiguous -> the gradient of packed."""
    rows, ffn = dy.shape[0], down.shape[1]
    grads = torch.empty_like(packed)
    if grads.numel():
        grid, options = _plan("mlp_bwd", dy, ffn)
        m, n, k, tma = (options[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "TMA"))
        halves = (half for buffer in (packed, grads) for half in (buffer[:, :ffn], buffer[:, ffn:]))
        _mlp_bwd_kernel[grid](
            _operand(dy, [m, k], tma), _operand(down, [k, n], tma),
            *(_operand(half, [m, n], tma) for half in halves),
            rows, dy.stride(0), down.stride(0), **options,
        )  # fmt: skip
    return grads


class _MLP(torch.autograd.Function):
    """x [rows, D]. The copies of gate_up and down, in x's dtype, are multiplied; the gradients go to the
    weights, in their own dtypes.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gate_up: Tensor, down: Tensor, gate_up_copy: Tensor, down_copy: Tensor
    ) -> Tensor:
        packed, act = _mlp_forward(x, gate_up_copy)
        ctx.save_for_backward(x, gate_up_copy, down_copy, packed, act)
        ctx.dtypes = gate_up.dtype, down.dtype
        return torch.mm(act, down_copy.t())

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        checks.first_derivative("mlp")
        x, gate_up, down, packed, act = ctx.saved_tensors
        dy = dense_rows(dy)
        dpacked = _mlp_backward(dy, down, packed)
        dx = torch.mm(dpacked, gate_up) if ctx.needs_input_grad[0] else None
        dgate_up = weight_gradient(dpacked, x, ctx.dtypes[0]) if ctx.needs_input_grad[1] else None
        ddown = weight_gradient(dy, act, ctx.dtypes[1]) if ctx.needs_input_grad[2] else None
        return dx, dgate_up, ddown, None, None


def supports(x: Tensor) -> bool:
    """Whether the launch table wants this form for x: in 16 bits, on a target where it was measured to be
    faster.
    """
    return x.element_size() == 2 and launch_config.fuses_mlp(x.device)


def mlp(
    x: Tensor, gate_up: Tensor, down: Tensor, *, copies: tuple[Tensor | None, Tensor | None] | None = None
) -> Tensor:
    """down @ (silu(gate @ x) * (up @ x)), with gate and up the two halves of gate_up.

    x [..., D] (float32, float16 or bfloat16), gate_up [2F, D] and down [D, F] of the same or another floating
    dtype, any strides -> [..., D] in x's dtype, contiguous. Weights of another dtype (fp32 master weights)
    are cast; gradients have the dtype of their weight, on CUDA without a rounding to 16 bits. copies: the
    weights in x's dtype, if there are any; the product reads these. Raises ValueError naming what was
    expected. Same semantics as `kernels.reference.mlp`.
    """
    checks.mlp(x, gate_up, down, copies)
    checks.kernel_dtype("mlp", x)
    cast = (
        dense_rows(weight.detach().to(x.dtype) if copy is None else copy)
        for weight, copy in zip((gate_up, down), copies or (None, None), strict=True)
    )
    return _MLP.apply(dense_rows(x), gate_up, down, *cast).view(x.shape)
