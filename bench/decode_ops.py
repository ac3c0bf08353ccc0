"""The operations of a decode step, for bench/ops.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench import work
from bench.case import EPS, Case, Compile, Shapes, forms, normal, with_eps
from kernels import TORCH, Backend, LayerWeights
from kernels.types import TokenState
from smollm2.layers import rotary_tables

# at most, of a decode step: for more the switch of kernels/backend.py takes the composition, not the fused
# kernels
DECODE_ROWS = 16


def decode_layer(shapes: Shapes, backend: Backend, compiled: Compile) -> Case:
    """A whole block for one new token of min(B, 16) rows: the last of 2 T keys, which it writes into caches
    of its own.

    Every call writes the same, so one call may follow the other. What was written is an output like any
    other, and compared.
    """

    def of(ops: Backend) -> Callable[..., Tensor]:
        def layer(cos: Tensor, sin: Tensor, x: Tensor, *rest: Tensor) -> Tensor:
            keys, values, lengths = rest[6:]
            weights = LayerWeights(*rest[:6])
            return ops.decode_layer(x, weights, keys, values, lengths, cos, sin, eps=EPS, ops=ops)

        return layer

    return _layers("decode_layer", 1, of, shapes, backend, compiled)


def decode_layers(shapes: Shapes, backend: Backend, compiled: Compile) -> Case:
    """Four blocks as in `decode_layer`; "triton joined": in one launch, also where the switch does not take
    that.
    """

    def of(ops: Backend | None) -> Callable[..., Tensor]:
        def layers(cos: Tensor, sin: Tensor, x: Tensor, *rest: Tensor) -> Tensor:
            parts = [rest[start : start + 8] for start in range(0, len(rest) - 1, 8)]
            weights = [LayerWeights(*part[:6]) for part in parts]
            caches = [part[6] for part in parts], [part[7] for part in parts], rest[-1], cos, sin
            if ops is not None:
                return ops.decode_layers(x, weights, *caches, eps=EPS, ops=ops)
            from kernels.decode_layers import decode_layers

            return decode_layers(x, weights, *caches, eps=EPS, by_phase=x.device.type != "cuda")

        return layers

    return _layers("decode_layers", 4, of, shapes, backend, compiled, joined=of(None))


def _layers(
    op: str, count: int, of: Callable[[Backend], Callable[..., Tensor]], shapes: Shapes, backend: Backend,
    compiled: Compile, joined: Callable[..., Tensor] | None = None,
) -> Case:  # fmt: skip
    """The case of so many blocks. of: a backend -> what takes cos, sin, x, of each block its six weights and
    two caches, and the lengths.
    """
    config, (heads, key_heads, head_dim) = shapes.config, shapes.heads
    rows, keys = min(shapes.batch, DECODE_ROWS), 2 * shapes.length
    hidden, width = config.hidden_size, config.intermediate_size
    # the loss is measured for rows that no table has the angles of
    last = min(keys, config.max_position_embeddings) - 1
    position = torch.full((rows, 1), last, device=shapes.device)
    tables = [table[position] for table in rotary_tables(config, shapes.device)]
    qkv_size, o_size = ((heads + 2 * key_heads) * head_dim, hidden), (hidden, heads * head_dim)
    matrices = [qkv_size, o_size, (2 * width, hidden), (hidden, width)]
    sizes = [(hidden,), (hidden,), *matrices, *[(rows, keys, key_heads, head_dim)] * 2]

    def inputs(seed: int) -> list[Tensor]:
        drawn = normal(shapes, seed, (rows, 1, hidden), *(sizes * count))
        x, *rest = (tensor.detach() for tensor in drawn)
        lengths = torch.full((rows,), keys, device=shapes.device)
        blocks: list[Tensor] = []
        for start in range(0, len(rest), len(sizes)):
            norm, post_norm, *weights, key_cache, value_cache = rest[start : start + len(sizes)]
            qkv, o, gate_up, down = (weight * weight.shape[1] ** -0.5 for weight in weights)
            blocks += [*LayerWeights(norm, qkv, o, post_norm, gate_up, down), key_cache, value_cache]
        return [x, *blocks, lengths]

    def with_written(function: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, ...]]:
        def call(*inputs: Tensor) -> tuple[Tensor, ...]:
            out = function(*tables, *inputs)
            caches = (cache for block in range(count) for cache in inputs[8 * block + 7 : 8 * block + 9])
            return (out, *(cache[:, -1] for cache in caches))

        return call

    layer = work.decode_layer(config, rows, keys, shapes.dtype.itemsize)
    return Case(
        op,
        layer * count,
        inputs,
        {
            "triton": with_written(of(backend)),
            **({"triton joined": with_written(joined)} if joined else {}),
            "reference": with_written(of(TORCH)),
            "compile": with_written(compiled(of(TORCH))),
        },
        tokens=rows,
    )


def decode_head(shapes: Shapes, backend: Backend, compiled: Compile) -> Case:
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
        forms("decode_head", backend, compiled, with_eps),
        tokens=rows,
    )


def decode_best(shapes: Shapes, backend: Backend, compiled: Compile) -> Case:
    """As _decode_head, for greedy decoding. Candidates differ between implementations: what is compared is
    the highest score of each row.
    """
    config, rows = shapes.config, min(shapes.batch, DECODE_ROWS)
    head = decode_head(shapes, backend, compiled)

    def highest(function: Callable[..., Any]) -> Callable[..., Tensor]:
        return lambda *tensors: function(*tensors, EPS)[0].amax(-1)

    return Case(
        "decode_best",
        work.decode_best(rows, config.hidden_size, config.vocab_size, shapes.dtype.itemsize),
        lambda seed: [tensor.squeeze(1) if tensor.dim() == 3 else tensor for tensor in head.inputs(seed)],
        forms("decode_best", backend, compiled, highest),
        tokens=rows,
    )


def decode_inputs(shapes: Shapes, backend: Backend, compiled: Compile) -> Case:
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


def next_token(shapes: Shapes, backend: Backend, compiled: Compile) -> Case:
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
