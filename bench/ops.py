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

from bench import weight_ops, work
from bench.case import Case, Compile, Shapes, compile_with, from_liger, from_quack, library, normal
from bench.peers import status
from kernels import TORCH, Backend, LayerWeights
from kernels.types import TokenState
from smollm2.model import rotary_tables

EPS = 1e-5
# at most, of a decode step: for more the switch of kernels/backend.py takes the composition, not the fused
# kernels
DECODE_ROWS = 16


def cases(shapes: Shapes, backend: Backend, compiler: str) -> list[Case]:
    """All operations. compiler: backend of torch.compile, "inductor" where times count."""
    return [make(shapes, backend, compile_with(compiler)) for make in MAKERS.values()]


# The peer behind a variant; "torch.compile" is that of the reference.
PEER_OF = {
    "compile": "torch.compile", "liger": "liger-kernel", "quack": "quack-kernels", "flash-attn": "flash-attn",
    "flash": "torch flash attention", "cudnn": "torch cuDNN attention", "flex": "torch FlexAttention",
}  # fmt: skip


def forms(
    op: str, backend: Backend, compiled: Compile, given: Callable[[Any], Any] = lambda call: call
) -> dict[str, Callable[..., Any]]:
    """The three forms that every operation has. given: adds the arguments that are no tensors of a case."""
    ours, reference = given(getattr(backend, op)), given(getattr(TORCH, op))
    return {"triton": ours, "reference": reference, "compile": compiled(reference)}


def _rms_norm(shapes: Shapes, backend: Backend, compiled: Compile) -> Case:
    hidden = shapes.config.hidden_size
    return Case(
        "rms_norm",
        work.rms_norm(shapes.tokens, hidden, shapes.dtype.itemsize),
        lambda seed: normal(shapes, seed, (shapes.batch, shapes.length, hidden), (hidden,)),
        {
            **forms("rms_norm", backend, compiled, _with_eps),
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
            **forms("add_rms_norm", backend, compiled, _with_eps),
            "F.rms_norm": aten,
            "liger": lambda *given: from_liger(shapes, "liger_fused_add_rms_norm")(
                *given, EPS, in_place=False
            ),
            "quack": lambda x, other, weight: from_quack(shapes, "quack", "rmsnorm")(
                x, weight, residual=other, eps=EPS, prenorm=True
            ),
        },
    )


def _with_eps(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *tensors: function(*tensors, EPS)


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


def _decode_layer(shapes: Shapes, backend: Backend, compiled: Compile) -> Case:
    """A whole block for one new token of min(B, 16) rows: the last of 2 T keys, which it writes into caches
    of its own.

    Every call writes the same, so one call may follow the other. What was written is an output like any
    other, and compared.
    """
    config, (heads, key_heads, head_dim) = shapes.config, shapes.heads
    rows, keys = min(shapes.batch, DECODE_ROWS), 2 * shapes.length
    hidden, width = config.hidden_size, config.intermediate_size
    # the loss is measured for rows that no table has the angles of
    last = min(keys, config.max_position_embeddings) - 1
    position = torch.full((rows, 1), last, device=shapes.device)
    cos, sin = (table[position] for table in rotary_tables(config, shapes.device))
    qkv_size, o_size = ((heads + 2 * key_heads) * head_dim, hidden), (hidden, heads * head_dim)
    matrices = [qkv_size, o_size, (2 * width, hidden), (hidden, width)]

    def inputs(seed: int) -> list[Tensor]:
        sizes = [(rows, 1, hidden), (hidden,), (hidden,), *matrices, *[(rows, keys, key_heads, head_dim)] * 2]
        drawn = (tensor.detach() for tensor in normal(shapes, seed, *sizes))
        x, norm, post_norm, *weights, key_cache, value_cache = drawn
        qkv, o, gate_up, down = (weight * weight.shape[1] ** -0.5 for weight in weights)
        lengths = torch.full((rows,), keys, device=shapes.device)
        return [x, *LayerWeights(norm, qkv, o, post_norm, gate_up, down), key_cache, value_cache, lengths]

    def of(ops: Backend) -> Callable[..., Tensor]:
        def layer(x: Tensor, *rest: Tensor) -> Tensor:
            key_cache, value_cache, lengths = rest[6:]
            return ops.decode_layer(
                x, LayerWeights(*rest[:6]), key_cache, value_cache, lengths, cos, sin, eps=EPS, ops=ops
            )

        return layer

    def with_written(function: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, ...]]:
        return lambda *inputs: (function(*inputs), *(cache[:, -1] for cache in inputs[7:9]))

    return Case(
        "decode_layer",
        work.decode_layer(config, rows, keys, shapes.dtype.itemsize),
        inputs,
        {
            "triton": with_written(of(backend)),
            "reference": with_written(of(TORCH)),
            "compile": with_written(compiled(of(TORCH))),
        },
        tokens=rows,
    )


def _decode_head(shapes: Shapes, backend: Backend, compiled: Compile) -> Case:
    """The final norm and the logits of one new token of min(B, 16) rows."""
    config, rows = shapes.config, min(shapes.batch, DECODE_ROWS)
    hidden, vocabulary = config.hidden_size, config.vocab_size

    def inputs(seed: int) -> list[Tensor]:
        sizes = ((rows, 1, hidden), (hidden,), (vocabulary, hidden))
        x, norm, head = (tensor.detach() for tensor in normal(shapes, seed, *sizes))
        return [x, norm, head * hidden**-0.5]

    return Case(
        "decode_head",
        work.decode_head(rows, hidden, vocabulary, shapes.dtype.itemsize),
        inputs,
        forms("decode_head", backend, compiled, _with_eps),
        tokens=rows,
    )


def _decode_best(shapes: Shapes, backend: Backend, compiled: Compile) -> Case:
    """As _decode_head, for greedy decoding. Candidates differ between implementations: what is compared is
    the highest score of each row.
    """
    config, rows = shapes.config, min(shapes.batch, DECODE_ROWS)
    head = _decode_head(shapes, backend, compiled)

    def highest(function: Callable[..., Any]) -> Callable[..., Tensor]:
        return lambda *tensors: function(*tensors, EPS)[0].amax(-1)

    return Case(
        "decode_best",
        work.decode_best(rows, config.hidden_size, config.vocab_size, shapes.dtype.itemsize),
        lambda seed: [tensor.squeeze(1) if tensor.dim() == 3 else tensor for tensor in head.inputs(seed)],
        forms("decode_best", backend, compiled, highest),
        tokens=rows,
    )


def _decode_inputs(shapes: Shapes, backend: Backend, compiled: Compile) -> Case:
    """What min(B, 16) rows of different lengths begin a step with. The lengths, which a call advances, are
    copied first: a small kernel more in every variant.
    """
    config, rows = shapes.config, min(shapes.batch, DECODE_ROWS)
    tables = rotary_tables(config, shapes.device)

    def inputs(seed: int) -> list[Tensor]:
        (embedding,) = normal(shapes, seed, (config.vocab_size, config.hidden_size))
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(config.vocab_size, (rows, 1), generator=generator)
        lengths = torch.randint(len(tables[0]), (rows,), generator=generator)
        return [tokens.to(shapes.device), embedding.detach(), lengths.to(shapes.device)]

    def with_tables(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda tokens, embedding, lengths: function(tokens, embedding, lengths.clone(), *tables)

    return Case(
        "decode_inputs",
        work.decode_inputs(rows, config.hidden_size, config.head_dim // 2, shapes.dtype.itemsize),
        inputs,
        forms("decode_inputs", backend, compiled, with_tables),
        tokens=rows,
    )


def _next_token(shapes: Shapes, backend: Backend, compiled: Compile) -> Case:
    """The end of a step from whole logits, as more than 16 rows have them: 2 B rows. The slots, which a call
    advances, are copied first.
    """
    rows, vocabulary = 2 * shapes.batch, shapes.config.vocab_size
    ends = torch.zeros(1, dtype=torch.int64, device=shapes.device)

    def inputs(seed: int) -> list[Tensor]:
        (scores,) = normal(shapes, seed, (rows, vocabulary))
        tokens, output, slot = (
            torch.zeros(size, dtype=torch.int64, device=shapes.device)
            for size in ((rows, 1), (1, rows), rows)
        )
        return [scores.detach(), tokens, slot.bool(), output, slot]

    def with_state(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(scores: Tensor, *buffers: Tensor) -> tuple[Tensor, Tensor]:
            state = TokenState(*buffers)
            function(scores, None, state._replace(slot=state.slot.clone()), ends, 0)
            return state.tokens, state.output

        return call

    return Case(
        "next_token",
        work.next_token(rows, vocabulary, shapes.dtype.itemsize),
        inputs,
        forms("next_token", backend, compiled, with_state),
        tokens=rows,
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
    "decode_attention": _decode_attention, "decode_layer": _decode_layer, "decode_head": _decode_head,
    "decode_inputs": _decode_inputs, "decode_best": _decode_best, "next_token": _next_token, "rope": _rope,
    "rope_cache": _rope_cache,
}  # fmt: skip
