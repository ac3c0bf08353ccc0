"""The layers of SmolLM2 from token ids to hidden states.

    ids -> embed_tokens -> 30 x [norm, attention, norm, mlp] -> norm

Every operation between the matrix products is called through `self.backend`. The residual stream and the
output of the last sub-layer travel as a pair, because their sum and the norm that follows are one operation
(`add_rms_norm`). The same layers run training, prompts, and decode steps whose layers were wrapped or hooked.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kernels import Backend, LayerWeights
from smollm2.config import SmolLM2Config
from smollm2.errors import UsageError
from smollm2.projections import FusedProjections, is_plain

# Of the rotary tables at first: a config may claim any number. Beyond these, they grow as they are used.
ROTARY_POSITIONS = 8192


class Cache(NamedTuple):
    """The cache of one layer. Without lengths the tokens of a call are its last T positions (a prompt); with
    lengths [B], which count them, those before lengths[b] in row b (a decode step).
    """

    keys: Tensor  # [B, S, K, D]
    values: Tensor  # [B, S, K, D]
    lengths: Tensor | None = None


def rotary_tables(
    config: SmolLM2Config, device: torch.device, positions: int | None = None
) -> tuple[Tensor, Tensor]:
    """cos and sin [positions, head_dim / 2] of the angles position * theta^(-2i/D), all in fp32; positions:
    default all of the config.
    """
    positions = config.max_position_embeddings if positions is None else positions
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device) / config.head_dim
    frequency = 1.0 / (config.rope_theta**exponent)
    angle = torch.outer(torch.arange(positions, dtype=torch.float32, device=device), frequency)
    return angle.cos(), angle.sin()


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype of an enclosing torch.autocast for that device; None outside of one."""
    kind = device.type
    active = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if active else None


def new_positions(lengths: Tensor, tokens: int) -> Tensor:
    """lengths [B], which count the tokens of a decode step -> their positions [B, T]."""
    return lengths[:, None] - tokens + torch.arange(tokens, device=lengths.device)


class RMSNorm(nn.Module):
    """y = x / rms(x) * weight. With a residual: normalises their sum and returns (y, sum)."""

    def __init__(self, config: SmolLM2Config, backend: Backend) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.hidden_size))
        self.eps = config.rms_norm_eps
        self.backend = backend

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x, residual [..., hidden] -> (normed, new residual stream); x begins it where there is none."""
        weight: Tensor = self.weight
        # fp32 master weights are rounded by the operation
        if weight.dtype != torch.float32 or x.dtype not in (torch.bfloat16, torch.float16):
            weight = weight.to(x.dtype)
        if residual is None:
            return self.backend.rms_norm(x, weight, self.eps), x
        return self.backend.add_rms_norm(x, residual, weight, self.eps)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


class SmolLM2Attention(FusedProjections):
    """Causal self-attention: H query heads share K key/value heads in groups of G = H / K."""

    def __init__(self, config: SmolLM2Config, backend: Backend) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        query_heads, self.key_heads = config.num_attention_heads, config.num_key_value_heads
        self.dropout = config.attention_dropout
        self.backend = backend
        queries, keys = query_heads * self.head_dim, self.key_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=False)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, doc_start: Tensor | None = None, cache: Cache | None = None
    ) -> Tensor:
        """x [B, T, hidden] -> [B, T, hidden]. A cache receives the keys and values of the T tokens."""
        heads = self.project(x).unflatten(-1, (-1, self.head_dim))
        if cache is not None and cache.lengths is not None:
            q = self.backend.rope_cache(heads, cos, sin, cache.keys, cache.values, cache.lengths)
            mixed = self.backend.decode_attention(q, cache.keys, cache.values, cache.lengths)
            return self.apply_one(self.o_proj, mixed.flatten(2))
        q, k, v = self.backend.rope_qkv(heads, cos, sin, self.key_heads)
        if cache is None:
            dropout = self.dropout if self.training else 0.0
            mixed = self.backend.attention(q, k, v, doc_start, dropout_p=dropout)
        else:
            cache.keys[:, -x.shape[1] :] = k
            cache.values[:, -x.shape[1] :] = v
            mixed = self.backend.attention(q, cache.keys, cache.values, doc_start)
        return self.apply_one(self.o_proj, mixed.flatten(2))

    def projections(self) -> tuple[nn.Linear, ...]:
        return self.q_proj, self.k_proj, self.v_proj


class SmolLM2MLP(FusedProjections):
    """down(silu(gate(x)) * up(x))"""

    def __init__(self, config: SmolLM2Config, backend: Backend) -> None:
        super().__init__()
        self.backend = backend
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, hidden] -> [B, T, hidden]"""
        if not all(map(is_plain, (*self.projections(), self.down_proj))):
            return self.apply_one(self.down_proj, self.backend.swiglu(self.project(x)))
        copies = self.copy_of(x.dtype, *self.projections()), self.copy_of(x.dtype, self.down_proj)
        return self.backend.mlp(x, self.fused_weight(), self.down_proj.weight, copies=copies)

    def projections(self) -> tuple[nn.Linear, ...]:
        return self.gate_proj, self.up_proj


class SmolLM2Block(nn.Module):
    """Pre-norm transformer block: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: SmolLM2Config, backend: Backend) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config, backend)
        self.self_attn = SmolLM2Attention(config, backend)
        self.post_attention_layernorm = RMSNorm(config, backend)
        self.mlp = SmolLM2MLP(config, backend)

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        doc_start: Tensor | None = None,
        cache: Cache | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(output of the last sub-layer, residual stream) [B, T, hidden] -> the pair after this block."""
        x, residual = self.input_layernorm(x, residual)
        x = self.self_attn(x, cos, sin, doc_start, cache)
        x, residual = self.post_attention_layernorm(x, residual)
        return self.mlp(x), residual

    def pack(self) -> LayerWeights:
        """Lays q, k, v and gate, up side by side in one buffer each; the parameters become views of it."""
        attention, mlp = self.self_attn, self.mlp
        return LayerWeights(
            input_norm=self.input_layernorm.weight.detach(),
            qkv=attention.pack(),
            o=attention.o_proj.weight.detach(),
            post_norm=self.post_attention_layernorm.weight.detach(),
            gate_up=mlp.pack(),
            down=mlp.down_proj.weight.detach(),
        )


class SmolLM2Model(nn.Module):
    """Token ids to final hidden states."""

    def __init__(self, config: SmolLM2Config, backend: Backend) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(SmolLM2Block(config, backend) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config, backend)
        # Not buffers: `.to(bfloat16)` would round them, and positions above 256 collide in bf16.
        self._rotary: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def rotary(self, device: torch.device, positions: int = 1) -> tuple[Tensor, Tensor]:
        """The fp32 tables cos and sin [at least `positions`, head_dim / 2] on that device.

        Built for ROTARY_POSITIONS at first, or what the config has if that is less. Longer ones, twice as
        long at least, replace them; who reads tables without asking again (a graph) keeps those it has.
        """
        known = self._rotary.get(device)
        if known is None or len(known[0]) < positions:
            enough = max(ROTARY_POSITIONS, 1 << (positions - 1).bit_length())
            # the next training step may use a table that was built while sampling
            with torch.inference_mode(False):
                known = rotary_tables(self.config, device, min(enough, self.config.max_position_embeddings))
            self._rotary[device] = known
        return known

    def forward(
        self,
        input_ids: Tensor,
        doc_start: Tensor | None = None,
        *,
        dtype: torch.dtype | None = None,
        cache: list[Cache] | None = None,
        embedded: Tensor | None = None,
    ) -> Tensor:
        """input_ids [B, T] -> final normed hidden states [B, T, hidden] in dtype (default: the parameters').

        doc_start [B, T]: where in the row the document of each token begins; positions count from there.
        cache: one per layer, which receives the keys and values of these tokens. embedded [B, T, hidden] in
        dtype: the rows of the table, if they were looked up already. Raises UsageError inside torch.autocast,
        which the whole model takes into account.
        """
        length, limit = input_ids.shape[1], self.config.max_position_embeddings
        if length > limit:
            raise UsageError(f"expected at most {limit} positions, got {length}")
        if autocast_dtype(input_ids.device) is not None:
            hint = "call the whole model, or leave it and set compute_dtype=torch.bfloat16"
            raise UsageError(f"torch.autocast: expected none around the layers of the model; {hint}")
        positions = max(length, cache[0].keys.shape[1] if cache else 1)
        cos, sin = self.rotary(input_ids.device, positions)
        if cache and cache[0].lengths is not None:
            position = new_positions(cache[0].lengths, length)
            cos, sin = cos[position], sin[position]
        else:
            first = cache[0].keys.shape[1] - length if cache else 0
            if doc_start is not None:
                position = torch.arange(first, first + length, device=input_ids.device) - doc_start
                cos, sin = cos[position], sin[position]
            else:
                cos, sin = cos[first : first + length], sin[first : first + length]
        x, residual = embedded, None
        if x is None:  # looked up first, then rounded: the gradient of the table is then summed in fp32
            x = self.embed_tokens(input_ids)
            x = x if dtype is None else x.to(dtype)
        for index, layer in enumerate(self.layers):
            layer_cache = cache[index] if cache is not None else None
            if self.gradient_checkpointing and self.training:
                x, residual = checkpoint(layer, x, residual, cos, sin, doc_start, use_reentrant=False)
            else:
                x, residual = layer(x, residual, cos, sin, doc_start, layer_cache)
        return self.norm(x, residual)[0]
