"""Up to 16 rows times a weight matrix, on matrix units: what the kernels of a decode step share.

    acc[r, n] = sum_k x[r, k] w[n, k]            x [R, K], w [N, K], acc fp32

A decode step waits for memory, so a product is laid out for its loads. A program owns a few rows of w
(columns of the result). Its warps divide K among them, in turns of 32 elements: in tile t, warp s holds the
elements (t * WARPS + s) * 32 .. + 31 of every row. Rows come in groups of 8. Four lanes hold a row's 32
elements, 8 in a row each, so that every load is one of 16 bytes:

    a tile [GROUPS, WARPS, 8, 32]       group, warp, row of the group, element

A matrix instruction (m16n8k16) wants other elements in a lane, but a sum over k does not mind the order of k
if x and w agree on it. `_operand` calls the elements 8q .. 8q + 7 of lane q those that the instruction
expects there. So a tile is multiplied out of the registers that it was loaded into: no exchange between
lanes, no shared memory. Only the partial sums of the warps meet there, once.

The 16 rows of x are always multiplied, and rows past R are zeros that are not loaded. So one compiled kernel
serves every R, and a row's bits do not depend on the other rows: batch invariance.

Dependent launches (sm_90 and newer): a kernel may start before the one before it has ended. It requests its
weights, which no kernel writes, and then calls `wait`. From there on all kernels before it are complete, and
the next one may start. It follows that while a kernel runs before its `wait`, only the kernel just before it
is incomplete: what an earlier one wrote may be read already.

Check: pytest tests -k "decode_product or dependent"
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def wait(DEPENDENT: tl.constexpr, counter_ptr=None, arrivals=0):
    """Waits for the kernels before this one, and lets the next one start. Must not stand inside a loop that
    is pipelined: Triton 3.7 moves the loads of such a loop above it.

    With a counter it waits for the phase before this one of the same kernel instead, until the programs
    together have arrived so many times.
    """
    if DEPENDENT:
        if counter_ptr is None:
            tl.extra.cuda.gdc_wait()
            tl.extra.cuda.gdc_launch_dependents()
        else:
            while tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu") < arrivals:
                pass
            tl.debug_barrier()


@triton.jit
def arrive(counter_ptr):
    """Makes what this program wrote visible to those that `wait` for its arrival -> how many came before."""
    tl.debug_barrier()
    return tl.atomic_add(counter_ptr, 1, sem="release", scope="gpu")


@triton.jit
def early_length(pointer):
    """A row's length, which an earlier launch than the one just before wrote, before `wait`. From L2: only
    `wait` is certain to clear a multiprocessor's own cache.
    """
    return tl.load(pointer, cache_modifier=".cg")


@triton.jit
def requested(DEPENDENT: tl.constexpr):
    """Stands behind loads that should be under way together. ptxas would move them down between the products
    to save registers, and each would wait for a round trip of its own. It moves no load across this
    instruction, which has no other effect the second time.
    """
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def prefetch(rows, WIDTH: tl.constexpr):
    """Requests these rows of WIDTH elements [N] for the L2 cache, in lines of 128 bytes."""
    LINE: tl.constexpr = 128 // (rows.dtype.element_ty.primitive_bitwidth // 8)
    for start in tl.static_range(0, WIDTH, LINE):
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; // $0", "=r,l", [(rows + start).to(tl.int64)], dtype=tl.int32,
            is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def members(GROUPS: tl.constexpr):
    """The numbers 0 .. 8 GROUPS - 1 of the rows of a tile, [GROUPS, 1, 8, 1]."""
    group = tl.arange(0, GROUPS)[:, None, None, None]
    return group * 8 + tl.arange(0, 8)[None, None, :, None]


@triton.jit
def tile(rows, there, t, WIDTH: tl.constexpr, WARPS: tl.constexpr):
    """Tile t of rows of WIDTH elements: rows, there [GROUPS, 1, 8, 1] point to their beginnings and say which
    exist -> [GROUPS, WARPS, 8, 32], zero where there is nothing. A number t, or one for each row.
    """
    warp = tl.arange(0, WARPS)[None, :, None, None]
    k = (t * WARPS + warp) * 32 + tl.arange(0, 32)[None, None, None, :]
    # Not how they lie: it is the order in which the dimensions are dealt out, first to lanes and then to
    # warps. Triton 3.6 would deal out [3, 0, 1, 2], and exchange every tile through shared memory.
    pointers = tl.max_contiguous(rows + k, [1, 2, 4, 32])
    return tl.load(pointers, mask=there & (k < WIDTH), other=0.0)


@triton.jit
def tiles(rows, there, WIDTH: tl.constexpr, WARPS: tl.constexpr, COUNT: tl.constexpr):
    """The first COUNT tiles of these rows, requested together."""
    found = tl.tuple([])
    for t in tl.static_range(COUNT):
        found = found + (tile(rows, there, t, WIDTH, WARPS),)
    return found


@triton.jit
def _operand(x, GROUPS: tl.constexpr, WARPS: tl.constexpr, TILES: tl.constexpr):
    """[TILES * GROUPS, WARPS, 8, 32] -> [WARPS, 8 GROUPS, 32 TILES], in the order of k in which a lane's own
    elements are those that the matrix instruction wants from it.
    """
    x = tl.reshape(x, [TILES, GROUPS, WARPS, 8, 4, 2, 2, 2])  # k: lane, instruction, half, pair
    x = tl.permute(x, [2, 1, 3, 0, 5, 6, 4, 7])
    return tl.reshape(x, [WARPS, 8 * GROUPS, 32 * TILES])


@triton.jit
def add_product(acc, x, w, GROUPS: tl.constexpr, WARPS: tl.constexpr, TILES: tl.constexpr = 1):
    """acc [WARPS, 16, 8 GROUPS] plus the product of x [TILES * 2, WARPS, 8, 32] and w [TILES * GROUPS, WARPS,
    8, 32], tile by tile; each warp adds its own part of k.
    """
    x, w = _operand(x, 2, WARPS, TILES), _operand(w, GROUPS, WARPS, TILES)
    return tl.dot(x, tl.permute(w, [0, 2, 1]), acc, input_precision="ieee")


@triton.jit
def add_squares(acc, x, WARPS: tl.constexpr):
    """acc [WARPS, 16, 16], whose diagonal grows by the sums of squares of tile x [2, WARPS, 8, 32]: as a
    matrix product they take a tenth of the instructions.
    """
    x = _operand(x, 2, WARPS, 1)
    return tl.dot(x, tl.permute(x, [0, 2, 1]), acc, input_precision="ieee")


@triton.jit
def multiply(
    x_ptr, x_stride, rows, ws, w, there, WIDTH: tl.constexpr, GROUPS: tl.constexpr, WARPS: tl.constexpr,
    AHEAD: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """x [rows, WIDTH] times the matrix rows that w, there [GROUPS, 1, 8, 1] point to, of which the first
    AHEAD tiles ws are requested already -> [16, 8 GROUPS] in fp32. Comes after `wait`.
    """
    TILES: tl.constexpr = (WIDTH + 32 * WARPS - 1) // (32 * WARPS)
    row = members(2)
    x, inside = x_ptr + row.to(tl.int64) * x_stride, row < rows
    xs = tiles(x, inside, WIDTH, WARPS, AHEAD)
    requested(DEPENDENT)
    acc = tl.zeros([WARPS, 16, 8 * GROUPS], tl.float32)
    for t in tl.static_range(TILES):
        if t + AHEAD < TILES:
            ws = ws + (tile(w, there, t + AHEAD, WIDTH, WARPS),)
            xs = xs + (tile(x, inside, t + AHEAD, WIDTH, WARPS),)
        acc = add_product(acc, xs[t], ws[t], GROUPS, WARPS)
    return tl.sum(acc, 0)


@triton.jit
def scale_tiles(scale_ptr, WIDTH: tl.constexpr, WARPS: tl.constexpr, COUNT: tl.constexpr):
    """The first COUNT tiles of a norm's weight [WIDTH]: one row, read by the eight rows that need it."""
    return tiles(_one_row(scale_ptr), members(1) < 8, WIDTH, WARPS, COUNT)


@triton.jit
def _one_row(pointer):
    """The same row eight times. The grids here have one dimension, so that the factor is 0; a compiler that
    knew it would deal out such a tile otherwise than those that it is multiplied with.
    """
    return pointer + members(1) * (tl.program_id(2) * 16)


@triton.jit
def norm_multiply(
    x_ptr, x_stride, rows, ws, w, there, scales, scale_ptr, EPS: tl.constexpr, WIDTH: tl.constexpr,
    GROUPS: tl.constexpr, WARPS: tl.constexpr, AHEAD: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """`multiply` of the normalised rows, without rounding them: x (w * scale)^T * rstd, rstd =
    1 / sqrt(mean(x^2) + EPS). w * scale is rounded to the weights' dtype.
    """
    TILES: tl.constexpr = (WIDTH + 32 * WARPS - 1) // (32 * WARPS)
    row = members(2)
    x, inside = x_ptr + row.to(tl.int64) * x_stride, row < rows
    xs = tiles(x, inside, WIDTH, WARPS, AHEAD)
    requested(DEPENDENT)
    acc = tl.zeros([WARPS, 16, 8 * GROUPS], tl.float32)
    squares = tl.zeros([WARPS, 16, 16], tl.float32)
    for t in tl.static_range(TILES):
        if t + AHEAD < TILES:
            ws = ws + (tile(w, there, t + AHEAD, WIDTH, WARPS),)
            scales = scales + (tile(_one_row(scale_ptr), members(1) < 8, t + AHEAD, WIDTH, WARPS),)
            xs = xs + (tile(x, inside, t + AHEAD, WIDTH, WARPS),)
        wide = ws[t].to(tl.float32) * scales[t].to(tl.float32)
        scaled = wide.to(ws[t].dtype)
        acc = add_product(acc, xs[t], scaled, GROUPS, WARPS)
        squares = add_squares(squares, xs[t], WARPS)
    index = tl.arange(0, 16)
    own = index[:, None] == index[None, :]
    total = tl.sum(tl.where(own, tl.sum(squares, 0), 0.0), 1)
    return tl.sum(acc, 0) * tl.rsqrt(total / WIDTH + EPS)[:, None]
