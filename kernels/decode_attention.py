"""Attention of a few new queries over a key/value cache, the keys split over programs.

    split i  S = q k^T * scale over its keys;  m_i = max S,  l_i = sum exp2(S - m_i),  a_i = exp2(S - m_i) v
    combine  m = max m_i,  out = sum_i exp2(m_i - m) a_i / sum_i exp2(m_i - m) l_i,  splits in ascending order

q, out [B, T, H, D], caches [B, S, K, D], lengths [B]. A decode step reads the whole cache and computes almost
nothing. So every key should be read once, and enough programs must read at the same time. The rows of a tile
are the T new queries of all G query heads of a key head: one load of a key block serves all of them. The keys
are cut into splits of a fixed size, whatever the batch and the cache; a split past a row's length adds an
exact zero. So a row's result is bit-identical alone, in any batch, and in a cache of any capacity.

Bytes per row and layer: 2 S K D elements, 786 kB in 16 bits at 1,024 keys of the 135M model. Floor of the 30
layers at 3.0 TB/s: 7.9 us at batch 1, 2.0 ms at batch 256. No backward pass: the cache has no gradient.

Source: Dao et al. 2023, Flash-Decoding (pytorch.org/blog/flash-decoding).
Check: pytest tests -k decode_attention
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import checks
from kernels.decode_product import early_length, prefetch, requested, wait
from kernels.launch_config import dependence, launch_config
from kernels.tracing import traceable

HEAD_DIMS = (32, 64, 128)
MAX_QUERIES = 16
KEYS_PER_SPLIT = 128  # changes the rounding of the result, so it is not a tuning parameter
LOG2_E = 1.4426950408889634


@triton.jit
def attend(
    split, row, q_ptr, k_ptr, v_ptr, lengths_ptr, out_ptr, part_ptr, part_max_ptr, part_sum_ptr,
    q_batch_stride, q_time_stride, q_head_stride, k_batch_stride, k_time_stride, k_head_stride,
    v_batch_stride, v_time_stride, v_head_stride, queries, keys, splits, counter_ptr, arrivals,
    SCALE: tl.constexpr, KEY_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT: tl.constexpr, ONE_SPLIT: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    """SPLIT keys of one key head of one row, for all queries that read them; row is one of B * K.

    Row i of the tile is query i // GROUP, head i % GROUP of the group. Parts are [B, T, H, splits(, D)] in
    fp32. With ONE_SPLIT the result itself goes into out.
    """
    batch = (row // KEY_HEADS).to(tl.int64)
    key_head = (row % KEY_HEADS).to(tl.int64)
    index = tl.arange(0, BLOCK_M)
    time, head = index // GROUP, key_head * GROUP + index % GROUP
    inside = time < queries
    lane = tl.arange(0, HEAD_DIM)
    q_rows = q_ptr + batch * q_batch_stride + time.to(tl.int64) * q_time_stride + head * q_head_stride
    length = early_length(lengths_ptr + batch).to(tl.int32)
    end = tl.minimum(length, keys)
    last_key = tl.minimum(length - queries + time, end - 1)  # [BLOCK_M]
    k_head = k_ptr + batch * k_batch_stride + key_head * k_head_stride
    v_head = v_ptr + batch * v_batch_stride + key_head * v_head_stride
    if DEPENDENT:  # most keys and values are older than the launch before, but the newest are not
        if split * SPLIT < end:
            key = tl.minimum(split * SPLIT + tl.arange(0, SPLIT), end - 1).to(tl.int64)
            prefetch(k_head + key * k_time_stride, HEAD_DIM)
            prefetch(v_head + key * v_time_stride, HEAD_DIM)
    wait(DEPENDENT, counter_ptr, arrivals)
    q = tl.load(q_rows[:, None] + lane[None, :], mask=inside[:, None], other=0.0)  # [BLOCK_M, HEAD_DIM]
    acc = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for start in range(split * SPLIT, tl.minimum((split + 1) * SPLIT, end), BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        position = key.to(tl.int64)
        filled = key < end
        # [HEAD_DIM, BLOCK_N]
        of_k = k_head + position[None, :] * k_time_stride + lane[:, None]
        k = tl.load(of_k, mask=filled[None, :], other=0.0)
        # [BLOCK_N, HEAD_DIM]
        of_v = v_head + position[:, None] * v_time_stride + lane[None, :]
        v = tl.load(of_v, mask=filled[:, None], other=0.0)
        scores = tl.dot(q, k, input_precision="ieee") * SCALE  # [BLOCK_M, BLOCK_N]
        scores = tl.where(key[None, :] <= last_key[:, None], scores, float("-inf"))
        new_m = tl.maximum(m, tl.max(scores, 1))
        pivot = tl.where(new_m == float("-inf"), 0.0, new_m)
        p = tl.exp2(scores - pivot[:, None])
        shrink = tl.exp2(m - pivot)
        total = total * shrink + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        m = new_m

    target = (batch * queries + time) * KEY_HEADS * GROUP + head  # [BLOCK_M], row of [B, T, H]
    if ONE_SPLIT:
        out = acc / tl.where(total == 0.0, 1.0, total)[:, None]
        tl.store(out_ptr + target[:, None] * HEAD_DIM + lane[None, :], out.to(q.dtype), mask=inside[:, None])
    else:
        part = target * splits + split
        tl.store(part_ptr + part[:, None] * HEAD_DIM + lane[None, :], acc, mask=inside[:, None])
        tl.store(part_max_ptr + part, m, mask=inside)
        tl.store(part_sum_ptr + part, total, mask=inside)


@triton.jit(do_not_specialize=["queries", "keys", "splits"])  # a growing cache must not compile again
def _decode_attention_split_kernel(
    q_ptr, k_ptr, v_ptr, lengths_ptr, out_ptr, part_ptr, part_max_ptr, part_sum_ptr,
    q_batch_stride, q_time_stride, q_head_stride, k_batch_stride, k_time_stride, k_head_stride,
    v_batch_stride, v_time_stride, v_head_stride, queries, keys, splits,
    SCALE: tl.constexpr, KEY_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT: tl.constexpr, ONE_SPLIT: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    """A program does what `attend` says. Grid: (splits, B * K)."""
    attend(
        tl.program_id(0), tl.program_id(1), q_ptr, k_ptr, v_ptr, lengths_ptr, out_ptr, part_ptr, part_max_ptr,
        part_sum_ptr, q_batch_stride, q_time_stride, q_head_stride, k_batch_stride, k_time_stride,
        k_head_stride, v_batch_stride, v_time_stride, v_head_stride, queries, keys, splits, None, 0, SCALE,
        KEY_HEADS, GROUP, HEAD_DIM, BLOCK_M, BLOCK_N, SPLIT, ONE_SPLIT, DEPENDENT,
    )  # fmt: skip


@triton.jit
def _add_splits(
    acc, m, total, part_ptr, part_max_ptr, part_sum_ptr, first, lane, there, start, splits,
    HEAD_DIM: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """`combined` for the splits start .. start + 7, which are requested together."""
    maxima, sums, values = tl.tuple([]), tl.tuple([]), tl.tuple([])
    new_m = m
    for step in tl.static_range(8):
        part, inside = first + start + step, there & (start + step < splits)
        maxima = maxima + (tl.load(part_max_ptr + part, mask=inside, other=float("-inf")),)
        sums = sums + (tl.load(part_sum_ptr + part, mask=inside, other=0.0),)
        mask = inside & (lane < HEAD_DIM)
        values = values + (tl.load(part_ptr + part * HEAD_DIM + lane, mask=mask, other=0.0),)
        new_m = tl.maximum(new_m, maxima[step])
    requested(DEPENDENT)
    pivot = tl.where(new_m == float("-inf"), 0.0, new_m)
    shrink = tl.exp2(m - pivot)
    acc, total = acc * shrink, total * shrink
    for step in tl.static_range(8):  # fma, because two kernels must not differ in what is contracted
        weight = tl.exp2(maxima[step] - pivot)
        acc, total = tl.fma(values[step], weight, acc), tl.fma(sums[step], weight, total)
    return acc, new_m, total


@triton.jit
def combined(
    part_ptr, part_max_ptr, part_sum_ptr, row, there, splits, filled, HEAD_DIM: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    """The attention output of rows [..., 1] of [B, T, H], as far as they are there -> [..., HEAD_DIM] in
    fp32.

    Adds the splits in ascending order, eight at a time: the first eight at once, whether or not they are
    filled (the others hold zeros and -inf), and then those up to `filled`. So nothing waits for a row's
    length.
    """
    lane = tl.arange(0, HEAD_DIM)
    first = row.to(tl.int64) * splits
    m = tl.where(there, float("-inf"), float("-inf"))
    total = tl.where(there, 0.0, 0.0)
    acc = total + 0.0 * lane.to(tl.float32)
    acc, m, total = _add_splits(
        acc, m, total, part_ptr, part_max_ptr, part_sum_ptr, first, lane, there, 0, splits, HEAD_DIM,
        DEPENDENT
    )  # fmt: skip
    for start in range(8, filled, 8):
        acc, m, total = _add_splits(
            acc, m, total, part_ptr, part_max_ptr, part_sum_ptr, first, lane, there, start, splits, HEAD_DIM,
            False
        )  # fmt: skip
    return acc / tl.where(total == 0.0, 1.0, total)


@triton.jit(do_not_specialize=["queries", "keys"])
def _decode_attention_combine_kernel(
    part_ptr, part_max_ptr, part_sum_ptr, lengths_ptr, out_ptr, queries, keys, HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr, SPLIT: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """A program owns one head of one query. Grid: B * T * H."""
    row = tl.program_id(0) + tl.arange(0, 1)
    length = early_length(lengths_ptr + tl.program_id(0) // (queries * HEADS)).to(tl.int32)
    splits = tl.cdiv(keys, SPLIT)
    filled = tl.minimum(tl.cdiv(length, SPLIT), splits)
    wait(DEPENDENT)
    out = combined(part_ptr, part_max_ptr, part_sum_ptr, row, row >= 0, splits, filled, HEAD_DIM, DEPENDENT)
    target = out_ptr + row.to(tl.int64) * HEAD_DIM + tl.arange(0, HEAD_DIM)
    tl.store(target, out.to(out_ptr.dtype.element_ty))


def split_attention(
    q: Tensor, key_cache: Tensor, value_cache: Tensor, lengths: Tensor, out: Tensor | None = None, *,
    dependent: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The first launch: q [B, T, H, D], caches [B, S, K, D], lengths [B], none of them empty -> the parts of
    all splits in fp32.

    The parts are sums of values weighted by exp2(score - maximum) [B * T * H, splits, D], the maxima and the
    sums of weights [B * T * H, splits]; a split without a visible key has zeros and -inf. If there is only
    one split and `out` [B, T, H, D] is given, the result is written there and the parts are empty.
    dependent: the launch just before writes q and the newest keys and values, and nothing else that is read
    here. decode_layer.py launches the same kernels, so the layer and the operation alone agree bit for bit.
    """
    batch, queries, heads, head_dim = q.shape
    keys, key_heads = key_cache.shape[1:3]
    splits = triton.cdiv(keys, KEYS_PER_SPLIT)
    one_split = splits == 1 and out is not None
    parts = (0, 0) if one_split else (batch * queries * heads, splits)
    part = torch.empty((*parts, head_dim), dtype=torch.float32, device=q.device)
    part_max = torch.empty(parts, dtype=torch.float32, device=q.device)
    part_sum = torch.empty(parts, dtype=torch.float32, device=q.device)
    op = "decode_layer_attention" if dependent else "decode_attention"
    config = launch_config(op, q.dtype, q.device, head_dim)
    _decode_attention_split_kernel[(splits, batch * key_heads)](
        q, key_cache, value_cache, lengths, q if out is None else out, part, part_max, part_sum,
        *q.stride()[:3], *key_cache.stride()[:3], *value_cache.stride()[:3], queries, keys, splits,
        SCALE=LOG2_E / math.sqrt(head_dim), KEY_HEADS=key_heads, GROUP=heads // key_heads, HEAD_DIM=head_dim,
        BLOCK_M=max(16, triton.next_power_of_2(queries * heads // key_heads)), BLOCK_N=config.block_n,
        SPLIT=KEYS_PER_SPLIT, ONE_SPLIT=one_split, num_warps=config.num_warps, num_stages=config.num_stages,
        **dependence(q.device, dependent),
    )  # fmt: skip
    return part, part_max, part_sum


def combine(
    parts: tuple[Tensor, Tensor, Tensor], lengths: Tensor, out: Tensor, queries: int, keys: int, *,
    dependent: bool = False,
) -> None:  # fmt: skip
    """The second launch: the parts of all splits -> out [..., H, D] of B * queries rows."""
    heads, head_dim = out.shape[-2:]
    _decode_attention_combine_kernel[(parts[1].shape[0],)](
        *parts, lengths, out, queries, keys, HEADS=heads, HEAD_DIM=head_dim, SPLIT=KEYS_PER_SPLIT,
        num_warps=1, **dependence(out.device, dependent),
    )  # fmt: skip


@traceable(lambda q, key_cache, value_cache, lengths: q.new_empty(q.shape))
def _decode_attention(q: Tensor, key_cache: Tensor, value_cache: Tensor, lengths: Tensor) -> Tensor:
    """q [B, T, H, D], caches [B, S, K, D], lengths [B] -> [B, T, H, D], contiguous."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if out.numel() == 0:
        return out
    parts = split_attention(q, key_cache, value_cache, lengths, out)
    if parts[0].numel():
        combine(parts, lengths, out, q.shape[1], key_cache.shape[1])
    return out


def decode_attention(q: Tensor, key_cache: Tensor, value_cache: Tensor, lengths: Tensor) -> Tensor:
    """Attention of 1 to 16 new queries per row over a cache whose rows are filled to different lengths.

    q [B, T, H, D] (D 32, 64 or 128; float32, float16, bfloat16), caches [B, S, K, D] with H a multiple of K,
    each with a last stride of 1; lengths [B] integer, the new keys included: query t of row b sees the first
    lengths[b] - T + t + 1 keys. -> [B, T, H, D], contiguous. A row's result does not depend on the other rows
    or on S. Raises ValueError naming what was expected. Same semantics as
    `kernels.reference.decode_attention`.
    """
    op = "decode_attention"
    checks.decode_attention(q, key_cache, value_cache, lengths)
    checks.kernel_dtype(op, q)
    (q.shape[3] in HEAD_DIMS) or checks.refuse(op, f"a head dim in {list(HEAD_DIMS)}", q.shape[3])
    (q.shape[1] <= MAX_QUERIES) or checks.refuse(op, f"at most {MAX_QUERIES} new queries", q.shape[1])
    checks.grid(op, q.shape[0] * key_cache.shape[2])
    for name, tensor in (("q", q), ("key cache", key_cache), ("value cache", value_cache)):
        (tensor.stride(3) == 1) or checks.refuse(op, f"{name} with a last stride of 1", tensor.stride(3))
    return _decode_attention(q, key_cache, value_cache, lengths.contiguous())
