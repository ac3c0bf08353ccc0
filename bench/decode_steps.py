"""Decode steps over a cache that holds random numbers, for bench/generation.py: one class for each way to run
them, and their clock.

The numbers are the same in every class, for the same sizes, so that their logits can be compared. No prompt
is prefilled for them.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

import kernels
from bench.timing import Sample, synchronize
from kernels.launch_config import joins_layers
from smollm2.engine.cache import KVCache
from smollm2.engine.captured import Choice, DecodeLoop
from smollm2.engine.eager import Engine
from smollm2.model import SmolLM2ForCausalLM
from smollm2.sampling import SamplingParams

LONG = 1.0  # seconds of a chunk that is not repeated more than necessary
PROMPT = 8  # tokens that a loop is started with, before its cache is filled


def tokens_for(batch: int, length: int, vocabulary: int, device: torch.device) -> Tensor:
    """Ids [batch, length], always the same."""
    return torch.randint(vocabulary, (batch, length), generator=torch.Generator().manual_seed(0)).to(device)


@contextmanager
def joined() -> Iterator[None]:
    """All layers of a decode step in one launch, whatever the launch table says."""
    module: Any = import_module(f"{kernels.__name__}.decode_layers")
    module.joins_layers = lambda device: True
    try:
        yield
    finally:
        module.joins_layers = joins_layers


class EagerSteps:
    """`Engine.decode` from Python, and argmax, over a cache filled with random numbers. A chunk is what is
    done between two rewinds.
    """

    rewinds_freely = True  # a rewind costs next to nothing, and may be timed

    def __init__(self, model: SmolLM2ForCausalLM, batch: int, keys: int, chunk: int) -> None:
        self.engine, self.keys, self.chunk = Engine(model), keys, min(chunk, keys - 1)
        self.tokens = tokens_for(batch, 1, model.config.vocab_size, model.lm_head.weight.device)
        self.cache = self._allocate(batch)
        generator = torch.Generator(self.tokens.device).manual_seed(0)
        for layer in range(model.config.num_hidden_layers):
            self.cache.keys[layer].normal_(generator=generator)
            self.cache.values[layer].normal_(generator=generator)

    def _allocate(self, batch: int) -> KVCache:
        return self.engine.allocate(batch, self.keys)

    def first(self) -> Tensor:
        """The logits [B, V] of the step that fills the cache; called before all others."""
        self.rewind(1)
        return self.engine.decode(self.tokens, self.cache)[:, -1].float().clone()

    def rewind(self, steps: int) -> None:
        """Leaves room for so many steps."""
        self.cache.lengths.fill_(self.keys - steps)
        self.cache.longest = self.keys - steps

    def go(self, steps: int) -> None:
        """So many steps. On CUDA it may return before they are done."""
        tokens = self.tokens
        for _ in range(steps):
            tokens = self.engine.decode(tokens, self.cache)[:, -1].argmax(-1, keepdim=True)


class LoopSteps(EagerSteps):
    """The decode loop, captured where there are CUDA graphs unless captured is False."""

    def __init__(
        self, model: SmolLM2ForCausalLM, batch: int, keys: int, chunk: int, captured: bool = True
    ) -> None:
        self.captured = captured
        super().__init__(model, batch, keys, chunk)

    def _allocate(self, batch: int) -> KVCache:
        self.loop = DecodeLoop(self.engine, batch, self.keys, self.chunk)
        self.loop.captures = self.loop.captures and self.captured
        length = min(PROMPT, self.keys)
        prompts = self.tokens.expand(batch, length).contiguous()
        self.loop.start(prompts, torch.full((batch,), length), [0] * batch, Choice(SamplingParams()))
        return self.loop.cache

    def same_tokens(self, logits: Tensor) -> float:
        """Share of rows in which the loop puts out the most likely token of `first`'s logits [B, V]."""
        self.loop.tokens.copy_(self.tokens)
        self.rewind(1)
        self.go(1)
        return (self.loop.output[0] == logits.argmax(-1)).double().mean().item()

    def go(self, steps: int) -> None:
        self.loop.run(steps)


def build_llama(model: SmolLM2ForCausalLM) -> Any:
    """transformers' model with the same weights, in their dtype and on their device."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    head = model.lm_head.weight
    # not `.to(dtype)`, which would round the frequencies of the rotary embedding
    with torch.device(head.device):
        llama: Any = AutoModelForCausalLM.from_config(LlamaConfig(**model.config.to_dict()), dtype=head.dtype)
    llama.load_state_dict(model.state_dict())
    return llama.eval()


class LlamaSteps:
    """Forward calls of transformers' model. compiler: a backend of torch.compile, with a StaticCache; else a
    DynamicCache, which grows.
    """

    rewinds_freely = False  # it writes the whole cache anew

    def __init__(
        self, llama: Any, batch: int, keys: int, chunk: int, compiler: str | None = None, graph: bool = False
    ) -> None:
        from transformers import StaticCache

        self.llama, self.keys, self.chunk, self.step = llama, keys, min(chunk, keys - 1), llama
        self.static = compiler is not None
        self.cache: Any = None
        if compiler is not None:
            torch._dynamo.reset()
            mode = "reduce-overhead" if graph and compiler == "inductor" else None
            self.step = torch.compile(llama.forward, dynamic=False, backend=compiler, mode=mode)
            self.cache = StaticCache(llama.config, max_cache_len=keys)
        self.tokens = tokens_for(batch, 1, llama.config.vocab_size, llama.device)
        self.position = torch.zeros(1, 1, dtype=torch.int64, device=llama.device)

    def first(self) -> Tensor:
        self.rewind(1)
        return self._logits(self.tokens).float().clone()

    def rewind(self, steps: int) -> None:
        from transformers import DynamicCache

        length, config = self.keys - steps, self.llama.config
        self.position.fill_(length)
        if self.static:
            self.cache.reset()
        else:
            self.cache = None  # its memory is needed
            self.cache = DynamicCache()
        generator = torch.Generator(self.tokens.device).manual_seed(0)
        shape = (len(self.tokens), self.keys, config.num_key_value_heads, config.head_dim)
        new = torch.empty(shape, dtype=self.llama.dtype, device=self.tokens.device)
        for layer in range(config.num_hidden_layers):  # the same numbers as in EagerSteps
            keys, values = (
                new.normal_(generator=generator).transpose(1, 2)[:, :, :length].clone() for _ in range(2)
            )
            self.cache.update(keys, values, layer)

    def go(self, steps: int) -> None:
        tokens = self.tokens
        for _ in range(steps):
            tokens = self._logits(tokens).argmax(-1, keepdim=True)

    def _logits(self, tokens: Tensor) -> Tensor:
        place = {"position_ids": self.position} if self.static else {}
        logits: Tensor = self.step(tokens, past_key_values=self.cache, use_cache=True, **place).logits[:, -1]
        self.position += 1
        return logits


def clock(
    steps: EagerSteps | LlamaSteps, device: torch.device, *, repeats: int, seconds: float
) -> tuple[Sample, int]:
    """Microseconds of a step, and how many steps each repeat had. One round or two do not count: the first
    replay of a graph uploads it.

    repeats: 1 times the very first round, which tells nothing. seconds: of one repeat, about.
    """

    def once(chunks: int) -> float:
        steps.rewind(steps.chunk)
        synchronize(device)
        began = time.perf_counter()
        for chunk in range(chunks):
            if chunk:
                steps.rewind(steps.chunk)
            steps.go(steps.chunk)
        synchronize(device)
        return (time.perf_counter() - began) / (chunks * steps.chunk)

    if repeats == 1:
        return Sample.of([1e6 * once(1)]), steps.chunk
    about = once(1) * steps.chunk
    if about < LONG:
        about = once(1) * steps.chunk
    chunks = max(1, min(16, int(seconds / about))) if steps.rewinds_freely else 1
    if about > 2 * seconds:
        repeats = min(3 if about < LONG else 2, repeats)
    return Sample.of([1e6 * once(chunks) for _ in range(repeats)]), chunks * steps.chunk
