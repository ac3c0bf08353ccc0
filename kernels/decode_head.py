"""The end of a decode step: final norm and head in one launch; the logits in fp32, or the best of every few.

    logits = x (w * scale)^T * rstd,   rstd = 1 / sqrt(mean(x^2) + eps)
    best   = for each tile of columns: its highest logit, and the first column that has it

x [N, E], norm weight scale [E], head w [V, E], logits [N, V]; N rows (1 to 16), E hidden width, V vocabulary.
No backward pass.

The kernel reads the head once, whatever N is: V E elements, 56.6 MB of the 135M model in 16 bits, 19 us at
3.0 TB/s, the largest single read of a decode step (an 8-bit head would save 12 us of the step's floor of 98).
A program owns 32 columns, 37 kB, and multiplies all rows at once (decode_product.py): 1,536 programs of four
warps. Each computes the norm again. The version before, which multiplied the rows one after the other, took
an H100 78 us at 16 rows; this one has not been measured.

Greedy decoding needs no logits. The same kernel then writes 8 bytes a program and row, a sixteenth of the
logits' bytes, and the launch that ends the step (decode_step.py) reads only the fp32 half of them. Suppressed
tokens count as -inf, NaN as +inf: a row's maximum tells whether the row is finite.

Rounding: only that of the result to fp32. The composition rounds the normalised row, and the logits to the
model's dtype: bfloat16 logits near 20 are 1/8 apart, so several may share the maximum. Batch invariance as in
decode_layer.py: one compiled kernel for every N.

Check: pytest tests -k decode_head
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import checks
from kernels.decode_product import members, norm_multiply, scale_tiles, tiles, wait
from kernels.launch_config import decode_launch, launch_config
from kernels.layout import dense_rows
from kernels.tracing import traceable

MAX_ROWS = 16


@triton.jit(do_not_specialize=["rows", "vocabulary"])
def _norm_head_kernel(
    x_ptr, scale_ptr, w_ptr, suppressed_ptr, out_ptr, id_ptr, rows, vocabulary, x_stride, w_stride,
    EPS: tl.constexpr, WIDTH: tl.constexpr, BEST: tl.constexpr, SUPPRESS: tl.constexpr, GROUPS: tl.constexpr,
    WARPS: tl.constexpr, AHEAD: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """A program owns COLUMNS columns of the logits for all rows. Grid: ceil(V / COLUMNS).

    out is [N, V]; with BEST it and id are [N, programs], the highest of these columns and its index. Only
    then suppressed [V] has a meaning.
    """
    COLUMNS: tl.constexpr = 8 * GROUPS
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    allowed = column < vocabulary
    of_w = tl.program_id(0) * COLUMNS + members(GROUPS)
    w, exists = w_ptr + of_w.to(tl.int64) * w_stride, of_w < vocabulary
    ws = tiles(w, exists, WIDTH, WARPS, AHEAD)
    scales = scale_tiles(scale_ptr, WIDTH, WARPS, AHEAD)
    wait(DEPENDENT)
    if SUPPRESS:
        allowed &= tl.load(suppressed_ptr + column, mask=allowed, other=1) == 0
    logits = norm_multiply(
        x_ptr, x_stride, rows, ws, w, exists, scales, scale_ptr, EPS, WIDTH, GROUPS, WARPS, AHEAD, DEPENDENT,
        EXACT=True
    )  # fmt: skip
    row = tl.arange(0, 16).to(tl.int64)
    if BEST:
        score = tl.where(allowed[None, :], tl.where(logits == logits, logits, float("inf")), float("-inf"))
        highest = tl.max(score, axis=1)
        first = tl.min(tl.where(score == highest[:, None], column[None, :], vocabulary), axis=1)
        target = row * tl.num_programs(0) + tl.program_id(0)
        tl.store(out_ptr + target, highest, mask=row < rows)
        tl.store(id_ptr + target, first, mask=row < rows)
    else:
        target = row[:, None] * vocabulary + column[None, :]
        tl.store(out_ptr + target, logits, mask=(row < rows)[:, None] & allowed[None, :])


def _launch(
    x: Tensor, scale: Tensor, weight: Tensor, eps: float, out: Tensor, dependent: bool,
    ids: Tensor | None = None, suppressed: Tensor | None = None,
) -> None:  # fmt: skip
    """Fills the logits [N, V], or with ids the best [N, P] of each program; nothing where that is empty."""
    width, vocabulary = x.shape[1], weight.shape[0]
    if out.numel():
        options: dict[str, Any] = decode_launch("decode_head", x.dtype, x.device, width, dependent)
        _norm_head_kernel[(triton.cdiv(vocabulary, 8 * options["GROUPS"]),)](
            x, scale, weight, x if suppressed is None else suppressed, out, out if ids is None else ids,
            x.shape[0], vocabulary, x.stride(0), weight.stride(0), EPS=eps, WIDTH=width, BEST=ids is not None,
            SUPPRESS=suppressed is not None, **options,
        )  # fmt: skip


@traceable(lambda x, _, weight, *__: x.new_empty((x.shape[0], weight.shape[0]), dtype=torch.float32))
def _decode_head(x: Tensor, scale: Tensor, weight: Tensor, eps: float, dependent: bool) -> Tensor:
    """x [N, E], scale [E], weight [V, E], each with a column stride of 1 -> [N, V] in fp32."""
    logits = torch.empty((x.shape[0], weight.shape[0]), dtype=torch.float32, device=x.device)
    _launch(x, scale, weight, eps, logits, dependent)
    return logits


def _empty_best(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    # int: torch.compile has a symbol there
    groups = launch_config("decode_head", x.dtype, x.device, int(x.shape[1])).block_n
    size = (x.shape[0], triton.cdiv(weight.shape[0], 8 * groups))
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
