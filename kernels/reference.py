"""Every operation of a SmolLM2 block in plain PyTorch: the specification, the CPU and MPS fallback, and the oracle of the tests.

Letters: B batch, T queries, S keys, H query heads, K key/value heads, G = H / K, D head dim, F ffn width, N tokens, V vocabulary.
Statistics are computed in fp32 (in fp64 when the input is fp64: the tests take that as the truth), results are rounded to the
input's dtype. Nothing that a caller can see is written in place except the cache that `decode_layer` is given.

The formulas are the plain code. Where a gradient is wanted in eager mode an autograd.Function stands in for the formula: the same
values bit for bit, but fewer passes over memory and fewer fresh tensors, whose first touch (a page fault per 4 KiB) costs a
training step on a CPU more than the arithmetic does. torch.compile is given the plain formula, which it fuses by itself.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import checks, cpu_linear
from kernels.products import linear as product

if TYPE_CHECKING:
    from kernels.backend import Backend, LayerWeights

# Tokens whose logits exist at one time in linear_cross_entropy: 1024 x 49152 fp32 logits are 201 MB.
CHUNK_TOKENS = 1024
# Of the rows of a chunk that become probabilities together, in fp32: a cache holds them from one pass to the next.
TILE_BYTES = 6 << 20


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _fused(*tensors: Tensor) -> bool:
    """Whether the autograd.Function stands in for the formula: eager mode, and something here wants a gradient."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling() and any(tensor.requires_grad for tensor in tensors)


def _once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """For a backward pass that has no derivative itself: refuses create_graph=True, which would leave terms out in silence."""

    @functools.wraps(backward)
    def checked(ctx: Any, *upstream: Any) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError("the operations of kernels.reference have first derivatives only; leave create_graph=True out")
        return backward(ctx, *upstream)

    return checked


def _normalised(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(y [..., D], 1 / rms [..., 1] in the accumulator's dtype)."""
    wide = x.to(_accumulator(x.dtype))
    rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * rstd).to(x.dtype) * weight, rstd


class _RMSNorm(torch.autograd.Function):
    """The sum with the residual, if there is one, and its norm. Saves the sum and 1 / rms; the normalised values are formed again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> Any:
        total = x if residual is None else x + residual
        y, rstd = _normalised(total, weight, eps)
        ctx.save_for_backward(total, weight, rstd)
        ctx.set_materialize_grads(False)
        return y if residual is None else (y, total)

    @staticmethod
    @_once
    def backward(ctx: Any, dy: Tensor | None, dtotal: Tensor | None = None) -> tuple[Tensor | None, ...]:
        total, weight, rstd = ctx.saved_tensors
        two = ctx.needs_input_grad[1]
        if dy is None:
            return dtotal, dtotal if two else None, None, None
        wide = rstd.dtype
        dy, scale = dy.to(wide), weight.to(wide)
        normed = total.to(wide) * rstd
        # As the formula has it: the weight meets the rounded values, the statistics belong to the unrounded ones.
        product = dy * normed.to(total.dtype)
        dweight = product.reshape(-1, product.shape[-1]).sum(0).to(weight.dtype) if ctx.needs_input_grad[2] else None
        mean = torch.mul(dy, normed, out=product).matmul(scale).unsqueeze_(-1).div_(scale.shape[0])
        dx = torch.mul(dy, scale, out=product).sub_(normed.mul_(mean)).mul_(rstd).to(total.dtype)
        if dtotal is not None:
            dx.add_(dtotal)
        return dx, dx if two else None, dweight, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """y = round(x / sqrt(mean(x^2) + eps)) * weight, over the last dimension.

    x [..., D], weight [D] of the same dtype, or in fp32: it is rounded to that of x -> [..., D]. Rounds as Hugging Face Llama does:
    normalise in fp32, round to the dtype of x, then scale. Source: Zhang and Sennrich 2019 (arXiv 1910.07467).
    """
    checks.rms_norm("rms_norm", x, weight)
    weight = weight.to(x.dtype)
    if _fused(x, weight):
        return _RMSNorm.apply(x, None, weight, eps)
    return _normalised(x, weight, eps)[0]


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(rms_norm(s, weight), s) with s = x + residual, rounded to the dtype before it is normalised.

    x and residual [..., D], weight [D] as in `rms_norm` -> two tensors [..., D]: the input of the next sub-layer and the new residual
    stream.
    """
    checks.rms_norm("add_rms_norm", x, weight, residual)
    weight = weight.to(x.dtype)
    if _fused(x, residual, weight):
        return _RMSNorm.apply(x, residual, weight, eps)
    total = x + residual
    return _normalised(total, weight, eps)[0], total


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> None:
    """Writes x [B, T, heads, D], rotated, to out of the same shape; cos and sin [(B,) T, 1, D/2]."""
    wide = torch.promote_types(_accumulator(x.dtype), cos.dtype)
    first, second = x.to(wide).chunk(2, dim=-1)
    rotated = out if out.dtype == wide else torch.empty(out.shape, dtype=wide, device=out.device)
    one, two = rotated.chunk(2, dim=-1)
    product = second * sin
    torch.mul(first, cos, out=one).sub_(product)
    torch.mul(first, sin, out=product)
    torch.mul(second, cos, out=two).add_(product)
    if rotated is not out:
        out.copy_(rotated)


class _RopePacked(torch.autograd.Function):
    """`rope_qkv`. Queries and keys are rotated together, and all three gradients are written into one packed buffer."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, cos: Tensor, sin: Tensor, key_heads: int) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        ctx.like = qkv.shape, qkv.dtype, qkv.device
        turned, values = qkv[:, :, :-key_heads], qkv[:, :, -key_heads:]
        rotated = torch.empty(turned.shape, dtype=qkv.dtype, device=qkv.device)
        _rotate(turned, cos.unsqueeze(-2), sin.unsqueeze(-2), rotated)
        return rotated[:, :, :-key_heads], rotated[:, :, -key_heads:], values

    @staticmethod
    @_once
    def backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = (table.unsqueeze(-2) for table in ctx.saved_tensors)
        shape, dtype, device = ctx.like
        dqkv = torch.empty(shape, dtype=dtype, device=device)
        into_q, into_k, into_v = dqkv.split((dq.shape[2], dk.shape[2], dv.shape[2]), dim=2)
        back = -sin  # the transpose of a rotation is the rotation back
        _rotate(dq, cos, back, into_q)
        _rotate(dk, cos, back, into_k)
        into_v.copy_(dv)
        return dqkv, None, None, None


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
    if _fused(qkv) and not (cos.requires_grad or sin.requires_grad):
        return _RopePacked.apply(qkv, cos, sin, key_heads)
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
    if not (q.is_cuda or torch.is_grad_enabled()):
        queries, k, v = queries.contiguous(), k.contiguous(), v.contiguous()  # a fifth faster on the CPU; training gains nothing by it
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
    # A branch, because under torch.compile a comparison of dynamic sizes is not a bool until something depends on it.
    grouped = {"enable_gqa": True} if queries.shape[1] != k.shape[1] else {}
    out = F.scaled_dot_product_attention(queries, k, v, attn_mask=mask, is_causal=mask is None, dropout_p=dropout_p, scale=scale, **grouped)
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


class _SwiGLUPacked(torch.autograd.Function):
    """`swiglu` of a packed buffer. Saves only the buffer: silu(gate) is formed again, and both gradients fill one buffer."""

    @staticmethod
    def forward(ctx: Any, packed: Tensor) -> Tensor:
        ctx.save_for_backward(packed)
        gate, up = packed.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    @_once
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (packed,) = ctx.saved_tensors
        gate, up = packed.chunk(2, dim=-1)
        grads = torch.empty(packed.shape, dtype=packed.dtype, device=packed.device)
        dgate, dup = grads.chunk(2, dim=-1)
        torch.mul(dy, F.silu(gate), out=dup)
        torch.ops.aten.silu_backward.grad_input(dy * up, gate, grad_input=dgate)
        return grads


def swiglu(gate: Tensor, up: Tensor | None = None) -> Tensor:
    """silu(gate) * up with silu(x) = x * sigmoid(x). Source: Shazeer 2020 (arXiv 2002.05202).

    gate and up [..., F] -> [..., F]. Without `up`, gate is the packed buffer [..., 2F] with the gate in its first half.
    """
    checks.swiglu(gate, up)
    if up is None:
        if _fused(gate):
            return _SwiGLUPacked.apply(gate)
        gate, up = gate.chunk(2, dim=-1)
    return F.silu(gate) * up


def mlp(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    *,
    copies: tuple[Tensor | None, Tensor | None] | None = None,
    swiglu: Callable[[Tensor], Tensor] = swiglu,
) -> Tensor:
    """down @ (silu(gate @ x) * (up @ x)), with gate and up the two halves of gate_up.

    x [..., D], gate_up [2F, D], down [D, F] -> [..., D] in x's dtype, in which the products run. A weight of another floating dtype (fp32
    masters) is cast, and its gradient has its own; copies: the weights in x's dtype where they exist already. `swiglu` is composed.
    """
    checks.mlp(x, gate_up, down, copies)
    gate_up_copy, down_copy = copies or (None, None)
    return product(swiglu(product(x, gate_up, gate_up_copy)), down, down_copy)


@dataclass(frozen=True)
class _Loss:
    """What linear_cross_entropy computes besides its three tensors, and what of it."""

    ignore_index: int
    reduction: str
    z_loss: float
    label_smoothing: float
    needs_hidden: bool
    needs_weight: bool
    chunk_tokens: int | None

    def rows(self, logits: Tensor, targets: Tensor, scale: Tensor) -> Tensor:
        """Losses [rows] of logits [rows, V], which become d (sum of losses * scale) / d logits where a gradient is needed."""
        wide = logits.to(_accumulator(logits.dtype))
        valid = targets != self.ignore_index
        safe = torch.where(valid, targets, 0).long()[:, None]
        lse = wide.logsumexp(-1)
        loss = lse - (1.0 - self.label_smoothing) * wide.gather(1, safe).squeeze(1) + self.z_loss * lse.square()
        if self.label_smoothing:
            loss = loss - self.label_smoothing * wide.mean(-1)
        if self.needs_hidden or self.needs_weight:
            # d loss / d logits = p (1 + 2 z lse) - (1 - eps) onehot - eps / V
            factor = torch.where(valid, scale, 0.0)[:, None]
            p = wide.sub_(lse[:, None]).exp_().mul_((1.0 + 2.0 * self.z_loss * lse)[:, None] * factor)
            if self.label_smoothing:
                p.sub_(factor * (self.label_smoothing / logits.shape[1]))
            p.scatter_add_(1, safe, factor * (self.label_smoothing - 1.0))
            if p is not logits:
                logits.copy_(p)
        return torch.where(valid, loss, 0.0)

    def compute(
        self, hidden: Tensor, weight: Tensor, targets: Tensor, weight_copy: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(loss, its gradient by hidden, by weight)."""
        wide, tokens = _accumulator(hidden.dtype), hidden.shape[0]
        head = weight.to(hidden.dtype) if weight_copy is None else weight_copy
        one = torch.ones((), dtype=wide, device=hidden.device)
        # With no valid target the sum is 0 and so is the mean, instead of 0 / 0.
        scale = one / (targets != self.ignore_index).sum().clamp(min=1).to(wide) if self.reduction == "mean" else one
        dhidden = torch.empty_like(hidden, memory_format=torch.contiguous_format) if self.needs_hidden else None
        dweight = None
        losses = torch.empty(tokens, dtype=wide, device=hidden.device)
        size = self.chunk_tokens or CHUNK_TOKENS
        # One buffer for the logits of all chunks; oneDNN brings a tensor of its own.
        buffer = None if cpu_linear.serves(hidden, head) else hidden.new_empty(min(tokens, size), weight.shape[0])
        whole = hidden.is_cuda or torch.compiler.is_compiling()
        tile = size if whole else max(1, TILE_BYTES // (wide.itemsize * weight.shape[0]))
        for start in range(0, tokens, size):
            chunk = hidden[start : start + size]
            logits = cpu_linear.mm(chunk, head.t(), out=buffer if buffer is None else buffer[: chunk.shape[0]])
            for first in range(0, chunk.shape[0], tile):
                rows = slice(start + first, start + min(first + tile, chunk.shape[0]))
                losses[rows] = self.rows(logits[first : first + tile], targets[rows], scale)
            if dhidden is not None:
                cpu_linear.mm(logits, head, out=dhidden[start : start + size])
            if self.needs_weight:
                dweight = _accumulate(dweight, logits.t(), chunk, _accumulator(weight.dtype))
            del logits  # before those of the next chunk are allocated
        if self.needs_weight and dweight is None:
            dweight = torch.zeros_like(weight, dtype=_accumulator(weight.dtype))
        return losses if self.reduction == "none" else losses.sum() * scale, dhidden, dweight


def _accumulate(total: Tensor | None, a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """total + a @ b in dtype, written into total; without a total (the first chunk) the product alone."""
    if total is None:
        return torch.mm(a, b).to(dtype)
    return total.addmm_(a, b) if a.dtype == dtype else total.add_(torch.mm(a, b))


class _LinearCrossEntropy(torch.autograd.Function):
    """Both gradients are formed in the forward pass, chunk by chunk, while the logits of the chunk exist: three matrix
    products in all, and no [N, V] tensor. The backward pass only scales them by the upstream gradient: in place, and gives them
    away, because a copy of [V, D] would cost as much as a layer. A second backward pass (retain_graph) computes them again."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, scale: Tensor | None, weight_copy: Tensor | None, what: _Loss
    ) -> Tensor:
        loss, *gradients = what.compute(hidden, weight, targets, weight_copy)
        ctx.save_for_backward(hidden, weight, targets, scale, weight_copy)
        ctx.what, ctx.gradients = what, gradients
        return loss if scale is None else loss * scale

    @staticmethod
    @_once
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, scale, weight_copy = ctx.saved_tensors
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            _, *gradients = ctx.what.compute(hidden, weight, targets, weight_copy)
        factor = dloss if scale is None else dloss * scale
        dhidden, dweight = (None if gradient is None else gradient.mul_(factor) for gradient in gradients)
        return dhidden, None if dweight is None else dweight.to(weight.dtype), None, None, None, None


class _LinearCrossEntropyTraced(torch.autograd.Function):
    """The same for torch.compile, whose graphs have no state: the gradients are saved, and the backward pass scales copies."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        scale: Tensor | None,
        weight_copy: Tensor | None,
        ignore_index: int,
        reduction: str,
        z_loss: float,
        label_smoothing: float,
        needs_hidden: bool,
        needs_weight: bool,
        chunk_tokens: int | None,
    ) -> Tensor:
        what = _Loss(ignore_index, reduction, z_loss, label_smoothing, needs_hidden, needs_weight, chunk_tokens)
        loss, dhidden, dweight = what.compute(hidden, weight, targets, weight_copy)
        ctx.save_for_backward(dhidden, dweight, scale)
        ctx.weight_dtype = weight.dtype
        return loss if scale is None else loss * scale

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        dhidden, dweight, scale = ctx.saved_tensors
        dloss = dloss if scale is None else dloss * scale
        if dhidden is not None:
            dhidden = dhidden * dloss.to(dhidden.dtype)
        if dweight is not None:
            dweight = (dweight * dloss).to(ctx.weight_dtype)
        return dhidden, dweight, None, None, None, None, None, None, None, None, None, None


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    scale: Tensor | None = None,
    weight_copy: Tensor | None = None,
    chunk_tokens: int | None = None,
) -> Tensor:
    """Cross entropy of the logits hidden @ weight.T, in chunks of 1024 tokens, so that the logits never exist as a whole.

    hidden [N, D], weight [V, D], targets [N] in [0, V) or ignore_index -> fp32 scalar in nats ("mean" over valid targets,
    or "sum"), or [N] losses ("none", which has no gradient). The products run in hidden's dtype; a weight of
    another dtype (fp32 masters) is cast, and its gradient comes back in its own dtype, accumulated in fp32. No valid target: 0.
    z_loss adds z_loss * logsumexp(logits)^2 per token (PaLM, arXiv 2204.02311); label_smoothing as torch's cross_entropy.
    scale: fp32 scalar on the device that multiplies the loss and all gradients. weight_copy: the weight in hidden's dtype, which saves the
    cast. Neither has a gradient. chunk_tokens: 1024 unless given.
    """
    checks.linear_cross_entropy(hidden, weight, targets, reduction, z_loss, label_smoothing, scale, weight_copy, chunk_tokens)
    # Decided here: inside an autograd.Function, ctx.needs_input_grad is true under no_grad as well.
    trains = torch.is_grad_enabled() and reduction != "none"
    needs = trains and hidden.requires_grad, trains and weight.requires_grad
    what = (ignore_index, reduction, z_loss, label_smoothing, *needs, chunk_tokens)
    with torch.set_grad_enabled(trains):
        if torch.compiler.is_compiling():
            return _LinearCrossEntropyTraced.apply(hidden, weight, targets, scale, weight_copy, *what)
        return _LinearCrossEntropy.apply(hidden, weight, targets, scale, weight_copy, _Loss(*what))


def tied_embedding(input_ids: Tensor, weight: Tensor, dtype: torch.dtype, weight_copy: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The rows of the embedding, and the embedding as the head: one operation, so that both their gradients can become one tensor.

    input_ids [...] int64 or int32, weight [V, D] -> (x [..., D] in `dtype`, head [V, D]: the weight itself).
    weight_copy: the weight in `dtype`, from which a kernel may read the same bits; there is no need of it here. An id out of range raises.
    """
    checks.tied_embedding(input_ids, weight, dtype, weight_copy)
    return F.embedding(input_ids, weight).to(dtype), weight


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
    linear: Callable[[Tensor, Any], Tensor] = F.linear,
) -> Tensor:
    """One whole block for a few new tokens: norm, qkv, rope, cache write, attention, projection, norm, SwiGLU MLP.

    x [B, T, hidden] -> [B, T, hidden]. Writes the new keys and values into the caches [B, S, K, D] at positions
    lengths[b] - T .. lengths[b] - 1. cos and sin [B, T, D/2] belong to those positions. `ops` are the operations composed; `linear`
    multiplies by the matrices, and may know other forms of them.
    """
    batch, length, _ = x.shape
    key_heads, head_dim = key_cache.shape[2:]
    normed = ops.rms_norm(x, weights.input_norm, eps)
    qkv = linear(normed, weights.qkv).view(batch, length, -1, head_dim)
    q, k, v = ops.rope_qkv(qkv, cos, sin, key_heads)
    row = torch.arange(batch, device=x.device)[:, None]
    position = lengths[:, None] - length + torch.arange(length, device=x.device)
    key_cache[row, position] = k
    value_cache[row, position] = v
    mixed = ops.decode_attention(q, key_cache, value_cache, lengths)
    normed, residual = ops.add_rms_norm(linear(mixed.flatten(2), weights.o), x, weights.post_norm, eps)
    return residual + linear(ops.swiglu(linear(normed, weights.gate_up)), weights.down)


def decode_head(x: Tensor, norm_weight: Tensor, head_weight: Tensor, eps: float) -> Tensor:
    """Final norm and output head of a decode step: x [..., E], norm_weight [E], head_weight [V, E] -> logits [..., V] in fp32."""
    checks.decode_head(x, norm_weight, head_weight)
    return F.linear(rms_norm(x, norm_weight, eps), head_weight).float()
