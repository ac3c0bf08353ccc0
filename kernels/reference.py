"""Every operation of a SmolLM2 block in plain PyTorch: the specification, the CPU and MPS fallback, and the oracle of the tests.

Letters: B batch, T queries, S keys, H query heads, K key/value heads, G = H / K, D head dim, F ffn width, N tokens, V vocabulary.
Statistics are computed in fp32 (in fp64 when the input is fp64: the tests take that as the truth), results are rounded to the
input's dtype. Nothing is written in place except the cache that `decode_layer` is given.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import checks

if TYPE_CHECKING:
    from kernels.backend import Backend, LayerWeights

# Tokens whose logits exist at one time in linear_cross_entropy: 1024 x 49152 fp32 logits are 201 MB.
CHUNK_TOKENS = 1024


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """y = round(x / sqrt(mean(x^2) + eps)) * weight, over the last dimension.

    x [..., D], weight [D] of the same dtype -> [..., D]. Rounds as Hugging Face Llama does: normalise in fp32, round to the
    dtype of x, then scale. Source: Zhang and Sennrich 2019 (arXiv 1910.07467).
    """
    checks.rms_norm("rms_norm", x, weight)
    wide = x.to(_accumulator(x.dtype))
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return normed.to(x.dtype) * weight


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(rms_norm(s, weight), s) with s = x + residual, rounded to the dtype before it is normalised.

    x and residual [..., D], weight [D] -> two tensors [..., D]: the input of the next sub-layer and the new residual stream.
    """
    checks.rms_norm("add_rms_norm", x, weight, residual)
    total = x + residual
    return rms_norm(total, weight, eps), total


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotary position embedding, rotate-half layout: the pair (x[i], x[i + D/2]) turns by the angle of frequency i.

    q [B, T, H, D], k [B, T, K, D]; cos and sin [T, D/2], or [B, T, D/2] when rows have positions of their own.
    Computed in fp32 from fp32 tables, rounded once. Source: Su et al. 2021 (arXiv 2104.09864).
    """
    checks.rope(q, k, cos, sin)
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)  # one angle for all heads

    def rotate(x: Tensor) -> Tensor:
        first, second = x.to(_accumulator(x.dtype)).chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)

    return rotate(q), rotate(k)


def rope_qkv(qkv: Tensor, cos: Tensor, sin: Tensor, key_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Splits a packed projection into queries, keys and values, and rotates the first two.

    qkv [B, T, H + 2K, D]; cos and sin as in `rope` -> q [B, T, H, D], k and v [B, T, K, D]. An operation of its own, because its
    gradient can then be written into one packed buffer, where three separate ones would have to be concatenated.
    """
    checks.rope_qkv(qkv, cos, sin, key_heads)
    q, k, v = qkv.split((qkv.shape[2] - 2 * key_heads, key_heads, key_heads), dim=2)
    return *rope(q, k, cos, sin), v


def attention(
    q: Tensor, k: Tensor, v: Tensor, doc_start: Tensor | None = None, *, dropout_p: float = 0.0, scale: float | None = None
) -> Tensor:
    """Causal grouped-query attention, aligned to the bottom right: query t sees keys up to t + S - T.

    q [B, T, H, D], k and v [B, S, K, D] with S >= T -> [B, T, H, D]. Query head h reads key head h // G.
    doc_start [B, T]: the first key that each query may see; None means 0. A query that may see no key gives zeros.
    scale: default 1 / sqrt(D).
    """
    checks.attention("attention", q, k, v, doc_start)
    length, keys = q.shape[1], k.shape[1]
    queries, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    mask = None
    if doc_start is not None or length != keys:
        # SDPA's own is_causal aligns to the top left, which is another thing when S > T.
        key = torch.arange(keys, device=q.device)
        last = torch.arange(keys - length, keys, device=q.device)
        mask = (key <= last[:, None])[None, None]
        if doc_start is not None:
            mask = mask & (key >= doc_start[:, None, :, None])
        if q.is_cuda:
            # With a mask only the memory-efficient CUDA kernel avoids a [T, S] score tensor, and it wants equal head counts.
            k, v = (x.repeat_interleave(queries.shape[1] // x.shape[1], dim=1) for x in (k, v))
    out = F.scaled_dot_product_attention(
        queries, k, v, attn_mask=mask, is_causal=mask is None, dropout_p=dropout_p, scale=scale, enable_gqa=queries.shape[1] != k.shape[1]
    )
    return out.transpose(1, 2)


def decode_attention(q: Tensor, key_cache: Tensor, value_cache: Tensor, lengths: Tensor) -> Tensor:
    """Attention of a few new queries over a cache whose rows are filled to different lengths.

    q [B, T, H, D], caches [B, S, K, D], lengths [B] (the new keys included): query t of row b sees the first
    lengths[b] - T + t + 1 keys. -> [B, T, H, D].
    """
    checks.decode_attention(q, key_cache, value_cache, lengths)
    batch, length, heads, head_dim = q.shape
    keys, key_heads = key_cache.shape[1:3]
    group = heads // key_heads
    # The G query heads of one key head become G * T queries of one head: each key is read once, not G times.
    folded = q.view(batch, length, key_heads, group, head_dim).permute(0, 2, 3, 1, 4).reshape(batch, key_heads, group * length, head_dim)
    last = lengths[:, None] - length + torch.arange(length, device=q.device)  # [B, T]
    mask = torch.arange(keys, device=q.device) <= last[..., None]  # [B, T, S]
    mask = mask.repeat(1, group, 1)[:, None]  # [B, 1, G * T, S]
    out = F.scaled_dot_product_attention(folded, key_cache.transpose(1, 2), value_cache.transpose(1, 2), attn_mask=mask)
    return out.view(batch, key_heads, group, length, head_dim).permute(0, 3, 1, 2, 4).reshape(batch, length, heads, head_dim)


def swiglu(gate: Tensor, up: Tensor | None = None) -> Tensor:
    """silu(gate) * up with silu(x) = x * sigmoid(x). Source: Shazeer 2020 (arXiv 2002.05202).

    gate and up [..., F] -> [..., F]. Without `up`, gate is the packed buffer [..., 2F] with the gate in its first half.
    """
    checks.swiglu(gate, up)
    if up is None:
        gate, up = gate.chunk(2, dim=-1)
    return F.silu(gate) * up


class _LinearCrossEntropy(torch.autograd.Function):
    """Both gradients are formed in the forward pass, chunk by chunk, while the logits of the chunk exist: three matrix
    products in all, and no [N, V] tensor. The backward pass only scales them by the upstream gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        ignore_index: int,
        reduction: str,
        z_loss: float,
        label_smoothing: float,
        needs_hidden: bool,
        needs_weight: bool,
    ) -> Tensor:
        wide = _accumulator(hidden.dtype)
        head = weight.to(hidden.dtype)
        valid = targets != ignore_index
        safe = torch.where(valid, targets, 0).long()
        # With no valid target the sum is 0 and so is the mean, instead of 0 / 0.
        scale = 1.0 / valid.sum().clamp(min=1).to(wide) if reduction == "mean" else torch.ones((), dtype=wide, device=hidden.device)
        dhidden = torch.empty_like(hidden) if needs_hidden else None
        dweight = torch.zeros_like(weight, dtype=_accumulator(weight.dtype)) if needs_weight else None
        losses = torch.empty(hidden.shape[0], dtype=wide, device=hidden.device)

        for start in range(0, hidden.shape[0], CHUNK_TOKENS):
            rows = slice(start, start + CHUNK_TOKENS)
            logits = (hidden[rows] @ head.t()).to(wide)
            lse = logits.logsumexp(-1)
            picked = logits.gather(1, safe[rows, None]).squeeze(1)
            loss = lse - (1.0 - label_smoothing) * picked + z_loss * lse.square()
            if label_smoothing:
                loss = loss - label_smoothing * logits.mean(-1)
            losses[rows] = torch.where(valid[rows], loss, 0.0)
            if not (needs_hidden or needs_weight):
                continue
            # d loss / d logits = p (1 + 2 z lse) - (1 - eps) onehot - eps / V
            dlogits = logits.sub_(lse[:, None]).exp_().mul_((1.0 + 2.0 * z_loss * lse)[:, None])
            if label_smoothing:
                dlogits.sub_(label_smoothing / weight.shape[0])
            dlogits.scatter_add_(1, safe[rows, None], torch.full_like(picked, label_smoothing - 1.0)[:, None])
            dlogits.mul_(torch.where(valid[rows], scale, 0.0)[:, None])
            dlogits = dlogits.to(hidden.dtype)
            if dhidden is not None:
                dhidden[rows] = dlogits @ head
            if dweight is not None:
                dweight += dlogits.t() @ hidden[rows]

        ctx.save_for_backward(dhidden, dweight)
        ctx.weight_dtype = weight.dtype
        if reduction == "none":
            return losses
        return losses.sum() * scale

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        dhidden, dweight = ctx.saved_tensors
        if dhidden is not None:
            dhidden = dhidden * dloss.to(dhidden.dtype)
        if dweight is not None:
            dweight = (dweight * dloss).to(ctx.weight_dtype)
        return dhidden, dweight, None, None, None, None, None, None, None


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Cross entropy of the logits hidden @ weight.T, in chunks of 1024 tokens, so that the logits never exist as a whole.

    hidden [N, D], weight [V, D], targets [N] in [0, V) or ignore_index -> fp32 scalar in nats ("mean" over valid targets,
    or "sum"), or [N] losses ("none", which has no gradient). The products run in hidden's dtype; a weight of
    another dtype (fp32 masters) is cast, and its gradient comes back in its own dtype, accumulated in fp32. No valid target: 0.
    z_loss adds z_loss * logsumexp(logits)^2 per token (PaLM, arXiv 2204.02311); label_smoothing as torch's cross_entropy.
    """
    checks.linear_cross_entropy(hidden, weight, targets, reduction, z_loss, label_smoothing)
    # Decided here: inside an autograd.Function, ctx.needs_input_grad is true under no_grad as well.
    trains = torch.is_grad_enabled() and reduction != "none"
    needs = trains and hidden.requires_grad, trains and weight.requires_grad
    with torch.set_grad_enabled(trains):
        return _LinearCrossEntropy.apply(hidden, weight, targets, ignore_index, reduction, z_loss, label_smoothing, *needs)


def decode_layer(
    x: Tensor,
    weights: LayerWeights,
    key_cache: Tensor,
    value_cache: Tensor,
    lengths: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    eps: float,
    ops: Backend,
) -> Tensor:
    """One whole block for a few new tokens: norm, qkv, rope, cache write, attention, projection, norm, SwiGLU MLP.

    x [B, T, hidden] -> [B, T, hidden]. Writes the new keys and values into the caches [B, S, K, D] at positions
    lengths[b] - T .. lengths[b] - 1. cos and sin [B, T, D/2] belong to those positions. `ops` are the operations composed.
    """
    batch, length, _ = x.shape
    key_heads, head_dim = key_cache.shape[2:]
    normed = ops.rms_norm(x, weights.input_norm, eps)
    qkv = F.linear(normed, weights.qkv).view(batch, length, -1, head_dim)
    q, k, v = ops.rope_qkv(qkv, cos, sin, key_heads)
    row = torch.arange(batch, device=x.device)[:, None]
    position = lengths[:, None] - length + torch.arange(length, device=x.device)
    key_cache[row, position] = k
    value_cache[row, position] = v
    mixed = ops.decode_attention(q, key_cache, value_cache, lengths)
    normed, residual = ops.add_rms_norm(F.linear(mixed.flatten(2), weights.o), x, weights.post_norm, eps)
    return residual + F.linear(ops.swiglu(F.linear(normed, weights.gate_up)), weights.down)
