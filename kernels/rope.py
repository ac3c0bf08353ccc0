"""Rotary position embedding of queries and keys in one launch, rotate-half layout; the backward pass is the
same kernel.

    forward    a' = a cos - b sin,   b' = b cos + a sin         a = x[..., :D/2], b = x[..., D/2:]
    backward   the same with -sin, since the inverse of a rotation is the rotation back

Saved: cos and sin (shared by all layers), nothing else. Computed in fp32 from fp32 tables, rounded once.
Bytes per token of 12 heads of 64 in 16 bits: 3,072 read and written (and the values' 384 copied in the packed
backward). Floor at 16,384 tokens and 3.0 TB/s: 17 us each way.

q and k are read by their strides wherever they lie: separate tensors or slices of a packed projection [B, T,
(H + 2K) * D]. Nothing is transposed or copied first. `rope_qkv` takes the packed projection itself; its
backward kernel gathers dq, dk and dv and writes the packed gradient in the same launch, where autograd would
concatenate three tensors.

Source: Su et al. 2021 (arXiv 2104.09864); layout of Hugging Face Llama.
Check: pytest tests -k rope
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import checks
from kernels.launch_config import launch_config
from kernels.tracing import traceable


@triton.jit
def _rotate_heads(
    x_ptr, y_ptr, x_row, y_row, x_head_stride, cos, sin, mask,
    HEADS: tl.constexpr, HALF: tl.constexpr, ROTATE: tl.constexpr,
):  # fmt: skip
    """Rotates (or copies) all heads of one tensor for a tile of tokens. x_row, y_row [TOKENS] are offsets;
    cos, sin, mask [TOKENS, HALF].
    """
    lane = tl.arange(0, HALF)[None, :]
    for head in tl.range(
        HEADS, loop_unroll_factor=4
    ):  # fully unrolled, 96 heads would compile for 10 seconds
        source = x_row[:, None] + tl.cast(head, tl.int64) * x_head_stride + lane
        target = y_row[:, None] + head * (2 * HALF) + lane
        a = tl.load(x_ptr + source, mask=mask, other=0.0)  # [TOKENS, HALF]
        b = tl.load(x_ptr + source + HALF, mask=mask, other=0.0)
        if ROTATE:
            first, second = a.to(tl.float32), b.to(tl.float32)
            a = (first * cos - second * sin).to(x_ptr.dtype.element_ty)
            b = (second * cos + first * sin).to(x_ptr.dtype.element_ty)
        tl.store(y_ptr + target, a, mask=mask)
        tl.store(y_ptr + target + HALF, b, mask=mask)


@triton.jit(do_not_specialize=["tokens", "length"])
def _rope_kernel(
    q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, q_out_ptr, k_out_ptr, v_out_ptr, tokens, length, q_batch_stride,
    q_time_stride, q_head_stride, k_batch_stride, k_time_stride, k_head_stride, v_batch_stride, v_time_stride,
    v_head_stride, table_batch_stride, q_out_stride, k_out_stride, HEADS: tl.constexpr,
    KEY_HEADS: tl.constexpr, HALF: tl.constexpr, COPY_V: tl.constexpr, INVERSE: tl.constexpr,
    TOKENS: tl.constexpr,
):  # fmt: skip
    """A program owns TOKENS tokens with all their heads, so it reads the tables once. Grid:
    ceil(tokens / TOKENS).

    Tables are [B or 1, T, HALF] with contiguous rows. An out stride is that of a token; its heads are
    contiguous. COPY_V copies the value heads too (k and v then share an out stride).
    """
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    batch, time = token // length, token % length
    mask = (token < tokens)[:, None] & (tl.arange(0, HALF) < HALF)[None, :]  # [TOKENS, HALF]
    table = (batch * table_batch_stride + time * HALF)[:, None] + tl.arange(0, HALF)[None, :]
    cos = tl.load(cos_ptr + table, mask=mask, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + table, mask=mask, other=0.0).to(tl.float32)
    if INVERSE:
        sin = -sin
    q_row = batch * q_batch_stride + time * q_time_stride
    k_row = batch * k_batch_stride + time * k_time_stride
    _rotate_heads(
        q_ptr, q_out_ptr, q_row, token * q_out_stride, q_head_stride, cos, sin, mask, HEADS, HALF, True
    )
    _rotate_heads(
        k_ptr, k_out_ptr, k_row, token * k_out_stride, k_head_stride, cos, sin, mask, KEY_HEADS, HALF, True
    )
    if COPY_V:
        v_row = batch * v_batch_stride + time * v_time_stride
        _rotate_heads(
            v_ptr, v_out_ptr, v_row, token * k_out_stride, v_head_stride, cos, sin, mask, KEY_HEADS, HALF,
            False,
        )  # fmt: skip


def _lanes(x: Tensor) -> Tensor:
    """The tensor with a last stride of 1; a copy only if it has another."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _launch(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    outs: tuple[Tensor, Tensor, Tensor],
    inverse: bool,
) -> None:
    batch, length, heads, head_dim = q.shape
    tokens = batch * length
    if tokens == 0:
        return
    config = launch_config("rope", q.dtype, q.device, head_dim)
    values = k if v is None else v
    _rope_kernel[(triton.cdiv(tokens, config.block_m),)](
        q, k, values, cos, sin, *outs, tokens, length, *q.stride()[:3], *k.stride()[:3], *values.stride()[:3],
        cos.stride(0) if cos.dim() == 3 else 0, outs[0].stride(1), outs[1].stride(1), HEADS=heads,
        KEY_HEADS=k.shape[2], HALF=head_dim // 2, COPY_V=v is not None, INVERSE=inverse,
        TOKENS=config.block_m, num_warps=config.num_warps,
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
    """dq [B, T, H, D], dk, dv [B, T, K, D] -> [B, T, H + 2K, D]: the first two rotated back, the third
    copied.
    """
    heads, key_heads = dq.shape[2], dk.shape[2]
    packed = torch.empty(
        (*dq.shape[:2], heads + 2 * key_heads, dq.shape[3]), dtype=dq.dtype, device=dq.device
    )
    _launch(dq, dk, dv, cos, sin, packed.split((heads, key_heads, key_heads), dim=2), True)
    return packed


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        return _rope_rotate(q, k, cos, sin, False)

    @staticmethod
    def backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return *_rope_rotate(_lanes(dq), _lanes(dk), cos, sin, True), None, None


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
        cos, sin = ctx.saved_tensors
        return (_rope_gather_gradient(_lanes(dq), _lanes(dk), _lanes(dv), cos, sin), None, None, None)


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotates queries and keys by the angles of their positions.

    q [B, T, H, D], k [B, T, K, D] of one dtype (float32, float16, bfloat16), D a power of two, any strides;
    cos and sin [T, D/2] (row t is position t: pass a slice for an offset) or [B, T, D/2] (gathered by
    position, for packed documents) -> two contiguous tensors. Raises ValueError naming what was expected.
    Same semantics as `kernels.reference.rope`.
    """
    checks.rope(q, k, cos, sin)
    _check_kernel("rope", q)
    return _Rope.apply(_lanes(q), _lanes(k), cos.contiguous(), sin.contiguous())


def rope_qkv(qkv: Tensor, cos: Tensor, sin: Tensor, key_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Splits a packed projection and rotates queries and keys; the gradient arrives packed, from one launch.

    qkv [B, T, H + 2K, D], otherwise as `rope` -> q [B, T, H, D] and k [B, T, K, D], contiguous, and v [B, T,
    K, D], a view of qkv.
    """
    checks.rope_qkv(qkv, cos, sin, key_heads)
    _check_kernel("rope_qkv", qkv)
    return _RopeQKV.apply(_lanes(qkv), cos.contiguous(), sin.contiguous(), key_heads)


def _check_kernel(op: str, q: Tensor) -> None:
    checks.kernel_dtype(op, q)
    head_dim = q.shape[3]
    checks.require(head_dim & (head_dim - 1) == 0, op, "a head dim that is a power of two", head_dim)
