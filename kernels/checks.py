"""What every implementation of an operation accepts: the reference and the kernels refuse the same input in the same words.

A check looks at shapes, dtypes and devices only. It never reads a value of a tensor, so it costs no synchronisation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from kernels.backend import LayerWeights


def require(condition: bool, op: str, expected: str, got: object) -> None:
    """Raises ValueError `op: expected ..., got ...` unless the condition holds."""
    if not condition:
        raise ValueError(f"{op}: expected {expected}, got {got}")


def shape(tensor: Tensor) -> list[int]:
    """The shape as a plain list, as it is printed in messages."""
    return list(tensor.shape)


def same_kind(op: str, tensors: Sequence[tuple[str, Tensor]]) -> None:
    """All tensors have the dtype and the device of the first one."""
    first_name, first = tensors[0]
    require(first.is_floating_point(), op, f"{first_name} of a floating-point dtype", first.dtype)
    for name, tensor in tensors[1:]:
        require(tensor.dtype == first.dtype, op, f"{name} of dtype {first.dtype} as {first_name}", tensor.dtype)
        require(tensor.device == first.device, op, f"{name} on {first.device} as {first_name}", tensor.device)


def kernel_dtype(op: str, tensor: Tensor) -> None:
    """The dtypes that the Triton kernels are written and tested for."""
    known = (torch.float32, torch.float16, torch.bfloat16)
    require(tensor.dtype in known, op, "float32, float16 or bfloat16 (the torch backend also takes float64)", tensor.dtype)


def rms_norm(op: str, x: Tensor, weight: Tensor, residual: Tensor | None = None) -> None:
    """x [..., D], weight [D], residual like x."""
    require(x.dim() >= 1, op, "x of shape [..., D]", shape(x))
    require(weight.shape == x.shape[-1:], op, f"weight of shape [{x.shape[-1]}]", shape(weight))
    tensors = [("x", x), ("weight", weight)]
    if residual is not None:
        require(residual.shape == x.shape, op, f"residual of shape {shape(x)}", shape(residual))
        tensors.append(("residual", residual))
    same_kind(op, tensors)


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    """q [B, T, H, D], k [B, T, K, D], cos and sin [T, D/2] or [B, T, D/2] in fp32 (or fp64)."""
    require(q.dim() == 4, "rope", "q of shape [B, T, H, D]", shape(q))
    batch, length, _, head_dim = q.shape
    require(head_dim % 2 == 0, "rope", "an even head dim", head_dim)
    require(
        k.dim() == 4 and k.shape[:2] == q.shape[:2] and k.shape[3] == head_dim,
        "rope", f"k of shape [{batch}, {length}, K, {head_dim}]", shape(k),
    )  # fmt: skip
    same_kind("rope", [("q", q), ("k", k)])
    _tables("rope", cos, sin, batch, length, head_dim, q, "q")


def _tables(op: str, cos: Tensor, sin: Tensor, batch: int, length: int, head_dim: int, like: Tensor, name_of_like: str) -> None:
    """cos and sin of one shape, [T, D/2] or [B, T, D/2], of one floating-point dtype, on the device of `like`."""
    for name, table in (("cos", cos), ("sin", sin)):
        require(
            shape(table) in ([length, head_dim // 2], [batch, length, head_dim // 2]),
            op, f"{name} of shape [{length}, {head_dim // 2}] or [{batch}, {length}, {head_dim // 2}]", shape(table),
        )  # fmt: skip
        require(table.device == like.device, op, f"{name} on {like.device} as {name_of_like}", table.device)
        require(table.dtype == cos.dtype and table.is_floating_point(), op, "cos and sin of one floating-point dtype", table.dtype)
    require(cos.shape == sin.shape, op, f"sin of shape {shape(cos)} as cos", shape(sin))


def rope_qkv(qkv: Tensor, cos: Tensor, sin: Tensor, key_heads: int) -> None:
    """qkv [B, T, H + 2K, D], cos and sin as in rope."""
    require(qkv.dim() == 4, "rope_qkv", "qkv of shape [B, T, H + 2K, D]", shape(qkv))
    require(0 < 2 * key_heads < qkv.shape[2], "rope_qkv", f"key_heads so that H + 2K = {qkv.shape[2]} with H > 0", key_heads)
    rope(qkv[:, :, : -2 * key_heads], qkv[:, :, -2 * key_heads : -key_heads], cos, sin)


def attention(op: str, q: Tensor, k: Tensor, v: Tensor, doc_start: Tensor | None = None) -> None:
    """q [B, T, H, D], k and v [B, S, K, D] with H a multiple of K and S >= T, doc_start [B, T] integer."""
    require(q.dim() == 4, op, "q of shape [B, T, H, D]", shape(q))
    batch, length, heads, head_dim = q.shape
    require(k.dim() == 4 and k.shape[0] == batch and k.shape[3] == head_dim, op, f"keys of shape [{batch}, S, K, {head_dim}]", shape(k))
    require(v.shape == k.shape, op, f"values of shape {shape(k)} as the keys", shape(v))
    require(k.shape[2] > 0 and heads % k.shape[2] == 0, op, f"key heads that divide the {heads} query heads", k.shape[2])
    require(k.shape[1] >= length, op, f"at least as many keys as the {length} queries", k.shape[1])
    same_kind(op, [("q", q), ("k", k), ("v", v)])
    if doc_start is not None:
        require(shape(doc_start) == [batch, length], op, f"doc_start of shape [{batch}, {length}]", shape(doc_start))
        require(not doc_start.is_floating_point(), op, "doc_start of an integer dtype", doc_start.dtype)
        require(doc_start.device == q.device, op, f"doc_start on {q.device} as q", doc_start.device)


def decode_attention(q: Tensor, key_cache: Tensor, value_cache: Tensor, lengths: Tensor) -> None:
    """q [B, T, H, D], caches [B, S, K, D], lengths [B] integer."""
    attention("decode_attention", q, key_cache, value_cache)
    require(shape(lengths) == [q.shape[0]], "decode_attention", f"lengths of shape [{q.shape[0]}]", shape(lengths))
    require(not lengths.is_floating_point(), "decode_attention", "lengths of an integer dtype", lengths.dtype)
    require(lengths.device == q.device, "decode_attention", f"lengths on {q.device} as q", lengths.device)


def decode_layer(
    x: Tensor, weights: LayerWeights, key_cache: Tensor, value_cache: Tensor, lengths: Tensor, cos: Tensor, sin: Tensor
) -> None:
    """x [B, T, E], packed weights, caches [B, S, K, D], lengths [B] integer, cos and sin [B, T, D/2] or [T, D/2] in fp32 (or fp64)."""
    op = "decode_layer"
    require(x.dim() == 3, op, "x of shape [B, T, hidden]", shape(x))
    batch, length, width = x.shape
    require(
        key_cache.dim() == 4 and key_cache.shape[0] == batch and key_cache.shape[1] >= length and key_cache.shape[2] > 0,
        op, f"key cache of shape [{batch}, S, K, D] with S >= {length} and K > 0", shape(key_cache),
    )  # fmt: skip
    require(value_cache.shape == key_cache.shape, op, f"value cache of shape {shape(key_cache)} as the key cache", shape(value_cache))
    key_heads, head_dim = key_cache.shape[2:]
    # How many query heads and how wide an MLP, the weights say themselves; from there on all of them must agree.
    heads, ffn = weights.o.shape[-1] // max(1, head_dim), weights.down.shape[-1]
    require(heads > 0 and heads % key_heads == 0, op, f"query heads (columns of o / {head_dim}) that are a multiple of {key_heads}", heads)
    wanted = {
        "input_norm": [width],
        "qkv": [(heads + 2 * key_heads) * head_dim, width],
        "o": [width, heads * head_dim],
        "post_norm": [width],
        "gate_up": [2 * ffn, width],
        "down": [width, ffn],
    }
    for name, expected in wanted.items():
        require(shape(getattr(weights, name)) == expected, op, f"weights.{name} of shape {expected}", shape(getattr(weights, name)))
    require(shape(lengths) == [batch], op, f"lengths of shape [{batch}]", shape(lengths))
    require(not lengths.is_floating_point(), op, "lengths of an integer dtype", lengths.dtype)
    require(lengths.device == x.device, op, f"lengths on {x.device} as x", lengths.device)
    named = [(f"weights.{name}", tensor) for name, tensor in weights._asdict().items()]
    same_kind(op, [("x", x), *named, ("key cache", key_cache), ("value cache", value_cache)])
    _tables(op, cos, sin, batch, length, head_dim, x, "x")


def decode_head(x: Tensor, norm_weight: Tensor, head_weight: Tensor) -> None:
    """x [..., E], norm_weight [E], head_weight [V, E]."""
    op = "decode_head"
    require(x.dim() >= 1, op, "x of shape [..., E]", shape(x))
    width = x.shape[-1]
    require(shape(norm_weight) == [width], op, f"norm_weight of shape [{width}]", shape(norm_weight))
    require(head_weight.dim() == 2 and head_weight.shape[1] == width, op, f"head_weight of shape [V, {width}]", shape(head_weight))
    same_kind(op, [("x", x), ("norm_weight", norm_weight), ("head_weight", head_weight)])


def swiglu(gate: Tensor, up: Tensor | None) -> None:
    """gate and up of one shape [..., F], or gate alone of shape [..., 2F]."""
    require(gate.dim() >= 1, "swiglu", "gate of shape [..., F]", shape(gate))
    if up is None:
        require(gate.shape[-1] % 2 == 0, "swiglu", "an even last dimension of the packed gate and up", gate.shape[-1])
        same_kind("swiglu", [("gate", gate)])
        return
    require(up.shape == gate.shape, "swiglu", f"up of shape {shape(gate)} as gate", shape(up))
    same_kind("swiglu", [("gate", gate), ("up", up)])


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, reduction: str, z_loss: float, label_smoothing: float) -> None:
    """hidden [N, D], weight [V, D] (any floating dtype), targets [N] int64 or int32."""
    op = "linear_cross_entropy"
    require(hidden.dim() == 2, op, "hidden of shape [N, D]", shape(hidden))
    require(weight.dim() == 2 and weight.shape[1] == hidden.shape[1], op, f"weight of shape [V, {hidden.shape[1]}]", shape(weight))
    require(shape(targets) == [hidden.shape[0]], op, f"targets of shape [{hidden.shape[0]}]", shape(targets))
    require(not targets.is_floating_point(), op, "targets of an integer dtype", targets.dtype)
    require(
        hidden.is_floating_point() and weight.is_floating_point(),
        op,
        "hidden and weight of floating-point dtypes",
        (hidden.dtype, weight.dtype),
    )
    require(
        weight.device == hidden.device == targets.device,
        op,
        f"weight and targets on {hidden.device} as hidden",
        (weight.device, targets.device),
    )
    require(reduction in ("mean", "sum", "none"), op, "reduction 'mean', 'sum' or 'none'", repr(reduction))
    require(z_loss >= 0.0, op, "z_loss >= 0", z_loss)
    require(0.0 <= label_smoothing <= 1.0, op, "label_smoothing in [0, 1]", label_smoothing)
