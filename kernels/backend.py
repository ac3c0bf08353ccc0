"""The switch: which implementation of each operation a model calls. The only dispatch of the project.

    backend = select_backend("triton,attention=torch", device="cuda")
    y = backend.rms_norm(x, weight, 1e-5)

A Backend is chosen once and handed to the model. There is no global state and no fallback behind the user's
back.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from kernels import reference
from kernels.eager import attention as eager_attention
from kernels.eager import linear, loss, pointwise
from kernels.types import OPS, Backend, LayerWeights

# What reference.decode_layer composes, and the fused decode layer does in kernels of its own. Where one of
# these was replaced, the composition serves: the one that was asked for would otherwise never be called.
LAYER_OPS = frozenset({"rms_norm", "add_rms_norm", "rope_qkv", "decode_attention", "swiglu"})


TORCH = Backend(
    name="torch",
    rms_norm=pointwise.rms_norm,
    add_rms_norm=pointwise.add_rms_norm,
    rope=reference.rope,
    rope_qkv=pointwise.rope_qkv,
    attention=eager_attention.attention,
    decode_attention=eager_attention.decode_attention,
    swiglu=pointwise.swiglu,
    tied_embedding=reference.tied_embedding,
    mlp=linear.mlp,
    linear_cross_entropy=loss.linear_cross_entropy,
    decode_layer=reference.decode_layer,
    decode_head=reference.decode_head,
)


@functools.cache
def load_triton() -> Backend:
    """The Triton backend, the same record every time. Imports the kernels, and with them triton, only now."""
    from kernels import (
        attention,
        decode_attention,
        decode_head,
        decode_layer,
        embedding,
        linear_cross_entropy,
        mlp,
        rms_norm,
        rope,
        swiglu,
    )

    def layer(
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
    ) -> Tensor:
        """Five kernels where they serve (at most 16 rows) and contain nothing that `ops` has from elsewhere,
        else the composition.
        """
        if decode_layer.supports(x, weights) and not ops.replaced & LAYER_OPS:
            return decode_layer.decode_layer(x, weights, key_cache, value_cache, lengths, cos, sin, eps=eps)
        return reference.decode_layer(x, weights, key_cache, value_cache, lengths, cos, sin, eps=eps, ops=ops)

    def head(x: Tensor, norm_weight: Tensor, head_weight: Tensor, eps: float) -> Tensor:
        if decode_head.supports(x):
            return decode_head.decode_head(x, norm_weight, head_weight, eps)
        return reference.decode_head(x, norm_weight, head_weight, eps)

    def gated(
        x: Tensor, gate_up: Tensor, down: Tensor, *, copies: tuple[Tensor | None, Tensor | None] | None = None
    ) -> Tensor:
        """SwiGLU inside its products where the launch table says so, else the kernel of swiglu between the
        library's.
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
        attention=attention.attention,
        decode_attention=decode_attention.decode_attention,
        swiglu=swiglu.swiglu,
        mlp=gated,
        tied_embedding=embedding.tied_embedding,
        linear_cross_entropy=linear_cross_entropy.linear_cross_entropy,
        decode_layer=layer,
        decode_head=head,
    )


def with_ops(backend: Backend, **replacements: Backend) -> Backend:
    """A copy in which single operations come from another backend: with_ops(TRITON, attention=TORCH).

    Every replacement has its effect in decode_layer too: the fused layer gives way to the composition if it
    contains one (LAYER_OPS). One of swiglu has its effect in mlp, which then composes it, unless mlp is
    replaced itself.
    """
    name = ",".join([backend.name, *(f"{op}={other.name}" for op, other in replacements.items())])
    changes: dict[str, Any] = {op: getattr(other, op) for op, other in replacements.items()}
    replaced = backend.replaced | replacements.keys()
    if "swiglu" in replacements and "mlp" not in replaced:
        changes["mlp"] = functools.partial(linear.mlp, swiglu=changes["swiglu"])
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
    raise ValueError(
        f"unknown backend {name!r}; known are 'auto', 'torch', 'triton', and single replacements as "
        "'triton,attention=torch'"
    )


def select_backend(name: str | Backend = "auto", device: str | torch.device = "cpu") -> Backend:
    """The backend of that name for that device.

    name: "torch", "triton", "auto" (triton on a GPU that has it, else torch; `.why` says which and why), or
    one of them followed by replacements of single operations, "triton,attention=torch,swiglu=torch". A
    Backend is returned as it is. Raises ValueError for an unknown name or operation, and when an explicit
    name cannot run on the device.
    """
    if isinstance(name, Backend):
        return name
    device = torch.device(device)
    base_name, *replacements = (part.strip() for part in name.split(","))
    if base_name == "auto":
        # The interpreter is for tests: a thousand times slower than torch, so it is never chosen unasked.
        obstacle = (
            _triton_obstacle(device) if device.type in ("cuda", "xpu") else f"the device is {device.type}"
        )
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
