"""Rotary position embedding of queries and keys in one launch, rotate-half layout, forward and backward.
And, for a decode step, the same with keys and values written into their caches.

    forward    a' = a cos - b sin,   b' = b cos + a sin         a = x[..., :D/2], b = x[..., D/2:]
    backward   the same kernel with -sin: the gradient is rotated back

q [B, T, H, D], k [B, T, K, D], cos and sin [(B,) T, D/2]. Saved: cos and sin only, which all layers share.
The arithmetic is fp32, from fp32 tables, and rounds once. Bytes per token of 12 heads of 64 in 16 bits: 3,072
read and written (and in the packed backward pass the values' 384 copied). Floor at 16,384 tokens and
3.0 TB/s: 17 us each way.

The kernel reads q and k by their strides, whether they are tensors of their own or slices of a packed
projection [B, T, (H + 2K) * D]; nothing is transposed or copied first. A program requests all of its heads
before it stores one, and owns few of them, so that many programs read at a time.

`rope_qkv` takes the packed projection itself. Its backward kernel writes the gradients of q, k and v into one
packed buffer in the same launch, where autograd would concatenate three tensors.

`rope_cache` is the form of a decode step, in one launch too: the new keys and values go straight to their
positions in the caches, which the kernel computes from the lengths of the rows. A step has few tokens, so a
program owns one head and not all of them, for more programs at a time. Bytes a token of the 135M model in 16
bits: 1,920 read, 1,920 written, 256 of tables. No backward pass: the cache has no gradient.

Source: Su et al. 2021 (arXiv 2104.09864); layout of Hugging Face Llama.
Check: pytest tests -k rope
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
from kernels.layout import dense_lanes
from kernels.tracing import traceable


@triton.jit
def _rotated(a, b, cos, sin):
    """Both halves of heads, turned by their angles in fp32 and rounded once; all of one shape.

    Which of two products an fma takes in is up to the compiler unless it is written down: two kernels would
    round differently.
    """
    first, second = a.to(tl.float32), b.to(tl.float32)
    turned = tl.fma(first, cos, -(second * sin)), tl.fma(second, cos, first * sin)
    return turned[0].to(a.dtype), turned[1].to(b.dtype)


@triton.jit
def _rotate_heads(
    x_ptr, y_ptr, x_row, y_row, x_head_stride, cos, sin, mask, first,
    HEADS: tl.constexpr, HALF: tl.constexpr, ROTATE: tl.constexpr,
):  # fmt: skip
    """Rotates (or copies) heads first .. first + HEADS - 1 of one tensor for a tile of tokens, all of which
    are requested before one is stored. x_row, y_row [TOKENS] are offsets; cos, sin, mask [TOKENS, HALF].
    """
    lane = tl.arange(0, HALF)[None, :]
    halves = tl.tuple([])
    for step in tl.static_range(HEADS):
        source = x_ptr + x_row[:, None] + tl.cast(first + step, tl.int64) * x_head_stride + lane
        a = tl.load(source, mask=mask, other=0.0)  # [TOKENS, HALF]
        halves = halves + (a, tl.load(source + HALF, mask=mask, other=0.0))
    for step in tl.static_range(HEADS):
        target = y_ptr + y_row[:, None] + (first + step) * (2 * HALF) + lane
        a, b = halves[2 * step], halves[2 * step + 1]
        if ROTATE:
            a, b = _rotated(a, b, cos, sin)
        tl.store(target, a, mask=mask)
        tl.store(target + HALF, b, mask=mask)


@triton.jit(do_not_specialize=["tokens", "length"])
def _rope_kernel(
    q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, q_out_ptr, k_out_ptr, v_out_ptr, tokens, length, q_batch_stride,
    q_time_stride, q_head_stride, k_batch_stride, k_time_stride, k_head_stride, v_batch_stride, v_time_stride,
    v_head_stride, table_batch_stride, q_out_stride, k_out_stride, HEADS: tl.constexpr,
    KEY_HEADS: tl.constexpr, HALF: tl.constexpr, COPY_V: tl.constexpr, INVERSE: tl.constexpr,
    TOKENS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """A program owns GROUP heads, all of q, of k or of v, of TOKENS tokens. Grid: ceil(tokens / TOKENS) times
    the groups of a token, whose programs stand side by side.

    Tables are [B or 1, T, HALF] with contiguous rows. An out stride is that of a token; its heads are
    contiguous. COPY_V copies the value heads too (k and v then share an out stride).
    """
    GROUPS: tl.constexpr = (HEADS + KEY_HEADS * (2 if COPY_V else 1)) // GROUP
    first = tl.program_id(0) % GROUPS * GROUP
    token = (tl.program_id(0) // GROUPS).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    batch, time = token // length, token % length
    mask = (token < tokens)[:, None] & (tl.arange(0, HALF) < HALF)[None, :]  # [TOKENS, HALF]
    if first < HEADS + KEY_HEADS:
        table = (batch * table_batch_stride + time * HALF)[:, None] + tl.arange(0, HALF)[None, :]
        cos = tl.load(cos_ptr + table, mask=mask, other=0.0).to(tl.float32)
        sin = tl.load(sin_ptr + table, mask=mask, other=0.0).to(tl.float32)
        if INVERSE:
            sin = -sin
        if first < HEADS:
            row = batch * q_batch_stride + time * q_time_stride
            out = token * q_out_stride
            _rotate_heads(q_ptr, q_out_ptr, row, out, q_head_stride, cos, sin, mask, first, GROUP, HALF, True)
        else:
            row = batch * k_batch_stride + time * k_time_stride
            out = token * k_out_stride
            first -= HEADS
            _rotate_heads(k_ptr, k_out_ptr, row, out, k_head_stride, cos, sin, mask, first, GROUP, HALF, True)
    elif COPY_V:
        row = batch * v_batch_stride + time * v_time_stride
        first -= HEADS + KEY_HEADS
        _rotate_heads(
            v_ptr, v_out_ptr, row, token * k_out_stride, v_head_stride, 0, 0, mask, first, GROUP, HALF, False
        )


@triton.jit
def _store_head(y_ptr, row, a, b, mask, HALF: tl.constexpr):
    """Both halves [TOKENS, HALF] of a head to the offsets row [TOKENS], where mask [TOKENS]."""
    target = y_ptr + row[:, None] + tl.arange(0, HALF)[None, :]
    tl.store(target, a, mask=mask[:, None])
    tl.store(target + HALF, b, mask=mask[:, None])


@triton.jit(do_not_specialize=["tokens", "length", "keys"])  # a growing cache must not compile again
def _rope_cache_kernel(
    qkv_ptr, cos_ptr, sin_ptr, lengths_ptr, q_ptr, k_ptr, v_ptr, tokens, length, keys, qkv_batch_stride,
    qkv_time_stride, qkv_head_stride, table_batch_stride, k_batch_stride, k_time_stride, k_head_stride,
    v_batch_stride, v_time_stride, v_head_stride, HEADS: tl.constexpr, KEY_HEADS: tl.constexpr,
    HALF: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """A program owns one head of TOKENS tokens. Grid: (ceil(tokens / TOKENS), H + 2K).

    q [B, T, H, 2 HALF] is contiguous; tables are [B or 1, T, HALF] with contiguous rows. New keys and values
    go to position lengths[b] - T + t of the caches, and nowhere if that lies outside.
    """
    head = tl.program_id(1)
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    inside = token < tokens
    batch, time = (token // length).to(tl.int64), (token % length).to(tl.int64)
    lane = tl.arange(0, HALF)[None, :]
    row = batch * qkv_batch_stride + time * qkv_time_stride + tl.cast(head, tl.int64) * qkv_head_stride
    source = qkv_ptr + row[:, None] + lane
    a = tl.load(source, mask=inside[:, None], other=0.0)  # [TOKENS, HALF]
    b = tl.load(source + HALF, mask=inside[:, None], other=0.0)
    if head < HEADS + KEY_HEADS:  # queries and keys are rotated, values are not
        table = (batch * table_batch_stride + time * HALF)[:, None] + lane
        cos = tl.load(cos_ptr + table, mask=inside[:, None], other=0.0).to(tl.float32)
        sin = tl.load(sin_ptr + table, mask=inside[:, None], other=0.0).to(tl.float32)
        a, b = _rotated(a, b, cos, sin)
    position = tl.load(lengths_ptr + batch, mask=inside, other=0).to(tl.int64) - length + time
    there = inside & (position >= 0) & (position < keys)
    if head < HEADS:
        _store_head(q_ptr, (token.to(tl.int64) * HEADS + head) * (2 * HALF), a, b, inside, HALF)
    elif head < HEADS + KEY_HEADS:
        key_head = tl.cast(head - HEADS, tl.int64)
        row = batch * k_batch_stride + position * k_time_stride + key_head * k_head_stride
        _store_head(k_ptr, row, a, b, there, HALF)
    else:
        value_head = tl.cast(head - HEADS - KEY_HEADS, tl.int64)
        row = batch * v_batch_stride + position * v_time_stride + value_head * v_head_stride
        _store_head(v_ptr, row, a, b, there, HALF)


def _launch(
    q: Tensor, k: Tensor, v: Tensor | None, cos: Tensor, sin: Tensor,
    outs: tuple[Tensor, Tensor, Tensor], inverse: bool,
) -> None:  # fmt: skip
    batch, length, heads, head_dim = q.shape
    tokens = batch * length
    if tokens == 0:
        return
    config = launch_config("rope", q.dtype, q.device, head_dim)
    values = k if v is None else v
    key_heads = k.shape[2]
    common = math.gcd(heads, key_heads)
    group = max(size for size in range(1, config.block_n + 1) if common % size == 0)
    groups = (heads + key_heads * (1 if v is None else 2)) // group
    _rope_kernel[(triton.cdiv(tokens, config.block_m) * groups,)](
        q, k, values, cos, sin, *outs, tokens, length, *q.stride()[:3], *k.stride()[:3], *values.stride()[:3],
        cos.stride(0) if cos.dim() == 3 else 0, outs[0].stride(1), outs[1].stride(1), HEADS=heads,
        KEY_HEADS=key_heads, HALF=head_dim // 2, COPY_V=v is not None, INVERSE=inverse,
        TOKENS=config.block_m, GROUP=group, num_warps=config.num_warps,
    )  # fmt: skip


@traceable(lambda q, k, cos, sin, inverse: (q.new_empty(q.shape), k.new_empty(k.shape)))
def _rope_rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    """q [B, T, H, D], k [B, T, K, D] -> both rotated, contiguous."""
    q_out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    k_out = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    _launch(q, k, None, cos, sin, (q_out, k_out, k_out), inverse)
    return q_out, k_out


def _fake_gather(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return q.new_empty((*q.shape[:2], q.shape[2] + 2 * k.shape[2], q.shape[3]))


@traceable(_fake_gather)
def _rope_gather_gradient(dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """dq [B, T, H, D], dk, dv [B, T, K, D] -> [B, T, H + 2K, D]: dq and dk rotated back, dv copied."""
    batch, length, heads, head_dim = dq.shape
    key_heads = dk.shape[2]
    shape = batch, length, heads + 2 * key_heads, head_dim
    packed = torch.empty(shape, dtype=dq.dtype, device=dq.device)
    _launch(dq, dk, dv, cos, sin, packed.split((heads, key_heads, key_heads), dim=2), True)
    return packed


def _fake_queries(
    qkv: Tensor, cos: Tensor, sin: Tensor, key_cache: Tensor, value_cache: Tensor, lengths: Tensor
) -> Tensor:
    return qkv.new_empty((*qkv.shape[:2], qkv.shape[2] - 2 * key_cache.shape[2], qkv.shape[3]))


@traceable(_fake_queries, mutates=("key_cache", "value_cache"))
def _rope_cache(
    qkv: Tensor, cos: Tensor, sin: Tensor, key_cache: Tensor, value_cache: Tensor, lengths: Tensor
) -> Tensor:
    """qkv [B, T, H + 2K, D] -> q [B, T, H, D], rotated, contiguous; writes the caches [B, S, K, D]."""
    batch, length, packed, head_dim = qkv.shape
    keys, key_heads = key_cache.shape[1:3]
    heads, tokens = packed - 2 * key_heads, batch * length
    q = torch.empty((batch, length, heads, head_dim), dtype=qkv.dtype, device=qkv.device)
    if tokens == 0:
        return q
    config = launch_config("rope", qkv.dtype, qkv.device, head_dim)
    _rope_cache_kernel[(triton.cdiv(tokens, config.block_m), packed)](
        qkv, cos, sin, lengths, q, key_cache, value_cache, tokens, length, keys, *qkv.stride()[:3],
        cos.stride(0) if cos.dim() == 3 else 0, *key_cache.stride()[:3], *value_cache.stride()[:3],
        HEADS=heads, KEY_HEADS=key_heads, HALF=head_dim // 2, TOKENS=config.block_m,
        num_warps=config.num_warps,
    )  # fmt: skip
    return q


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        return _rope_rotate(q, k, cos, sin, False)

    @staticmethod
    def backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
        checks.first_derivative("rope")
        cos, sin = ctx.saved_tensors
        return *_rope_rotate(dense_lanes(dq), dense_lanes(dk), cos, sin, True), None, None


class _RopeQKV(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, cos: Tensor, sin: Tensor, key_heads: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        q, k, v = qkv.split((qkv.shape[2] - 2 * key_heads, key_heads, key_heads), dim=2)
        return *_rope_rotate(q, k, cos, sin, False), v

    @staticmethod
    def backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor | None, ...]:
        checks.first_derivative("rope_qkv")
        cos, sin = ctx.saved_tensors
        packed = _rope_gather_gradient(dense_lanes(dq), dense_lanes(dk), dense_lanes(dv), cos, sin)
        return packed, None, None, None


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotates queries and keys by the angles of their positions.

    q [B, T, H, D], k [B, T, K, D] of one dtype (float32, float16, bfloat16), D a power of two, any strides;
    cos and sin [T, D/2] (row t belongs to position t: pass a slice for an offset) or [B, T, D/2] (gathered by
    position, for packed documents) -> two contiguous tensors. The tables get no gradient. Raises ValueError
    naming what was expected. Same semantics as `kernels.reference.rope`.
    """
    checks.rope(q, k, cos, sin)
    _check_kernel("rope", q)
    return _Rope.apply(dense_lanes(q), dense_lanes(k), cos.contiguous(), sin.contiguous())


def rope_qkv(qkv: Tensor, cos: Tensor, sin: Tensor, key_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Splits a packed projection and rotates queries and keys. Its gradient is packed, from one launch.

    qkv [B, T, H + 2K, D], otherwise as `rope` -> q [B, T, H, D] and k [B, T, K, D], contiguous, and
    v [B, T, K, D], a view of qkv.
    """
    checks.rope_qkv(qkv, cos, sin, key_heads)
    _check_kernel("rope_qkv", qkv)
    return _RopeQKV.apply(dense_lanes(qkv), cos.contiguous(), sin.contiguous(), key_heads)


def rope_cache(
    qkv: Tensor, cos: Tensor, sin: Tensor, key_cache: Tensor, value_cache: Tensor, lengths: Tensor
) -> Tensor:
    """Splits the packed projection of a decode step, rotates queries and keys, and writes keys and values
    into their caches, in one launch.

    qkv [B, T, H + 2K, D], cos and sin as in `rope`; caches [B, S, K, D] with a last stride of 1; lengths [B]
    integer, the new tokens included -> q [B, T, H, D], contiguous. Token t of row b is written to position
    lengths[b] - T + t, as far as that exists. No gradient. What is launched depends on shapes only. Raises
    ValueError naming what was expected. Same semantics as `kernels.reference.rope_cache`.
    """
    op = "rope_cache"
    checks.rope_cache(qkv, key_cache, value_cache, lengths)
    checks.rope_qkv(qkv, cos, sin, key_cache.shape[2])
    _check_kernel(op, qkv)
    for name, cache in (("key cache", key_cache), ("value cache", value_cache)):
        (cache.stride(3) == 1) or checks.refuse(op, f"{name} with a last stride of 1", cache.stride(3))
    cos, sin, lengths = cos.contiguous(), sin.contiguous(), lengths.contiguous()
    return _rope_cache(dense_lanes(qkv), cos, sin, key_cache, value_cache, lengths)


def _check_kernel(op: str, q: Tensor) -> None:
    checks.kernel_dtype(op, q)
    head_dim = q.shape[3]
    (head_dim & (head_dim - 1) == 0) or checks.refuse(op, "a head dim that is a power of two", head_dim)
