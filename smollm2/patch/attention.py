"""Attention in transformers' registries, under the name "smollm2": `attn_implementation="smollm2"` for every
model whose attention goes through them.

The two halves speak to each other through `attention_mask`. The mask function is asked once per forward pass,
and answers with

    None          every query sees all keys up to its own, aligned to the bottom right
    [B, T] int32  doc_start: the first key that each query sees, for packed documents and left padding
    [B, 1, T, S]  bool: anything else (padding with holes, static caches, windows); torch's attention takes it

Right padding needs no mask, since no real token sees it. The output at a padded position is arbitrary, as it
is with flash attention.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from kernels import TORCH, Backend, select_backend
from smollm2.errors import UsageError
from smollm2.layers import autocast_dtype

NAME = "smollm2"


@dataclass(frozen=True)
class Kernels:
    """What a model was given: the switches, and the backend for each type of device."""

    chosen: frozenset[str]  # of the switches of apply_kernels
    asked: str | Backend
    backends: dict[str, Backend]

    @classmethod
    def of(cls, chosen: frozenset[str], asked: str | Backend) -> Kernels:
        """Raises ValueError as select_backend does, if no device of this machine can have that backend."""
        return cls(chosen, asked, backends(asked))

    def __reduce__(self) -> tuple[Any, ...]:
        """Backends are found anew where a model is unpickled: there may be another kind of GPU."""
        return Kernels.of, (self.chosen, self.asked)

    def on(self, x: Tensor) -> Backend:
        """The backend for the device of x. Raises UsageError for a device that it cannot serve."""
        found = self.backends.get(x.device.type)
        if found is None:
            known = ", ".join(self.backends)
            raise UsageError(f"kernels: expected tensors on {known}, got {x.device.type}; move the model")
        return found


def interpreted() -> bool:
    """Whether Triton's interpreter was asked for."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def accelerators() -> list[str]:
    """The types of GPU that this machine has and Triton serves."""
    return [kind for kind, module in (("cuda", torch.cuda), ("xpu", torch.xpu)) if module.is_available()]


def backends(name: str | Backend) -> dict[str, Backend]:
    """The backend of that name for each type of device here that it can serve, at least one. "auto" is
    Triton's on a CPU too, where the interpreter was asked for. Raises ValueError as select_backend does.
    """
    found, refused = {}, None
    for device in ("cpu", *accelerators(), *(["mps"] if torch.backends.mps.is_available() else [])):
        wanted = "triton" if name == "auto" and device == "cpu" and interpreted() else name
        try:
            found[device] = select_backend(wanted, device)
        except ValueError as error:
            refused = error
    if not found:
        assert refused is not None
        raise refused
    return found


def previous_visible_start(sees_previous: Tensor) -> Tensor:
    """Where the document of each token begins. sees_previous [B, T] -> doc_start [B, T] int32."""
    time = torch.arange(sees_previous.shape[1], device=sees_previous.device)
    return torch.where(sees_previous, 0, time).cummax(-1).values.int()


def padding_start(mask: Tensor, queries: int) -> Tensor | None | bool:
    """What a padding mask [B, S], True for a real token, leaves to be said: None for nothing, doc_start
    [B, T], or False if padding lies between real tokens. Waits for the device once.
    """
    first = mask.int().argmax(-1, keepdim=True)  # [B, 1]
    index = torch.arange(mask.shape[1], device=mask.device)
    solid = mask == ((index >= first) & (index < first + mask.sum(-1, keepdim=True)))
    left, holes = torch.stack((first.any(), ~solid.all())).tolist()
    if holes:
        return False
    return first.int().repeat(1, queries) if left else None


def varlen_start(cumulative: Tensor, q: Tensor, keys: int) -> Tensor:
    """doc_start [B, T] from flash attention's cu_seq_lens [documents + 1], which count over all B rows."""
    batch, length = q.shape[:2]
    if keys != length:
        raise UsageError(f"cu_seq_lens: expected as many keys as the {length} queries, got {keys}; no cache")
    token = torch.arange(batch * length, device=q.device)
    cumulative = cumulative.to(q.device)
    begin = cumulative[torch.searchsorted(cumulative, token, right=True) - 1].view(batch, length)
    row = torch.arange(0, batch * length, length, device=q.device)
    return (begin - row[:, None]).clamp(min=0).int()


@cache
def register() -> None:
    """Makes `attn_implementation="smollm2"` known to transformers. It takes the kernels on a GPU (and in the
    interpreter, if that was asked for), else torch's attention; `apply_kernels` may choose otherwise.
    """
    import transformers
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import causal_mask_function, sdpa_mask

    if "q_length" not in inspect.signature(sdpa_mask).parameters:
        raise UsageError(f"kernels: expected transformers 5.12 or newer, got {transformers.__version__}")
    causal_mask: Any = causal_mask_function
    whole_mask: Any = sdpa_mask
    default = Kernels.of(frozenset({"attention"}), "auto")

    def mask(
        batch_size: int, q_length: int, kv_length: int, q_offset: int | Tensor = 0, kv_offset: int = 0,
        mask_function: Callable[..., Tensor] = causal_mask, attention_mask: Tensor | None = None,
        local_size: int | None = None, use_vmap: bool = False, device: torch.device | str = "cpu",
        **kwargs: Any,
    ) -> Tensor | None:  # fmt: skip
        """The answer for one forward pass: see the top of this file."""
        # How transformers combines causality with packed documents; other combinations see other keys.
        packed = mask_function is not causal_mask and mask_function.__qualname__.startswith("and_masks.")
        plain = (mask_function is causal_mask or packed) and not use_vmap and local_size is None
        # In a static cache keys go on after the last query, and the offset is a tensor.
        if plain and isinstance(q_offset, int) and q_offset + q_length == kv_length + kv_offset:
            if attention_mask is None and packed:
                time = torch.arange(q_length, device=device)[None]
                row = torch.arange(batch_size, device=device)[:, None]
                return previous_visible_start(mask_function(row, row[:1], time, (time - 1).clamp(min=0)))
            if attention_mask is None:
                return None
            # a trace cannot ask whether the padding has holes
            if attention_mask.shape[1] == kv_length and not torch.compiler.is_compiling():
                start = padding_start(attention_mask.to(device), q_length)
                if not isinstance(start, bool):
                    return start
        whole: Tensor = whole_mask(
            batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask, local_size,
            use_vmap=use_vmap, device=device, **{**kwargs, "allow_is_causal_skip": False,
            "allow_is_bidirectional_skip": False},
        )  # fmt: skip
        return whole

    def attention(
        module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
        dropout: float = 0.0, scaling: float | None = None, is_causal: bool | None = None, **kwargs: Any,
    ) -> tuple[Tensor, None]:  # fmt: skip
        """query [B, H, T, D], key and value [B, K, S, D] -> [B, T, H, D]. Raises UsageError for what other
        models add to attention, and ValueError for a head dim that the kernels do not have.
        """
        for name in ("softcap", "s_aux", "position_bias", "cache"):
            if kwargs.get(name) is not None:
                raise UsageError(
                    f"attn_implementation={NAME!r}: expected no {name}; use sdpa or eager for this model"
                )
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        if not causal or (attention_mask is not None and attention_mask.dim() == 4):
            result: tuple[Tensor, None] = sdpa_attention_forward(
                module, query, key, value, attention_mask, dropout, scaling, causal, **kwargs
            )
            return result
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        # without our rotary embedding, autocast leaves q and k in fp32, the dtype of transformers' tables
        dtype = autocast_dtype(q.device) or v.dtype
        q, k, v = (x.to(dtype) for x in (q, k, v))
        doc_start = attention_mask
        if doc_start is None and kwargs.get("cu_seq_lens_q") is not None:
            doc_start = varlen_start(kwargs["cu_seq_lens_q"], q, k.shape[1])
        chosen = getattr(module, "_smollm2", None) or default
        ops = chosen.on(q)
        if dropout > 0.0:  # the kernels have none
            return TORCH.attention(q, k, v, doc_start, dropout_p=dropout, scale=scaling), None
        trains = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
        usual = scaling is None or scaling == q.shape[-1] ** -0.5
        if q.shape[1] == 1 < k.shape[1] and doc_start is None and usual and not trains:
            lengths = torch.full((q.shape[0],), k.shape[1], dtype=torch.int32, device=q.device)
            return ops.decode_attention(q, k, v, lengths), None
        return ops.attention(q, k, v, doc_start, scale=scaling), None

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, mask)
