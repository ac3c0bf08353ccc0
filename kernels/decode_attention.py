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
from kernels.launch_config import launch_config
from kernels.tracing import traceable

HEAD_DIMS = (32, 64, 128)
MAX_QUERIES = 16
KEYS_PER_SPLIT = 128  # changes the rounding of the result, so it is not a tuning parameter
LOG2_E = 1.4426950408889634


@triton.jit(do_not_specialize=["queries", "keys", "splits"])  # a growing cache must not compile again
def _decode_attention_split_kernel(
    q_ptr, k_ptr, v_ptr, lengths_ptr, out_ptr, part_ptr, part_max_ptr, part_sum_ptr,
    q_batch_stride, q_time_stride, q_head_stride, k_batch_stride, k_time_stride, k_head_stride,
    v_batch_stride, v_time_stride, v_head_stride, queries, keys, splits,
    SCALE: tl.constexpr, KEY_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT: tl.constexpr, ONE_SPLIT: tl.constexpr,
):  # fmt: skip
    """A program owns SPLIT keys of one key head of one row, for all queries that read them. Grid:
    (splits, B * K).

    Row i of the tile is query i // GROUP, head i % GROUP of the group. Parts are [B, T, H, splits(, D)] in
    fp32. With ONE_SPLIT the program writes out itself.
    """
    split = tl.program_id(0)
    batch = (tl.program_id(1) // KEY_HEADS).to(tl.int64)
    key_head = (tl.program_id(1) % KEY_HEADS).to(tl.int64)
    index = tl.arange(0, BLOCK_M)
    time, head = index // GROUP, key_head * GROUP + index % GROUP
    inside = time < queries
    lane = tl.arange(0, HEAD_DIM)
    q_rows = q_ptr + batch * q_batch_stride + time.to(tl.int64) * q_time_stride + head * q_head_stride
    q = tl.load(q_rows[:, None] + lane[None, :], mask=inside[:, None], other=0.0)  # [BLOCK_M, HEAD_DIM]
    length = tl.minimum(tl.load(lengths_ptr + batch).to(tl.int32), keys)
    last_key = length - queries + time  # [BLOCK_M]

    k_head = k_ptr + batch * k_batch_stride + key_head * k_head_stride
    v_head = v_ptr + batch * v_batch_stride + key_head * v_head_stride
    acc = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for start in range(split * SPLIT, tl.minimum((split + 1) * SPLIT, length), BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        row = key.to(tl.int64)
        filled = key < length
        # [HEAD_DIM, BLOCK_N]
        k = tl.load(k_head + row[None, :] * k_time_stride + lane[:, None], mask=filled[None, :], other=0.0)
        # [BLOCK_N, HEAD_DIM]
        v = tl.load(v_head + row[:, None] * v_time_stride + lane[None, :], mask=filled[:, None], other=0.0)
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


@triton.jit(do_not_specialize=["splits"])
def _decode_attention_combine_kernel(
    part_ptr, part_max_ptr, part_sum_ptr, out_ptr, splits, HEAD_DIM: tl.constexpr
):  # fmt: skip
    """A program owns one head of one query and adds its splits in ascending order. Grid: B * T * H."""
    first = tl.program_id(0).to(tl.int64) * splits
    lane = tl.arange(0, HEAD_DIM)
    acc = tl.zeros([HEAD_DIM], tl.float32)
    m = float("-inf")
    total = 0.0
    for split in range(0, splits):
        part_max = tl.load(part_max_ptr + first + split)
        part = tl.load(part_ptr + (first + split) * HEAD_DIM + lane)  # [HEAD_DIM]
        new_m = tl.maximum(m, part_max)
        pivot = tl.where(new_m == float("-inf"), 0.0, new_m)
        shrink, weight = tl.exp2(m - pivot), tl.exp2(part_max - pivot)
        acc = acc * shrink + part * weight
        total = total * shrink + tl.load(part_sum_ptr + first + split) * weight
        m = new_m
    out = acc / tl.where(total == 0.0, 1.0, total)
    tl.store(out_ptr + tl.program_id(0).to(tl.int64) * HEAD_DIM + lane, out.to(out_ptr.dtype.element_ty))


def split_attention(
    q: Tensor, key_cache: Tensor, value_cache: Tensor, lengths: Tensor, out: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The first launch: q [B, T, H, D], caches [B, S, K, D], lengths [B], none of them empty -> the parts of
    all splits in fp32.

    The parts are sums of values weighted by exp2(score - maximum) [B * T * H, splits, D], the maxima and the
    sums of weights [B * T * H, splits]; a split without a visible key has zeros and -inf. If there is only
    one split and `out` [B, T, H, D] is given, the result is written there and the parts are empty.
    decode_layer.py launches the same kernel, so the layer and the operation alone agree bit for bit.
    """
    batch, queries, heads, head_dim = q.shape
    keys, key_heads = key_cache.shape[1:3]
    splits = triton.cdiv(keys, KEYS_PER_SPLIT)
    one_split = splits == 1 and out is not None
    parts = (0, 0) if one_split else (batch * queries * heads, splits)
    part = torch.empty((*parts, head_dim), dtype=torch.float32, device=q.device)
    part_max = torch.empty(parts, dtype=torch.float32, device=q.device)
    part_sum = torch.empty(parts, dtype=torch.float32, device=q.device)
    config = launch_config("decode_attention", q.dtype, q.device, head_dim)
    _decode_attention_split_kernel[(splits, batch * key_heads)](
        q, key_cache, value_cache, lengths, q if out is None else out, part, part_max, part_sum,
        *q.stride()[:3], *key_cache.stride()[:3], *value_cache.stride()[:3], queries, keys, splits,
        SCALE=LOG2_E / math.sqrt(head_dim), KEY_HEADS=key_heads, GROUP=heads // key_heads, HEAD_DIM=head_dim,
        BLOCK_M=max(16, triton.next_power_of_2(queries * heads // key_heads)), BLOCK_N=config.block_n,
        SPLIT=KEYS_PER_SPLIT, ONE_SPLIT=one_split, num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return part, part_max, part_sum


@traceable(lambda q, key_cache, value_cache, lengths: q.new_empty(q.shape))
def _decode_attention(q: Tensor, key_cache: Tensor, value_cache: Tensor, lengths: Tensor) -> Tensor:
    """q [B, T, H, D], caches [B, S, K, D], lengths [B] -> [B, T, H, D], contiguous."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if out.numel() == 0:
        return out
    parts = split_attention(q, key_cache, value_cache, lengths, out)
    heads, splits = parts[1].shape
    if heads:
        _decode_attention_combine_kernel[(heads,)](*parts, out, splits, HEAD_DIM=q.shape[3], num_warps=1)
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
    for name, tensor in (("q", q), ("key cache", key_cache), ("value cache", value_cache)):
        (tensor.stride(3) == 1) or checks.refuse(op, f"{name} with a last stride of 1", tensor.stride(3))
    return _decode_attention(q, key_cache, value_cache, lengths.contiguous())
