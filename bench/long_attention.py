"""Attention over rows longer than those of a training step, and within packed documents: cases of bench/kernels.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from bench import peers, work
from bench.ops import Case, FlexAttention, Shapes, attention_peers, compile_with, on_gpu, random_qkv
from kernels import TORCH, Backend

DOCUMENT = 700  # tokens of a document on average, as in cosmopedia-v2


def long_attention(shapes: Shapes, backend: Backend, compiler: str, length: int) -> Case:
    """Attention over longer rows, as many tokens in all."""
    shapes = replace(shapes, batch=max(1, shapes.tokens // length), length=length)
    heads, key_heads, head_dim = shapes.heads
    return Case(
        f"attention {length}",
        work.attention(shapes.batch, length, heads, key_heads, head_dim, shapes.dtype.itemsize),
        lambda seed: random_qkv(shapes, seed),
        {"triton": backend.attention, "reference": TORCH.attention, **attention_peers(shapes, compile_with(compiler))},
    )


def document_attention(shapes: Shapes, backend: Backend, compiler: str, length: int) -> Case:
    """Attention within packed documents of DOCUMENT tokens on average; as many tokens in all, whatever the length of a row.

    Peers are told of the documents before the clock runs: FlexAttention gets its block mask, flash attention the documents' borders.
    """
    shapes = replace(shapes, batch=max(1, shapes.tokens // length), length=length)
    heads, key_heads, head_dim = shapes.heads
    generator = torch.Generator().manual_seed(0)
    begins = torch.rand(shapes.batch, length, generator=generator) < 1 / DOCUMENT
    begins[:, 0] = True
    position = torch.arange(length)
    doc_start = torch.where(begins, position, 0).cummax(1).values.int()
    pairs = int((position - doc_start + 1).sum())  # of a query and a key that it sees
    borders = torch.cat((begins.flatten().nonzero().flatten(), torch.tensor([shapes.tokens]))).int().to(shapes.device)
    longest = int(borders.diff().max())
    doc_start = doc_start.to(shapes.device)
    flex_call = FlexAttention(compile_with(compiler), doc_start=doc_start)

    def ours(attention: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda q, k, v: attention(q, k, v, doc_start)

    def flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if shapes.device.type == "cpu":
            raise peers.Unavailable(f"torch flash attention {torch.__version__}: needs a GPU for documents")
        from torch.nn.attention.varlen import varlen_attn

        # It has no enable_gqa: every query head gets a key head of its own.
        flat, keys, values = q.flatten(0, 1), *(x.repeat_interleave(heads // key_heads, dim=2).flatten(0, 1) for x in (k, v))
        out = varlen_attn(flat, keys, values, borders, borders, longest, longest, window_size=(-1, 0))
        assert isinstance(out, Tensor)
        return out.view(q.shape)

    cost = work.attention(shapes.batch, length, heads, key_heads, head_dim, shapes.dtype.itemsize)
    flops = 4 * pairs * heads * head_dim
    return Case(
        f"attention documents {length}",
        work.Cost(replace(cost.forward, flops=flops), replace(cost.backward, flops=flops * 5 // 2)),
        lambda seed: random_qkv(shapes, seed),
        {"triton": ours(backend.attention), "reference": ours(TORCH.attention), "flex": on_gpu(shapes, flex_call), "flash": flash},
    )
