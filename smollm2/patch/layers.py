"""transformers' Llama layers with our operations in them.

Each class is a subclass of the one it replaces, and has its name: what looks for layers by class or by name
(checkpointing, sharding, recorded outputs) finds them. A layer becomes one by a change of its class, which
leaves its parameters, hooks and names alone. Every projection is still called as a module, so adapters and
quantised layers work.
"""

from __future__ import annotations

import functools
from functools import wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smollm2.layers import autocast_dtype
from smollm2.model import IGNORE_INDEX
from smollm2.projections import is_plain

# class of transformers -> the switches of which any makes it ours
REPLACED = {
    "LlamaRMSNorm": {"rms_norm"},
    "LlamaDecoderLayer": {"rms_norm"},
    "LlamaRotaryEmbedding": {"rope"},
    "LlamaAttention": {"rope"},
    "LlamaMLP": {"swiglu"},
    "LlamaForCausalLM": {"loss"},
}


@functools.cache
def classes() -> dict[str, type[nn.Module]]:
    """Our classes by the names of those that they replace. Needs transformers, so they are made when asked
    for.
    """
    from transformers.loss.loss_utils import ForCausalLMLoss
    from transformers.modeling_outputs import CausalLMOutputWithPast
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    from transformers.models.llama import modeling_llama
    from transformers.utils import can_return_tuple

    llama: Any = modeling_llama

    class LlamaRMSNorm(llama.LlamaRMSNorm):
        def forward(self, hidden_states: Tensor) -> Tensor:
            """[..., hidden] -> [..., hidden]"""
            if hidden_states.dtype != self.weight.dtype:  # the result has the wider dtype
                return super().forward(hidden_states)
            ops = self._smollm2.on(hidden_states)
            return ops.rms_norm(hidden_states, self.weight, self.variance_epsilon)

    class LlamaDecoderLayer(llama.LlamaDecoderLayer):
        def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
            """[B, T, hidden] -> [B, T, hidden]; the sum after attention and its norm are one operation."""
            residual, norm = hidden_states, self.post_attention_layernorm
            mixed, _ = self.self_attn(self.input_layernorm(hidden_states), **kwargs)
            # Of two dtypes (autocast) the sum would need a cast, and save no memory traffic.
            if mixed.dtype == residual.dtype == norm.weight.dtype and is_plain(norm, (LlamaRMSNorm,)):
                ops = self._smollm2.on(mixed)
                normed, residual = ops.add_rms_norm(mixed, residual, norm.weight, norm.variance_epsilon)
            else:
                residual = residual + mixed
                normed = norm(residual)
            return residual + self.mlp(normed)

    class LlamaRotaryEmbedding(llama.LlamaRotaryEmbedding):
        def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
            """cos and sin [B, T, D/2], or [T, D/2] if all rows have the same positions, in fp32 whatever the
            dtype of x.
            """
            wide = x.new_empty(0, dtype=torch.promote_types(x.dtype, torch.float32))
            cos, sin = (
                table.chunk(2, dim=-1)[0].contiguous() for table in super().forward(wide, position_ids)
            )
            return (cos[0], sin[0]) if cos.shape[0] == 1 else (cos, sin)

    class LlamaAttention(llama.LlamaAttention):
        def forward(
            self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor] | None = None,
            attention_mask: Tensor | None = None, past_key_values: Any = None, cache: Any = None,
            **kwargs: Any,
        ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
            """[B, T, hidden] -> [B, T, hidden] and, where the attention gives them, its weights.
            position_embeddings: as LlamaRotaryEmbedding above gives them. cache: the name of past_key_values
            from transformers 5.24 on.
            """
            assert position_embeddings is not None
            shape = *hidden_states.shape[:-1], -1, self.head_dim
            q, k, v = (layer(hidden_states).view(shape) for layer in (self.q_proj, self.k_proj, self.v_proj))
            q, k = self._smollm2.on(q).rope(q, k, *position_embeddings)
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            if (cache := past_key_values if cache is None else cache) is not None:
                k, v = cache.update(k, v, self.layer_idx)
            attend = ALL_ATTENTION_FUNCTIONS.get_interface(
                self.config._attn_implementation, llama.eager_attention_forward
            )
            dropout = self.attention_dropout if self.training else 0.0
            mixed, weights = attend(
                self, q, k, v, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
            )
            return self.o_proj(mixed.reshape(*shape[:-2], -1)), weights

    class LlamaMLP(llama.LlamaMLP):
        def forward(self, x: Tensor) -> Tensor:
            """[B, T, hidden] -> [B, T, hidden]"""
            gate, up = self.gate_proj(x), self.up_proj(x)
            return self.down_proj(self._smollm2.on(gate).swiglu(gate, up))

    class LlamaForCausalLM(llama.LlamaForCausalLM):
        @can_return_tuple
        @wraps(llama.LlamaForCausalLM.forward)  # whose signature Trainer and generate read
        def forward(
            self, *args: Any, labels: Tensor | None = None, logits_to_keep: int | Tensor = 0,
            skip_logits: bool | None = None, **kwargs: Any,
        ) -> Any:  # fmt: skip
            """As transformers', except that the logits are None where the loss needs no more of them: in
            training with labels, or with labels and skip_logits=True.
            """
            skip = self.training if skip_logits is None else skip_logits
            fused = getattr(self, "_smollm2", None) is not None and self.loss_function is ForCausalLMLoss
            whole = isinstance(logits_to_keep, int) and logits_to_keep == 0
            if labels is None or not (skip and fused and whole and is_plain(self.lm_head)):
                options: dict[str, Any] = {} if labels is None else {"labels": labels}
                options |= {} if whole else {"logits_to_keep": logits_to_keep}
                return llama.LlamaForCausalLM.forward(self, *args, **options, **kwargs)
            outputs = self.model(*args, **kwargs)
            others = {name: value for name, value in outputs.items() if name != "last_hidden_state"}
            loss = _loss(self, outputs.last_hidden_state, labels, **kwargs)
            return CausalLMOutputWithPast(loss=loss, **others)

    made = (
        LlamaRMSNorm, LlamaDecoderLayer, LlamaRotaryEmbedding, LlamaAttention, LlamaMLP, LlamaForCausalLM,
    )  # fmt: skip
    for one in made:
        one.__qualname__ = one.__name__  # where pickle looks for it: see __getattr__
    return {one.__name__: one for one in made}


def _loss(
    model: Any, hidden: Tensor, labels: Tensor, num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = IGNORE_INDEX, shift_labels: Tensor | None = None, **_: Any,
) -> Tensor:  # fmt: skip
    """ForCausalLMLoss of transformers, from hidden states [B, T, hidden] and without logits: the mean over
    the valid targets or, with num_items_in_batch, their sum over that number.
    """
    targets = shift_labels
    if targets is None:
        targets = F.pad(labels[..., 1:], (0, 1), value=ignore_index)
    device, dtype = hidden.device, autocast_dtype(hidden.device) or hidden.dtype
    scale = count = None
    if num_items_in_batch is not None:
        count = torch.as_tensor(num_items_in_batch, dtype=torch.float32, device=device)
        scale = count.reshape(()).reciprocal()
    with torch.autocast(device.type, enabled=False):
        loss: Tensor = model._smollm2.on(hidden).linear_cross_entropy(
            hidden.to(dtype).flatten(0, -2), model.lm_head.weight, targets.to(device).flatten(),
            ignore_index=ignore_index, reduction="mean" if scale is None else "sum", scale=scale,
        )  # fmt: skip
    return loss if count is None else loss.reshape(count.shape)  # [1] on each GPU of a DataParallel


def __getattr__(name: str) -> Any:
    """Our classes as attributes of this module, where pickle looks for them."""
    if name in REPLACED:
        return classes()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
