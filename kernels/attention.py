"""Causal grouped-query flash attention with document boundaries, in [B, T, H, D] with any strides.

    forward    S = q k^T * scale,  masked to doc_start[t] <= key <= t + S - T
               m = row maximum, l = sum exp(S - m), out = exp(S - m) v / l   online over key blocks, in base 2
               lse = m + log2(l)     fp32 [B, H, T], saved (+inf for a row with no key)
    backward   P = exp2(S - lse),  delta = sum(do * out) over D
               dv = P^T do,  dP = do v^T,  dS = P * (dP - delta),  dq = dS k * scale,  dk = dS^T q * scale

Letters as in kernels/reference.py. Three kernels, without atomics: gradients are bit-identical from run to
run. The forward kernel owns a block of queries of one head. So does the dq kernel; it computes delta itself,
which saves a pass over `out` and `do`, and stores it next to lse for the dk/dv kernel, which runs after it.
The dk/dv kernel owns a block of keys of one key head and loops over the query blocks of all G heads that
share it.

Skipped: key blocks above the diagonal, and key blocks (in dk/dv query blocks) outside every document of the
block at hand, for any doc_start, sorted or not. Masked element by element: blocks that the diagonal or the
start of a document crosses. With BRANCH, other blocks jump over the mask, which saves a fifth to a third of
the loop's instructions. Where a branch causes spills or detours through shared memory (see launch_config.py)
every block is masked, except in the forward pass without documents, which has an unmasked loop. A sliding
window is doc_start = max(doc_start, t - window + 1) and needs no parameter.

Saved: q, k, v, out (all of which exist anyway) and lse, 4 bytes per query and head. FLOP of the causal half:
2 B H T S D forward, 5 B H T S D backward (7 as implemented: both backward kernels compute S and dP). 32 x 512
tokens of the 135M model are 9.7 and 24.2 GFLOP a layer, 12 and 30 us at 800 TFLOP/s, and 50 and 101 MB in 16
bits, 17 and 34 us at 3.0 TB/s: at this length memory is the floor. Instructions of the innermost loop on
sm_90, all kinds, for a score without a mask: forward 9.7, dq 7.8, dk/dv 10 (with a mask for documents 14.2,
12.6 and 15.3); at Triton 3.6 up to 0.2 fewer, 0.4 fewer for dq with a mask.

The backward pass computes P again from S and lse, each rounded by about L * 6e-8 at logits of size L. The
rounding of S cancels, because all three kernels sum q k^T in the same order: a probability near one stays
near one. (When the forward kernel read k as [D, S], numpy, hence the interpreter, summed in another order: at
logits of 35 the fp32 errors of dk and dv were up to 3.6 and 4.2 times torch's.) The rounding of lse remains:
at logits of 35 and of 100 the errors of dq and dk are at most 1.2 times, that of dv at most 1.7 times those
with an exact lse. Products are in "ieee" precision, because tl.dot rounds fp32 operands to tf32 by default;
for 16-bit operands the option changes nothing.

Source: Dao 2023 (arXiv 2307.08691), Shah et al. 2024 (arXiv 2407.08608).
Check: pytest tests -k kernel_attention
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import checks
from kernels.launch_config import LaunchConfig, launch_config
from kernels.layout import dense_lanes, in_32_bits
from kernels.tracing import traceable

HEAD_DIMS = (32, 64, 128)
LOG2_E = 1.4426950408889634
# Never specialised: a prompt whose length is 1 or a multiple of 16 must not mean another compilation.
LENGTHS = ["queries", "keys"]


@triton.jit
def _visible(key, first_key, last_key, HAS_DOCS: tl.constexpr):
    """Whether a query sees a key: first_key <= key <= last_key. The shapes broadcast."""
    visible = key <= last_key
    if HAS_DOCS:
        visible &= key >= first_key
    return visible


@triton.jit
def _rows(key, keys, WIDE: tl.constexpr):
    """The rows to load for a block of keys. Past the end the last row is loaded again: this needs no mask,
    and no query sees those keys.

    WIDE: offsets within a head need int64. int32 offsets are recomputed for every block; int64 offsets would
    hold 16 registers a thread.
    """
    row = tl.minimum(key, keys - 1)
    return row.to(tl.int64) if WIDE else row


@triton.jit
def _add_product(a, b, total):
    """total + a b. An fp32 product is summed on its own first: a single chain of additions over all queries
    of all heads would round too often.
    """
    if a.dtype == tl.float32:
        # fma and not +, which the compiler would fold back into the product
        total = tl.fma(tl.dot(a, b, input_precision="ieee"), 1.0, total)
    else:
        total = tl.dot(a, b, total, input_precision="ieee")
    return total


@triton.jit
def _key_blocks(
    acc, m, total, q, k_ptr, v_ptr, first, last, clear, diagonal, query, doc, keys, k_stride, v_stride,
    SCALE: tl.constexpr, MASK: tl.constexpr, HAS_DOCS: tl.constexpr, WIDE: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Online softmax over the keys [first, last). doc, query [BLOCK_M]: the first and last key each row sees.

    m is the maximum of q k^T, already scaled and rounded: p and shrink must both use the same rounded value.
    If m * SCALE were part of a fused multiply-add, every block would be off by that rounding.
    MASK: "all" blocks, "none", or "branch": those that are not within [clear, diagonal).
    """
    lane = tl.arange(0, HEAD_DIM)
    for start in range(first, last, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        row = _rows(key, keys, WIDE)[:, None]
        k = tl.load(k_ptr + (row * k_stride + lane[None, :]))  # [BLOCK_N, HEAD_DIM]
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")  # [BLOCK_M, BLOCK_N]
        if MASK == "branch":
            if start < clear or start + BLOCK_N > diagonal:
                visible = _visible(key[None, :], doc[:, None], query[:, None], HAS_DOCS)
                scores = tl.where(visible, scores, float("-inf"))
        elif MASK == "all":
            visible = _visible(key[None, :], doc[:, None], query[:, None], HAS_DOCS)
            scores = tl.where(visible, scores, float("-inf"))
        new_m = tl.maximum(m, tl.max(scores, 1) * SCALE)
        # For a row that has seen no key yet, (-inf) - (-inf) would be NaN.
        pivot = tl.where(new_m == float("-inf"), 0.0, new_m)
        p = tl.exp2(scores * SCALE - pivot[:, None])
        shrink = tl.exp2(m - pivot)
        total = total * shrink + tl.sum(p, 1)
        v = tl.load(v_ptr + (row * v_stride + lane[None, :]))  # [BLOCK_N, HEAD_DIM]
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")  # [BLOCK_M, HEAD_DIM]
        m = new_m
    return acc, m, total


@triton.jit(do_not_specialize=LENGTHS)
def _attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, doc_ptr, out_ptr, lse_ptr, q_batch_stride, q_time_stride, q_head_stride,
    k_batch_stride, k_time_stride, k_head_stride, v_batch_stride, v_time_stride, v_head_stride,
    doc_batch_stride, queries, keys, SCALE: tl.constexpr, HEADS: tl.constexpr, GROUP: tl.constexpr,
    HAS_DOCS: tl.constexpr, WIDE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BRANCH: tl.constexpr,
):  # fmt: skip
    """A program owns BLOCK_M queries of a head. Grid: (ceil(T / BLOCK_M), B * H). Outputs are contiguous."""
    # The last block has the most keys. It starts first, so that short blocks fill the end of the launch.
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    batch = (tl.program_id(1) // HEADS).to(tl.int64)
    head = (tl.program_id(1) % HEADS).to(tl.int64)
    time = block * BLOCK_M + tl.arange(0, BLOCK_M)
    lane = tl.arange(0, HEAD_DIM)
    inside = time < queries
    row = time.to(tl.int64)
    q_rows = q_ptr + batch * q_batch_stride + head * q_head_stride + row[:, None] * q_time_stride
    q = tl.load(q_rows + lane[None, :], mask=inside[:, None], other=0.0)  # [BLOCK_M, HEAD_DIM]
    k_head = k_ptr + batch * k_batch_stride + (head // GROUP) * k_head_stride
    v_head = v_ptr + batch * v_batch_stride + (head // GROUP) * v_head_stride

    offset = keys - queries
    last_key = time + offset  # [BLOCK_M]
    end = tl.minimum((block + 1) * BLOCK_M + offset, keys)
    # Causality lets every row of the block see the keys before `diagonal`; documents, the keys from `clear`.
    diagonal = (block * BLOCK_M + offset + 1) // BLOCK_N * BLOCK_N
    begin, clear = 0, 0
    doc = tl.zeros([BLOCK_M], tl.int32)
    if HAS_DOCS:
        doc = tl.load(doc_ptr + batch * doc_batch_stride + row, mask=inside, other=2147483647).to(tl.int32)
        begin = tl.maximum(tl.min(doc, 0), 0) // BLOCK_N * BLOCK_N
        clear = tl.max(tl.where(inside, doc, 0), 0)

    acc = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    if BRANCH:
        acc, m, total = _key_blocks(
            acc, m, total, q, k_head, v_head, begin, end, clear, diagonal, last_key, doc, keys, k_time_stride,
            v_time_stride, SCALE, "branch", HAS_DOCS, WIDE, HEAD_DIM, BLOCK_N,
        )  # fmt: skip
    else:
        middle = tl.maximum(begin, diagonal)
        acc, m, total = _key_blocks(
            acc, m, total, q, k_head, v_head, begin, middle, clear, diagonal, last_key, doc, keys,
            k_time_stride, v_time_stride, SCALE, "all" if HAS_DOCS else "none", HAS_DOCS, WIDE, HEAD_DIM,
            BLOCK_N,
        )  # fmt: skip
        acc, m, total = _key_blocks(
            acc, m, total, q, k_head, v_head, middle, end, clear, diagonal, last_key, doc, keys,
            k_time_stride, v_time_stride, SCALE, "all", HAS_DOCS, WIDE, HEAD_DIM, BLOCK_N,
        )  # fmt: skip

    empty = total == 0.0
    out = acc / tl.where(empty, 1.0, total)[:, None]
    # For a row that sees no key, +inf makes exp2(S - lse) zero in the backward pass.
    lse = tl.where(empty, float("inf"), m + tl.log2(tl.where(empty, 1.0, total)))
    out_rows = out_ptr + ((batch * queries + row) * HEADS + head)[:, None] * HEAD_DIM
    tl.store(out_rows + lane[None, :], out.to(q.dtype), mask=inside[:, None])
    tl.store(lse_ptr + (batch * HEADS + head) * queries + row, lse, mask=inside)


@triton.jit(do_not_specialize=LENGTHS)
def _attention_bwd_dq_kernel(
    q_ptr, k_ptr, v_ptr, doc_ptr, out_ptr, lse_ptr, do_ptr, dq_ptr, rows_ptr, q_batch_stride, q_time_stride,
    q_head_stride, k_batch_stride, k_time_stride, k_head_stride, v_batch_stride, v_time_stride, v_head_stride,
    doc_batch_stride, queries, keys, SCALE: tl.constexpr, HEADS: tl.constexpr, GROUP: tl.constexpr,
    HAS_DOCS: tl.constexpr, WIDE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BRANCH: tl.constexpr,
):  # fmt: skip
    """A program owns dq and delta of BLOCK_M queries of one head. Grid as in the forward pass.

    out, do, dq [B, T, H, D] are contiguous. rows [B, H, T, 2] receives the pairs (lse, delta).
    """
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    batch = (tl.program_id(1) // HEADS).to(tl.int64)
    head = (tl.program_id(1) % HEADS).to(tl.int64)
    time = block * BLOCK_M + tl.arange(0, BLOCK_M)
    lane = tl.arange(0, HEAD_DIM)
    inside = time < queries
    row = time.to(tl.int64)
    dense = ((batch * queries + row) * HEADS + head)[:, None] * HEAD_DIM + lane[None, :]
    statistic = (batch * HEADS + head) * queries + row
    q_rows = q_ptr + batch * q_batch_stride + head * q_head_stride + row[:, None] * q_time_stride
    q = tl.load(q_rows + lane[None, :], mask=inside[:, None], other=0.0)  # [BLOCK_M, HEAD_DIM]
    do = tl.load(do_ptr + dense, mask=inside[:, None], other=0.0)
    out = tl.load(out_ptr + dense, mask=inside[:, None], other=0.0)
    delta = tl.sum(do.to(tl.float32) * out.to(tl.float32), 1)  # [BLOCK_M]
    lse = tl.load(lse_ptr + statistic, mask=inside, other=float("inf"))
    pair = rows_ptr + statistic[:, None] * 2 + tl.arange(0, 2)[None, :]  # [BLOCK_M, 2]
    tl.store(pair, tl.join(lse, delta), mask=inside[:, None])
    k_head = k_ptr + batch * k_batch_stride + (head // GROUP) * k_head_stride
    v_head = v_ptr + batch * v_batch_stride + (head // GROUP) * v_head_stride

    offset = keys - queries
    last_key = time + offset
    end = tl.minimum((block + 1) * BLOCK_M + offset, keys)
    diagonal = block * BLOCK_M + offset + 1  # as in the forward pass
    begin, clear = 0, 0
    doc = tl.zeros([BLOCK_M], tl.int32)
    if HAS_DOCS:
        doc = tl.load(doc_ptr + batch * doc_batch_stride + row, mask=inside, other=2147483647).to(tl.int32)
        begin = tl.maximum(tl.min(doc, 0), 0) // BLOCK_N * BLOCK_N
        clear = tl.max(tl.where(inside, doc, 0), 0)

    dq = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
    for start in range(begin, end, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        key_row = _rows(key, keys, WIDE)[:, None]
        k = tl.load(k_head + (key_row * k_time_stride + lane[None, :]))  # [BLOCK_N, HEAD_DIM]
        v = tl.load(v_head + (key_row * v_time_stride + lane[None, :]))
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * SCALE  # [BLOCK_M, BLOCK_N]
        if BRANCH:
            p = tl.exp2(scores - lse[:, None])
            if start < clear or start + BLOCK_N > diagonal:
                p = tl.where(_visible(key[None, :], doc[:, None], last_key[:, None], HAS_DOCS), p, 0.0)
        else:
            visible = _visible(key[None, :], doc[:, None], last_key[:, None], HAS_DOCS)
            p = tl.where(visible, tl.exp2(scores - lse[:, None]), 0.0)
        dp = tl.dot(do, tl.trans(v), input_precision="ieee")  # [BLOCK_M, BLOCK_N]
        ds = p * (dp - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")  # [BLOCK_M, HEAD_DIM]
    dq *= SCALE * 0.6931471805599453  # ln 2 takes out the log2(e) that SCALE contains for exp2
    tl.store(dq_ptr + dense, dq.to(q.dtype), mask=inside[:, None])


@triton.jit(do_not_specialize=LENGTHS)
def _attention_bwd_dkv_kernel(
    q_ptr, k_ptr, v_ptr, doc_ptr, rows_ptr, do_ptr, dk_ptr, dv_ptr, q_batch_stride, q_time_stride,
    q_head_stride, k_batch_stride, k_time_stride, k_head_stride, v_batch_stride, v_time_stride, v_head_stride,
    doc_batch_stride, queries, keys, SCALE: tl.constexpr, KEY_HEADS: tl.constexpr, GROUP: tl.constexpr,
    HAS_DOCS: tl.constexpr, WIDE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BRANCH: tl.constexpr,
):  # fmt: skip
    """A program owns dk and dv of BLOCK_N keys of one key head, summed over its GROUP query heads.

    Grid: (ceil(S / BLOCK_N), B * K). The first blocks are seen by the most queries, and they start first.
    rows [B, H, T, 2] comes from the dq kernel; do [B, T, H, D], dk and dv [B, S, K, D] are contiguous.
    """
    block = tl.program_id(0)
    batch = (tl.program_id(1) // KEY_HEADS).to(tl.int64)
    key_head = (tl.program_id(1) % KEY_HEADS).to(tl.int64)
    key = block * BLOCK_N + tl.arange(0, BLOCK_N)
    lane = tl.arange(0, HEAD_DIM)
    inside = key < keys
    key_row = key.to(tl.int64)
    k_rows = k_ptr + batch * k_batch_stride + key_head * k_head_stride + key_row[:, None] * k_time_stride
    v_rows = v_ptr + batch * v_batch_stride + key_head * v_head_stride + key_row[:, None] * v_time_stride
    k = tl.load(k_rows + lane[None, :], mask=inside[:, None], other=0.0)  # [BLOCK_N, HEAD_DIM]
    v = tl.load(v_rows + lane[None, :], mask=inside[:, None], other=0.0)

    # The first query that reaches this block, rounded down to a block of queries.
    begin = tl.maximum(block * BLOCK_N - (keys - queries), 0) // BLOCK_M * BLOCK_M
    end = queries
    # Causality lets queries from `diagonal` on see all keys of the block; documents, queries before `clear`.
    diagonal, clear = (block + 1) * BLOCK_N - 1 - (keys - queries), queries + BLOCK_M
    doc_row = doc_ptr + batch * doc_batch_stride
    if HAS_DOCS:
        # reach: one past the last query that sees a key of this block; short: the first query that does not
        # see the block's first key.
        reach, short = tl.zeros([256], tl.int32), tl.zeros([256], tl.int32) + queries
        for start in range(begin, queries, 256):
            time = start + tl.arange(0, 256)
            doc = tl.load(doc_row + time, mask=time < queries, other=2147483647).to(tl.int32)
            reach = tl.maximum(reach, tl.where(doc < (block + 1) * BLOCK_N, time + 1, 0))
            short = tl.minimum(short, tl.where(doc > block * BLOCK_N, time, queries))
        end, clear = tl.minimum(tl.max(reach, 0), queries), tl.min(short, 0)

    dk = tl.zeros([BLOCK_N, HEAD_DIM], tl.float32)
    dv = tl.zeros([BLOCK_N, HEAD_DIM], tl.float32)
    q_ptr += batch * q_batch_stride + key_head * GROUP * q_head_stride
    do_ptr += (batch * queries * KEY_HEADS + key_head) * GROUP * HEAD_DIM
    rows_ptr += (batch * KEY_HEADS + key_head) * GROUP * queries * 2
    # One loop over the query blocks of all heads of the group, so that prefetching goes on from head to head.
    start, member = begin, 0
    for _ in range(0, GROUP * tl.cdiv(tl.maximum(end - begin, 0), BLOCK_M)):
        time = start + tl.arange(0, BLOCK_M)
        row, head = time, member
        if WIDE:
            row, head = time.to(tl.int64), tl.cast(member, tl.int64)
        present = (time < queries)[:, None]  # other rows load as zeros and add nothing
        q_tile = row[:, None] * q_time_stride + (head * q_head_stride + lane[None, :])
        q = tl.load(q_ptr + q_tile, mask=present, other=0.0)  # [BLOCK_M, HEAD_DIM]
        do_tile = row[:, None] * (KEY_HEADS * GROUP * HEAD_DIM) + (head * HEAD_DIM + lane[None, :])
        do = tl.load(do_ptr + do_tile, mask=present, other=0.0)
        # Loaded in pairs: Triton 3.6 would load a single number once for every thread that needs it, 16
        # loads a thread.
        pairs = rows_ptr + (head * queries + row)[:, None] * 2 + tl.arange(0, 2)[None, :]
        pair = tl.load(pairs, mask=present, other=0.0)
        lse, delta = tl.split(pair)
        doc = time
        if HAS_DOCS:
            # a pair for the same reason
            twice = tl.load(doc_row + time[:, None] + tl.zeros([1, 2], tl.int32), mask=present, other=0)
            doc, _ = tl.split(twice.to(tl.int32))
        scores = tl.dot(k, tl.trans(q), input_precision="ieee") * SCALE  # [BLOCK_N, BLOCK_M]
        p = tl.exp2(scores - lse[None, :])
        last_key = time + keys - queries
        if BRANCH:
            if start < diagonal or start + BLOCK_M > clear:
                p = tl.where(_visible(key[:, None], doc[None, :], last_key[None, :], HAS_DOCS), p, 0.0)
        else:
            p = tl.where(_visible(key[:, None], doc[None, :], last_key[None, :], HAS_DOCS), p, 0.0)
        dv = _add_product(p.to(do.dtype), do, dv)  # [BLOCK_N, HEAD_DIM]
        dp = tl.dot(v, tl.trans(do), input_precision="ieee")  # [BLOCK_N, BLOCK_M]
        ds = p * (dp - delta[None, :])
        dk = _add_product(ds.to(q.dtype), q, dk)
        start += BLOCK_M
        member += (start >= end).to(tl.int32)
        start = tl.where(start >= end, begin, start)
    dk *= SCALE * 0.6931471805599453
    dense = ((batch * keys + key_row) * KEY_HEADS + key_head)[:, None] * HEAD_DIM + lane[None, :]
    tl.store(dk_ptr + dense, dk.to(k.dtype), mask=inside[:, None])
    tl.store(dv_ptr + dense, dv.to(k.dtype), mask=inside[:, None])


def _arguments(
    op: str, q: Tensor, k: Tensor, v: Tensor, doc_start: Tensor | None, scale: float, walked: Sequence[Tensor]
) -> tuple[LaunchConfig, tuple[int, ...], dict[str, Any]]:
    """A kernel's launch configuration, and what all three kernels take: strides and lengths; options.

    walked: the tensors that its loop reads, in int64 where offsets within a batch row may exceed int32.
    """
    config = launch_config(op, q.dtype, q.device, q.shape[3])
    doc_stride = 0 if doc_start is None else doc_start.stride(0)
    sizes = *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], doc_stride, q.shape[1], k.shape[1]
    wide = max([k.shape[1] * x.stride(1) + x.shape[2] * x.stride(2) for x in walked]) >= 2**31
    return config, sizes, dict(
        SCALE=scale * LOG2_E, GROUP=q.shape[2] // k.shape[2], HAS_DOCS=doc_start is not None, WIDE=wide,
        HEAD_DIM=q.shape[3], BLOCK_M=config.block_m, BLOCK_N=config.block_n, BRANCH=config.branch,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip


@traceable(lambda q, *_: (q.new_empty(q.shape), q.new_empty(q[..., 0].mT.shape, dtype=torch.float32)))
def _attention_forward(
    q: Tensor, k: Tensor, v: Tensor, doc_start: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """q [B, T, H, D], k, v [B, S, K, D] -> out [B, T, H, D], lse [B, H, T]."""
    if scale <= 0:  # the kernel takes the maximum before it scales
        q, scale = (-q, -scale) if scale < 0 else (torch.zeros_like(q), 1.0)
    batch, queries, heads, _ = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((batch, heads, queries), dtype=torch.float32, device=q.device)
    if out.numel():
        config, sizes, options = _arguments("attention_fwd", q, k, v, doc_start, scale, (k, v))
        docs = q if doc_start is None else doc_start
        _attention_fwd_kernel[(triton.cdiv(queries, config.block_m), batch * heads)](
            q, k, v, docs, out, lse, *sizes, HEADS=heads, **options
        )
    return out, lse


@traceable(lambda do, q, k, v, *_: (q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)))
def _attention_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, doc_start: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """do, out [B, T, H, D] -> dq, dk, dv in the shapes of q, k, v, contiguous."""
    batch, queries, heads, _ = q.shape
    keys, key_heads = k.shape[1:3]
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if dq.numel() == 0:
        return dq, torch.zeros_like(k), torch.zeros_like(v)
    do = do.contiguous()
    dk = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    dv = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    rows = torch.empty((*lse.shape, 2), dtype=torch.float32, device=q.device)
    docs, walked = q if doc_start is None else doc_start, (q, k, v, do)
    config, sizes, options = _arguments("attention_bwd_dq", q, k, v, doc_start, scale, walked)
    _attention_bwd_dq_kernel[(triton.cdiv(queries, config.block_m), batch * heads)](
        q, k, v, docs, out, lse, do, dq, rows, *sizes, HEADS=heads, **options
    )
    config, sizes, options = _arguments("attention_bwd_dkv", q, k, v, doc_start, scale, walked)
    _attention_bwd_dkv_kernel[(triton.cdiv(keys, config.block_n), batch * key_heads)](
        q, k, v, docs, rows, do, dk, dv, *sizes, KEY_HEADS=key_heads, **options
    )
    return dq, dk, dv


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, doc_start: Tensor | None, scale: float) -> Tensor:
        out, lse = _attention_forward(q, k, v, doc_start, scale)
        ctx.save_for_backward(q, k, v, out, lse, doc_start)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
        checks.first_derivative("attention")
        q, k, v, out, lse, doc_start = ctx.saved_tensors
        return (*_attention_backward(do, q, k, v, out, lse, doc_start, ctx.scale), None, None)


def attention(
    q: Tensor, k: Tensor, v: Tensor, doc_start: Tensor | None = None, *, dropout_p: float = 0.0,
    scale: float | None = None,
) -> Tensor:  # fmt: skip
    """Causal grouped-query attention, aligned to the bottom right: query t sees the keys from doc_start[t] to
    t + S - T.

    q [B, T, H, D], k and v [B, S, K, D] with S >= T, H a multiple of K, D 32, 64 or 128; float32, float16 or
    bfloat16; any strides (without a contiguous last dimension it is copied); B * H at most 65,535. doc_start
    [B, T] integer, None means 0. scale: default 1 / sqrt(D). -> [B, T, H, D], contiguous; zeros for a query
    that sees no key. Raises ValueError naming what was expected; no dropout. Else as `reference.attention`.
    """
    checks.attention("attention", q, k, v, doc_start, scale)
    checks.kernel_dtype("attention", q)
    (q.shape[3] in HEAD_DIMS) or checks.refuse("attention", f"a head dim in {list(HEAD_DIMS)}", q.shape[3])
    wanted = "dropout_p = 0 (for dropout use backend 'triton,attention=torch')"
    (dropout_p == 0.0) or checks.refuse("attention", wanted, dropout_p)
    checks.grid("attention", q.shape[0] * q.shape[2])
    starts = None if doc_start is None else dense_lanes(in_32_bits(doc_start, k.shape[1]))
    scale = 1 / math.sqrt(q.shape[3]) if scale is None else float(scale)
    return _Attention.apply(dense_lanes(q), dense_lanes(k), dense_lanes(v), starts, scale)
