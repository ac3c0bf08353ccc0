"""What every implementation of an operation accepts. The reference and the kernels refuse the same input with
the same message.

A check looks at shapes, dtypes and devices only. It never reads a tensor's values, so it never waits for the
device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor

from kernels.types import LayerWeights, TokenState


def refuse(op: str, expected: str, got: object) -> NoReturn:
    """Raises ValueError `op: expected ..., got ...`.

    It stands behind an `or`, so that a message is built only when needed: a step makes some 3,000 checks.
    """
    raise ValueError(f"{op}: expected {expected}, got {got}")


def shape(tensor: Tensor) -> list[int]:
    """The shape as a plain list, as messages print it."""
    return list(tensor.shape)


def same_kind(op: str, tensors: Sequence[tuple[str, Tensor]]) -> None:
    """All tensors have the dtype and the device of the first one."""
    first_name, first = tensors[0]
    first.is_floating_point() or refuse(op, f"{first_name} of a floating-point dtype", first.dtype)
    for name, tensor in tensors[1:]:
        tensor.dtype == first.dtype or refuse(
            op, f"{name} of dtype {first.dtype} as {first_name}", tensor.dtype
        )
        tensor.device == first.device or refuse(
            op, f"{name} on {first.device} as {first_name}", tensor.device
        )


def _indices(op: str, name: str, tensor: Tensor, wanted: list[int], like: Tensor, like_name: str) -> None:
    """An integer tensor of the wanted shape, on the device of `like`."""
    shape(tensor) == wanted or refuse(op, f"{name} of shape {wanted}", shape(tensor))
    integer = not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)
    integer or refuse(op, f"{name} of an integer dtype", tensor.dtype)
    tensor.device == like.device or refuse(op, f"{name} on {like.device} as {like_name}", tensor.device)


def _typed(
    op: str, name: str, tensor: Tensor, wanted: list[int], dtype: torch.dtype, like: Tensor, like_name: str
) -> None:
    """A tensor of the wanted shape and dtype, on the device of `like`."""
    shape(tensor) == wanted or refuse(op, f"{name} of shape {wanted}", shape(tensor))
    tensor.dtype == dtype or refuse(op, f"{name} of dtype {dtype}", tensor.dtype)
    tensor.device == like.device or refuse(op, f"{name} on {like.device} as {like_name}", tensor.device)


def kernel_dtype(op: str, given: Tensor | torch.dtype) -> None:
    """The dtypes that the Triton kernels are written and tested for."""
    dtype = given.dtype if isinstance(given, Tensor) else given
    known = (torch.float32, torch.float16, torch.bfloat16)
    dtype in known or refuse(op, "float32, float16 or bfloat16 (the torch backend also takes float64)", dtype)


def rms_norm(op: str, x: Tensor, weight: Tensor, residual: Tensor | None = None) -> None:
    """x [..., D], weight [D] of the same dtype, or fp32 for 16 bits, residual like x."""
    x.dim() >= 1 or refuse(op, "x of shape [..., D]", shape(x))
    weight.shape == x.shape[-1:] or refuse(op, f"weight of shape [{x.shape[-1]}]", shape(weight))
    if weight.dtype == torch.float32 and x.dtype in (torch.float16, torch.bfloat16):
        weight.device == x.device or refuse(op, f"weight on {x.device}, as x", str(weight.device))
        tensors = [("x", x)]
    else:
        tensors = [("x", x), ("weight", weight)]
    if residual is not None:
        residual.shape == x.shape or refuse(op, f"residual of shape {shape(x)}", shape(residual))
        tensors.append(("residual", residual))
    same_kind(op, tensors)


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    """q [B, T, H, D], k [B, T, K, D], cos and sin [T, D/2] or [B, T, D/2] in fp32 (or fp64)."""
    q.dim() == 4 or refuse("rope", "q of shape [B, T, H, D]", shape(q))
    batch, length, _, head_dim = q.shape
    head_dim % 2 == 0 or refuse("rope", "an even head dim", head_dim)
    (k.dim() == 4 and k.shape[:2] == q.shape[:2] and k.shape[3] == head_dim) or refuse(
        "rope", f"k of shape [{batch}, {length}, K, {head_dim}]", shape(k)
    )
    same_kind("rope", [("q", q), ("k", k)])
    _tables("rope", cos, sin, batch, length, head_dim // 2, q, "q")


def _tables(
    op: str, cos: Tensor, sin: Tensor, batch: int, length: int, half: int, like: Tensor, like_name: str
) -> None:
    """cos and sin of one shape, [T, half] or [B, T, half], and one floating-point dtype, on the device of
    `like`.
    """
    for name, table in (("cos", cos), ("sin", sin)):
        # Compared one by one: Dynamo is wrong about `in` where two dynamic sizes happen to be equal.
        (table.shape == (length, half) or table.shape == (batch, length, half)) or refuse(
            op, f"{name} of shape [{length}, {half}] or [{batch}, {length}, {half}]", shape(table)
        )
        table.device == like.device or refuse(op, f"{name} on {like.device} as {like_name}", table.device)
        (table.dtype == cos.dtype and table.is_floating_point()) or refuse(
            op, "cos and sin of one floating-point dtype", table.dtype
        )
    cos.shape == sin.shape or refuse(op, f"sin of shape {shape(cos)} as cos", shape(sin))


def rope_qkv(qkv: Tensor, cos: Tensor, sin: Tensor, key_heads: int) -> None:
    """qkv [B, T, H + 2K, D], cos and sin as in rope."""
    qkv.dim() == 4 or refuse("rope_qkv", "qkv of shape [B, T, H + 2K, D]", shape(qkv))
    0 < 2 * key_heads < qkv.shape[2] or refuse(
        "rope_qkv", f"key_heads so that H + 2K = {qkv.shape[2]} with H > 0", key_heads
    )
    rope(qkv[:, :, : -2 * key_heads], qkv[:, :, -2 * key_heads : -key_heads], cos, sin)


def attention(
    op: str, q: Tensor, k: Tensor, v: Tensor, doc_start: Tensor | None = None, scale: float | None = None
) -> None:
    """q [B, T, H, D], k and v [B, S, K, D] with H a multiple of K and S >= T, doc_start [B, T] integer, a
    finite scale.
    """
    (scale is None or math.isfinite(scale)) or refuse(op, "a finite scale", scale)
    q.dim() == 4 or refuse(op, "q of shape [B, T, H, D]", shape(q))
    batch, length, heads, head_dim = q.shape
    (k.dim() == 4 and k.shape[0] == batch and k.shape[3] == head_dim) or refuse(
        op, f"keys of shape [{batch}, S, K, {head_dim}]", shape(k)
    )
    v.shape == k.shape or refuse(op, f"values of shape {shape(k)} as the keys", shape(v))
    (k.shape[2] > 0 and heads % k.shape[2] == 0) or refuse(
        op, f"key heads that divide the {heads} query heads", k.shape[2]
    )
    k.shape[1] >= length or refuse(op, f"at least as many keys as the {length} queries", k.shape[1])
    same_kind(op, [("q", q), ("k", k), ("v", v)])
    if doc_start is not None:
        _indices(op, "doc_start", doc_start, [batch, length], q, "q")


def decode_attention(q: Tensor, key_cache: Tensor, value_cache: Tensor, lengths: Tensor) -> None:
    """q [B, T, H, D], caches [B, S, K, D], lengths [B] integer."""
    attention("decode_attention", q, key_cache, value_cache)
    _indices("decode_attention", "lengths", lengths, [q.shape[0]], q, "q")


def decode_inputs(tokens: Tensor, embedding: Tensor, lengths: Tensor, cos: Tensor, sin: Tensor) -> None:
    """tokens [B, T] int64 or int32, embedding [V, E], lengths [B] integer, cos and sin [P, D/2] in fp32 (or
    fp64).
    """
    op = "decode_inputs"
    tokens.dim() == 2 or refuse(op, "tokens of shape [B, T]", shape(tokens))
    tokens.dtype in (torch.int64, torch.int32) or refuse(op, "tokens of dtype int64 or int32", tokens.dtype)
    embedding.dim() == 2 or refuse(op, "embedding of shape [V, E]", shape(embedding))
    same_kind(op, [("embedding", embedding)])
    embedding.device == tokens.device or refuse(
        op, f"embedding on {tokens.device} as tokens", embedding.device
    )
    _indices(op, "lengths", lengths, [tokens.shape[0]], tokens, "tokens")
    cos.dim() == 2 or refuse(op, "cos of shape [P, D/2]", shape(cos))
    positions, half = cos.shape
    _tables(op, cos, sin, tokens.shape[0], positions, half, tokens, "tokens")


def _caches(op: str, key_cache: Tensor, value_cache: Tensor, batch: int, length: int) -> None:
    """Both caches of one shape [B, S, K, D], with room for the T new tokens."""
    fits = key_cache.dim() == 4 and key_cache.shape[0] == batch
    (fits and key_cache.shape[1] >= length and key_cache.shape[2] > 0) or refuse(
        op, f"key cache of shape [{batch}, S, K, D] with S >= {length} and K > 0", shape(key_cache)
    )
    value_cache.shape == key_cache.shape or refuse(
        op, f"value cache of shape {shape(key_cache)} as the key cache", shape(value_cache)
    )


def rope_cache(qkv: Tensor, key_cache: Tensor, value_cache: Tensor, lengths: Tensor) -> None:
    """Caches [B, S, K, D] and lengths [B] integer for qkv [B, T, H + 2K, D], of which rope_qkv checks the
    rest.
    """
    op = "rope_cache"
    qkv.dim() == 4 or refuse(op, "qkv of shape [B, T, H + 2K, D]", shape(qkv))
    batch, length, _, head_dim = qkv.shape
    _caches(op, key_cache, value_cache, batch, length)
    key_cache.shape[3] == head_dim or refuse(op, f"caches of head dim {head_dim}", key_cache.shape[3])
    _indices(op, "lengths", lengths, [batch], qkv, "qkv")
    same_kind(op, [("qkv", qkv), ("key cache", key_cache), ("value cache", value_cache)])


def decode_layer(
    x: Tensor, weights: LayerWeights, key_cache: Tensor, value_cache: Tensor, lengths: Tensor, cos: Tensor,
    sin: Tensor,
) -> None:  # fmt: skip
    """x [B, T, E], packed weights, caches [B, S, K, D], lengths [B] integer, cos and sin [B, T, D/2] or
    [T, D/2] in fp32 (or fp64).
    """
    op = "decode_layer"
    x.dim() == 3 or refuse(op, "x of shape [B, T, hidden]", shape(x))
    batch, length, width = x.shape
    _caches(op, key_cache, value_cache, batch, length)
    key_heads, head_dim = key_cache.shape[2:]
    # Two weights tell the number of query heads and the width of the MLP; all others must agree with them.
    heads, ffn = weights.o.shape[-1] // max(1, head_dim), weights.down.shape[-1]
    (heads > 0 and heads % key_heads == 0) or refuse(
        op, f"query heads (columns of o / {head_dim}) that are a multiple of {key_heads}", heads
    )
    qkv, o = [(heads + 2 * key_heads) * head_dim, width], [width, heads * head_dim]
    wanted = [width], qkv, o, [width], [2 * ffn, width], [width, ffn]
    for name, tensor, expected in zip(weights._fields, weights, wanted, strict=True):
        shape(tensor) == expected or refuse(op, f"weights.{name} of shape {expected}", shape(tensor))
    _indices(op, "lengths", lengths, [batch], x, "x")
    named = [(f"weights.{name}", tensor) for name, tensor in weights._asdict().items()]
    same_kind(op, [("x", x), *named, ("key cache", key_cache), ("value cache", value_cache)])
    _tables(op, cos, sin, batch, length, head_dim // 2, x, "x")


def decode_head(x: Tensor, norm_weight: Tensor, head_weight: Tensor, op: str = "decode_head") -> None:
    """x [..., E], norm_weight [E], head_weight [V, E]."""
    x.dim() >= 1 or refuse(op, "x of shape [..., E]", shape(x))
    width = x.shape[-1]
    shape(norm_weight) == [width] or refuse(op, f"norm_weight of shape [{width}]", shape(norm_weight))
    (head_weight.dim() == 2 and head_weight.shape[1] == width) or refuse(
        op, f"head_weight of shape [V, {width}]", shape(head_weight)
    )
    same_kind(op, [("x", x), ("norm_weight", norm_weight), ("head_weight", head_weight)])


def decode_best(x: Tensor, norm_weight: Tensor, head_weight: Tensor, suppressed: Tensor | None) -> None:
    """x [R, E], norm_weight [E], head_weight [V, E], suppressed [V] bool."""
    op = "decode_best"
    x.dim() == 2 or refuse(op, "x of shape [R, E]", shape(x))
    decode_head(x, norm_weight, head_weight, op)
    if suppressed is not None:
        _typed(op, "suppressed", suppressed, [head_weight.shape[0]], torch.bool, x, "x")


def next_token(scores: Tensor | None, ids: Tensor | None, state: TokenState, ends: Tensor) -> None:
    """scores [B, P] of a floating dtype with P > 0, ids [B, P] int64 or int32, at least one of the two, and
    ids alone [B, 1]; the buffers of `state`; ends [N] int64.
    """
    op = "next_token"
    tokens = state.tokens
    tokens.dim() == 2 or refuse(op, "state.tokens of shape [B, 1]", shape(tokens))
    batch = tokens.shape[0]
    state.output.dim() == 2 or refuse(op, f"state.output of shape [C, {batch}]", shape(state.output))
    wanted = (
        ("tokens", [batch, 1], torch.int64), ("finished", [batch], torch.bool),
        ("output", [len(state.output), batch], torch.int64), ("slot", [batch], torch.int64),
    )  # fmt: skip
    for name, size, dtype in wanted:
        _typed(op, f"state.{name}", getattr(state, name), size, dtype, tokens, "state.tokens")
    ends.dim() == 1 or refuse(op, "ends of shape [N]", shape(ends))
    _typed(op, "ends", ends, shape(ends), torch.int64, tokens, "state.tokens")
    columns = 1 if scores is None else scores.shape[-1]
    if scores is not None:
        (scores.dim() == 2 and len(scores) == batch and scores.shape[1] > 0) or refuse(
            op, f"scores of shape [{batch}, P] with P > 0", shape(scores)
        )
        same_kind(op, [("scores", scores)])
        scores.device == tokens.device or refuse(
            op, f"scores on {tokens.device} as state.tokens", scores.device
        )
    ids is not None or scores is not None or refuse(op, "scores, ids or both", "neither")
    if ids is not None:
        shape(ids) == [batch, columns] or refuse(op, f"ids of shape [{batch}, {columns}]", shape(ids))
        ids.dtype in (torch.int64, torch.int32) or refuse(op, "ids of dtype int64 or int32", ids.dtype)
        ids.device == tokens.device or refuse(op, f"ids on {tokens.device} as state.tokens", ids.device)


def swiglu(gate: Tensor, up: Tensor | None) -> None:
    """gate and up of one shape [..., F], or gate alone of shape [..., 2F]."""
    gate.dim() >= 1 or refuse("swiglu", "gate of shape [..., F]", shape(gate))
    if up is None:
        gate.shape[-1] % 2 == 0 or refuse(
            "swiglu", "an even last dimension of the packed gate and up", gate.shape[-1]
        )
        same_kind("swiglu", [("gate", gate)])
        return
    up.shape == gate.shape or refuse("swiglu", f"up of shape {shape(gate)} as gate", shape(up))
    same_kind("swiglu", [("gate", gate), ("up", up)])


def grid(op: str, rows: int) -> None:
    """Rows times heads, which are the second dimension of a grid: CUDA has 65,535 of them."""
    rows <= 65535 or refuse(op, "at most 65,535 rows times heads; split the batch", rows)


def first_derivative(op: str) -> None:
    """Called in a backward pass that cannot be differentiated: refuses create_graph=True, which would leave
    terms out silently.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(f"{op} has first derivatives only; leave create_graph=True out")


def _copy(op: str, weight: Tensor, copy: Tensor | None, dtype: torch.dtype) -> None:
    """The copy of a weight: of the weight's shape, in `dtype`, on its device."""
    if copy is not None:
        copy.shape == weight.shape or refuse(
            op, f"weight_copy of shape {shape(weight)} as the weight", shape(copy)
        )
        copy.dtype == dtype or refuse(op, f"weight_copy of dtype {dtype}", copy.dtype)
        copy.device == weight.device or refuse(
            op, f"weight_copy on {weight.device} as the weight", copy.device
        )


def tied_embedding(input_ids: Tensor, weight: Tensor, dtype: torch.dtype, weight_copy: Tensor | None) -> None:
    """input_ids [...] int64 or int32, weight [V, D] (any floating dtype), dtype a floating one, weight_copy
    [V, D] in it.
    """
    op = "tied_embedding"
    input_ids.dtype in (torch.int64, torch.int32) or refuse(
        op, "input_ids of dtype int64 or int32", input_ids.dtype
    )
    weight.dim() == 2 or refuse(op, "weight of shape [V, D]", shape(weight))
    (weight.is_floating_point() and dtype.is_floating_point) or refuse(
        op, "a weight and a dtype of floating point", (weight.dtype, dtype)
    )
    weight.device == input_ids.device or refuse(
        op, f"weight on {input_ids.device} as input_ids", weight.device
    )
    _copy(op, weight, weight_copy, dtype)


def mlp(x: Tensor, gate_up: Tensor, down: Tensor, copies: tuple[Tensor | None, Tensor | None] | None) -> None:
    """x [..., D], gate_up [2F, D] and down [D, F] of any floating dtypes, copies of both in x's dtype."""
    x.dim() >= 1 or refuse("mlp", "x of shape [..., D]", shape(x))
    width = x.shape[-1]
    (gate_up.dim() == 2 and gate_up.shape[1] == width) or refuse(
        "mlp", f"gate_up of shape [2F, {width}]", shape(gate_up)
    )
    gate_up.shape[0] % 2 == 0 or refuse("mlp", "an even number of rows of gate_up", gate_up.shape[0])
    shape(down) == [width, gate_up.shape[0] // 2] or refuse(
        "mlp", f"down of shape [{width}, {gate_up.shape[0] // 2}]", shape(down)
    )
    x.is_floating_point() or refuse("mlp", "x of a floating-point dtype", x.dtype)
    for name, weight, copy in zip(("gate_up", "down"), (gate_up, down), copies or (None, None), strict=True):
        weight.is_floating_point() or refuse("mlp", f"{name} of a floating-point dtype", weight.dtype)
        weight.device == x.device or refuse("mlp", f"{name} on {x.device} as x", weight.device)
        if copy is not None:
            copy.shape == weight.shape or refuse(
                "mlp", f"a copy of {name} of shape {shape(weight)}", shape(copy)
            )
            same_kind("mlp", [("x", x), (f"the copy of {name}", copy)])


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, reduction: str, z_loss: float, label_smoothing: float,
    scale: Tensor | None, weight_copy: Tensor | None, chunk_tokens: int | None,
) -> None:  # fmt: skip
    """hidden [N, D], weight [V, D] (any floating dtype), targets [N] int64 or int32, scale [] in fp32,
    weight_copy [V, D] in the dtype of hidden.
    """
    op = "linear_cross_entropy"
    hidden.dim() == 2 or refuse(op, "hidden of shape [N, D]", shape(hidden))
    (weight.dim() == 2 and weight.shape[1] == hidden.shape[1]) or refuse(
        op, f"weight of shape [V, {hidden.shape[1]}]", shape(weight)
    )
    shape(targets) == [hidden.shape[0]] or refuse(op, f"targets of shape [{hidden.shape[0]}]", shape(targets))
    not targets.is_floating_point() or refuse(op, "targets of an integer dtype", targets.dtype)
    (hidden.is_floating_point() and weight.is_floating_point()) or refuse(
        op, "hidden and weight of floating-point dtypes", (hidden.dtype, weight.dtype)
    )
    weight.device == hidden.device == targets.device or refuse(
        op, f"weight and targets on {hidden.device} as hidden", (weight.device, targets.device)
    )
    reduction in ("mean", "sum", "none") or refuse(op, "reduction 'mean', 'sum' or 'none'", repr(reduction))
    z_loss >= 0.0 or refuse(op, "z_loss >= 0", z_loss)
    0.0 <= label_smoothing <= 1.0 or refuse(op, "label_smoothing in [0, 1]", label_smoothing)
    if scale is not None:
        (scale.dim() == 0 and scale.dtype == torch.float32) or refuse(
            op, "scale of shape [] in float32", (shape(scale), scale.dtype)
        )
        scale.device == hidden.device or refuse(op, f"scale on {hidden.device} as hidden", scale.device)
    _copy(op, weight, weight_copy, hidden.dtype)
    (chunk_tokens is None or chunk_tokens >= 1) or refuse(op, "chunk_tokens >= 1", chunk_tokens)
