"""The model as it is, operation by operation, and what every engine offers.

    cache  = engine.allocate(batch, capacity)
    logits = engine.prefill(input_ids, lengths, cache)        # then, token by token:
    logits = engine.decode(tokens, cache)

Letters: B rows, T tokens of a row, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from smollm2.engine.cache import KVCache
from smollm2.engine.eager_step import Weights, decode_step, packed_weights, supports
from smollm2.model import SmolLM2ForCausalLM


@torch.inference_mode()
def prefill(model: SmolLM2ForCausalLM, input_ids: Tensor, lengths: Tensor, cache: KVCache) -> Tensor:
    """Runs the prompts through the model and fills the empty cache.

    input_ids [B, T], row b holding lengths[b] tokens and then anything -> logits [B, V] after the last token
    of each row. Causality makes what follows a row's tokens harmless; the decode steps overwrite it in the
    cache.
    """
    cache.advance(input_ids.shape[1])
    cache.lengths.copy_(lengths)
    layers = [cache.layer(index) for index in range(len(model.model.layers))]
    hidden = model.model(input_ids, cache=layers)
    last = hidden[torch.arange(len(lengths), device=hidden.device), lengths - 1]
    return F.linear(last, model.lm_head.weight)


class Engine:
    """Runs a model's prompts and decode steps.

    Every engine fills the same cache and returns the same shapes, so that a generation may change engines.
    """

    name = "eager"

    def __init__(self, model: SmolLM2ForCausalLM, why: str = "") -> None:
        self.model, self.why = model, why
        self._packed: Weights | None = None  # asked for anew at every prompt: training may have changed them

    def allocate(self, batch: int, capacity: int) -> KVCache:
        """An empty cache for `batch` rows of `capacity` tokens. Raises UsageError if it does not fit."""
        weight = self.model.lm_head.weight
        return KVCache.allocate(self.model.config, batch, capacity, weight.device, weight.dtype)

    def prefill(self, input_ids: Tensor, lengths: Tensor, cache: KVCache) -> Tensor:
        """`prefill`: [B, T], [B] -> logits [B, V]"""
        self._packed = None
        return prefill(self.model, input_ids, lengths, cache)

    def decode(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """Appends a few tokens to every row: [B, T] -> logits [B, T, V] in fp32. The cache grows by T."""
        model, length = self.model, tokens.shape[1]
        if supports(model, cache):
            return decode_step(model, self._weights(tokens.numel()), tokens, cache).float()
        with torch.inference_mode():
            cache.advance(length)
            position = cache.lengths[:, None] - length + torch.arange(length, device=tokens.device)
            cos, sin = (table[position] for table in model.model.rotary(tokens.device))
            return self._composed(model.model.embed_tokens(tokens), cos, sin, cache)

    def _weights(self, rows: int) -> Weights:
        """The matrices of the step on a CPU for so many tokens."""
        self._packed = self._packed or packed_weights(self.model)
        return self._packed

    def _composed(self, x: Tensor, cos: Tensor, sin: Tensor, cache: KVCache) -> Tensor:
        """The step by the backend's operations: embeddings [B, T, hidden] -> logits [B, T, V] in fp32."""
        model, ops, eps = self.model, self.model.backend, self.model.config.rms_norm_eps
        for index, weights in enumerate(model.pack()):
            x = ops.decode_layer(x, weights, *cache.layer(index), cache.lengths, cos, sin, eps=eps, ops=ops)
        return ops.decode_head(x, model.model.norm.weight, model.lm_head.weight, eps)

    def __str__(self) -> str:
        return f"{self.name} ({self.why})" if self.why else self.name
