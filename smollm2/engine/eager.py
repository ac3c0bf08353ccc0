"""The model as it is, operation by operation, and what every engine offers.

    cache  = engine.allocate(batch, capacity)
    logits = engine.prefill(input_ids, lengths, cache)        # then, token by token:
    logits = engine.decode(tokens, cache)

Letters: B rows, T tokens of a row, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import LayerWeights
from smollm2.engine.cache import KVCache
from smollm2.engine.eager_step import Weights, decode_step, packed_weights, supports
from smollm2.layers import Cache, autocast_dtype
from smollm2.model import SmolLM2ForCausalLM
from smollm2.projections import apply, is_plain


def outside_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Generation has the dtype of the parameters and of the cache: an enclosing torch.autocast is left."""
    active = autocast_dtype(device) is not None
    return torch.autocast(device.type, enabled=False) if active else nullcontext()


@torch.inference_mode()
def prefill(model: SmolLM2ForCausalLM, input_ids: Tensor, lengths: Tensor, cache: KVCache) -> Tensor:
    """Runs prompts through the model and fills the cache, behind the tokens that its rows hold already: none,
    or equally many in every row.

    input_ids [B, T], row b holding lengths[b] tokens and then anything -> logits [B, V] after the last token
    of each row. Causality makes what follows a row's tokens harmless; the decode steps overwrite it in the
    cache.
    """
    held = cache.longest
    cache.advance(input_ids.shape[1])
    cache.lengths.copy_(lengths + held)
    layers = [Cache(*cache.layer(index)) for index in range(len(model.model.layers))]
    with outside_autocast(input_ids.device):
        hidden = model.model(input_ids, cache=layers)
        last = hidden[torch.arange(len(lengths), device=hidden.device), lengths - 1]
        head = model.lm_head
        return F.linear(last, head.weight) if is_plain(head) else apply(head, last)


class Engine:
    """Runs a model's prompts and decode steps.

    Every engine fills the same cache and returns the same shapes, so that a generation may change engines.
    What it derives from the weights (copies in another order, in 8 bits) is compared with them once when a
    text begins, at its prompt or at the first step after it: a model may be trained or loaded into between
    two texts, by any means. A model with adapters, hooks or other layers is run by calling these. frozen: the
    caller answers for it that weights and layers stay as they are, so that they are looked at once.
    """

    name = "eager"
    reads_at_once = 512  # tokens of prompts, where others wait: more are hardly read faster
    reads_between_steps = 128  # tokens of prompts between two steps of rows that are under way
    padding = 0  # tokens that `extend` may read for nothing to have fewer calls of the model
    prefix_block = 1  # a prompt takes over a multiple of so many tokens that are known already

    def __init__(self, model: SmolLM2ForCausalLM, why: str = "") -> None:
        self.model, self.why = model, why
        self.renewed = False  # since the last prompt
        self.frozen = False
        self.plain = True
        self._packed: Weights | None = None

    def allocate(self, batch: int, capacity: int) -> KVCache:
        """An empty cache for `batch` rows of `capacity` tokens. Raises UsageError if it does not fit."""
        model = self.model
        return KVCache.allocate(model.config, batch, capacity, model.device, model.dtype)

    def prefill(self, input_ids: Tensor, lengths: Tensor, cache: KVCache) -> Tensor:
        """`prefill`: [B, T], [B] -> logits [B, V]"""
        self.renewed = self.renewed and self.frozen
        return prefill(self.model, input_ids, lengths, cache)

    def extend(self, parts: Sequence[Sequence[int]], slots: Sequence[int], cache: KVCache) -> Tensor:
        """Reads on in some rows of a cache: the tokens of part i, at least one, behind those that row
        slots[i] holds -> logits [len(parts), V] after the last of each. The caller counts `longest`.
        """
        held = cache.lengths[list(slots)].tolist()
        logits: dict[int, Tensor] = {}
        for group in self._together(parts, slots, held):
            lengths = [len(parts[index]) for index in group]
            ids = [[*parts[index], *[0] * (max(lengths) - len(parts[index]))] for index in group]
            rows = cache.part(slots[group[0]], slots[group[-1]] + 1, held[group[0]])
            device = cache.keys.device
            found = self.prefill(torch.tensor(ids, device=device), torch.tensor(lengths, device=device), rows)
            logits.update(zip(group, found, strict=True))
        return torch.stack([logits[index] for index in range(len(parts))])

    def _together(
        self, parts: Sequence[Sequence[int]], slots: Sequence[int], held: Sequence[int]
    ) -> list[list[int]]:
        """Indices of parts that one call reads: slots side by side that hold equally much, little padding."""
        groups: list[list[int]] = []
        for index in sorted(range(len(parts)), key=slots.__getitem__):
            group = groups[-1] if groups else []
            lengths = [len(parts[one]) for one in (*group, index)]
            beside = group and (slots[index], held[index]) == (slots[group[-1]] + 1, held[group[-1]])
            if beside and len(lengths) * max(lengths) - sum(lengths) <= self.padding:
                group.append(index)
            else:
                groups.append([index])
        return groups

    def decode(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """Appends a few tokens to every row: [B, T] -> logits [B, T, V] in fp32. The cache grows by T."""
        self._look(cache)
        with torch.inference_mode(), outside_autocast(tokens.device):
            return self._decode(tokens, cache)

    def decode_best(
        self, tokens: Tensor, cache: KVCache, suppressed: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """As `decode`, for greedy choice of the next token of plain models: [B, 1] -> candidates [B, P], as
        the backend's decode_best gives them. suppressed [V] bool: tokens that are not chosen.
        """
        self._look(cache)
        with torch.inference_mode(), outside_autocast(tokens.device):
            return self._best(self._hidden(tokens, cache)[:, -1], suppressed)

    def _look(self, cache: KVCache) -> None:
        """Renews what is derived from the model at the first step after a prompt."""
        if not (self.renewed and (cache.longest or self.frozen)):
            self.renew()
            self.renewed = True

    def renew(self) -> None:
        """Looks at the layers and the weights of the model, which may have changed since the last text."""
        self.plain, self._packed = self.model.is_plain(), None

    def _decode(self, tokens: Tensor, cache: KVCache) -> Tensor:
        model = self.model
        if self.plain and supports(model, cache):
            return decode_step(model, self._weights(tokens.numel()), tokens, cache).float()
        if self.plain:
            return self._logits(self._hidden(tokens, cache))
        cache.advance(tokens.shape[1])
        layers = [Cache(*cache.layer(index), cache.lengths) for index in range(len(model.model.layers))]
        return apply(model.lm_head, model.model(tokens, cache=layers)).float()

    def _weights(self, rows: int) -> Weights:
        """The matrices of the step on a CPU for so many tokens."""
        self._packed = self._packed or packed_weights(self.model)
        return self._packed

    def _hidden(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """The step by the backend's operations, up to its head: tokens [B, T] -> [B, T, hidden]."""
        model = self.model
        # First: a copy of weights just before the kernel that reads them early would not be seen by it.
        layers = self._packed_layers()
        cache.reserve(tokens.shape[1])
        tables = model.model.rotary(tokens.device, cache.capacity)
        inputs = model.backend.decode_inputs(tokens, model.model.embed_tokens.weight, cache.lengths, *tables)
        return self._blocks(layers, *inputs, cache)

    def _packed_layers(self) -> list[LayerWeights[Any]]:
        return self.model.pack()

    def _blocks(
        self, layers: list[LayerWeights[Any]], x: Tensor, cos: Tensor, sin: Tensor, cache: KVCache
    ) -> Tensor:
        ops, eps = self.model.backend, self.model.config.rms_norm_eps
        keys, values = zip(*(cache.layer(index) for index in range(len(layers))), strict=True)
        return ops.decode_layers(
            x, layers, keys, values, cache.lengths, cos, sin, eps=eps, ops=ops, dependent=True
        )

    def _logits(self, x: Tensor) -> Tensor:
        """The head: [B, T, hidden] -> logits [B, T, V] in fp32."""
        model = self.model
        norm, eps = model.model.norm.weight, model.config.rms_norm_eps
        return model.backend.decode_head(x, norm, model.lm_head.weight, eps, dependent=True)

    def _best(self, x: Tensor, suppressed: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The head for greedy decoding: [B, hidden] -> candidates [B, P]."""
        model = self.model
        norm, eps = model.model.norm.weight, model.config.rms_norm_eps
        return model.backend.decode_best(x, norm, model.lm_head.weight, eps, suppressed, dependent=True)

    def __str__(self) -> str:
        return f"{self.name} ({self.why})" if self.why else self.name
