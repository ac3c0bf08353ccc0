"""What is timed: every operation at the model's shapes, each with what one would use instead (bench/case.py
says how).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from bench import decode_ops, weight_ops, work
from bench.case import (
    EPS,
    Case,
    Compile,
    Shapes,
    compile_with,
    forms,
    from_liger,
    from_quack,
    library,
    normal,
    with_eps,
)
from bench.peers import status
from kernels import Backend
from smollm2.layers import rotary_tables


def cases(shapes: Shapes, backend: Backend, compiler: str) -> list[Case]:
    """All operations. compiler: backend of torch.compile, "inductor" where times count."""
    return [make(shapes, backend, compile_with(compiler)) for make in MAKERS.values()]


# The peer behind a variant; "torch.compile" is that of the reference.
PEER_OF = {
    "compile": "torch.compile", "liger": "liger-kernel", "quack": "quack-kernels", "flash-attn": "flash-attn",
    "flash": "torch flash attention", "cudnn": "torch cuDNN attention", "flex": "torch FlexAttention",
}  # fmt: skip


def _rms_norm(shapes: Shapes, backend: Backend, compiled: Compile) -> Case:
    hidden = shapes.config.hidden_size
    return Case(
        "rms_norm",
        work.rms_norm(shapes.tokens, hidden, shapes.dtype.itemsize),
        lambda seed: normal(shapes, seed, (shapes.batch, shapes.length, hidden), (hidden,)),
        {
            **forms("rms_norm", backend, compiled, with_eps),
            "F.rms_norm": lambda x, weight: F.rms_norm(x, weight.shape, weight, EPS),
            "liger": lambda x, weight: from_liger(shapes, "liger_rms_norm")(x, weight, EPS, in_place=False),
            "quack": lambda x, weight: from_quack(shapes, "quack", "rmsnorm")(x, weight, eps=EPS),
        },
    )


def _add_rms_norm(shapes: Shapes, backend: Backend, compiled: Compile) -> Case:
    hidden = shapes.config.hidden_size
    stream = (shapes.batch, shapes.length, hidden)

    def aten(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        total = x + residual
        return F.rms_norm(total, weight.shape, weight, EPS), total

    return Case(
        "add_rms_norm",
        work.add_rms_norm(shapes.tokens, hidden, shapes.dtype.itemsize),
        lambda seed: normal(shapes, seed, stream, stream, (hidden,)),
        {
            **forms("add_rms_norm", backend, compiled, with_eps),
            "F.rms_norm": aten,
            "liger": lambda *given: from_liger(shapes, "liger_fused_add_rms_norm")(
                *given, EPS, in_place=False
            ),
            "quack": lambda x, other, weight: from_quack(shapes, "quack", "rmsnorm")(
                x, weight, residual=other, eps=EPS, prenorm=True
            ),
        },
    )


def _rope_qkv(shapes: Shapes, backend: Backend, compiled: Compile) -> Case:
    heads, key_heads, head_dim = shapes.heads
    cos, sin = (table[: shapes.length] for table in rotary_tables(shapes.config, shapes.device))

    def with_tables(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda qkv: function(qkv, cos, sin, key_heads)

    def liger(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = qkv.split((heads, key_heads, key_heads), dim=2)
        full = [torch.cat((table, table), -1)[None].to(qkv.dtype) for table in (cos, sin)]
        q, k = from_liger(shapes, "liger_rope")(q.transpose(1, 2), k.transpose(1, 2), *full)
        return q.transpose(1, 2), k.transpose(1, 2), v

    return Case(
        "rope_qkv",
        work.rope_qkv(shapes.tokens, shapes.length, heads, key_heads, head_dim, shapes.dtype.itemsize),
        lambda seed: normal(shapes, seed, (shapes.batch, shapes.length, heads + 2 * key_heads, head_dim)),
        {**forms("rope_qkv", backend, compiled, with_tables), "liger": liger},
    )


def _rope_cache(shapes: Shapes, backend: Backend, compiled: Compile) -> Case:
    """One new token for each of 2 B rows, the last of T keys, written into caches of its own.

    Every call writes the same, so one call may follow the other. What was written is an output too.
    """
    heads, key_heads, head_dim = shapes.heads
    batch, keys = 2 * shapes.batch, shapes.length
    cos, sin = (table[-1].expand(batch, 1, -1) for table in rotary_tables(shapes.config, shapes.device))

    def inputs(seed: int) -> list[Tensor]:
        sizes = [(batch, 1, heads + 2 * key_heads, head_dim), *[(batch, keys, key_heads, head_dim)] * 2]
        tensors = [tensor.detach() for tensor in normal(shapes, seed, *sizes)]
        return [*tensors, torch.full((batch,), keys, device=shapes.device)]

    def with_written(function: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, ...]]:
        def call(qkv: Tensor, key_cache: Tensor, value_cache: Tensor, lengths: Tensor) -> tuple[Tensor, ...]:
            q = function(qkv, cos, sin, key_cache, value_cache, lengths)
            return q, key_cache[:, -1], value_cache[:, -1]

        return call

    return Case(
        "rope_cache",
        work.rope_cache(batch, heads, key_heads, head_dim, shapes.dtype.itemsize),
        inputs,
        forms("rope_cache", backend, compiled, with_written),
        tokens=batch,
    )


def _rope(shapes: Shapes, backend: Backend, compiled: Compile) -> Case:
    """Queries and keys in tensors of their own. Liger's kernel, which would turn these in place, stands
    beside rope_qkv.
    """
    heads, key_heads, head_dim = shapes.heads
    cos, sin = (table[: shapes.length] for table in rotary_tables(shapes.config, shapes.device))

    def with_tables(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda q, k: function(q, k, cos, sin)

    sizes = [(shapes.batch, shapes.length, count, head_dim) for count in (heads, key_heads)]
    return Case(
        "rope",
        work.rope(shapes.tokens, shapes.length, heads, key_heads, head_dim, shapes.dtype.itemsize),
        lambda seed: normal(shapes, seed, *sizes),
        forms("rope", backend, compiled, with_tables),
    )


def _attention(shapes: Shapes, backend: Backend, compiled: Compile) -> Case:
    heads, key_heads, head_dim = shapes.heads
    return Case(
        "attention",
        work.attention(shapes.batch, shapes.length, heads, key_heads, head_dim, shapes.dtype.itemsize),
        lambda seed: random_qkv(shapes, seed),
        {
            **forms("attention", backend, compiled),
            "math": sdpa(shapes, SDPBackend.MATH),
            **attention_peers(shapes, compiled),
        },
    )


def random_qkv(shapes: Shapes, seed: int) -> list[Tensor]:
    heads, key_heads, head_dim = shapes.heads
    counts = (heads, key_heads, key_heads)
    return normal(shapes, seed, *[(shapes.batch, shapes.length, count, head_dim) for count in counts])


def sdpa(shapes: Shapes, kind: SDPBackend, mask: Callable[[], Tensor] | None = None) -> Callable[..., Tensor]:
    """torch's attention by one of its kernels. mask: makes what is added to the scores, [B, 1, T, S]; None:
    causal, which costs less.
    """
    heads, key_heads, _ = shapes.heads

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if kind == SDPBackend.CUDNN_ATTENTION and shapes.device.type == "cpu":
            raise RuntimeError(f"torch cuDNN attention {torch.__version__}: needs a GPU")
        with sdpa_kernel(kind):
            out = F.scaled_dot_product_attention(
                q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2),
                attn_mask=None if mask is None else mask(), is_causal=mask is None,
                enable_gqa=heads != key_heads,
            )  # fmt: skip
        return out.transpose(1, 2)

    return call


def on_gpu(shapes: Shapes, flex: FlexAttention) -> Callable[..., Tensor]:
    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if shapes.device.type == "cpu":
            raise status.Unavailable(
                f"torch FlexAttention {torch.__version__}: needs a GPU: on a CPU it has no backward pass"
            )
        return flex(q, k, v, causal=True)

    return call


def attention_peers(shapes: Shapes, compiled: Compile) -> dict[str, Callable[..., Tensor]]:
    """Causal attention of others, each with query and key heads as the model has them."""
    flash_attn = library("flash-attn", "flash_attn", "flash_attn_func", shapes.device)
    return {
        "flash": sdpa(shapes, SDPBackend.FLASH_ATTENTION),
        "cudnn": sdpa(shapes, SDPBackend.CUDNN_ATTENTION),
        "flex": on_gpu(shapes, FlexAttention(compiled)),
        "flash-attn": lambda q, k, v: flash_attn(q, k, v, causal=True),
    }


class FlexAttention:
    """torch's FlexAttention under torch.compile, which makes its kernel; the block mask is made once for a
    length.

    doc_start [B, T]: as of `attention`; for calls of one shape.
    """

    def __init__(self, compiled: Compile, doc_start: Tensor | None = None, **kernel_options: Any) -> None:
        self._function, self._doc_start = compiled(flex_attention), doc_start
        self._options = kernel_options or None
        self._masks: dict[tuple[int, torch.device], BlockMask] = {}

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        """q [B, T, H, D], k, v [B, S, K, D] -> [B, T, H, D]; without causal every query sees every key."""
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        key = (q.shape[2], q.device)
        if causal and key not in self._masks:
            self._masks[key] = self._mask(*key, k.shape[2])
        mask = self._masks[key] if causal else None
        out: Tensor = self._function(
            q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1], kernel_options=self._options
        )
        return out.transpose(1, 2)

    def _mask(self, queries: int, device: torch.device, keys: int) -> BlockMask:
        starts = self._doc_start
        if starts is None:
            return create_block_mask(
                lambda batch, head, query, key: query >= key, None, None, queries, keys, device=device
            )

        def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return (query >= key) & (key >= starts[batch, query])

        return create_block_mask(sees, starts.shape[0], None, queries, keys, device=device)


def _decode_attention(shapes: Shapes, backend: Backend, compiled: Compile) -> Case:
    """One new token for each of 2 B rows, over full caches of 2 T keys: 64 rows of 1,024 keys at the full
    size.
    """
    heads, key_heads, head_dim = shapes.heads
    batch, keys = 2 * shapes.batch, 2 * shapes.length

    def inputs(seed: int) -> list[Tensor]:
        sizes = [(batch, 1, heads, head_dim), *[(batch, keys, key_heads, head_dim)] * 2]
        tensors = [tensor.requires_grad_(False) for tensor in normal(shapes, seed, *sizes)]
        return [*tensors, torch.full((batch,), keys, device=shapes.device)]

    def flex_decode(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
        """The kernel that FlexAttention has for one query. It wants groups of a power of two: at 9 heads over
        3 its error is the row.
        """
        if shapes.device.type == "cpu":
            raise status.Unavailable(
                f"torch FlexAttention {torch.__version__}: needs a GPU: its decode kernel is one of Triton's"
            )
        return forced(q, k, v, causal=False)

    flex, forced = FlexAttention(compiled), FlexAttention(compiled, BACKEND="TRITON_DECODE")
    flash_attn = library("flash-attn", "flash_attn", "flash_attn_with_kvcache", shapes.device)
    return Case(
        "decode_attention",
        work.decode_attention(batch, keys, heads, key_heads, head_dim, shapes.dtype.itemsize),
        inputs,
        {
            **forms("decode_attention", backend, compiled),
            # all caches are full; which kernel, it decides by itself
            "flex": lambda q, k, v, lengths: flex(q, k, v, causal=False),
            "flex decode": flex_decode,
            "flash-attn": lambda q, k, v, lengths: flash_attn(
                q, k, v, cache_seqlens=lengths.int(), causal=True
            ),
        },
        tokens=batch,
    )


def _swiglu(shapes: Shapes, backend: Backend, compiled: Compile) -> Case:
    width = shapes.config.intermediate_size
    return Case(
        "swiglu",
        work.swiglu(shapes.tokens, width, shapes.dtype.itemsize),
        lambda seed: normal(shapes, seed, (shapes.batch, shapes.length, 2 * width)),
        {
            **forms("swiglu", backend, compiled),
            "liger": lambda packed: from_liger(shapes, "liger_swiglu")(*packed.chunk(2, dim=-1)),
        },
    )


MAKERS: dict[str, Callable[[Shapes, Backend, Compile], Case]] = {
    "add_rms_norm": _add_rms_norm, "swiglu": _swiglu, "attention": _attention,
    "linear_cross_entropy": weight_ops.linear_cross_entropy, "mlp": weight_ops.mlp,
    "tied_embedding": weight_ops.tied_embedding, "rms_norm": _rms_norm, "rope_qkv": _rope_qkv,
    "decode_attention": _decode_attention, "decode_layer": decode_ops.decode_layer,
    "decode_layers": decode_ops.decode_layers, "decode_head": decode_ops.decode_head,
    "decode_inputs": decode_ops.decode_inputs, "decode_best": decode_ops.decode_best,
    "next_token": decode_ops.next_token, "rope": _rope, "rope_cache": _rope_cache,
}  # fmt: skip
