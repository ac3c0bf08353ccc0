"""The tied embedding: its rows for the ids, the embedding itself as the head, and one gradient for both uses.

    x[n] = round(W[id_n]),  head = W
    dW = dhead + E,  E[v] = sum of dx[n] over the tokens n with id_n = v, in fp32

ids [N]; x, dx [N, D]; W, head, dhead, E [V, D]. dhead comes from linear_cross_entropy in fp32: 113 MB for the
135M model. Because the head is an output of this operation, dhead arrives in the same backward pass as dx,
and the rows of E are added to it in place. A separate embedding gradient would be another tensor of that
size, to be zeroed, filled and added. On an H100 at 16,384 tokens torch's kernels took 46 us forward (rows in
fp32, then a cast) and 416 us backward, of which 30 for dx in fp32, 70 for sorting, 34 for the zeros, 156 for
the sums and 111 for the addition. Predicted here: 20 us forward and 80 us backward, 40 of them for sorting
(32-bit ids take 4 of 8 passes) and 40 for two kernels that read and write 94 MB at most.

Forward: an id out of range stops the process with an assertion on the device, as torch's embedding does; its
row of x is NaN. Bytes a token: 2 D written and 4 D read, or 2 D read where a 16-bit `weight_copy` exists.

Backward, without atomics, so the gradient is bit-identical from run to run: the ids are sorted (stably), and
a run of equal ids belongs to one row of W. A program adds up one run, ROWS tokens at a time, in order. So
that a token that fills the whole batch does not take much longer, runs are cut at the ends of windows of
WINDOW positions: a first kernel sums the pieces that begin with a window, and a second one adds these sums to
the run's first piece. With N tokens a program adds at most WINDOW + N / WINDOW rows, 256 at 16,384. No sum
depends on the number of multiprocessors.
Bytes: a token 2 D of dx and 12 of order and ids; a distinct token 8 D for its row of dW, read and written.

Who owns dhead: autograd passes it to this node and may have passed it to others too (a hook that keeps it,
`torch.autograd.grad` that asks for it, several heads). It is written only where nobody else can see it, and
copied otherwise; see `_is_ours`.

Check: pytest tests -k embedding
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import checks
from kernels.launch_config import launch_config
from kernels.layout import dense_lanes, dense_rows
from kernels.tracing import traceable

WINDOW = 128
# C++ references to a gradient while autograd calls a node's backward pass: that of its Python object, and
# in torch 2.11 autograd's own.
HELD = 2 if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 12) else 1


@triton.jit
def _embedding_fwd_kernel(
    ids_ptr, weight_ptr, x_ptr, known_ptr, vocabulary, weight_stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """A program owns BLOCK columns of one token. Grid: (tokens, ceil(WIDTH / BLOCK)).

    x is contiguous; the weight has a column stride of 1. known_ptr points to 1, which becomes 0 if an id is
    out of range: every program that writes it writes 0.
    """
    token = tl.program_id(0).to(tl.int64)
    row = tl.load(ids_ptr + token).to(tl.int64)
    inside = (row >= 0) & (row < vocabulary)
    if not inside:
        tl.store(known_ptr, 0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(
        weight_ptr + row * weight_stride + column, mask=(column < WIDTH) & inside, other=float("nan")
    )
    tl.store(x_ptr + token * WIDTH + column, value.to(x_ptr.dtype.element_ty), mask=column < WIDTH)


@triton.jit
def _sum_of_piece(
    dx_ptr, order_ptr, ids_ptr, first, stop, row, dx_stride,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """[BLOCK] in fp32: the sum, in order, of the dx of the positions from `first` on whose id is `row`, up to
    `stop` at most.
    """
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    position = first
    more = True
    while more:
        positions = position + tl.arange(0, ROWS)
        ids = tl.load(ids_ptr + positions, mask=positions < stop, other=-1)  # [ROWS]
        mine = (positions < stop) & (ids == row)
        token = tl.load(order_ptr + positions, mask=mine, other=0)
        mask = mine[:, None] & (column < WIDTH)[None, :]  # [ROWS, BLOCK]
        total += tl.sum(
            tl.load(dx_ptr + token[:, None] * dx_stride + column, mask=mask, other=0.0).to(tl.float32), axis=0
        )
        position += ROWS
        more = (position < stop) & (tl.load(ids_ptr + position, mask=position < stop, other=-1) == row)
    return total


@triton.jit(do_not_specialize=["tokens"])
def _embedding_bwd_piece_kernel(
    dx_ptr, order_ptr, ids_ptr, piece_ptr, tokens, dx_stride,
    WIDTH: tl.constexpr, SPAN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program owns BLOCK columns of one window (any but the first) and of its row of piece
    [windows, WIDTH]. Grid: (windows - 1, ceil(WIDTH / BLOCK)).

    If a run continues into the window, the program sums the part of the run that lies in the window. If none
    does, it writes nothing, and the second kernel reads nothing there.
    """
    window = tl.program_id(0).to(tl.int64) + 1
    first = window * SPAN
    row = tl.load(ids_ptr + first)
    if tl.load(ids_ptr + first - 1) == row:
        stop = tl.minimum(first + SPAN, tokens)
        total = _sum_of_piece(dx_ptr, order_ptr, ids_ptr, first, stop, row, dx_stride, WIDTH, ROWS, BLOCK)
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        tl.store(piece_ptr + window * WIDTH + column, total, mask=column < WIDTH)


@triton.jit(do_not_specialize=["tokens"])
def _embedding_bwd_kernel(
    dx_ptr, order_ptr, ids_ptr, piece_ptr, dweight_ptr, tokens, vocabulary, dx_stride,
    WIDTH: tl.constexpr, SPAN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program owns BLOCK columns of one position of the sorted ids. If a run begins there, it adds the run
    to its row of dweight. Grid: (tokens, ceil(WIDTH / BLOCK)).

    dweight is contiguous. An id out of range has no row and is skipped.
    """
    first = tl.program_id(0).to(tl.int64)
    row = tl.load(ids_ptr + first).to(tl.int64)
    before = tl.load(ids_ptr + first - 1, mask=first > 0, other=0).to(tl.int64)
    if ((first == 0) | (before != row)) & (row >= 0) & (row < vocabulary):
        window = first // SPAN + 1
        stop = tl.minimum(window * SPAN, tokens)
        total = _sum_of_piece(dx_ptr, order_ptr, ids_ptr, first, stop, row, dx_stride, WIDTH, ROWS, BLOCK)
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        # The rest of the run lies in the windows that begin with the same id.
        more = (stop < tokens) & (tl.load(ids_ptr + stop, mask=stop < tokens, other=-1) == row)
        while more:
            windows = window + tl.arange(0, ROWS).to(tl.int64)
            start = windows * SPAN
            # [ROWS]
            mine = (start < tokens) & (tl.load(ids_ptr + start, mask=start < tokens, other=-1) == row)
            mask = mine[:, None] & (column < WIDTH)[None, :]  # [ROWS, BLOCK]
            total += tl.sum(
                tl.load(piece_ptr + windows[:, None] * WIDTH + column, mask=mask, other=0.0), axis=0
            )
            window += ROWS
            start = window * SPAN
            more = (start < tokens) & (tl.load(ids_ptr + start, mask=start < tokens, other=-1) == row)
        target = dweight_ptr + row * WIDTH + column
        total += tl.load(target, mask=column < WIDTH, other=0.0).to(tl.float32)
        tl.store(target, total.to(dweight_ptr.dtype.element_ty), mask=column < WIDTH)


def _fake_forward(ids: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    return weight.new_empty((*ids.shape, weight.shape[1]), dtype=dtype)


@traceable(_fake_forward)
def _embedding_forward(ids: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """ids [...], weight [V, D] -> x [..., D]."""
    width = weight.shape[1]
    ids, weight = ids.contiguous(), dense_lanes(weight)
    x = torch.empty((*ids.shape, width), dtype=dtype, device=weight.device)
    if x.numel():
        known = torch.ones((), dtype=torch.int32, device=weight.device)
        config = launch_config("embedding_fwd", weight.dtype, weight.device, width)
        block = min(config.block_n, triton.next_power_of_2(width))
        _embedding_fwd_kernel[(ids.numel(), triton.cdiv(width, block))](
            ids, weight, x, known, weight.shape[0], weight.stride(0),
            WIDTH=width, BLOCK=block, num_warps=config.num_warps,
        )  # fmt: skip
        torch._assert_async(known, f"tied_embedding: expected ids in [0, {weight.shape[0]})")
    return x


def _add_rows(dweight: Tensor, dx: Tensor, ids: Tensor) -> None:
    """dweight [V, D] += the rows dx [..., D], each at its id."""
    vocabulary, width = dweight.shape
    dx = dense_rows(dx)
    tokens = dx.shape[0]
    if not dx.numel():
        return
    rows, order = torch.sort(ids.flatten().to(torch.int32), stable=True)
    windows = triton.cdiv(tokens, WINDOW)
    piece = torch.empty((windows, width), dtype=torch.float32, device=dx.device)
    config = launch_config("embedding_bwd", dx.dtype, dx.device, width)
    block = min(config.block_n, triton.next_power_of_2(width))
    columns = triton.cdiv(width, block)
    options = dict(WIDTH=width, SPAN=WINDOW, ROWS=config.block_m, BLOCK=block, num_warps=config.num_warps)
    if windows > 1:
        _embedding_bwd_piece_kernel[(windows - 1, columns)](
            dx, order, rows, piece, tokens, dx.stride(0), **options
        )
    _embedding_bwd_kernel[(tokens, columns)](
        dx, order, rows, piece, dweight, tokens, vocabulary, dx.stride(0), **options
    )


def _fake_backward(dx: Tensor, ids: Tensor, vocabulary: int, dtype: torch.dtype) -> Tensor:
    return dx.new_empty((vocabulary, dx.shape[-1]), dtype=dtype)


@traceable(_fake_backward)
def _embedding_backward(dx: Tensor, ids: Tensor, vocabulary: int, dtype: torch.dtype) -> Tensor:
    """dx [..., D], ids [...] -> the gradient of the embedding alone, [V, D]."""
    dweight = torch.zeros((vocabulary, dx.shape[-1]), dtype=dtype, device=dx.device)
    _add_rows(dweight, dx, ids)
    return dweight


def _is_ours(gradient: Tensor, fresh: Tensor) -> bool:
    """Whether only the running backward pass can see a gradient, so that it may be written.

    That is so if C++ holds no reference besides those of autograd's own call, if Python holds none besides
    those that it holds to `fresh`, which came the same way and is nobody else's, and if no other tensor
    shares its memory. An unknown holder makes the counts larger, never smaller.
    """
    held = gradient._use_count()  # type: ignore[attr-defined]
    if (
        type(gradient) is not Tensor
        or held > HELD
        or sys.getrefcount(gradient) - sys.getrefcount(fresh) >= held
    ):
        return False
    storage = gradient.untyped_storage()
    # 2: the gradient's reference and that of `storage`
    return torch._C._storage_Use_Count(storage._cdata) == 2 and gradient.is_contiguous()


class _TiedEmbedding(torch.autograd.Function):
    """The third output exists for its gradient, which autograd makes: it shows how many references a
    gradient has that nobody else holds.
    """

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, ids: Tensor, dtype: torch.dtype, weight_copy: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(ids)
        x = _embedding_forward(ids, weight if weight_copy is None else weight_copy, dtype)
        return x, weight, torch.empty(0)

    @staticmethod
    def backward(ctx: Any, dx: Tensor, dhead: Tensor, fresh: Tensor) -> tuple[Tensor | None, ...]:
        # A gradient that does not exist arrives as zeros.
        checks.first_derivative("tied_embedding")
        (ids,) = ctx.saved_tensors
        dweight = dhead if _is_ours(dhead, fresh) else dhead.clone(memory_format=torch.contiguous_format)
        _add_rows(dweight, dx, ids)
        return dweight, None, None, None


class _EmbeddingTraced(torch.autograd.Function):
    """The rows alone, for torch.compile, whose graphs write nothing in place: there the two gradients are
    added.
    """

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, ids: Tensor, dtype: torch.dtype, weight_copy: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.like = weight.shape[0], weight.dtype
        return _embedding_forward(ids, weight if weight_copy is None else weight_copy, dtype)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor | None, ...]:
        (ids,) = ctx.saved_tensors
        return _embedding_backward(dx, ids, *ctx.like), None, None, None


def tied_embedding(
    input_ids: Tensor, weight: Tensor, dtype: torch.dtype, weight_copy: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The rows of the embedding, and the embedding as the head; their gradients become one tensor.

    input_ids [...] int64 or int32, weight [V, D] (any floating dtype) -> (x [..., D] in `dtype`: float32,
    float16 or bfloat16; head [V, D]: the weight itself, for `linear_cross_entropy`). The gradient has the
    weight's dtype; each row is summed in fp32, in a fixed order. weight_copy: the weight in `dtype`; x is
    read from it, and it has no gradient. An id out of range is an assertion on the device, in the interpreter
    a RuntimeError. Raises ValueError naming what was expected, and RuntimeError for create_graph=True. Same
    semantics as `kernels.reference.tied_embedding`.
    """
    checks.tied_embedding(input_ids, weight, dtype, weight_copy)
    checks.kernel_dtype("tied_embedding", weight)
    checks.kernel_dtype("tied_embedding", dtype)
    if not (torch.is_grad_enabled() and weight.requires_grad):
        return _embedding_forward(input_ids, weight if weight_copy is None else weight_copy, dtype), weight
    if torch.compiler.is_compiling():
        return _EmbeddingTraced.apply(weight, input_ids, dtype, weight_copy), weight
    x, head, _ = _TiedEmbedding.apply(weight, input_ids, dtype, weight_copy)
    return x, head
