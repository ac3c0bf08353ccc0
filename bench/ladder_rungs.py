"""The rungs of `python -m bench.ladder`: what is on at each. The bottom has the norms and SwiGLU of
kernels/reference.py, and rope, attention and loss as transformers computes them without fused kernels.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.step import all_logits, training_model
from kernels import TORCH, Backend, reference, with_ops
from kernels.eager.linear import mlp
from smollm2.config import SmolLM2Config
from smollm2.layers import Cache
from smollm2.model import SmolLM2Attention, SmolLM2ForCausalLM, SmolLM2MLP

# What changes at each, and the operations that come from the best backend from there on.
RUNGS: dict[str, tuple[str, ...]] = {
    "plain eager": (),
    "packed projections": (),
    "fused add+norm": ("rms_norm", "add_rms_norm"),
    "fused rope": ("rope", "rope_qkv"),
    "fused attention": ("attention",),
    "fused SwiGLU": ("swiglu", "mlp"),
    "fused loss": ("tied_embedding", "linear_cross_entropy"),
    "fused optimizer": (),
    "optimizer + copies": (),
    "graph capture": (),
    "compile of the rest": (),
}


def plain_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """x * cos + rotate_half(x) * sin, with tables as wide as a head: as transformers writes it."""
    cos, sin = (torch.cat((table, table), -1).unsqueeze(-2) for table in (cos, sin))

    def rotate(x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        first, second = wide.chunk(2, -1)
        return (wide * cos + torch.cat((-second, first), -1) * sin).to(x.dtype)

    return rotate(q), rotate(k)


def plain_rope_qkv(qkv: Tensor, cos: Tensor, sin: Tensor, key_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = qkv.split((qkv.shape[2] - 2 * key_heads, key_heads, key_heads), 2)
    return *plain_rope(q, k, cos, sin), v


def plain_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    doc_start: Tensor | None = None,
    *,
    dropout_p: float = 0.0,
    scale: float | None = None,
) -> Tensor:
    """softmax(q k^T) v with the whole score matrix [B, H, T, S]; keys and values repeated for the query heads
    of their group.
    """
    length, keys, group = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    queries, k, v = (
        x.transpose(1, 2) for x in (q, k.repeat_interleave(group, 2), v.repeat_interleave(group, 2))
    )
    key = torch.arange(keys, device=q.device)
    mask = key <= torch.arange(keys - length, keys, device=q.device)[:, None]
    if doc_start is not None:
        mask = mask & (key >= doc_start[:, None, :, None])
    scores = queries @ k.transpose(2, 3) * (q.shape[3] ** -0.5 if scale is None else scale)
    wide = scores.to(torch.promote_types(q.dtype, torch.float32)).masked_fill(~mask, float("-inf"))
    return (F.dropout(wide.softmax(-1).to(q.dtype), dropout_p) @ v).transpose(1, 2)


PLAIN = dataclasses.replace(
    TORCH, name="plain", rms_norm=reference.rms_norm, add_rms_norm=reference.add_rms_norm,
    rope=plain_rope, rope_qkv=plain_rope_qkv, attention=plain_attention, swiglu=reference.swiglu,
    mlp=partial(mlp, swiglu=reference.swiglu), linear_cross_entropy=all_logits,
)  # fmt: skip


class SeparateAttention(SmolLM2Attention):
    """Attention whose queries, keys and values are three products. Without a cache: for training."""

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        doc_start: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        assert cache is None, "the ladder trains"
        q, k, v = (
            F.linear(x, part.weight.to(x.dtype)).unflatten(-1, (-1, self.head_dim))
            for part in self.projections()
        )
        q, k = self.backend.rope(q, k, cos, sin)
        mixed = self.backend.attention(q, k, v, doc_start, dropout_p=self.dropout if self.training else 0.0)
        return F.linear(mixed.flatten(2), self.o_proj.weight.to(x.dtype))


class SeparateMLP(SmolLM2MLP):
    """The MLP whose gate and up are two products."""

    def forward(self, x: Tensor) -> Tensor:
        gate, up = (F.linear(x, part.weight.to(x.dtype)) for part in self.projections())
        return F.linear(self.backend.swiglu(gate, up), self.down_proj.weight.to(x.dtype))


# a rung


@dataclass(frozen=True)
class Setup:
    """All that is on at one rung."""

    backend: Backend
    packed: bool
    fused_optimizer: bool
    own_optimizer: bool
    captured: bool
    compiled: bool


def setups(best: Backend, cuda: bool) -> dict[str, Setup]:
    """Rung -> what is on there: its own change and all those before it. A capture needs a GPU."""
    found: dict[str, Setup] = {}
    ops: dict[str, Backend] = {}
    for name, changed in RUNGS.items():
        ops |= dict.fromkeys(changed, best)
        on = {*found, name}
        compiled, own = "compile of the rest" in on, "optimizer + copies" in on
        found[name] = Setup(
            with_ops(PLAIN, **ops) if ops else PLAIN, "packed projections" in on, "fused optimizer" in on,
            own and best.name.startswith("triton") and not compiled, cuda and "graph capture" in on, compiled,
        )  # fmt: skip
    return found


def build_model(
    setup: Setup, config: SmolLM2Config, dtype: torch.dtype, device: torch.device
) -> SmolLM2ForCausalLM:
    """The model of a rung, with the weights that seed 0 gives on this device."""
    model = training_model(config, setup.backend, device, dtype)
    with torch.device(device):
        for block in model.model.layers if not setup.packed else ():
            for name, kind in (("self_attn", SeparateAttention), ("mlp", SeparateMLP)):
                separate = kind(config, setup.backend)
                separate.load_state_dict(getattr(block, name).state_dict())
                setattr(block, name, separate)
    return model.train()
