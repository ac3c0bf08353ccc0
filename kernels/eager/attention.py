"""Causal grouped-query attention: torch's own kernel, or, for training on some CPUs, batched matrix products
over blocks of queries.

    S = scale Q K^T, masked    P = exp(S - lse)    O = P V          lse [B K, T G]: log-sum-exp of a row of S
    dV = P^T dO    dP = dO V^T    dS = P (dP - delta)               delta = sum of dO O over D
    dQ = scale dS K    dK = scale dS^T Q

Letters as in kernels/reference.py, whose `attention` is the specification. All five products leave out the
keys that no query of the block may see: those after it and those of earlier documents. They are the
library's, and large: the G query heads of a key head are G rows of one matrix per query, a block of n queries
is [B K, n G, D] against [B K, W, D], and dK and dV of a key head are one product.

In bf16 torch's CPU kernel reaches a fifth of the rate of a matrix product. In fp32 it is as fast as blocks,
but not with documents, because it multiplies what their mask hides. Milliseconds forward and backward of
torch's kernel and of blocks on two cores, three documents in a row: 2 x 512 tokens 15 and 37, 11 and 20 on an
EPYC 7003 (Zen 3, AVX2), 7.5 and 15, 4.8 and 8.5 on an Intel Xeon (Emerald Rapids, AVX-512); 2,048 tokens 117
and 334, 51 and 99; 54 and 148, 21 and 44.

Saved: q, k, v, O, lse and doc_start, but no masks or scores. The scores of one block lie in buffers that a
thread keeps from call to call, because the first touch of fresh memory (a page fault per 4 KiB) costs as much
as a pass over the scores. The backward pass works on S^T [B K, W, n G], so that two of its three narrow
products read their matrices row by row.

Rounding: S, dP, P, lse and delta are fp32; beside bf16 in base 2, since exp2 takes a third of the time of
exp, beside fp32 in base e, since base 2 misses the numerics contract where scores are large. P and dS are
rounded to q's dtype before they are multiplied, as in torch's kernel, and each block's share of dK and dV
before it is added in fp32. No atomics: the same numbers every time. Source: Dao 2023 (arXiv 2307.08691), with
the loop over queries outermost.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import checks
from kernels.products import faster_in_fp32

# Scores of a block. To stay below, batch rows are computed separately, and then the block gets fewer queries,
# down to MIN_QUERIES.
MAX_SCORES = 1 << 21
MIN_QUERIES = 32
# Maximum and sum of a row that sees no key: its scores stay -inf when their log-sum-exp is subtracted.
LOWEST, TINY = -1e30, torch.finfo(torch.float32).tiny


class _Arithmetic(NamedTuple):
    """How blocks of a dtype compute."""

    # The base of powers and logarithms, with the logarithm of e.
    unit: float
    exp_: Callable[[Tensor], Tensor]
    log_: Callable[[Tensor], Tensor]
    # Queries of a block. With more, less is skipped above the diagonal; with fewer, products are smaller and
    # more numerous, and threads synchronise at each of them.
    queries: int
    rows: int  # that one product of dK and dV adds up

    def add_product(self, total: Tensor, weights: Tensor, x: Tensor) -> None:
        """total [b K, W, D] += weights [b K, W, n G] x [b K, n G, D]"""
        for part, rows in zip(weights.split(self.rows, -1), x.split(self.rows, 1), strict=True):
            total.add_(torch.bmm(part, rows))


# A product adds up one row after the other, and its error grows with their number: 192 rows of fp32 miss the
# numerics contract. bf16's is lost in the rounding of P and dS.
ARITHMETIC = {
    torch.float32: _Arithmetic(1.0, Tensor.exp_, Tensor.log_, 64, 96),
    torch.bfloat16: _Arithmetic(math.log2(math.e), Tensor.exp2_, Tensor.log2_, 128, 1 << 30),
}


def _in_blocks(q: Tensor, k: Tensor, v: Tensor, doc_start: Tensor | None) -> bool:
    """Whether to use blocks: for eager training on a CPU, in bf16 if its library has bf16 products, in fp32
    with documents if it is of the kinds that were measured.
    """
    if q.device.type != "cpu" or q.numel() == 0 or torch.compiler.is_compiling():
        return False
    if not (torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)):
        return False
    if q.dtype == torch.float32:
        return doc_start is not None and torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    return q.dtype == torch.bfloat16 and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def attention(
    q: Tensor, k: Tensor, v: Tensor, doc_start: Tensor | None = None, *, dropout_p: float = 0.0,
    scale: float | None = None,
) -> Tensor:  # fmt: skip
    """`kernels.reference.attention`: q [B, T, H, D], k and v [B, S, K, D] with S >= T, doc_start [B, T] ->
    [B, T, H, D]. In blocks it has first derivatives only.
    """
    checks.attention("attention", q, k, v, doc_start, scale)
    if faster_in_fp32(q, q.shape[1]):
        wide = attention(q.float(), k.float(), v.float(), doc_start, dropout_p=dropout_p, scale=scale)
        return wide.to(q.dtype)
    if dropout_p > 0.0 or not _in_blocks(q, k, v, doc_start):
        return library_attention(q, k, v, doc_start, dropout_p=dropout_p, scale=scale)
    return blocked_attention(q, k, v, doc_start, scale=scale)


def blocked_attention(
    q: Tensor, k: Tensor, v: Tensor, doc_start: Tensor | None = None, *, scale: float | None = None
) -> Tensor:
    """`attention` in blocks, for a CPU and a dtype of ARITHMETIC."""
    checks.attention("attention", q, k, v, doc_start, scale)
    out: Tensor = _BlockedAttention.apply(q, k, v, doc_start, q.shape[-1] ** -0.5 if scale is None else scale)
    return out


def library_attention(
    q: Tensor, k: Tensor, v: Tensor, doc_start: Tensor | None = None, *, dropout_p: float = 0.0,
    scale: float | None = None,
) -> Tensor:  # fmt: skip
    """`attention` by torch's own kernels, for any device and dtype."""
    checks.attention("attention", q, k, v, doc_start, scale)
    if scale is not None and scale <= 0:  # torch takes the root of the scale
        q, scale = (-q, -scale) if scale < 0 else (q * 0.0, 1.0)
    length, keys = q.shape[1], k.shape[1]
    queries, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if not (q.is_cuda or torch.is_grad_enabled()):
        # A fifth faster on the CPU without gradients; training does not gain by it.
        queries, k, v = queries.contiguous(), k.contiguous(), v.contiguous()
    mask = None
    if doc_start is not None or length != keys:
        # SDPA's is_causal aligns to the top left, which differs when S > T.
        key = torch.arange(keys, device=q.device)
        last = torch.arange(keys - length, keys, device=q.device)
        mask = (key <= last[:, None])[None, None]
        if doc_start is not None:
            mask = mask & (key >= doc_start[:, None, :, None])
        if q.is_cuda:
            # With a mask only the memory-efficient CUDA kernel avoids a [T, S] score tensor, and it needs
            # equal head counts.
            k, v = (x.repeat_interleave(queries.shape[1] // x.shape[1], dim=1) for x in (k, v))
    # A branch, because under torch.compile a comparison of dynamic sizes only becomes a bool in a condition.
    grouped = {"enable_gqa": True} if queries.shape[1] != k.shape[1] else {}
    out = F.scaled_dot_product_attention(
        queries, k, v, attn_mask=mask, is_causal=mask is None, dropout_p=dropout_p, scale=scale, **grouped
    )
    return out.transpose(1, 2)


def decode_attention(q: Tensor, key_cache: Tensor, value_cache: Tensor, lengths: Tensor) -> Tensor:
    """`reference.decode_attention`: q [B, T, H, D], caches [B, S, K, D], lengths [B] -> [B, T, H, D]."""
    checks.decode_attention(q, key_cache, value_cache, lengths)
    batch, length, heads, head_dim = q.shape
    keys, key_heads = key_cache.shape[1:3]
    group = heads // key_heads
    # The G query heads of one key head become G * T queries of one head: each key is read once, not G times.
    folded = (
        q.view(batch, length, key_heads, group, head_dim)
        .permute(0, 2, 3, 1, 4)
        .reshape(batch, key_heads, group * length, head_dim)
    )
    last = lengths[:, None] - length + torch.arange(length, device=q.device)  # [B, T]
    mask = torch.arange(keys, device=q.device) <= last[..., None]  # [B, T, S]
    mask = mask.repeat(1, group, 1)[:, None]  # [B, 1, G * T, S]
    out = F.scaled_dot_product_attention(
        folded, key_cache.transpose(1, 2), value_cache.transpose(1, 2), attn_mask=mask
    )
    return (
        out.view(batch, key_heads, group, length, head_dim)
        .permute(0, 3, 1, 2, 4)
        .reshape(batch, length, heads, head_dim)
    )


class _Buffers(threading.local):
    """Memory that a thread keeps for its next call: one flat tensor per purpose and dtype, of the size that
    the largest call needed.
    """

    def __init__(self) -> None:
        self.kept: dict[tuple[str, torch.dtype], Tensor] = {}

    def get(self, purpose: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        """A contiguous tensor with arbitrary content."""
        size = math.prod(shape)
        flat = self.kept.get((purpose, dtype))
        if flat is None or flat.numel() < size:
            flat = torch.empty(size, dtype=dtype, device="cpu")
            if type(flat) is Tensor:  # and no stand-in of a mode that traces
                self.kept[purpose, dtype] = flat
        return flat[:size].view(shape)


_buffers = _Buffers()


@dataclass(frozen=True)
class _Block:
    """Some queries of some batch rows, and the keys that any of them may see."""

    rows: slice  # of T G, queries times heads of the group
    keys: slice
    # [1 or b, n G, last columns]: 0 where a query may see the key, else -inf; all queries see the keys before
    bias: Tensor

    def mask(self, scores: Tensor, *, transposed: bool = False) -> None:
        """Adds the bias to scores [b K, n G, W], or [b K, W, n G]."""
        seen = self.keys.stop - self.keys.start
        first = seen - self.bias.shape[-1]
        scores = scores.view(self.bias.shape[0], -1, *scores.shape[1:])
        if transposed:
            scores[:, :, first:].add_(self.bias.transpose(1, 2)[:, None])
        else:
            scores[..., first:].add_(self.bias[:, None])


@dataclass(frozen=True)
class _Sizes:
    """The sizes of one call."""

    batch: int
    length: int
    keys: int
    key_heads: int
    group: int
    head_dim: int
    block: int  # queries of the largest block

    @classmethod
    def of(cls, q: Tensor, k: Tensor) -> _Sizes:
        batch, length, heads, head_dim = q.shape
        group, block = heads // k.shape[2], ARITHMETIC[q.dtype].queries
        return cls(batch, length, k.shape[1], k.shape[2], group, head_dim, block)

    @property
    def queries(self) -> int:
        """Queries of a block."""
        fit = MAX_SCORES // (self.key_heads * self.group * self.keys) // MIN_QUERIES * MIN_QUERIES
        return min(self.length, self.block, max(MIN_QUERIES, fit))

    def batches(self) -> Iterator[slice]:
        """The batch rows that are computed together."""
        rows = max(1, MAX_SCORES // (self.key_heads * self.group * self.queries * self.keys))
        for first in range(0, self.batch, rows):
            yield slice(first, min(first + rows, self.batch))

    def blocks(self, doc_start: Tensor | None, *, transposed: bool) -> Iterator[_Block]:
        """The blocks of queries, in order, of the batch rows to which doc_start [b, T] belongs."""
        size, before = self.queries, self.keys - self.length  # before: keys ahead of the first query's own
        layout = torch.empty(1, size * self.group, size, device="cpu")
        above = torch.full((size, size), -math.inf, device="cpu").triu_(1)
        diagonal = layout.copy_(above.repeat_interleave(self.group, 0))
        if transposed:
            diagonal = diagonal.transpose(1, 2).contiguous().transpose(1, 2)
        for start in range(0, self.length, size):
            stop = min(start + size, self.length)
            n, last = stop - start, stop + before
            bias, first = diagonal[:, : n * self.group, :n], 0
            if doc_start is not None:
                begins = doc_start[:, start:stop]
                low, high = (int(bound) for bound in begins.aminmax())
                first = min(max(low, 0), last - 1)
                if high > first or last - first < n:
                    begins = begins.repeat_interleave(self.group, 1)[..., None]
                    own = torch.arange(last - n, last, device="cpu").repeat_interleave(self.group)[:, None]
                    key = torch.arange(first, last, device="cpu")
                    hidden = (key < begins) | (key > own)  # [b, n G, W]
                    bias = torch.zeros(hidden.shape, device="cpu").masked_fill_(hidden, -math.inf)
            yield _Block(slice(start * self.group, stop * self.group), slice(first, last), bias)

    def fold(self, x: Tensor, purpose: str, dtype: torch.dtype) -> Tensor:
        """[b, n, H, ...] -> [b K, n G, ...], or [b, n, K, ...] -> [b K, n, ...], in a buffer of dtype."""
        b, n, heads, *rest = x.shape
        group = heads // self.key_heads
        out = _buffers.get(purpose, (b, self.key_heads, n, group, *rest), dtype)
        out.copy_(x.unflatten(2, (self.key_heads, group)).transpose(1, 2))
        return out.view(b * self.key_heads, n * group, *rest)

    def unfold(self, x: Tensor, into: Tensor) -> None:
        """Writes x [b K, n G, ...] to into [b, n, H, ...], rounded to its dtype."""
        b, n, heads, *rest = into.shape
        shape = self.key_heads, heads // self.key_heads
        into.unflatten(2, shape).copy_(x.view(b, shape[0], n, shape[1], *rest).transpose(1, 2))


class _BlockedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, doc_start: Tensor | None, scale: float) -> Tensor:
        sizes, narrow, wide, get = _Sizes.of(q, k), q.dtype, torch.float32, _buffers.get
        how = ARITHMETIC[narrow]
        out = torch.empty(q.shape, dtype=narrow, device="cpu")
        heads = q.shape[0], k.shape[2], q.shape[1] * sizes.group, 1
        lse = torch.empty(heads, dtype=wide, device="cpu")
        for batch in sizes.batches():
            starts = None if doc_start is None else doc_start[batch]
            queries, keys = sizes.fold(q[batch], "queries", wide), sizes.fold(k[batch], "keys", wide)
            values = sizes.fold(v[batch], "values", narrow)
            mixed, sums = get("mixed", tuple(queries.shape), narrow), lse[batch].flatten(0, 1)
            for block in sizes.blocks(starts, transposed=False):
                rows, seen = block.rows, block.keys
                shape = queries.shape[0], rows.stop - rows.start, seen.stop - seen.start
                s = get("scores", shape)
                torch.baddbmm(
                    s, queries[:, rows], keys[:, seen].transpose(1, 2), beta=0, alpha=scale * how.unit, out=s
                )
                block.mask(s)
                highest = s.amax(-1, keepdim=True).clamp_(min=LOWEST)
                total = how.exp_(s.sub_(highest)).sum(-1, keepdim=True).clamp_(min=TINY)
                s.mul_(total.reciprocal())  # before the product, whose result is then rounded once
                p = s if narrow == wide else get("weights", shape, narrow).copy_(s)
                torch.bmm(p, values[:, seen], out=mixed[:, rows])
                torch.add(highest, how.log_(total), out=sums[:, rows])
            sizes.unfold(mixed, out[batch])
        ctx.save_for_backward(q, k, v, out, lse, doc_start)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        checks.first_derivative("attention")
        q, k, v, out, lse, doc_start = ctx.saved_tensors
        sizes, narrow, wide, get = _Sizes.of(q, k), q.dtype, torch.float32, _buffers.get
        how, scale = ARITHMETIC[narrow], ctx.scale
        dq, dk, dv = (torch.empty(x.shape, dtype=narrow, device="cpu") for x in (q, k, v))
        for batch in sizes.batches():
            starts = None if doc_start is None else doc_start[batch]
            queries, keys, upstream = (
                sizes.fold(x[batch], name, narrow)
                for x, name in ((q, "queries"), (k, "keys"), (dout, "upstream"))
            )
            values = sizes.fold(v[batch], "values", wide)
            wide_queries, wide_keys, wide_upstream = (
                get(name, tuple(x.shape)).copy_(x)
                for x, name in ((queries, "queries"), (keys, "keys"), (upstream, "upstream"))
            )
            product = get("mixed", tuple(out[batch].shape)).copy_(dout[batch]).mul_(out[batch])
            delta = sizes.fold(product.sum(-1), "delta", wide).mul_(-scale).unsqueeze(1)
            bias = lse[batch].flatten(0, 1).neg().transpose(1, 2)
            dqueries = get("mixed", tuple(queries.shape), narrow)
            dkeys, dvalues = (get(name, tuple(keys.shape)).zero_() for name in ("dkeys", "dvalues"))
            for block in sizes.blocks(starts, transposed=True):
                rows, seen = block.rows, block.keys
                shape = queries.shape[0], seen.stop - seen.start, rows.stop - rows.start
                p, ds = get("scores", shape), get("dscores", shape)
                q_rows, do_rows = (x[:, rows].transpose(1, 2) for x in (wide_queries, wide_upstream))
                torch.baddbmm(bias[..., rows], wide_keys[:, seen], q_rows, alpha=scale * how.unit, out=p)
                block.mask(p, transposed=True)
                how.exp_(p)
                torch.baddbmm(delta[..., rows], values[:, seen], do_rows, alpha=scale, out=ds)
                ds.mul_(p)
                if narrow != wide:
                    p, ds = get("weights", shape, narrow).copy_(p), get("dweights", shape, narrow).copy_(ds)
                how.add_product(dvalues[:, seen], p, upstream[:, rows])
                how.add_product(dkeys[:, seen], ds, queries[:, rows])
                torch.bmm(ds.transpose(1, 2), keys[:, seen], out=dqueries[:, rows])
            sizes.unfold(dqueries, dq[batch])
            sizes.unfold(dkeys, dk[batch])
            sizes.unfold(dvalues, dv[batch])
        return dq, dk, dv, None, None
