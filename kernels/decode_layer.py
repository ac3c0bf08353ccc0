"""One whole block for 1 to 16 new tokens in six launches (five for one), each weight read once.

    1  norm, qkv, rope, cache    a = x (w * scale)^T * rstd,  rstd = 1 / sqrt(mean(x^2) + eps);  q, k rotated;
                                 k, v into the cache
    2  split attention           the kernel of decode_attention.py
    3  combine, o, residual      m = sum of the splits, weighted;  s = x + m w^T
    4  norm, gate and up, SiLU   g, u = s (w * scale)^T * rstd as in 1;  h = silu(g) * u
    5  down, residual            y = s + h w^T

R = B * T rows, E hidden width, F ffn width; other letters as in reference.py. x, s, y [R, E], m [R, H * D],
h [R, F]; w are the weights of LayerWeights. No backward pass: the cache has no gradient.

A decode step is a chain of memory reads too short to hide each other's latency. What counts is the number of
launches, and that each launch requests all of its bytes at once, if possible before the launch before it has
ended. kernels/decode_product.py says how: programs own a few columns, keep their whole weight rows in
registers, and multiply all rows at once on matrix units.

The 135M model in 16 bits (E 576, F 1536, 9 + 3 + 3 heads of 64), by launch:

    launch         weights   columns of a program    programs x warps      bytes a program
    1 qkv          1.11 MB   4 pairs                 120 x 4               9.2 kB
    2 split        -         128 keys of a head      3 B ceil(S/128) x 4   32.8 kB of keys and values
    3 o            0.66 MB   8                       72 x 8                9.2 kB, and 2.3 kB a row and split
    4 gate and up  3.54 MB   16 and 16               96 x 4                36.9 kB
    5 down         1.77 MB   8                       72 x 8                24.6 kB

A layer reads 7.08 MB, 2.36 us at 3.0 TB/s; 30 layers 212 MB, 71 us. Keys and values add 768 bytes a key and
layer (7.9 us a token at 1,024 keys), the head 56.6 MB (19 us): a floor of 98 us a token. What a launch costs
beyond its bytes (first-byte latency, dependent loads, sums across warps) is larger at batch 1: `python -m
bench.step_model --decode` predicts it. An H200 with Triton 3.6 took 616 us a token at one row and 847 us at
sixteen, where 358 and 464 had been predicted for an H100. Triton 3.6 loaded the tiles in another order of
lanes than 3.7, and exchanged them through shared memory one by one, each after a wait for memory
(decode_product.py, `tile`); of that code the model gives 504 and 627. It has not been measured since that was
mended.

With one row, every program of launch 3 adds all splits itself. With more, that would be more instructions and
bytes from L2 than a launch of its own costs: at 16 rows and 1,024 keys all programs together would read 21
MB. By the model of bench.step_model four rows take 385 us a token with that launch, and 480 without.

Batch invariance: the products of every R are the same compiled kernel (the row count is an ordinary argument,
never specialised) over the same 16 rows, and both forms of launch 3 take the same steps in the same order
(the compiler goes through the k of one long dot as through a chain of dots). So a row's bits do not depend on
the other rows, on their number, or on the cache's capacity. (The tile of launch 2 grows with T: tokens
decoded together may differ in the last bit from the same tokens decoded one by one.)

Rounded as in the composition: qkv before rope, then queries, keys and values; the attention output; the
projections o, gate, up and down; both residual sums; h once, as in swiglu.py. Unlike the composition, the
normalised row is not rounded: the product of weight and scale is, once, and rstd is applied to the sum. All
sums are in fp32.

Source: the fused decoding step of Hazy Research 2025, "Look Ma, No Bubbles", split at its barriers
(kernels/PERSISTENT.md).
Check: pytest tests -k decode_layer
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import checks
from kernels.decode_attention import HEAD_DIMS, KEYS_PER_SPLIT, combine, combined, split_attention
from kernels.decode_product import (
    add_product,
    early_length,
    members,
    multiply,
    norm_multiply,
    scale_tiles,
    tile,
    tiles,
    wait,
)  # fmt: skip
from kernels.launch_config import TABLE, decode_launch
from kernels.tracing import traceable
from kernels.types import LayerWeights

MAX_ROWS = 16
# With more elements of a row's attention output, the splits no longer fit the registers of a program of
# launch 3.
MERGED_ELEMENTS = 4096
MAX_WIDTH = TABLE["decode_down"][-1].size


@triton.jit
def norm_qkv_rope(
    unit, x_ptr, scale_ptr, w_ptr, cos_ptr, sin_ptr, lengths_ptr, q_ptr, k_ptr, v_ptr, rows, queries, keys,
    table_batch_stride, k_batch_stride, k_time_stride, k_head_stride, v_batch_stride, v_time_stride,
    v_head_stride, counter_ptr, arrivals, EPS: tl.constexpr, WIDTH: tl.constexpr, HEADS: tl.constexpr,
    KEY_HEADS: tl.constexpr, HALF: tl.constexpr, GROUPS: tl.constexpr, WARPS: tl.constexpr,
    AHEAD: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """A unit is PAIRS pairs of columns (i, i + HALF) of one head, the pairs that rope rotates, for all rows.
    Units: (H + 2K) HALF / PAIRS.

    q [R, H, 2 HALF] is contiguous; tables are [B or 1, T, HALF] with contiguous rows. New keys and values go
    to position lengths[b] - T + t of the caches, and nowhere if that lies outside.
    """
    PAIRS: tl.constexpr = 4 * GROUPS
    head, part = unit // (HALF // PAIRS), unit % (HALF // PAIRS)
    member = members(GROUPS)
    column = head * (2 * HALF) + part * PAIRS + member // 2 + member % 2 * HALF
    w, exists = w_ptr + column.to(tl.int64) * WIDTH, column < (HEADS + 2 * KEY_HEADS) * 2 * HALF
    ws = tiles(w, exists, WIDTH, WARPS, AHEAD)
    scales = scale_tiles(scale_ptr, WIDTH, WARPS, AHEAD)
    row = tl.arange(0, 16)
    lane = part * PAIRS + tl.arange(0, PAIRS)[None, :]
    batch, time = row // queries, row % queries
    inside = (row < rows)[:, None] & (lane < HALF) & (head < HEADS + 2 * KEY_HEADS)
    table = (batch.to(tl.int64) * table_batch_stride + time * HALF)[:, None] + lane
    rotated = inside & (head < HEADS + KEY_HEADS)  # queries and keys are rotated, values are not
    wait(DEPENDENT, counter_ptr, arrivals)
    length = tl.load(lengths_ptr + batch, mask=row < rows, other=0)
    cos = tl.load(cos_ptr + table, mask=rotated, other=1.0).to(tl.float32)
    sin = tl.load(sin_ptr + table, mask=rotated, other=0.0).to(tl.float32)
    y = norm_multiply(
        x_ptr, WIDTH, rows, ws, w, exists, scales, scale_ptr, EPS, WIDTH, GROUPS, WARPS, AHEAD, DEPENDENT
    )
    a, b = tl.split(tl.reshape(y.to(q_ptr.dtype.element_ty), [16, PAIRS, 2]))  # [16, PAIRS]
    position = length.to(tl.int64) - queries + time
    there = inside & ((position >= 0) & (position < keys))[:, None]
    if head < HEADS + KEY_HEADS:
        wide_a, wide_b = a.to(tl.float32), b.to(tl.float32)
        a = (wide_a * cos - wide_b * sin).to(a.dtype)
        b = (wide_b * cos + wide_a * sin).to(b.dtype)
    batch = batch.to(tl.int64)
    if head < HEADS:
        target = q_ptr + (row * HEADS + head)[:, None] * (2 * HALF) + lane
        tl.store(target, a, mask=inside)
        tl.store(target + HALF, b, mask=inside)
    elif head < HEADS + KEY_HEADS:
        start = (
            batch * k_batch_stride + position * k_time_stride + (head - HEADS).to(tl.int64) * k_head_stride
        )
        tl.store(k_ptr + start[:, None] + lane, a, mask=there)
        tl.store(k_ptr + start[:, None] + lane + HALF, b, mask=there)
    else:
        value_head = (head - HEADS - KEY_HEADS).to(tl.int64)
        start = batch * v_batch_stride + position * v_time_stride + value_head * v_head_stride
        tl.store(v_ptr + start[:, None] + lane, a, mask=there)
        tl.store(v_ptr + start[:, None] + lane + HALF, b, mask=there)


@triton.jit(do_not_specialize=["rows", "queries", "keys"])
def _norm_qkv_rope_kernel(
    x_ptr, scale_ptr, w_ptr, cos_ptr, sin_ptr, lengths_ptr, q_ptr, k_ptr, v_ptr, rows, queries, keys,
    table_batch_stride, k_batch_stride, k_time_stride, k_head_stride, v_batch_stride, v_time_stride,
    v_head_stride, EPS: tl.constexpr, WIDTH: tl.constexpr, HEADS: tl.constexpr, KEY_HEADS: tl.constexpr,
    HALF: tl.constexpr, GROUPS: tl.constexpr, WARPS: tl.constexpr, AHEAD: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    """A program is a unit of `norm_qkv_rope`."""
    norm_qkv_rope(
        tl.program_id(0), x_ptr, scale_ptr, w_ptr, cos_ptr, sin_ptr, lengths_ptr, q_ptr, k_ptr, v_ptr, rows,
        queries, keys, table_batch_stride, k_batch_stride, k_time_stride, k_head_stride, v_batch_stride,
        v_time_stride, v_head_stride, None, 0, EPS, WIDTH, HEADS, KEY_HEADS, HALF, GROUPS, WARPS, AHEAD,
        DEPENDENT,
    )  # fmt: skip


@triton.jit
def _own(unit, rows, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    """A unit's columns of the residual stream: offsets [16, COLUMNS], and which of them exist."""
    row = tl.arange(0, 16)[:, None]
    column = unit * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    return row * WIDTH + column, (row < rows) & (column < WIDTH)


@triton.jit
def _sum(y, x):
    """The residual sum: a projection y, rounded, and the stream x."""
    return (y.to(x.dtype).to(tl.float32) + x.to(tl.float32)).to(x.dtype)


@triton.jit
def combine_o(
    unit, part_ptr, part_max_ptr, part_sum_ptr, lengths_ptr, w_ptr, x_ptr, sum_ptr, keys, counter_ptr,
    arrivals, WIDTH: tl.constexpr, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_H: tl.constexpr, GROUPS: tl.constexpr, WARPS: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """`_decode_attention_combine_kernel` and `project` of a single row, bit for bit: a unit is 8 GROUPS
    columns of the residual stream, and adds the splits of all heads itself. Units: ceil(WIDTH / (8 GROUPS)).
    """
    dtype: tl.constexpr = sum_ptr.dtype.element_ty
    INPUTS: tl.constexpr = HEADS * HEAD_DIM
    TILES: tl.constexpr = (BLOCK_H * HEAD_DIM + 32 * WARPS - 1) // (32 * WARPS)
    number = members(TILES * GROUPS)
    column = unit * 8 * GROUPS + number % (8 * GROUPS)
    rows_of_w, t = w_ptr + column.to(tl.int64) * INPUTS, number // (8 * GROUPS)
    w = tile(rows_of_w, column < WIDTH, t, INPUTS, WARPS)  # all of it
    own, there = _own(unit, 1, WIDTH, 8 * GROUPS)
    head = tl.arange(0, BLOCK_H)[:, None]
    splits = tl.cdiv(keys, SPLIT)
    filled = tl.minimum(tl.cdiv(early_length(lengths_ptr).to(tl.int32), SPLIT), splits)
    wait(DEPENDENT, counter_ptr, arrivals)
    residual = tl.load(x_ptr + own, mask=there, other=0.0)
    mixed = combined(
        part_ptr, part_max_ptr, part_sum_ptr, head, head < HEADS, splits, filled, HEAD_DIM, DEPENDENT
    )
    # [BLOCK_H, HEAD_DIM] -> tiles in which every row is this one, of which the first is stored
    mixed = tl.reshape(mixed.to(dtype), [TILES, WARPS, 32])[:, None, :, None]
    x = tl.reshape(tl.broadcast_to(mixed, [TILES, 2, WARPS, 8, 32]), [TILES * 2, WARPS, 8, 32])
    acc = add_product(tl.zeros([WARPS, 16, 8 * GROUPS], tl.float32), x, w, GROUPS, WARPS, TILES)
    tl.store(sum_ptr + own, _sum(tl.sum(acc, 0), residual), mask=there)


@triton.jit(do_not_specialize=["keys"])
def _combine_o_kernel(
    part_ptr, part_max_ptr, part_sum_ptr, lengths_ptr, w_ptr, x_ptr, sum_ptr, keys, WIDTH: tl.constexpr,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, SPLIT: tl.constexpr, BLOCK_H: tl.constexpr,
    GROUPS: tl.constexpr, WARPS: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """A program is a unit of `combine_o`."""
    combine_o(
        tl.program_id(0), part_ptr, part_max_ptr, part_sum_ptr, lengths_ptr, w_ptr, x_ptr, sum_ptr, keys,
        None, 0, WIDTH, HEADS, HEAD_DIM, SPLIT, BLOCK_H, GROUPS, WARPS, DEPENDENT,
    )  # fmt: skip


@triton.jit
def project(
    unit, h_ptr, w_ptr, x_ptr, sum_ptr, rows, counter_ptr, arrivals, INPUTS: tl.constexpr,
    WIDTH: tl.constexpr, GROUPS: tl.constexpr, WARPS: tl.constexpr, AHEAD: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    """x + h w^T with h [R, INPUTS]. A unit is 8 GROUPS columns of the residual stream for all rows. Units:
    ceil(WIDTH / (8 GROUPS)).
    """
    column = unit * 8 * GROUPS + members(GROUPS)
    w = w_ptr + column.to(tl.int64) * INPUTS
    ws = tiles(w, column < WIDTH, INPUTS, WARPS, AHEAD)
    own, there = _own(unit, rows, WIDTH, 8 * GROUPS)
    wait(DEPENDENT, counter_ptr, arrivals)
    residual = tl.load(x_ptr + own, mask=there, other=0.0)
    y = multiply(h_ptr, INPUTS, rows, ws, w, column < WIDTH, INPUTS, GROUPS, WARPS, AHEAD, DEPENDENT)
    tl.store(sum_ptr + own, _sum(y, residual), mask=there)


@triton.jit(do_not_specialize=["rows"])
def _project_kernel(
    h_ptr, w_ptr, x_ptr, sum_ptr, rows, INPUTS: tl.constexpr, WIDTH: tl.constexpr, GROUPS: tl.constexpr,
    WARPS: tl.constexpr, AHEAD: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """A program is a unit of `project`."""
    project(
        tl.program_id(0), h_ptr, w_ptr, x_ptr, sum_ptr, rows, None, 0, INPUTS, WIDTH, GROUPS, WARPS, AHEAD,
        DEPENDENT,
    )  # fmt: skip


@triton.jit
def norm_gate_up(
    unit, x_ptr, scale_ptr, w_ptr, act_ptr, rows, counter_ptr, arrivals, EPS: tl.constexpr,
    WIDTH: tl.constexpr, FFN: tl.constexpr, GROUPS: tl.constexpr, WARPS: tl.constexpr, AHEAD: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    """A unit is COLUMNS columns of the activations [R, FFN] for all rows, with the gate and up weights.
    Units: ceil(FFN / COLUMNS).
    """
    dtype: tl.constexpr = act_ptr.dtype.element_ty
    COLUMNS: tl.constexpr = 4 * GROUPS
    member = members(GROUPS)
    column = unit * COLUMNS + member // 2
    w = w_ptr + (member % 2 * FFN + column).to(tl.int64) * WIDTH
    ws = tiles(w, column < FFN, WIDTH, WARPS, AHEAD)
    scales = scale_tiles(scale_ptr, WIDTH, WARPS, AHEAD)
    wait(DEPENDENT, counter_ptr, arrivals)
    y = norm_multiply(
        x_ptr, WIDTH, rows, ws, w, column < FFN, scales, scale_ptr, EPS, WIDTH, GROUPS, WARPS, AHEAD,
        DEPENDENT
    )  # fmt: skip
    gate, up = tl.split(tl.reshape(y.to(dtype), [16, COLUMNS, 2]))  # [16, COLUMNS]
    gate, up = gate.to(tl.float32), up.to(tl.float32)
    row = tl.arange(0, 16)[:, None]
    column = unit * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    act = (gate * tl.sigmoid(gate) * up).to(dtype)
    tl.store(act_ptr + row * FFN + column, act, mask=(row < rows) & (column < FFN))


@triton.jit(do_not_specialize=["rows"])
def _norm_gate_up_kernel(
    x_ptr, scale_ptr, w_ptr, act_ptr, rows, EPS: tl.constexpr, WIDTH: tl.constexpr, FFN: tl.constexpr,
    GROUPS: tl.constexpr, WARPS: tl.constexpr, AHEAD: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """A program is a unit of `norm_gate_up`."""
    norm_gate_up(
        tl.program_id(0), x_ptr, scale_ptr, w_ptr, act_ptr, rows, None, 0, EPS, WIDTH, FFN, GROUPS, WARPS,
        AHEAD, DEPENDENT,
    )  # fmt: skip


@traceable(lambda x, *_: x.new_empty(x.shape), mutates=("key_cache", "value_cache"))
def _decode_layer(
    x: Tensor, input_norm: Tensor, qkv: Tensor, o: Tensor, post_norm: Tensor, gate_up: Tensor, down: Tensor,
    key_cache: Tensor, value_cache: Tensor, lengths: Tensor, cos: Tensor, sin: Tensor, eps: float,
    dependent: bool,
) -> Tensor:  # fmt: skip
    """The launches. x [B, T, E] contiguous, the rest as in `decode_layer` -> [B, T, E], contiguous."""
    batch, queries, width = x.shape
    keys, key_heads, head_dim = key_cache.shape[1:]
    heads, ffn, rows = o.shape[1] // head_dim, down.shape[1], batch * queries
    if rows == 0:
        return torch.empty(x.shape, dtype=x.dtype, device=x.device)

    def config(name: str, size: int, dependent: bool = True) -> dict[str, Any]:
        return decode_launch(name, x.dtype, x.device, size, dependent)

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=x.dtype, device=x.device)

    q = empty(batch, queries, heads, head_dim)
    options = config("decode_qkv", width, dependent)
    _norm_qkv_rope_kernel[(head_dim // 8 // options["GROUPS"] * (heads + 2 * key_heads),)](
        x, input_norm, qkv, cos, sin, lengths, q, key_cache, value_cache, rows, queries, keys,
        cos.stride(0) if cos.dim() == 3 else 0, *key_cache.stride()[:3], *value_cache.stride()[:3], EPS=eps,
        WIDTH=width, HEADS=heads, KEY_HEADS=key_heads, HALF=head_dim // 2, **options,
    )  # fmt: skip
    parts = split_attention(q, key_cache, value_cache, lengths, dependent=True)
    total = empty(rows, width)
    options = config("decode_o", heads * head_dim)
    grid = (triton.cdiv(width, 8 * options["GROUPS"]),)
    block_h = max(triton.next_power_of_2(heads), 32 * options["WARPS"] // head_dim)
    if rows == 1 and block_h * head_dim <= MERGED_ELEMENTS:
        del options["AHEAD"]  # all tiles
        _combine_o_kernel[grid](
            *parts, lengths, o, x, total, keys, WIDTH=width, HEADS=heads, HEAD_DIM=head_dim,
            SPLIT=KEYS_PER_SPLIT, BLOCK_H=block_h, **options,
        )  # fmt: skip
    else:
        mixed = empty(rows, heads, head_dim)
        combine(parts, lengths, mixed, queries, keys, dependent=True)
        _project_kernel[grid](mixed, o, x, total, rows, INPUTS=heads * head_dim, WIDTH=width, **options)
    act = empty(rows, ffn)
    options = config("decode_gate_up", width)
    _norm_gate_up_kernel[(triton.cdiv(ffn, 4 * options["GROUPS"]),)](
        total, post_norm, gate_up, act, rows, EPS=eps, WIDTH=width, FFN=ffn, **options
    )
    out = empty(*x.shape)
    options = config("decode_down", ffn)
    grid = (triton.cdiv(width, 8 * options["GROUPS"]),)
    _project_kernel[grid](act, down, total, out, rows, INPUTS=ffn, WIDTH=width, **options)
    return out


def supports(x: Tensor, weights: LayerWeights) -> bool:
    """Whether the kernels can run this layer: at most 16 rows (an empty batch included), and widths that the
    launch table has.
    """
    widths = (weights.qkv.shape[-1], weights.o.shape[-1], weights.down.shape[-1])
    return x.dim() == 3 and x.shape[0] * x.shape[1] <= MAX_ROWS and max(widths) <= MAX_WIDTH


def decode_layer(
    x: Tensor, weights: LayerWeights, key_cache: Tensor, value_cache: Tensor, lengths: Tensor, cos: Tensor,
    sin: Tensor, *, eps: float, dependent: bool = False,
) -> Tensor:  # fmt: skip
    """One whole block for at most 16 rows in six launches (five for a single row): norm, qkv, rope, cache
    write, attention, projection, norm, SwiGLU MLP.

    x [B, T, E] with 1 <= T and B * T <= 16 (float32, float16, bfloat16), contiguous weights of one dtype,
    widths up to 16384; caches [B, S, K, D] with D 32, 64 or 128 and a last stride of 1; lengths [B] integer,
    the new tokens included; cos and sin [B, T, D/2] or [T, D/2] -> [B, T, E], contiguous. Writes the new keys
    and values into the caches at positions lengths[b] - T .. lengths[b] - 1, as far as these exist. The host
    reads no value: what is launched depends on shapes only, so a CUDA graph can hold it. A row's result does
    not depend on the other rows or on S. Raises ValueError naming what was expected. Same semantics as
    `kernels.reference.decode_layer`, which composes given operations; backend.py chooses between the two.
    dependent: the launch just before writes none of the weights, so the first launch here may read them
    before that one has ended.
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
    lengths, cos, sin = lengths.contiguous(), cos.contiguous(), sin.contiguous()
    return _decode_layer(x.contiguous(), *weights, key_cache, value_cache, lengths, cos, sin, eps, dependent)
