"""Causal grouped-query flash attention with document boundaries, forward and backward, in [B, T, H, D] with any strides.

    forward    S = q k^T * scale,  masked to doc_start[t] <= key <= t + S - T
               m = row maximum, l = sum exp(S - m), out = exp(S - m) v / l       online over key blocks, in base 2
               lse = m + log2(l)                                                  fp32 [B, H, T], saved (+inf for a row with no key)
    backward   P = exp2(S - lse),  delta = sum(do * out) over D
               dv = P^T do,  dP = do v^T,  dS = P * (dP - delta),  dq = dS k * scale,  dk = dS^T q * scale

Three kernels. The first owns a block of queries of one query head. In the backward pass the dq kernel owns the same block and computes
delta on the way in, so that no pre-pass reads `out` and `do` on its own; it must run before the dk/dv kernel, which owns a block of keys of
one key head and adds up the G = H / K query heads that share it, in order. No atomics: gradients are bit-identical from run to
run.

Skipped: key blocks above the diagonal, and key blocks (query blocks in dk/dv) that lie outside every document of the block at hand, for
any doc_start, sorted or not. Masked element by element: blocks that the diagonal or the beginning of a document crosses. A block that
needs no mask jumps over it (BRANCH), which saves it a fifth to a third of the loop's instructions; where the compiler answers a branch
with spills or detours through shared memory (launch_config.py says where), all are masked, except by the forward pass without documents,
which has a loop of its own for them. A sliding window is doc_start = max(doc_start, t - window + 1): it needs no parameter of its own.

Saved: q, k, v, out (all of which exist anyway) and lse, 4 bytes per query and head.
FLOPs (causal, half of the square): forward 2 B H T S D, backward 5 B H T S D, and 7 as written, since S and dP are formed in both of its
kernels. At 32 x 512 of the 135M model: 9.7 and 24.2 GFLOP a layer, 12 and 30 us at 800 TFLOP/s; bytes 50 MB and 126 MB in 16 bits,
17 and 42 us at 3.0 TB/s: at this length memory is the floor. What the matrix units do not do is counted too: in the innermost loop,
sm_90, instructions a score of a block without mask: forward 10, dq 8.5, dk/dv 12.5 (15, 13 and 19 with documents in every block's mask).

P is computed again from lse, which is rounded: at logits of size L its relative error is about L * 6e-8, so that fp32 gradients
at logits of a hundred are good to about 1e-5, not 1e-7. Outputs are not affected.

Dots are in "ieee" precision: left to itself, tl.dot rounds fp32 operands to tf32. For 16-bit operands the word changes nothing.

Source: Dao 2023 (arXiv 2307.08691), Shah et al. 2024 (arXiv 2407.08608).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import checks
from kernels.launch_config import launch_config
from kernels.tracing import traceable

HEAD_DIMS = (32, 64, 128)
LOG2_E = 1.4426950408889634
# Not compiled anew for lengths that happen to be 1 or a multiple of 16: a prompt of another length must not mean another compilation.
LENGTHS = ["queries", "keys"]


@triton.jit
def _visible(key, first_key, last_key, HAS_DOCS: tl.constexpr):
    """Which keys lie between the first and the last one of a query; shapes broadcast."""
    visible = key <= last_key
    if HAS_DOCS:
        visible &= key >= first_key
    return visible


@triton.jit
def _add_product(a, b, total):
    """total + a b. In fp32 the product is summed by itself first: one chain of additions over all queries of all heads rounds too often."""
    if a.dtype == tl.float32:
        total = tl.fma(tl.dot(a, b, input_precision="ieee"), 1.0, total)  # not +, which the compiler would fold into the product
    else:
        total = tl.dot(a, b, total, input_precision="ieee")
    return total


@triton.jit
def _key_blocks(
    acc, m, total, q, k_ptr, v_ptr, first, last, clear, diagonal, query, doc, keys, k_stride, v_stride,
    SCALE: tl.constexpr, MASK: tl.constexpr, HAS_DOCS: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Online softmax over the key blocks [first, last). doc, query: the first and the last key that each row sees, [BLOCK_M].

    m is the maximum of q k^T, scaled and rounded once: what was added up relative to it must be shrunk relative to it. With m * SCALE in a
    GPU's multiply-add instead, every block would be off by that rounding. MASK: "all" blocks, "none", or "branch", those that do not lie
    within [clear, diagonal).
    """
    lane = tl.arange(0, HEAD_DIM)
    for start in range(first, last, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        row = key.to(tl.int64)
        inside = key < keys
        k = tl.load(k_ptr + row[None, :] * k_stride + lane[:, None], mask=inside[None, :], other=0.0)  # [HEAD_DIM, BLOCK_N]
        scores = tl.dot(q, k, input_precision="ieee")  # [BLOCK_M, BLOCK_N]
        if MASK == "branch":
            if start < clear or start + BLOCK_N > diagonal:
                scores = tl.where(_visible(key[None, :], doc[:, None], query[:, None], HAS_DOCS), scores, float("-inf"))
        elif MASK == "all":
            scores = tl.where(_visible(key[None, :], doc[:, None], query[:, None], HAS_DOCS), scores, float("-inf"))
        new_m = tl.maximum(m, tl.max(scores, 1) * SCALE)
        pivot = tl.where(new_m == float("-inf"), 0.0, new_m)  # a row that has seen no key yet: (-inf) - (-inf) is NaN
        p = tl.exp2(scores * SCALE - pivot[:, None])
        shrink = tl.exp2(m - pivot)
        total = total * shrink + tl.sum(p, 1)
        v = tl.load(v_ptr + row[:, None] * v_stride + lane[None, :], mask=inside[:, None], other=0.0)  # [BLOCK_N, HEAD_DIM]
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")  # [BLOCK_M, HEAD_DIM]
        m = new_m
    return acc, m, total


@triton.jit(do_not_specialize=LENGTHS)
def _attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, doc_ptr, out_ptr, lse_ptr,
    q_batch_stride, q_time_stride, q_head_stride, k_batch_stride, k_time_stride, k_head_stride,
    v_batch_stride, v_time_stride, v_head_stride, doc_batch_stride, queries, keys,
    SCALE: tl.constexpr, HEADS: tl.constexpr, GROUP: tl.constexpr, HAS_DOCS: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BRANCH: tl.constexpr,
):  # fmt: skip
    """A program owns BLOCK_M queries of one head of one row. Grid: (ceil(T / BLOCK_M), B * H). out [B, T, H, D] is contiguous."""
    # The last block has the most keys: it starts first, so that the short ones fill the end.
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
    # Keys below `diagonal` are visible to all rows of the block as far as causality goes, those from `clear` on as far as documents go.
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
            acc, m, total, q, k_head, v_head, begin, end, clear, diagonal, last_key, doc, keys, k_time_stride, v_time_stride,
            SCALE, "branch", HAS_DOCS, HEAD_DIM, BLOCK_N,
        )  # fmt: skip
    else:
        middle = tl.maximum(begin, diagonal)
        acc, m, total = _key_blocks(
            acc, m, total, q, k_head, v_head, begin, middle, clear, diagonal, last_key, doc, keys, k_time_stride, v_time_stride,
            SCALE, "all" if HAS_DOCS else "none", HAS_DOCS, HEAD_DIM, BLOCK_N,
        )  # fmt: skip
        acc, m, total = _key_blocks(
            acc, m, total, q, k_head, v_head, middle, end, clear, diagonal, last_key, doc, keys, k_time_stride, v_time_stride,
            SCALE, "all", HAS_DOCS, HEAD_DIM, BLOCK_N,
        )  # fmt: skip

    empty = total == 0.0
    out = acc / tl.where(empty, 1.0, total)[:, None]
    # +inf makes exp2(S - lse) zero in the backward pass of a row that sees no key.
    lse = tl.where(empty, float("inf"), m + tl.log2(tl.where(empty, 1.0, total)))
    out_rows = out_ptr + ((batch * queries + row) * HEADS + head)[:, None] * HEAD_DIM
    tl.store(out_rows + lane[None, :], out.to(q.dtype), mask=inside[:, None])
    tl.store(lse_ptr + (batch * HEADS + head) * queries + row, lse, mask=inside)


@triton.jit(do_not_specialize=LENGTHS)
def _attention_bwd_dq_kernel(
    q_ptr, k_ptr, v_ptr, doc_ptr, out_ptr, lse_ptr, do_ptr, dq_ptr, delta_ptr,
    q_batch_stride, q_time_stride, q_head_stride, k_batch_stride, k_time_stride, k_head_stride,
    v_batch_stride, v_time_stride, v_head_stride, do_batch_stride, do_time_stride, do_head_stride, doc_batch_stride,
    queries, keys,
    SCALE: tl.constexpr, HEADS: tl.constexpr, GROUP: tl.constexpr, HAS_DOCS: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BRANCH: tl.constexpr,
):  # fmt: skip
    """A program owns dq and delta of BLOCK_M queries of one head. Grid as in the forward pass; out, dq [B, T, H, D] contiguous."""
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
    do_rows = do_ptr + batch * do_batch_stride + head * do_head_stride + row[:, None] * do_time_stride
    q = tl.load(q_rows + lane[None, :], mask=inside[:, None], other=0.0)  # [BLOCK_M, HEAD_DIM]
    do = tl.load(do_rows + lane[None, :], mask=inside[:, None], other=0.0)
    out = tl.load(out_ptr + dense, mask=inside[:, None], other=0.0)
    delta = tl.sum(do.to(tl.float32) * out.to(tl.float32), 1)  # [BLOCK_M]
    tl.store(delta_ptr + statistic, delta, mask=inside)
    lse = tl.load(lse_ptr + statistic, mask=inside, other=float("inf"))
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
        key_row = key.to(tl.int64)
        k = tl.load(k_head + key_row[:, None] * k_time_stride + lane[None, :], mask=(key < keys)[:, None], other=0.0)
        v = tl.load(v_head + key_row[:, None] * v_time_stride + lane[None, :], mask=(key < keys)[:, None], other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * SCALE  # [BLOCK_M, BLOCK_N]
        if BRANCH:
            p = tl.exp2(scores - lse[:, None])
            if start < clear or start + BLOCK_N > diagonal:
                p = tl.where(_visible(key[None, :], doc[:, None], last_key[:, None], HAS_DOCS), p, 0.0)
        else:
            p = tl.where(_visible(key[None, :], doc[:, None], last_key[:, None], HAS_DOCS), tl.exp2(scores - lse[:, None]), 0.0)
        dp = tl.dot(do, tl.trans(v), input_precision="ieee")  # [BLOCK_M, BLOCK_N]
        ds = p * (dp - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")  # [BLOCK_M, HEAD_DIM]
    dq *= SCALE * 0.6931471805599453  # SCALE carries log2(e) for exp2; the gradient does not
    tl.store(dq_ptr + dense, dq.to(q.dtype), mask=inside[:, None])


@triton.jit(do_not_specialize=LENGTHS)
def _attention_bwd_dkv_kernel(
    q_ptr, k_ptr, v_ptr, doc_ptr, lse_ptr, delta_ptr, do_ptr, dk_ptr, dv_ptr,
    q_batch_stride, q_time_stride, q_head_stride, k_batch_stride, k_time_stride, k_head_stride,
    v_batch_stride, v_time_stride, v_head_stride, do_batch_stride, do_time_stride, do_head_stride, doc_batch_stride,
    queries, keys,
    SCALE: tl.constexpr, KEY_HEADS: tl.constexpr, GROUP: tl.constexpr, HAS_DOCS: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BRANCH: tl.constexpr,
):  # fmt: skip
    """A program owns dk and dv of BLOCK_N keys of one key head, summed over its GROUP query heads.

    Grid: (ceil(S / BLOCK_N), B * K); the first blocks see the most queries and start first. dk, dv [B, S, K, D] contiguous.
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

    # The first query whose last key reaches this block, rounded down to a block of queries.
    begin = tl.maximum(block * BLOCK_N - (keys - queries), 0) // BLOCK_M * BLOCK_M
    end = queries
    # Queries from `diagonal` on see all keys of the block as far as causality goes, those before `clear` as far as documents go.
    diagonal, clear = (block + 1) * BLOCK_N - 1 - (keys - queries), queries + BLOCK_M
    doc_row = doc_ptr + batch * doc_batch_stride
    if HAS_DOCS:
        # One past the last query that may see any key of this block, and the first that may not see its first key.
        reach, short = tl.zeros([256], tl.int32), tl.zeros([256], tl.int32) + queries
        for start in range(begin, queries, 256):
            time = start + tl.arange(0, 256)
            doc = tl.load(doc_row + time, mask=time < queries, other=2147483647).to(tl.int32)
            reach = tl.maximum(reach, tl.where(doc < (block + 1) * BLOCK_N, time + 1, 0))
            short = tl.minimum(short, tl.where(doc > block * BLOCK_N, time, queries))
        end, clear = tl.minimum(tl.max(reach, 0), queries), tl.min(short, 0)

    dk = tl.zeros([BLOCK_N, HEAD_DIM], tl.float32)
    dv = tl.zeros([BLOCK_N, HEAD_DIM], tl.float32)
    for member in range(GROUP):
        head = key_head * GROUP + member
        q_head = q_ptr + batch * q_batch_stride + head * q_head_stride
        do_head = do_ptr + batch * do_batch_stride + head * do_head_stride
        statistic = (batch * KEY_HEADS * GROUP + head) * queries
        for start in range(begin, end, BLOCK_M):
            time = start + tl.arange(0, BLOCK_M)
            row = time.to(tl.int64)
            present = time < queries
            q = tl.load(q_head + row[:, None] * q_time_stride + lane[None, :], mask=present[:, None], other=0.0)  # [BLOCK_M, HEAD_DIM]
            do = tl.load(do_head + row[:, None] * do_time_stride + lane[None, :], mask=present[:, None], other=0.0)
            lse = tl.load(lse_ptr + statistic + row, mask=present, other=float("inf"))
            delta = tl.load(delta_ptr + statistic + row, mask=present, other=0.0)
            scores = tl.dot(k, tl.trans(q), input_precision="ieee") * SCALE  # [BLOCK_N, BLOCK_M]
            last_key = time + keys - queries
            if BRANCH:
                p = tl.exp2(scores - lse[None, :])
                if start < diagonal or start + BLOCK_M > clear:
                    doc = tl.load(doc_row + time, mask=present, other=2147483647).to(tl.int32) if HAS_DOCS else time
                    p = tl.where(_visible(key[:, None], doc[None, :], last_key[None, :], HAS_DOCS), p, 0.0)
            else:
                doc = tl.load(doc_row + time, mask=present, other=2147483647).to(tl.int32) if HAS_DOCS else time
                p = tl.where(_visible(key[:, None], doc[None, :], last_key[None, :], HAS_DOCS), tl.exp2(scores - lse[None, :]), 0.0)
            dv = _add_product(p.to(do.dtype), do, dv)  # [BLOCK_N, HEAD_DIM]
            dp = tl.dot(v, tl.trans(do), input_precision="ieee")  # [BLOCK_N, BLOCK_M]
            ds = p * (dp - delta[None, :])
            dk = _add_product(ds.to(q.dtype), q, dk)
    dk *= SCALE * 0.6931471805599453
    dense = ((batch * keys + key_row) * KEY_HEADS + key_head)[:, None] * HEAD_DIM + lane[None, :]
    tl.store(dk_ptr + dense, dk.to(k.dtype), mask=inside[:, None])
    tl.store(dv_ptr + dense, dv.to(k.dtype), mask=inside[:, None])


def _lanes(x: Tensor) -> Tensor:
    """The tensor with a last stride of 1; a copy only if it has another."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _fake_forward(q: Tensor, k: Tensor, v: Tensor, doc_start: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32)


@traceable(_fake_forward)
def _attention_forward(q: Tensor, k: Tensor, v: Tensor, doc_start: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """q [B, T, H, D], k, v [B, S, K, D] -> out [B, T, H, D], lse [B, H, T]."""
    if scale <= 0:  # the kernel takes the maximum before it scales
        q, scale = (-q, -scale) if scale < 0 else (torch.zeros_like(q), 1.0)
    batch, queries, heads, head_dim = q.shape
    keys, key_heads = k.shape[1:3]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((batch, heads, queries), dtype=torch.float32, device=q.device)
    config = launch_config("attention_fwd", q.dtype, q.device, head_dim)
    if out.numel():
        _attention_fwd_kernel[(triton.cdiv(queries, config.block_m), batch * heads)](
            q, k, v, q if doc_start is None else doc_start, out, lse,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], 0 if doc_start is None else doc_start.stride(0),
            queries, keys,
            SCALE=scale * LOG2_E, HEADS=heads, GROUP=heads // key_heads, HAS_DOCS=doc_start is not None, HEAD_DIM=head_dim,
            BLOCK_M=config.block_m, BLOCK_N=config.block_n, BRANCH=config.branch,
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
    return out, lse


def _fake_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, doc_start: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


@traceable(_fake_backward)
def _attention_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, doc_start: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """do, out [B, T, H, D] -> dq, dk, dv in the shapes of q, k, v, contiguous."""
    batch, queries, heads, head_dim = q.shape
    keys, key_heads = k.shape[1:3]
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if dq.numel() == 0:
        return dq, torch.zeros_like(k), torch.zeros_like(v)
    dk = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    dv = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    delta = torch.empty_like(lse)
    docs = q if doc_start is None else doc_start
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *do.stride()[:3], 0 if doc_start is None else doc_start.stride(0))
    sizes = (queries, keys)
    shared: dict[str, Any] = {
        "SCALE": scale * LOG2_E,
        "GROUP": heads // key_heads,
        "HAS_DOCS": doc_start is not None,
        "HEAD_DIM": head_dim,
    }
    config = launch_config("attention_bwd_dq", q.dtype, q.device, head_dim)
    _attention_bwd_dq_kernel[(triton.cdiv(queries, config.block_m), batch * heads)](
        q, k, v, docs, out, lse, do, dq, delta, *strides, *sizes, HEADS=heads, **shared,
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, BRANCH=config.branch, num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    config = launch_config("attention_bwd_dkv", q.dtype, q.device, head_dim)
    _attention_bwd_dkv_kernel[(triton.cdiv(keys, config.block_n), batch * key_heads)](
        q, k, v, docs, lse, delta, do, dk, dv, *strides, *sizes, KEY_HEADS=key_heads, **shared,
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, BRANCH=config.branch, num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
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
        q, k, v, out, lse, doc_start = ctx.saved_tensors
        return (*_attention_backward(_lanes(do), q, k, v, out, lse, doc_start, ctx.scale), None, None)


def attention(
    q: Tensor, k: Tensor, v: Tensor, doc_start: Tensor | None = None, *, dropout_p: float = 0.0, scale: float | None = None
) -> Tensor:
    """Causal grouped-query attention, aligned to the bottom right: query t sees keys doc_start[t] .. t + S - T.

    q [B, T, H, D], k and v [B, S, K, D] with S >= T, H a multiple of K, D 32, 64 or 128; float32, float16 or bfloat16; any
    strides (the tensor is copied if its last dimension is not contiguous). doc_start [B, T] integer, None means 0. A query that may
    see no key gives zeros. scale: default 1 / sqrt(D). -> [B, T, H, D], contiguous. Same semantics as `kernels.reference.attention`.
    Raises ValueError naming what was expected; dropout is not supported.
    """
    checks.attention("attention", q, k, v, doc_start)
    checks.kernel_dtype("attention", q)
    checks.require(q.shape[3] in HEAD_DIMS, "attention", f"a head dim in {list(HEAD_DIMS)}", q.shape[3])
    checks.require(dropout_p == 0.0, "attention", "dropout_p = 0 (for dropout use backend 'triton,attention=torch')", dropout_p)
    if doc_start is not None:
        doc_start = _lanes(doc_start)
    return _Attention.apply(_lanes(q), _lanes(k), _lanes(v), doc_start, 1 / math.sqrt(q.shape[3]) if scale is None else float(scale))
