"""The switch: which implementation of each operation a model calls. The project has no other dispatch.

    backend = select_backend("triton,attention=torch", device="cuda")
    y = backend.rms_norm(x, weight, 1e-5)

A Backend is chosen once and passed to the model. There is no global state and no silent fallback.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import reference
from kernels.eager import attention as eager_attention
from kernels.eager import linear, loss, pointwise
from kernels.types import OPS, Backend, LayerWeights

# The operations of reference.decode_layer that the fused decode layer does in kernels of its own. If one of
# them was replaced, the composition runs: the fused layer would never call the replacement.
LAYER_OPS = frozenset({"rms_norm", "add_rms_norm", "rope_qkv", "rope_cache", "decode_attention", "swiglu"})

# One object for the same parts, so that backends with the same operations are equal.
_composed = functools.cache(functools.partial)


TORCH = Backend(
    name="torch",
    rms_norm=pointwise.rms_norm,
    add_rms_norm=pointwise.add_rms_norm,
    rope=reference.rope,
    rope_qkv=pointwise.rope_qkv,
    rope_cache=pointwise.rope_cache,
    attention=eager_attention.attention,
    decode_attention=eager_attention.decode_attention,
    swiglu=pointwise.swiglu,
    tied_embedding=reference.tied_embedding,
    mlp=linear.mlp,
    linear_cross_entropy=loss.linear_cross_entropy,
    decode_inputs=reference.decode_inputs,
    decode_layer=reference.decode_layer,
    decode_layers=reference.decode_layers,
    decode_head=reference.decode_head,
    decode_best=reference.decode_best,
    next_token=reference.next_token,
)


@functools.cache
def load_triton() -> Backend:
    """The Triton backend, always the same record. Triton and the kernels are imported here, not before."""
    from kernels import (
        attention,
        decode_attention,
        decode_head,
        decode_layer,
        decode_layers,
        decode_step,
        embedding,
        linear_cross_entropy,
        mlp,
        rms_norm,
        rope,
        swiglu,
    )

    def layer(
        x: Tensor, weights: LayerWeights, key_cache: Tensor, value_cache: Tensor, lengths: Tensor,
        cos: Tensor, sin: Tensor, *, eps: float, ops: Backend, dependent: bool = False,
    ) -> Tensor:  # fmt: skip
        """Fused kernels if they support the layer (at most 16 rows) and `ops` replaces none of their
        operations, else the composition.
        """
        if decode_layer.supports(x, weights) and not ops.replaced & LAYER_OPS:
            return decode_layer.decode_layer(
                x, weights, key_cache, value_cache, lengths, cos, sin, eps=eps, dependent=dependent
            )
        return reference.decode_layer(x, weights, key_cache, value_cache, lengths, cos, sin, eps=eps, ops=ops)

    def layers(
        x: Tensor, layers: Sequence[LayerWeights], key_caches: Sequence[Tensor],
        value_caches: Sequence[Tensor], lengths: Tensor, cos: Tensor, sin: Tensor, *, eps: float,
        ops: Backend, dependent: bool = False,
    ) -> Tensor:  # fmt: skip
        """One launch where that is faster and `ops` replaces nothing in it, else layer by layer."""
        caches = (key_caches, value_caches)
        if not ops.replaced & (LAYER_OPS | {"decode_layer"}) and decode_layers.supports(x, layers, *caches):
            return decode_layers.decode_layers(x, layers, *caches, lengths, cos, sin, eps=eps)
        return reference.decode_layers(
            x, layers, *caches, lengths, cos, sin, eps=eps, ops=ops, dependent=dependent
        )

    def product(
        x: Tensor, norm_weight: Tensor, head_weight: Tensor, eps: float, *, dependent: bool = False
    ) -> Tensor:
        """The logits of many rows, in their dtype: the library's product reads the head once for all."""
        return F.linear(rms_norm.rms_norm(x, norm_weight, eps), head_weight)

    def head(
        x: Tensor, norm_weight: Tensor, head_weight: Tensor, eps: float, *, dependent: bool = False
    ) -> Tensor:
        if decode_head.supports(x):
            return decode_head.decode_head(x, norm_weight, head_weight, eps, dependent=dependent)
        return product(x, norm_weight, head_weight, eps).float()

    def best(
        x: Tensor, norm_weight: Tensor, head_weight: Tensor, eps: float, suppressed: Tensor | None = None, *,
        dependent: bool = False,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        if decode_head.supports(x):
            return decode_head.decode_best(x, norm_weight, head_weight, eps, suppressed, dependent=dependent)
        return reference.decode_best(x, norm_weight, head_weight, eps, suppressed, head=product)

    def gated(
        x: Tensor, gate_up: Tensor, down: Tensor, *, copies: tuple[Tensor | None, Tensor | None] | None = None
    ) -> Tensor:
        """SwiGLU inside its products where the launch table says so, else the swiglu kernel between library
        products.
        """
        if mlp.supports(x):
            return mlp.mlp(x, gate_up, down, copies=copies)
        return linear.mlp(x, gate_up, down, copies=copies, swiglu=swiglu.swiglu)

    return Backend(
        name="triton",
        rms_norm=rms_norm.rms_norm,
        add_rms_norm=rms_norm.add_rms_norm,
        rope=rope.rope,
        rope_qkv=rope.rope_qkv,
        rope_cache=rope.rope_cache,
        attention=attention.attention,
        decode_attention=decode_attention.decode_attention,
        swiglu=swiglu.swiglu,
        mlp=gated,
        tied_embedding=embedding.tied_embedding,
        linear_cross_entropy=linear_cross_entropy.linear_cross_entropy,
        decode_inputs=decode_step.decode_inputs,
        decode_layer=layer,
        decode_layers=layers,
        decode_head=head,
        decode_best=best,
        next_token=decode_step.next_token,
    )


def with_ops(backend: Backend, **replacements: Backend) -> Backend:
    """A copy in which single operations come from another backend: with_ops(TRITON, attention=TORCH).

    A replacement takes effect in decode_layer and decode_layers too: the composition runs if the fused layer
    contains the operation (LAYER_OPS). A replacement of swiglu takes effect in mlp too, one of rope_qkv in
    rope_cache and one of decode_head in decode_best, which then compose it, unless they are replaced
    themselves.
    """
    name = ",".join([backend.name, *(f"{op}={other.name}" for op, other in replacements.items())])
    changes: dict[str, Any] = {op: getattr(other, op) for op, other in replacements.items()}
    replaced = backend.replaced | replacements.keys()
    if "swiglu" in replacements and "mlp" not in replaced:
        changes["mlp"] = _composed(linear.mlp, swiglu=changes["swiglu"])
    if "rope_qkv" in replacements and "rope_cache" not in replaced:
        changes["rope_cache"] = _composed(pointwise.rope_cache, rope_qkv=changes["rope_qkv"])
    if "decode_head" in replacements and "decode_best" not in replaced:
        changes["decode_best"] = _composed(reference.decode_best, head=changes["decode_head"])
    return dataclasses.replace(backend, name=name, replaced=replaced, **changes)


def _triton_obstacle(device: torch.device) -> str | None:
    """Why Triton kernels cannot run on this device, or None if they can."""
    if find_spec("triton") is None:
        return "triton is not installed"
    if device.type in ("cuda", "xpu") or os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return f"needs a CUDA, ROCm or XPU device (or TRITON_INTERPRET=1), got {device.type}"


def _single(name: str, device: torch.device) -> Backend:
    if name == "torch":
        return TORCH
    if name == "triton":
        obstacle = _triton_obstacle(device)
        if obstacle:
            raise ValueError(f"backend 'triton' {obstacle}; use 'torch' or 'auto'")
        return load_triton()
    known = "'auto', 'torch', 'triton', and single replacements as 'triton,attention=torch'"
    raise ValueError(f"unknown backend {name!r}; known are {known}")


def select_backend(name: str | Backend = "auto", device: str | torch.device = "cpu") -> Backend:
    """The backend of that name for that device.

    name: "torch", "triton", "auto" (triton on a GPU that has it, else torch; `.why` gives the reason), or one
    of these followed by replacements of single operations, "triton,attention=torch,swiglu=torch". A Backend
    is returned unchanged. Raises ValueError for an unknown name or operation, and when an explicit name
    cannot run on the device.
    """
    if isinstance(name, Backend):
        return name
    device = torch.device(device)
    base_name, *replacements = (part.strip() for part in name.split(","))
    if base_name == "auto":
        # Triton's interpreter is for tests. It is a thousand times slower than torch, so auto never picks it.
        gpu = device.type in ("cuda", "xpu")
        obstacle = _triton_obstacle(device) if gpu else f"the device is {device.type}"
        backend = TORCH if obstacle else load_triton()
        backend = dataclasses.replace(backend, why=f"auto: {obstacle or f'triton runs on {device.type}'}")
    else:
        backend = _single(base_name, device)
    chosen: dict[str, Backend] = {}
    for part in replacements:
        op, separator, other = (piece.strip() for piece in part.partition("="))
        if not separator or op not in OPS:
            raise ValueError(f"backend {name!r}: {part!r} is not OP=BACKEND; operations are {', '.join(OPS)}")
        chosen[op] = _single(other, device)
    return with_ops(backend, **chosen) if chosen else backend
