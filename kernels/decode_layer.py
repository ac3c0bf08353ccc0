"""One whole block for 1 to 16 new tokens in five launches, each weight read once.

    1  norm, qkv, rope, cache    a = x (w * scale)^T * rstd,  rstd = 1 / sqrt(mean(x^2) + eps);  q, k rotated;
                                 k, v into the cache
    2  split attention           the kernel of decode_attention.py
    3  combine, o, residual      m = sum of the splits, weighted;  s = x + m w^T
    4  norm, gate and up, SiLU   g, u = s (w * scale)^T * rstd as in 1;  h = silu(g) * u
    5  down, residual            y = s + h w^T

R = B * T rows, E hidden width, F ffn width; other letters as in reference.py. x, s, y [R, E], m [R, H * D],
h [R, F]; w are the weights of LayerWeights. No backward pass: the cache has no gradient.

A decode step is a chain of memory reads too short to hide each other's latency. What counts is the number of
launches, and that each launch requests all of its bytes at once. A program owns a few output columns and
keeps their whole weight rows in registers: it issues every load, including that of the first row, before it
needs one. Then it loops over the R rows, and loads the next row before it works on the current one. The
products are elementwise with a sum over the width, not `tl.dot`: a matrix instruction needs 16 columns, and
36 programs cannot occupy 132 multiprocessors.

The 135M model in 16 bits (E 576, F 1536, 9 + 3 + 3 heads of 64), batch 1, by launch:

    launch             weights   columns of a program   programs x warps   bytes a program
    1 qkv              1.11 MB   2 pairs                240 x 1            4.6 kB
    2 split            -         128 keys of a head     3 ceil(S/128) x 4  32.8 kB of keys and values
    3 o                0.66 MB   4                      144 x 8            4.6 kB, and from L2 2.3 kB a split
    4 gate and up      3.54 MB   2 and 2                768 x 1            4.6 kB
    5 down             1.77 MB   2                      288 x 4            6.1 kB

A layer reads 7.08 MB, 2.36 us at 3.0 TB/s; 30 layers 212 MB, 71 us. Keys and values add 768 bytes a key and
layer (7.9 us a token at 1,024 keys), the head 56.6 MB (19 us): a floor of 98 us a token. An H100 took 580 us
a token at one row (151 launch boundaries of 1.3 us would be 196), and 2,584 us at sixteen, 82 us a layer: the
weights are still read once, but the rows are multiplied one after the other, 452 instructions a row and warp
in launch 1. Every program of launch 3 adds all splits itself. That saves a sixth launch, but every program
reads R * splits * 2.3 kB from L2 (splits past a row's length are left out): 18 kB at 1,024 keys and one row,
295 kB at sixteen, where a sixth launch may be the better choice.

Batch invariance: one compiled kernel serves every R (the row count is an ordinary argument, never
specialised), and each row takes the same instructions. So a row's bits do not depend on the other rows, on
their number, or on the cache's capacity. (The tile of launch 2 grows with T: tokens decoded together may
differ in the last bit from the same tokens decoded one by one.)

Rounded as in the composition: qkv before rope, then queries, keys and values; the attention output; the
projections o, gate, up and down; both residual sums; h once, as in swiglu.py. Unlike the composition, the
normalised row is never rounded: its scale is folded into the weights and its rstd is applied to the sum,
which saves two roundings an element. All sums are in fp32.

Source: the fused decoding step of Hazy Research 2025, "Look Ma, No Bubbles", split at its barriers
(kernels/PERSISTENT.md).
Check: pytest tests -k decode_layer
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import checks
from kernels.decode_attention import HEAD_DIMS, KEYS_PER_SPLIT, split_attention
from kernels.launch_config import TABLE, launch_config
from kernels.types import LayerWeights

MAX_ROWS = 16
MAX_WIDTH = TABLE["decode_norm_matmul"][-1].size  # a whole weight row must fit a program's registers


@triton.jit
def _weights(w_ptr, column, columns, k, WIDTH: tl.constexpr):
    """Rows `column` [N] of a contiguous matrix [columns, WIDTH] -> [N, BLOCK_K], zero past either end."""
    mask = (column < columns)[:, None] & (k < WIDTH)[None, :]
    return tl.load(w_ptr + column.to(tl.int64)[:, None] * WIDTH + k[None, :], mask=mask, other=0.0)


@triton.jit
def _row(x_ptr, row, k, WIDTH: tl.constexpr):
    """Elements k of one row of a contiguous x [R, WIDTH], not widened, so that nothing waits for them yet."""
    return tl.load(x_ptr + tl.cast(row, tl.int64) * WIDTH + k, mask=k < WIDTH, other=0.0)


@triton.jit
def _rstd(x, WIDTH: tl.constexpr, EPS: tl.constexpr):
    """1 / rms of an fp32 row x [BLOCK_K], which is zero past its end."""
    return tl.rsqrt(tl.sum(x * x, axis=0) / WIDTH + EPS)


@triton.jit
def _project(x, w):
    """x [BLOCK_K], w [N, BLOCK_K] -> w x [N]."""
    return tl.sum(w * x[None, :], axis=1)


@triton.jit(do_not_specialize=["rows", "queries", "keys"])
def _norm_qkv_rope_kernel(
    x_ptr, scale_ptr, w_ptr, cos_ptr, sin_ptr, lengths_ptr, q_ptr, k_ptr, v_ptr, rows, queries, keys,
    table_batch_stride, k_batch_stride, k_time_stride, k_head_stride, v_batch_stride, v_time_stride,
    v_head_stride, EPS: tl.constexpr, WIDTH: tl.constexpr, HEADS: tl.constexpr, KEY_HEADS: tl.constexpr,
    HALF: tl.constexpr, PAIRS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A program owns PAIRS pairs of columns (i, i + HALF) of one head, the pairs that rope rotates, for all
    rows. Grid: (HALF / PAIRS, H + 2K).

    q [R, H, 2 HALF] is contiguous; tables are [B or 1, T, HALF] with contiguous rows. New keys and values go
    to position lengths[b] - T + t of the caches, and nowhere if that lies outside.
    """
    head = tl.program_id(1)
    lane = tl.program_id(0) * PAIRS + tl.arange(0, PAIRS)
    k = tl.arange(0, BLOCK_K)
    column = head * (2 * HALF) + lane
    columns: tl.constexpr = (HEADS + 2 * KEY_HEADS) * 2 * HALF
    scale = tl.load(scale_ptr + k, mask=k < WIDTH, other=0.0)
    first = _weights(w_ptr, column, columns, k, WIDTH)  # [PAIRS, BLOCK_K]
    second = _weights(w_ptr, column + HALF, columns, k, WIDTH)
    x = _row(x_ptr, 0, k, WIDTH)
    first = first.to(tl.float32) * scale.to(tl.float32)[None, :]
    second = second.to(tl.float32) * scale.to(tl.float32)[None, :]
    for row in range(0, rows):
        ahead = _row(x_ptr, tl.minimum(row + 1, rows - 1), k, WIDTH)
        batch, time = tl.cast(row // queries, tl.int64), row % queries
        position = tl.load(lengths_ptr + batch).to(tl.int64) - queries + time
        there = (position >= 0) & (position < keys)
        table = batch * table_batch_stride + time * HALF + lane
        cos = tl.load(cos_ptr + table).to(tl.float32)
        sin = tl.load(sin_ptr + table).to(tl.float32)
        wide = x.to(tl.float32)
        rstd = _rstd(wide, WIDTH, EPS)
        a = (_project(wide, first) * rstd).to(x.dtype)  # [PAIRS]
        b = (_project(wide, second) * rstd).to(x.dtype)
        if head < HEADS + KEY_HEADS:  # queries and keys are rotated, values are not
            wide_a, wide_b = a.to(tl.float32), b.to(tl.float32)
            a = (wide_a * cos - wide_b * sin).to(a.dtype)
            b = (wide_b * cos + wide_a * sin).to(b.dtype)
        if head < HEADS:
            target = q_ptr + (tl.cast(row, tl.int64) * HEADS + head) * (2 * HALF) + lane
            tl.store(target, a)
            tl.store(target + HALF, b)
        elif head < HEADS + KEY_HEADS:
            target = (
                k_ptr
                + batch * k_batch_stride
                + position * k_time_stride
                + tl.cast(head - HEADS, tl.int64) * k_head_stride
                + lane
            )
            tl.store(target, a, mask=there)
            tl.store(target + HALF, b, mask=there)
        else:
            value_head = tl.cast(head - HEADS - KEY_HEADS, tl.int64)
            target = (
                v_ptr + batch * v_batch_stride + position * v_time_stride + value_head * v_head_stride + lane
            )
            tl.store(target, a, mask=there)
            tl.store(target + HALF, b, mask=there)
        x = ahead


@triton.jit
def _combined(
    part_ptr, part_max_ptr, part_sum_ptr, lengths_ptr, row, queries, keys, dtype: tl.constexpr,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, SPLIT: tl.constexpr, BLOCK_H: tl.constexpr,
    AT_ONCE: tl.constexpr,
):  # fmt: skip
    """The attention output of one row, rounded to dtype, [BLOCK_H * HEAD_DIM].

    Adds the splits within the row's length in ascending order, AT_ONCE loads at a time. The result is that of
    `_decode_attention_combine_kernel`, where the other splits add exact zeros.
    """
    head = tl.arange(0, BLOCK_H)
    lane = tl.arange(0, HEAD_DIM)
    length = tl.minimum(tl.load(lengths_ptr + row // queries).to(tl.int32), keys)
    filled = tl.cdiv(length, SPLIT)
    first = (tl.cast(row, tl.int64) * HEADS + head) * tl.cdiv(keys, SPLIT)  # [BLOCK_H]
    acc = tl.zeros([BLOCK_H, HEAD_DIM], tl.float32)
    m = tl.full([BLOCK_H], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_H], tl.float32)
    for start in range(0, filled, AT_ONCE):
        for step in tl.static_range(AT_ONCE):
            part = first + start + step
            there = (head < HEADS) & (start + step < filled)
            part_max = tl.load(part_max_ptr + part, mask=there, other=float("-inf"))
            part_sum = tl.load(part_sum_ptr + part, mask=there, other=0.0)
            # [BLOCK_H, HEAD_DIM]
            values = tl.load(
                part_ptr + part[:, None] * HEAD_DIM + lane[None, :], mask=there[:, None], other=0.0
            )
            new_m = tl.maximum(m, part_max)
            pivot = tl.where(new_m == float("-inf"), 0.0, new_m)
            shrink, weight = tl.exp2(m - pivot), tl.exp2(part_max - pivot)
            acc = acc * shrink[:, None] + values * weight[:, None]
            total = total * shrink + part_sum * weight
            m = new_m
    return tl.reshape((acc / tl.where(total == 0.0, 1.0, total)[:, None]).to(dtype), [BLOCK_H * HEAD_DIM])


@triton.jit(do_not_specialize=["rows", "queries", "keys"])
def _combine_o_kernel(
    part_ptr, part_max_ptr, part_sum_ptr, lengths_ptr, w_ptr, x_ptr, sum_ptr, rows, queries, keys,
    WIDTH: tl.constexpr, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, SPLIT: tl.constexpr,
    COLUMNS: tl.constexpr, BLOCK_H: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """A program owns COLUMNS columns of the residual stream for all rows. Grid: ceil(WIDTH / COLUMNS).

    Every program adds the splits of all heads itself, those of the first row while its weights are loading.
    """
    dtype: tl.constexpr = sum_ptr.dtype.element_ty
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    # [COLUMNS, BLOCK_H * HEAD_DIM]
    w = _weights(w_ptr, column, WIDTH, tl.arange(0, BLOCK_H * HEAD_DIM), HEADS * HEAD_DIM)
    mixed = _combined(
        part_ptr, part_max_ptr, part_sum_ptr, lengths_ptr, 0, queries, keys, dtype, HEADS, HEAD_DIM, SPLIT,
        BLOCK_H, AT_ONCE
    )  # fmt: skip
    w = w.to(tl.float32)
    for row in range(0, rows):
        x = _row(x_ptr, row, column, WIDTH)
        y = _project(mixed.to(tl.float32), w).to(dtype)  # [COLUMNS]
        y = (y.to(tl.float32) + x.to(tl.float32)).to(dtype)
        tl.store(sum_ptr + tl.cast(row, tl.int64) * WIDTH + column, y, mask=column < WIDTH)
        if row + 1 < rows:
            mixed = _combined(
                part_ptr, part_max_ptr, part_sum_ptr, lengths_ptr, row + 1, queries, keys, dtype, HEADS,
                HEAD_DIM, SPLIT, BLOCK_H, AT_ONCE
            )  # fmt: skip


@triton.jit(do_not_specialize=["rows"])
def _norm_gate_up_kernel(
    x_ptr, scale_ptr, w_ptr, act_ptr, rows,
    EPS: tl.constexpr, WIDTH: tl.constexpr, FFN: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A program owns COLUMNS columns of the activations [R, FFN] for all rows, with the gate and up weights.
    Grid: ceil(FFN / COLUMNS).
    """
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    k = tl.arange(0, BLOCK_K)
    scale = tl.load(scale_ptr + k, mask=k < WIDTH, other=0.0)
    gate_rows = _weights(w_ptr, column, FFN, k, WIDTH)  # [COLUMNS, BLOCK_K]
    up_rows = _weights(w_ptr + FFN * WIDTH, column, FFN, k, WIDTH)
    x = _row(x_ptr, 0, k, WIDTH)
    gate_rows = gate_rows.to(tl.float32) * scale.to(tl.float32)[None, :]
    up_rows = up_rows.to(tl.float32) * scale.to(tl.float32)[None, :]
    for row in range(0, rows):
        ahead = _row(x_ptr, tl.minimum(row + 1, rows - 1), k, WIDTH)
        wide = x.to(tl.float32)
        rstd = _rstd(wide, WIDTH, EPS)
        gate = (_project(wide, gate_rows) * rstd).to(x.dtype).to(tl.float32)  # [COLUMNS]
        up = (_project(wide, up_rows) * rstd).to(x.dtype).to(tl.float32)
        act = (gate * tl.sigmoid(gate) * up).to(x.dtype)
        tl.store(act_ptr + tl.cast(row, tl.int64) * FFN + column, act, mask=column < FFN)
        x = ahead


@triton.jit(do_not_specialize=["rows"])
def _down_kernel(
    act_ptr, w_ptr, sum_ptr, out_ptr, rows,
    WIDTH: tl.constexpr, FFN: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A program owns COLUMNS columns of the residual stream for all rows. Grid: ceil(WIDTH / COLUMNS)."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    k = tl.arange(0, BLOCK_K)
    w = _weights(w_ptr, column, WIDTH, k, FFN)  # [COLUMNS, BLOCK_K]
    act = _row(act_ptr, 0, k, FFN)
    w = w.to(tl.float32)
    for row in range(0, rows):
        ahead = _row(act_ptr, tl.minimum(row + 1, rows - 1), k, FFN)
        x = _row(sum_ptr, row, column, WIDTH)
        y = _project(act.to(tl.float32), w).to(x.dtype)  # [COLUMNS]
        y = (y.to(tl.float32) + x.to(tl.float32)).to(x.dtype)
        tl.store(out_ptr + tl.cast(row, tl.int64) * WIDTH + column, y, mask=column < WIDTH)
        act = ahead


def _decode_layer(
    x: Tensor, input_norm: Tensor, qkv: Tensor, o: Tensor, post_norm: Tensor, gate_up: Tensor, down: Tensor,
    key_cache: Tensor, value_cache: Tensor, lengths: Tensor, cos: Tensor, sin: Tensor, eps: float,
) -> Tensor:  # fmt: skip
    """The five launches. x [B, T, E] contiguous, the rest as in `decode_layer` -> [B, T, E], contiguous."""
    batch, queries, width = x.shape
    keys, key_heads, head_dim = key_cache.shape[1:]
    heads, ffn, rows = o.shape[1] // head_dim, down.shape[1], batch * queries
    if rows == 0:
        return torch.empty(x.shape, dtype=x.dtype, device=x.device)

    q = torch.empty((batch, queries, heads, head_dim), dtype=x.dtype, device=x.device)
    norm = launch_config("decode_norm_matmul", x.dtype, x.device, width)
    block_k = triton.next_power_of_2(width)
    _norm_qkv_rope_kernel[(head_dim // 2 // norm.block_n, heads + 2 * key_heads)](
        x, input_norm, qkv, cos, sin, lengths, q, key_cache, value_cache, rows, queries, keys,
        cos.stride(0) if cos.dim() == 3 else 0, *key_cache.stride()[:3], *value_cache.stride()[:3], EPS=eps,
        WIDTH=width, HEADS=heads, KEY_HEADS=key_heads, HALF=head_dim // 2, PAIRS=norm.block_n,
        BLOCK_K=block_k, num_warps=norm.num_warps,
    )  # fmt: skip
    parts = split_attention(q, key_cache, value_cache, lengths)
    total = torch.empty((rows, width), dtype=x.dtype, device=x.device)
    block_h = triton.next_power_of_2(heads)
    config = launch_config("decode_o", x.dtype, x.device, block_h * head_dim)
    _combine_o_kernel[(triton.cdiv(width, config.block_n),)](
        *parts, lengths, o, x, total, rows, queries, keys, WIDTH=width, HEADS=heads, HEAD_DIM=head_dim,
        SPLIT=KEYS_PER_SPLIT, COLUMNS=config.block_n, BLOCK_H=block_h, AT_ONCE=config.block_m,
        num_warps=config.num_warps,
    )  # fmt: skip
    act = torch.empty((rows, ffn), dtype=x.dtype, device=x.device)
    _norm_gate_up_kernel[(triton.cdiv(ffn, norm.block_n),)](
        total, post_norm, gate_up, act, rows,
        EPS=eps, WIDTH=width, FFN=ffn, COLUMNS=norm.block_n, BLOCK_K=block_k, num_warps=norm.num_warps,
    )  # fmt: skip
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    config = launch_config("decode_down", x.dtype, x.device, ffn)
    _down_kernel[(triton.cdiv(width, config.block_n),)](
        act, down, total, out, rows, WIDTH=width, FFN=ffn, COLUMNS=config.block_n,
        BLOCK_K=triton.next_power_of_2(ffn), num_warps=config.num_warps,
    )  # fmt: skip
    return out


# As in kernels/tracing.py, but for a launcher that writes into two of its arguments.
_OPERATION = torch.library.custom_op(
    "smollm2::decode_layer", _decode_layer, mutates_args=("key_cache", "value_cache")
)
_OPERATION.register_fake(lambda x, *_: x.new_empty(x.shape))


def supports(x: Tensor, weights: LayerWeights) -> bool:
    """Whether the five kernels can run this layer: at most 16 rows (an empty batch included), and weight rows
    that fit in registers.
    """
    widths = (weights.qkv.shape[-1], triton.next_power_of_2(weights.o.shape[-1]), weights.down.shape[-1])
    return x.dim() == 3 and x.shape[0] * x.shape[1] <= MAX_ROWS and max(widths) <= MAX_WIDTH


def decode_layer(
    x: Tensor, weights: LayerWeights, key_cache: Tensor, value_cache: Tensor, lengths: Tensor, cos: Tensor,
    sin: Tensor, *, eps: float,
) -> Tensor:  # fmt: skip
    """One whole block for at most 16 rows in five launches: norm, qkv, rope, cache write, attention,
    projection, norm, SwiGLU MLP.

    x [B, T, E] with 1 <= T and B * T <= 16 (float32, float16, bfloat16), contiguous weights of one dtype,
    widths up to 16384; caches [B, S, K, D] with D 32, 64 or 128 and a last stride of 1; lengths [B] integer,
    the new tokens included; cos and sin [B, T, D/2] or [T, D/2] -> [B, T, E], contiguous. Writes the new keys
    and values into the caches at positions lengths[b] - T .. lengths[b] - 1, as far as these exist. The host
    reads no value: what is launched depends on shapes only, so a CUDA graph can hold it. A row's result does
    not depend on the other rows or on S. Raises ValueError naming what was expected. Same semantics as
    `kernels.reference.decode_layer`, which composes given operations; backend.py chooses between the two.
    """
    op = "decode_layer"
    checks.decode_layer(x, weights, key_cache, value_cache, lengths, cos, sin)
    checks.kernel_dtype(op, x)
    head_dim = key_cache.shape[3]
    (head_dim in HEAD_DIMS) or checks.refuse(op, f"a head dim in {list(HEAD_DIMS)}", head_dim)
    wanted = f"B * T <= {MAX_ROWS} rows and widths of at most {MAX_WIDTH}"
    supports(x, weights) or checks.refuse(op, wanted, checks.shape(x))
    for name, tensor in (("key cache", key_cache), ("value cache", value_cache)):
        (tensor.stride(3) == 1) or checks.refuse(op, f"{name} with a last stride of 1", tensor.stride(3))
    for name, tensor in weights._asdict().items():
        wanted = f"contiguous weights ({name}.contiguous())"
        tensor.is_contiguous() or checks.refuse(op, wanted, tensor.stride())
    run = _OPERATION if torch.compiler.is_compiling() else _decode_layer
    lengths, cos, sin = lengths.contiguous(), cos.contiguous(), sin.contiguous()
    return run(x.contiguous(), *weights, key_cache, value_cache, lengths, cos, sin, eps)
