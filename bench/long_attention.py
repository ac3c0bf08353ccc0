"""Attention over rows longer than those of a training step, and within packed documents: cases of
bench/kernels.py.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from bench import work
from bench.ops import Case, FlexAttention, Shapes, attention_peers, compile_with, on_gpu, random_qkv, sdpa
from bench.peers import status
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
        {
            "triton": backend.attention,
            "reference": TORCH.attention,
            **attention_peers(shapes, compile_with(compiler)),
        },
    )


def document_mask(doc_start: Tensor, dtype: torch.dtype) -> Tensor:
    """doc_start [B, T] -> [B, 1, T, T], 0 where a query sees a key and -inf elsewhere, to be added to the
    scores.
    """
    position = torch.arange(doc_start.shape[1], device=doc_start.device)
    hidden = (position > position[:, None]) | (position < doc_start[:, None, :, None])
    return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, float("-inf"))


def document_attention(shapes: Shapes, backend: Backend, compiler: str, length: int) -> Case:
    """Attention within packed documents of DOCUMENT tokens on average; as many tokens in all, whatever the
    length of a row.

    Peers are told of the documents before the clock runs: FlexAttention gets its block mask, flash attention
    the documents' borders. torch has no call that tells cuDNN of borders and has a gradient: it gets a mask
    of all pairs, and skips none of them.
    """
    shapes = replace(shapes, batch=max(1, shapes.tokens // length), length=length)
    heads, key_heads, head_dim = shapes.heads
    generator = torch.Generator().manual_seed(0)
    begins = torch.rand(shapes.batch, length, generator=generator) < 1 / DOCUMENT
    begins[:, 0] = True
    position = torch.arange(length)
    doc_start = torch.where(begins, position, 0).cummax(1).values.int()
    pairs = int((position - doc_start + 1).sum())  # of a query and a key that it sees
    borders = torch.cat((begins.flatten().nonzero().flatten(), torch.tensor([shapes.tokens]))).int()
    longest = int(borders.diff().max())
    borders, doc_start = borders.to(shapes.device), doc_start.to(shapes.device)
    flex_call = FlexAttention(compile_with(compiler), doc_start=doc_start)

    # In the dtype of the queries: cuDNN takes another one, and reads it as if it were theirs.
    mask = functools.cache(lambda: document_mask(doc_start, shapes.dtype))

    def ours(attention: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda q, k, v: attention(q, k, v, doc_start)

    def flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if shapes.device.type == "cpu":
            raise status.Unavailable(f"torch flash attention {torch.__version__}: needs a GPU for documents")
        from torch.nn.attention.varlen import varlen_attn

        # torch 2.11 takes fewer key heads than query heads without being told.
        known = inspect.signature(varlen_attn).parameters
        grouped: Any = {"enable_gqa": True} if "enable_gqa" in known else {}
        flat, keys, values = (x.flatten(0, 1) for x in (q, k, v))
        out = varlen_attn(
            flat, keys, values, borders, borders, longest, longest, window_size=(-1, 0), **grouped
        )
        assert isinstance(out, Tensor)
        return out.view(q.shape)

    cost = work.attention(shapes.batch, length, heads, key_heads, head_dim, shapes.dtype.itemsize)
    flops = 4 * pairs * heads * head_dim
    return Case(
        f"attention documents {length}",
        work.Cost(replace(cost.forward, flops=flops), replace(cost.backward, flops=flops * 5 // 2)),
        lambda seed: random_qkv(shapes, seed),
        {
            "triton": ours(backend.attention),
            "reference": ours(TORCH.attention),
            "flex": on_gpu(shapes, flex_call),
            "flash": flash,
            "cudnn": sdpa(shapes, SDPBackend.CUDNN_ATTENTION, mask),
        },
    )
