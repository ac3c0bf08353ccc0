"""The end of a decode step: final norm and head in one launch; the logits in fp32, or the best of every few.

    logits = x (w * scale)^T * rstd,   rstd = 1 / sqrt(mean(x^2) + eps)
    best   = for each tile of columns: its highest logit, and the first column that has it

x [N, E], norm weight scale [E], head w [V, E], logits [N, V]; N rows (1 to 16), E hidden width, V vocabulary.
No backward pass.

The kernel reads the head once, whatever N is: V E elements, 56.6 MB of the 135M model in 16 bits, 13 us at
the 4.3 TB/s of an H200, the largest single read of a decode step. The version before took 52.7 us there for
the logits of 16 rows, where the composition takes 38.4: 2,048 programs computed the norm again, multiplied
every weight by its scale and waited for memory without overlap. This one has not been measured.

Everything is laid out for that read. Two programs stay on a multiprocessor, and each walks over its tiles
of columns in blocks of 64 elements of E, tile after tile in one loop: the weights of four blocks are under
way to shared memory, also while the logits of a tile are written. Nothing is done to a weight but to multiply
it, from shared memory. The norm and its weight are applied to the rows instead, a block [64, 16] at a time,
1/8 of a tile of the weights, from the L2 cache: on sm_90 a warp takes 300 instructions for each 16 kB of
weights. The sums of squares are computed in the first iteration, after the first weights were requested. A
dependent launch requests a whole tile for L2 before it waits.

In 16 bits the normalised row is a sum of two numbers of the model's dtype, which together hold 16 bits or
more. They stand beside each other as columns of one product, [128, 64] times [64, 32] for 16 rows.

Greedy decoding needs no logits. The same kernel then writes 8 bytes a tile and row, and the launch that ends
the step (decode_step.py) reads only the fp32 half of them, 1.5 kB a row. Suppressed tokens count as -inf, NaN
as +inf: a row's maximum tells whether the row is finite.

Rounding: that of the normalised row to 16 bits or more, and of the result to fp32. The composition rounds the
normalised row, and the logits to the model's dtype: bfloat16 logits near 20 are 1/8 apart, so several may
share the maximum. All 16 rows are always multiplied, rows past N as zeros: one compiled kernel serves every
N, and a row's bits do not depend on the other rows (batch invariance).

Check: pytest tests -k decode_head
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import checks
from kernels.decode_product import prefetch, wait
from kernels.launch_config import dependence, launch_config, multiprocessors
from kernels.layout import dense_rows
from kernels.tracing import traceable

MAX_ROWS = 16
BLOCK_K = 64  # in 16 bits 128 bytes: one swizzled row of shared memory


@triton.jit
def _rstd(x, inside, WIDTH: tl.constexpr, EPS: tl.constexpr):
    """1 / sqrt(mean(x^2) + EPS) of the rows that x, inside [16] point to -> [16]."""
    CHUNK: tl.constexpr = 512  # a function of Triton's here would make the key depend on its version
    lane = tl.arange(0, CHUNK)
    total = tl.zeros([16], tl.float32)
    for start in tl.static_range(0, WIDTH, CHUNK):
        there = inside[:, None] & (start + lane < WIDTH)[None, :]
        part = tl.load(x[:, None] + start + lane[None, :], mask=there, other=0.0).to(tl.float32)
        total += tl.sum(part * part, axis=1)
    return tl.rsqrt(total / WIDTH + EPS)


@triton.jit(do_not_specialize=["rows", "vocabulary"])
def _norm_head_kernel(
    x_ptr, scale_ptr, w_ptr, suppressed_ptr, out_ptr, id_ptr, rows, vocabulary, x_stride, w_stride,
    EPS: tl.constexpr, WIDTH: tl.constexpr, BEST: tl.constexpr, SUPPRESS: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, JOINED: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """A program owns every grid-th tile: BLOCK_N columns of the logits for all rows. Any grid.

    out is [N, V]; with BEST it and id are [N, tiles], the highest of these columns and its index. Only then
    suppressed [V] has a meaning.
    """
    PARTS: tl.constexpr = 2 if JOINED else 1  # of a normalised row, side by side
    BLOCKS: tl.constexpr = (WIDTH + BLOCK_K - 1) // BLOCK_K
    tiles = tl.cdiv(vocabulary, BLOCK_N)
    first_tile, programs = tl.program_id(0), tl.num_programs(0)
    n, row = tl.arange(0, BLOCK_N), tl.arange(0, 16)
    if DEPENDENT:
        early = tl.minimum(first_tile * BLOCK_N + n, vocabulary - 1)
        prefetch(w_ptr + early.to(tl.int64) * w_stride, min(WIDTH, 1024))
    wait(DEPENDENT)
    x, inside = x_ptr + row.to(tl.int64) * x_stride, row < rows
    rstd = tl.zeros([16], tl.float32)
    acc = tl.zeros([BLOCK_N, 16 * PARTS], tl.float32)
    for step in range(0, tl.cdiv(tiles - first_tile, programs) * BLOCKS):
        tile, block = first_tile + step // BLOCKS * programs, step % BLOCKS
        column, k = tile * BLOCK_N + n, block * BLOCK_K + tl.arange(0, BLOCK_K)
        exists, there = column < vocabulary, k < WIDTH
        of_w = w_ptr + column.to(tl.int64)[:, None] * w_stride + k[None, :]
        w = tl.load(of_w, mask=exists[:, None] & there[None, :], other=0.0)  # [BLOCK_N, BLOCK_K]
        if step == 0:  # not before the loop, which begins by requesting its first tiles of w
            rstd = _rstd(x, inside, WIDTH, EPS)
        scale = tl.load(scale_ptr + k, mask=there, other=0.0).to(tl.float32)
        part = tl.load(x[None, :] + k[:, None], mask=there[:, None] & inside[None, :], other=0.0)
        y = part.to(tl.float32) * scale[:, None] * rstd[None, :]  # [BLOCK_K, 16]
        if w.dtype == tl.float32:  # sums of short chains of fmas are more exact than one over the whole width
            acc = tl.fma(tl.dot(w, y, input_precision="ieee"), 1.0, acc)
        else:
            high = y.to(w.dtype)
            rest = (y - high.to(tl.float32)).to(w.dtype)
            if JOINED:
                acc = tl.dot(w, tl.join(high, rest).reshape(BLOCK_K, 32), acc)
            else:
                acc = tl.dot(w, rest, tl.dot(w, high, acc))
        if block == BLOCKS - 1:
            logits = tl.sum(acc.reshape(BLOCK_N, 16, PARTS), axis=2)
            if BEST:
                allowed = exists
                if SUPPRESS:
                    allowed &= tl.load(suppressed_ptr + column, mask=exists, other=1) == 0
                known = tl.where(logits == logits, logits, float("inf"))
                score = tl.where(allowed[:, None], known, float("-inf"))
                highest = tl.max(score, axis=0)
                first = tl.min(tl.where(score == highest[None, :], column[:, None], vocabulary), axis=0)
                target = row.to(tl.int64) * tiles + tile
                tl.store(out_ptr + target, highest, mask=inside)
                tl.store(id_ptr + target, first, mask=inside)
            else:
                target = row.to(tl.int64)[None, :] * vocabulary + column[:, None]
                tl.store(out_ptr + target, logits, mask=inside[None, :] & exists[:, None])
            acc = tl.zeros([BLOCK_N, 16 * PARTS], tl.float32)


def _launch(
    x: Tensor, scale: Tensor, weight: Tensor, eps: float, out: Tensor, dependent: bool,
    ids: Tensor | None = None, suppressed: Tensor | None = None,
) -> None:  # fmt: skip
    """Fills the logits [N, V], or with ids the best [N, P] of each tile; nothing where that is empty."""
    width, vocabulary = x.shape[1], weight.shape[0]
    if out.numel():
        config = launch_config("decode_head", x.dtype, x.device, width)
        tiles = triton.cdiv(vocabulary, config.block_n)
        # For sm_90 Triton 3.6 does not compile joined parts where weights are not loaded 16 bytes at a time.
        aligned = weight.stride(0) * weight.element_size() % 16 == 0 and weight.data_ptr() % 16 == 0
        joined = weight.dtype != torch.float32 and aligned
        _norm_head_kernel[(min(tiles, config.block_m * multiprocessors(x.device)),)](
            x, scale, weight, x if suppressed is None else suppressed, out, out if ids is None else ids,
            x.shape[0], vocabulary, x.stride(0), weight.stride(0), EPS=eps, WIDTH=width, BEST=ids is not None,
            SUPPRESS=suppressed is not None, BLOCK_N=config.block_n, BLOCK_K=BLOCK_K, JOINED=joined,
            num_warps=config.num_warps, num_stages=config.num_stages, **dependence(x.device, dependent),
        )  # fmt: skip


@traceable(lambda x, _, weight, *__: x.new_empty((x.shape[0], weight.shape[0]), dtype=torch.float32))
def _decode_head(x: Tensor, scale: Tensor, weight: Tensor, eps: float, dependent: bool) -> Tensor:
    """x [N, E], scale [E], weight [V, E], each with a column stride of 1 -> [N, V] in fp32."""
    logits = torch.empty((x.shape[0], weight.shape[0]), dtype=torch.float32, device=x.device)
    _launch(x, scale, weight, eps, logits, dependent)
    return logits


def _empty_best(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    # int: torch.compile has a symbol there
    columns = launch_config("decode_head", x.dtype, x.device, int(x.shape[1])).block_n
    size = (x.shape[0], triton.cdiv(weight.shape[0], columns))
    return x.new_empty(size, dtype=torch.float32), x.new_empty(size, dtype=torch.int32)


@traceable(lambda x, _, weight, *__: _empty_best(x, weight))
def _decode_best(
    x: Tensor, scale: Tensor, weight: Tensor, eps: float, suppressed: Tensor | None, dependent: bool
) -> tuple[Tensor, Tensor]:
    """As `_decode_head` -> scores in fp32 and ids, [N, P]."""
    scores, ids = _empty_best(x, weight)
    _launch(x, scale, weight, eps, scores, dependent, ids, suppressed)
    return scores, ids


def supports(x: Tensor) -> bool:
    """Whether x [..., E] has few enough rows for the kernel."""
    return x.dim() > 0 and x.numel() <= MAX_ROWS * x.shape[-1]


def _check(op: str, x: Tensor, head_weight: Tensor) -> None:
    """What only the kernel demands."""
    checks.kernel_dtype(op, x)
    stride = head_weight.stride(1)
    supports(x) or checks.refuse(op, f"at most {MAX_ROWS} rows", x.numel() // max(1, x.shape[-1]))
    (stride == 1) or checks.refuse(op, "head_weight with a last stride of 1", stride)


def decode_head(
    x: Tensor, norm_weight: Tensor, head_weight: Tensor, eps: float, *, dependent: bool = False
) -> Tensor:
    """fp32 logits of the last block's output: rms_norm(x, norm_weight, eps) @ head_weight.T, without rounding
    the norm.

    x [..., E] of at most 16 rows (float32, float16, bfloat16), norm_weight [E], head_weight [V, E] with a
    last stride of 1, all of one dtype; E up to 16384 -> [..., V] in float32, contiguous. A row's logits do
    not depend on the other rows. dependent: as in `decode_layer`. No gradient. Raises ValueError naming what
    was expected.
    """
    checks.decode_head(x, norm_weight, head_weight)
    _check("decode_head", x, head_weight)
    dependent = dependent and norm_weight.is_contiguous()  # else the launch just before makes it so
    logits = _decode_head(dense_rows(x), norm_weight.contiguous(), head_weight, eps, dependent)
    return logits.view(*x.shape[:-1], head_weight.shape[0])


def decode_best(
    x: Tensor, norm_weight: Tensor, head_weight: Tensor, eps: float, suppressed: Tensor | None = None, *,
    dependent: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Of the logits that `decode_head` computes, bit for bit, the highest of every few columns.

    x [R, E] of at most 16 rows, norm_weight [E], head_weight [V, E] as in `decode_head`; suppressed [V] bool:
    tokens that count as -inf -> (scores [R, P] in float32, ids [R, P] int32, ascending). A score is +inf
    where a logit is NaN. The host reads no value. Raises ValueError naming what was expected. Same semantics
    as `kernels.reference.decode_best`, whose candidates are all logits.
    """
    checks.decode_best(x, norm_weight, head_weight, suppressed)
    _check("decode_best", x, head_weight)
    if suppressed is not None:
        suppressed = suppressed.contiguous()
    dependent = dependent and norm_weight.is_contiguous()
    return _decode_best(dense_rows(x), norm_weight.contiguous(), head_weight, eps, suppressed, dependent)
