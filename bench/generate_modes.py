"""The ways of this project to generate, as `python -m bench.generate` measures them: an engine step by step,
or a loop on the device.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.variant import Turns, Variant
from smollm2.engine.cache import KVCache, cache_bytes
from smollm2.engine.compiled import CompiledEngine
from smollm2.engine.eager import Engine
from smollm2.engine.quantized import QuantizedEngine
from smollm2.errors import UsageError
from smollm2.model import SmolLM2ForCausalLM
from smollm2.sampling import highest


def engine_variant(engine: Engine, captured: bool = False) -> Variant:
    """An engine as a variant: step by step from the host, or in a loop on the device."""
    below = getattr(engine, "below", engine)
    dtype = engine.model.lm_head.weight.dtype
    name, weights = str(dtype).removeprefix("torch."), list[Any](engine.model.parameters())
    if isinstance(below, QuantizedEngine):
        name, weights = below.name, [below.head, *(part for layer in below.layers for part in layer)]
    size = sum(tensor.nbytes for weight in weights for tensor in _tensors(weight))
    begin = partial(CapturedTurns if captured else EngineTurns, engine)
    return Variant(name, size, cache_bytes(engine.model.config, 1, 1, dtype), begin)


def all_tokens(turns: Turns, new_tokens: int) -> Tensor:
    """The new tokens of a batch [B, new], from its prompts."""
    first = turns.prefill()
    return torch.cat([first, turns.decode(first, new_tokens - 1)], 1)


def _tensors(weight: Any) -> Iterator[Tensor]:
    """A weight is a tensor, or a tuple of them when it is quantised."""
    parts = weight if isinstance(weight, tuple) else (weight,)
    yield from (part for part in parts if isinstance(part, Tensor))


class EngineTurns:
    """An engine and its cache. Raises UsageError for a batch that it would hand to another one."""

    def __init__(self, engine: Engine, prompts: Tensor, new_tokens: int) -> None:
        batch, length = prompts.shape
        if isinstance(engine, CompiledEngine) and batch > engine.max_tokens:
            raise UsageError(
                f"the compiled step takes {engine.max_tokens} rows; a larger batch runs as eager does"
            )
        self._engine, self._prompts = engine, prompts
        self._lengths = torch.full((batch,), length, device=prompts.device)
        self._cache = engine.allocate(batch, length + new_tokens)

    def rewind(self, length: int) -> None:
        """Forgets what the cache holds behind so many tokens of every row."""
        self._cache.lengths.fill_(length)
        self._cache.longest = length

    @torch.inference_mode()
    def prefill(self) -> Tensor:
        self.rewind(0)
        return self._engine.prefill(self._prompts, self._lengths, self._cache).argmax(-1, keepdim=True)

    @torch.inference_mode()
    def decode(self, tokens: Tensor, steps: int) -> Tensor:
        found = [tokens]
        for _ in range(steps):
            found.append(highest(self._engine.decode(found[-1], self._cache)[:, -1])[:, None])
        return torch.cat(found[1:], 1)


class CapturedTurns:
    """The decode loop of smollm2/engine/captured.py: all steps in a row, then one read-back."""

    def __init__(self, engine: Engine, prompts: Tensor, new_tokens: int) -> None:
        from smollm2.engine.captured import Choice, DecodeLoop, capacity_for
        from smollm2.sampling import SamplingParams

        batch, length = prompts.shape
        capacity = capacity_for(length + new_tokens, engine.model.config.max_position_embeddings)
        self._loop = DecodeLoop(engine, batch, capacity, chunk=new_tokens)
        self._start = (
            prompts,
            torch.full((batch,), length, device=prompts.device),
            [0] * batch,
            Choice(SamplingParams(temperature=0.0)),
        )

    def prefill(self) -> Tensor:
        self._loop.start(*self._start)
        return self._loop.output[:1].T.clone()

    def decode(self, tokens: Tensor, steps: int) -> Tensor:
        self._loop.run(steps)
        return self._loop.output[:steps].T.clone()


class TorchCompiledEngine(Engine):
    """Decode steps under torch.compile: what its compiler makes of our model on backend torch. For caches of
    a fixed size.
    """

    name = "torch.compile"

    def __init__(self, model: SmolLM2ForCausalLM, compiler: str) -> None:
        """compiler: the backend of torch.compile."""
        super().__init__(model)
        self._layers, self._tables = model.pack(), model.model.rotary(model.lm_head.weight.device)
        self._compiled = torch.compile(self._step, backend=compiler, dynamic=False, fullgraph=True)

    def decode(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """[B, 1] -> logits [B, 1, V]"""
        cache.advance(tokens.shape[1])
        logits: Tensor = self._compiled(tokens, cache.lengths, cache.keys, cache.values)
        return logits

    def _step(self, tokens: Tensor, lengths: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        model, eps = self.model, self.model.config.rms_norm_eps
        x = model.model.embed_tokens(tokens)
        cos, sin = (table[lengths[:, None] - 1] for table in self._tables)
        caches = keys.unbind(), values.unbind()
        x = model.backend.decode_layers(
            x, self._layers, *caches, lengths, cos, sin, eps=eps, ops=model.backend
        )
        return model.backend.decode_head(x, model.model.norm.weight, model.lm_head.weight, eps)
