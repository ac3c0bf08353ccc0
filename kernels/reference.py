"""Every operation of a SmolLM2 model as a formula in plain, differentiable PyTorch: the specification, and
the oracle of the tests.

Letters: B batch, T queries, S keys, H query heads, K key/value heads, G = H / K, D head dim, E hidden width,
F ffn width, N tokens, V vocabulary. Sums are in fp32, or in fp64 for fp64 inputs, which the tests take as the
truth. Results are rounded to the input's dtype. The formulas are not fast: they form whole matrices of scores
and of logits. backend=torch runs kernels/eager/.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import checks
from kernels.types import NOT_FINITE, Backend, DecodeHead, LayerWeights, TokenState


def _wide(x: Tensor) -> Tensor:
    """x in fp32, or in fp64 if it is fp64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _in_dtype(weight: Tensor, copy: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The weight in dtype. If there is a copy, its values count, and the gradient goes to the weight."""
    return weight.to(dtype) if copy is None else copy + (weight - weight.detach()).to(dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """y = round(x / sqrt(mean(x^2) + eps)) * weight, over the last dimension.

    x [..., E]; weight [E] in the dtype of x, or in fp32 and rounded to it -> [..., E]. Rounds as Hugging Face
    Llama does: normalise in fp32, round to the dtype of x, then scale. Source: Zhang and Sennrich 2019 (arXiv
    1910.07467).
    """
    checks.rms_norm("rms_norm", x, weight)
    wide = _wide(x)
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return normed.to(x.dtype) * weight.to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(rms_norm(s, weight), s) with s = x + residual, rounded to the dtype before it is normalised.

    x and residual [..., E], weight [E] as in `rms_norm` -> two tensors [..., E]: the input of the next
    sub-layer and the new residual stream.
    """
    checks.rms_norm("add_rms_norm", x, weight, residual)
    total = x + residual
    return rms_norm(total, weight, eps), total


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotary position embedding, rotate-half layout: the pair (x[i], x[i + D/2]) is rotated by the angle of
    frequency i.

    q [B, T, H, D], k [B, T, K, D]; cos and sin [T, D/2], or [B, T, D/2] if each row has its own positions.
    Computed in fp32 from fp32 tables, rounded once. Source: Su et al. 2021 (arXiv 2104.09864).
    """
    checks.rope(q, k, cos, sin)
    return _rotate(q, k, cos, sin)


def _rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)  # one angle for all heads

    def rotate(x: Tensor) -> Tensor:
        first, second = _wide(x).chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)

    return rotate(q), rotate(k)


def rope_qkv(qkv: Tensor, cos: Tensor, sin: Tensor, key_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Splits a packed projection into queries, keys and values, and rotates the first two.

    qkv [B, T, H + 2K, D]; cos and sin as in `rope` -> q [B, T, H, D], k and v [B, T, K, D]. As one operation
    its gradient can be written into one packed buffer; three separate gradients would be concatenated.
    """
    checks.rope_qkv(qkv, cos, sin, key_heads)
    q, k, v = qkv.split((qkv.shape[2] - 2 * key_heads, key_heads, key_heads), dim=2)
    return *_rotate(q, k, cos, sin), v


def rope_cache(
    qkv: Tensor, cos: Tensor, sin: Tensor, key_cache: Tensor, value_cache: Tensor, lengths: Tensor
) -> Tensor:
    """`rope_qkv` of a decode step, which writes the new keys and values into the caches.

    qkv [B, T, H + 2K, D]; cos and sin as in `rope`; caches [B, S, K, D] with S >= T; lengths [B], the new
    tokens included -> q [B, T, H, D]. Token t of row b goes to position lengths[b] - T + t of its row, and
    nowhere if that lies outside.
    """
    checks.rope_cache(qkv, key_cache, value_cache, lengths)
    q, k, v = rope_qkv(qkv, cos, sin, key_cache.shape[2])
    row = torch.arange(len(lengths), device=qkv.device)[:, None]
    position = lengths[:, None] + torch.arange(-qkv.shape[1], 0, device=qkv.device)  # [B, T]
    slot = position % key_cache.shape[1]  # another one for each token of a row
    inside = (slot == position)[..., None, None]
    for cache, new in ((key_cache, k), (value_cache, v)):
        cache[row, slot] = torch.where(inside, new, cache[row, slot])
    return q


def attention(
    q: Tensor, k: Tensor, v: Tensor, doc_start: Tensor | None = None, *, dropout_p: float = 0.0,
    scale: float | None = None,
) -> Tensor:  # fmt: skip
    """Causal grouped-query attention, aligned to the bottom right: query t sees keys up to t + S - T.

    q [B, T, H, D], k and v [B, S, K, D] with S >= T -> [B, T, H, D]. Query head h reads key head h // G.
    doc_start [B, T]: the first key that each query sees; None means 0. The result of a query that sees no key
    is zero. scale: finite, default 1 / sqrt(D). Source: Vaswani et al. 2017 (arXiv 1706.03762), Ainslie et
    al. 2023 (arXiv 2305.13245).
    """
    checks.attention("attention", q, k, v, doc_start, scale)
    length, keys = q.shape[1], k.shape[1]
    key = torch.arange(keys, device=q.device)
    seen = key <= torch.arange(keys - length, keys, device=q.device)[:, None]  # [T, S]
    if doc_start is not None:
        seen = seen & (key >= doc_start[:, None, :, None])  # [B, 1, T, S]
    return _mix(q, k, v, seen, dropout_p, scale)


def decode_attention(q: Tensor, key_cache: Tensor, value_cache: Tensor, lengths: Tensor) -> Tensor:
    """Attention of a few new queries over a cache whose rows are filled to different lengths.

    q [B, T, H, D], caches [B, S, K, D], lengths [B], the new keys included: query t of row b sees the first
    lengths[b] - T + t + 1 keys. -> [B, T, H, D].
    """
    checks.decode_attention(q, key_cache, value_cache, lengths)
    length, keys = q.shape[1], key_cache.shape[1]
    last = lengths[:, None] - length + torch.arange(length, device=q.device)  # [B, T]
    seen = torch.arange(keys, device=q.device) <= last[:, None, :, None]  # [B, 1, T, S]
    return _mix(q, key_cache, value_cache, seen, 0.0, None)


def _mix(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, dropout_p: float, scale: float | None) -> Tensor:
    """softmax(scale q k^T) v over the keys that are seen [(B, 1,) T, S]."""
    group = q.shape[2] // k.shape[2]
    k, v = (_wide(x).repeat_interleave(group, dim=2) for x in (k, v))
    scores = torch.einsum("bthd,bshd->bhts", _wide(q), k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    # The lowest finite number instead of -inf: a query that sees no key would divide zero by zero.
    weights = scores.masked_fill(~seen, torch.finfo(scores.dtype).min).softmax(-1).masked_fill(~seen, 0.0)
    return torch.einsum("bhts,bshd->bthd", F.dropout(weights, dropout_p), v).to(q.dtype)


def swiglu(gate: Tensor, up: Tensor | None = None) -> Tensor:
    """silu(gate) * up with silu(x) = x * sigmoid(x). Source: Shazeer 2020 (arXiv 2002.05202).

    gate and up [..., F] -> [..., F]. Without `up`, gate is a packed buffer [..., 2F] with the gate in its
    first half.
    """
    checks.swiglu(gate, up)
    if up is None:
        gate, up = gate.chunk(2, dim=-1)
    return F.silu(gate) * up


def mlp(
    x: Tensor, gate_up: Tensor, down: Tensor, *, copies: tuple[Tensor | None, Tensor | None] | None = None
) -> Tensor:
    """down @ (silu(gate @ x) * (up @ x)), with gate and up the two halves of gate_up.

    x [..., E], gate_up [2F, E], down [E, F] -> [..., E]. The products run in x's dtype. A weight of another
    floating dtype (fp32 master weights) is cast, and its gradient has its own dtype. copies: the weights in
    x's dtype, where they exist already.
    """
    checks.mlp(x, gate_up, down, copies)
    gate_up, down = (
        _in_dtype(w, copy, x.dtype) for w, copy in zip((gate_up, down), copies or (None, None), strict=True)
    )
    return F.linear(swiglu(F.linear(x, gate_up)), down)


def tied_embedding(
    input_ids: Tensor, weight: Tensor, dtype: torch.dtype, weight_copy: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The rows of the embedding, and the embedding as the head: one operation, so that the gradients of both
    can become one tensor.

    input_ids [...] int64 or int32, weight [V, E] -> (x [..., E] in `dtype`, head [V, E]: the weight itself).
    weight_copy: the weight in `dtype`, from which a kernel may read the same bits; it is not needed here. An
    id out of range raises an error.
    """
    checks.tied_embedding(input_ids, weight, dtype, weight_copy)
    return F.embedding(input_ids, weight).to(dtype), weight


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, ignore_index: int = -100, reduction: str = "mean",
    z_loss: float = 0.0, label_smoothing: float = 0.0, scale: Tensor | None = None,
    weight_copy: Tensor | None = None, chunk_tokens: int | None = None,
) -> Tensor:  # fmt: skip
    """Cross entropy of the logits hidden @ weight.T.

    hidden [N, E], weight [V, E], targets [N] in [0, V) or ignore_index -> fp32 scalar in nats ("mean" over
    valid targets, 0 if there is none, or "sum"), or [N] losses ("none", without a gradient). The product runs
    in hidden's dtype; a weight of another dtype (fp32 master weights) is cast, and its gradient has its own
    dtype. z_loss adds z_loss * logsumexp(logits)^2 per token (PaLM, arXiv 2204.02311); label_smoothing is
    that of torch's cross_entropy. scale: fp32 scalar on the device that multiplies the loss and all
    gradients. weight_copy: the weight in hidden's dtype, which saves the cast. Neither has a gradient.
    chunk_tokens: how many tokens' logits may exist at a time; here all of them do.
    """
    checks.linear_cross_entropy(
        hidden, weight, targets, reduction, z_loss, label_smoothing, scale, weight_copy, chunk_tokens
    )
    logits = _wide(F.linear(hidden, _in_dtype(weight, weight_copy, hidden.dtype)))
    valid = targets != ignore_index
    lse = logits.logsumexp(-1)
    of_target = logits.gather(1, torch.where(valid, targets, 0).long()[:, None]).squeeze(1)
    losses = (
        lse - (1.0 - label_smoothing) * of_target - label_smoothing * logits.mean(-1) + z_loss * lse.square()
    )
    losses = torch.where(valid, losses, 0.0)
    if reduction == "none":
        losses = losses.detach()
    else:
        losses = losses.sum() / (valid.sum().clamp(min=1) if reduction == "mean" else 1)
    return losses if scale is None else losses * scale


def decode_inputs(
    tokens: Tensor, embedding: Tensor, lengths: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """What a decode step begins with: the rows of the embedding, and the angles of the new positions.

    tokens [B, T] int64 or int32, embedding [V, E], lengths [B], cos and sin [P, D/2] -> (x [B, T, E], cos
    and sin [B, T, D/2] at positions lengths[b] + t). Then adds T to lengths. A token or a position outside
    its table is an error.
    """
    checks.decode_inputs(tokens, embedding, lengths, cos, sin)
    position = lengths[:, None] + torch.arange(tokens.shape[1], device=tokens.device)
    lengths += tokens.shape[1]
    return F.embedding(tokens, embedding), cos[position], sin[position]


def decode_layer(
    x: Tensor, weights: LayerWeights, key_cache: Tensor, value_cache: Tensor, lengths: Tensor, cos: Tensor,
    sin: Tensor, *, eps: float, ops: Backend, dependent: bool = False,
    linear: Callable[[Tensor, Any], Tensor] = F.linear,
) -> Tensor:  # fmt: skip
    """One whole block for a few new tokens: norm, qkv, rope, cache write, attention, projection, norm, SwiGLU
    MLP.

    x [B, T, E] -> [B, T, E]. Writes the new keys and values into the caches [B, S, K, D] at positions
    lengths[b] - T .. lengths[b] - 1, to which cos and sin [B, T, D/2] belong. `ops` are the operations that
    are composed. dependent: whether the work queued just before leaves the weights alone, as every part of a
    decode step does; it changes no result. `linear` multiplies by the matrices, which may have another form
    than a Tensor.
    """
    batch, length, _ = x.shape
    normed = ops.rms_norm(x, weights.input_norm, eps)
    qkv = linear(normed, weights.qkv).view(batch, length, -1, key_cache.shape[3])
    q = ops.rope_cache(qkv, cos, sin, key_cache, value_cache, lengths)
    mixed = ops.decode_attention(q, key_cache, value_cache, lengths)
    normed, residual = ops.add_rms_norm(linear(mixed.flatten(2), weights.o), x, weights.post_norm, eps)
    return residual + linear(ops.swiglu(linear(normed, weights.gate_up)), weights.down)


def decode_layers(
    x: Tensor, layers: Sequence[LayerWeights], key_caches: Sequence[Tensor], value_caches: Sequence[Tensor],
    lengths: Tensor, cos: Tensor, sin: Tensor, *, eps: float, ops: Backend, dependent: bool = False,
) -> Tensor:  # fmt: skip
    """`ops.decode_layer` of all layers, one after the other, each with its weights and its caches."""
    for weights, keys, values in zip(layers, key_caches, value_caches, strict=True):
        x = ops.decode_layer(
            x, weights, keys, values, lengths, cos, sin, eps=eps, ops=ops, dependent=dependent
        )
    return x


def decode_head(
    x: Tensor, norm_weight: Tensor, head_weight: Tensor, eps: float, *, dependent: bool = False
) -> Tensor:
    """Final norm and output head of a decode step: x [..., E], norm_weight [E], head_weight [V, E] -> logits
    [..., V] in fp32. dependent: as in `decode_layer`.
    """
    checks.decode_head(x, norm_weight, head_weight)
    return F.linear(rms_norm(x, norm_weight, eps), head_weight).float()


def decode_best(
    x: Tensor, norm_weight: Tensor, head_weight: Tensor, eps: float, suppressed: Tensor | None = None, *,
    dependent: bool = False, head: DecodeHead = decode_head,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """`decode_head` for greedy decoding: the candidates among which each row's most likely token is.

    x [R, E], norm_weight [E], head_weight [V, E]; suppressed [V] bool: tokens that are no candidates ->
    (scores [R, P], ids [R, P], ascending). Without ids, column i is token i. A tie is won by the first. In
    these formulas all logits are candidates. head: what they come from.
    """
    checks.decode_best(x, norm_weight, head_weight, suppressed)
    logits = head(x, norm_weight, head_weight, eps, dependent=dependent)
    return logits if suppressed is None else logits.masked_fill(suppressed, -math.inf), None


def next_token(scores: Tensor | None, ids: Tensor | None, state: TokenState, ends: Tensor, pad: int) -> None:
    """Ends a decode step: takes the candidate of highest score in each row, and writes it where the next step
    and the host look for it.

    scores [B, P] and ids [B, P] as `decode_best` gives them, or only ids [B, 1]: tokens that were chosen
    already. ends [N] int64. A row whose highest score is NaN or infinite gets NOT_FINITE, a finished row
    `pad`. That goes into state.output at the row's slot, which moves on by one; and into state.tokens, but 0
    instead of either, because the embedding may have no such row. A row whose token is among `ends` is
    finished from then on.
    """
    checks.next_token(scores, ids, state, ends)
    if scores is None:
        assert ids is not None
        chosen = ids
    else:
        best = scores.argmax(-1, keepdim=True)  # NaN counts as the highest
        chosen = best if ids is None else ids.gather(1, best)
        chosen = chosen.where(scores.gather(1, best).abs() < math.inf, NOT_FINITE)
    chosen, finished = chosen.long(), state.finished[:, None]
    state.output.scatter_(0, state.slot[None], chosen.masked_fill(finished, pad).T)
    torch.clamp(chosen.masked_fill(finished, 0), min=0, out=state.tokens)
    # not torch.isin: with ten end tokens or more it sorts, and waits for the result
    state.finished.logical_or_((state.tokens == ends).any(1))
    state.slot.add_(1)
