"""The captured loops of an engine: kept for later prompts, and a generation that runs on one of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from smollm2.engine.captured import Choice, DecodeLoop, capacity_for
from smollm2.engine.eager import Engine
from smollm2.errors import UsageError
from smollm2.model import SmolLM2ForCausalLM
from smollm2.sampling import SamplingParams, read_tokens

KEPT_LOOPS = 4  # idle loops, each with a cache of its own


@dataclass
class DecodeLoops:
    """The loops of an engine, kept for later prompts; for one thread.

    A generation borrows one, so that two which take turns have one each.
    """

    engine: Engine
    chunk: int | None = None  # as DecodeLoop's
    idle: list[DecodeLoop] = field(default_factory=list)  # the one used last at the end

    @contextmanager
    def borrow(self, batch: int, tokens: int, capacity: int | None = None) -> Iterator[DecodeLoop]:
        """A loop for that many rows of up to `tokens` tokens. capacity: that of a new one, and the largest of
        one that is kept; by default a power of two. Raises UsageError for too many tokens.
        """
        model = self.engine.model
        capacity = capacity or capacity_for(tokens, model.config.max_position_embeddings)
        kind = model.device, model.dtype
        self.idle = [loop for loop in self.idle if (loop.device, loop.cache.keys.dtype) == kind]
        same_batch = (loop for loop in self.idle if loop.batch == batch)
        loop = next((loop for loop in same_batch if tokens <= loop.cache.capacity <= capacity), None)
        if loop is None:
            loop = self._allocate(batch, capacity, tokens)
        else:
            self.idle.remove(loop)
        try:
            yield loop
        except Exception:
            loop = None  # its state is unknown
            raise
        finally:
            if loop is not None:
                self.idle.append(loop)
                del self.idle[:-KEPT_LOOPS]

    def describe(self) -> str:
        """A line for every loop that is kept."""
        return "\n".join(loop.describe() for loop in self.idle) or "no decode loop yet"

    def _allocate(self, batch: int, capacity: int, tokens: int) -> DecodeLoop:
        """A new loop; where memory is short in the place of the idle ones, and then for exactly `tokens`."""
        try:
            return DecodeLoop(self.engine, batch, capacity, self.chunk)
        except UsageError:
            self.idle.clear()
        try:
            return DecodeLoop(self.engine, batch, capacity, self.chunk)
        except UsageError:
            return DecodeLoop(self.engine, batch, tokens, self.chunk)


class CapturedEngine(Engine):
    """The model as it is, its steps recorded as CUDA graphs: `generate` hands its loop to the device."""

    name = "captured"
    # A prompt's operations are launched one by one, which takes as long for some thousands of tokens.
    reads_at_once = 4096
    reads_between_steps = 2048
    padding = 4096
    prefix_block = 16  # so that prompts which share a beginning hold equally much, and are read together

    def __init__(self, model: SmolLM2ForCausalLM, why: str = "") -> None:
        super().__init__(model, why)
        self.loops = DecodeLoops(self)


def captured_steps(
    loops: DecodeLoops,
    input_ids: Tensor,
    lengths: Tensor,
    *,
    max_new_tokens: int,
    params: SamplingParams,
    seeds: Sequence[int] | Tensor,
    eos_token_ids: Sequence[int] = (),
    pad_token_id: int = 0,
) -> Iterator[Tensor]:
    """Yields what `generate_steps` yields: the next token of every row [B], on the host.

    input_ids [B, T], row b holding lengths[b] >= 1 tokens and then anything; lengths [B]; seeds [B].
    Arguments are otherwise as in `generate_steps`, which checks them. Raises UsageError, before any work, for
    more tokens than the model or the memory holds.
    """
    batch = input_ids.shape[0]
    if batch == 0 or max_new_tokens == 0:
        return
    longest = int(lengths.max())
    ends = torch.tensor(list(eos_token_ids), dtype=torch.int64)
    with loops.borrow(batch, longest + max_new_tokens) as loop:
        loop.start(input_ids[:, :longest], lengths, seeds, Choice(params, tuple(eos_token_ids), pad_token_id))
        finished = torch.zeros(batch, dtype=torch.bool)
        for chunk in _chunks(loop, max_new_tokens):
            for tokens in read_tokens(chunk):
                yield tokens
                finished |= torch.isin(tokens, ends)
                if finished.all():
                    return


def _chunks(loop: DecodeLoop, tokens: int) -> Iterator[Tensor]:
    """The tokens of the prefill, then of every chunk, [steps, B] each."""
    # Those of the prefill are read alone: they should not wait for a chunk.
    reading: Callable[[], Tensor] | None = loop.read_back(1)
    tokens -= 1
    while reading is not None:
        if not loop.captures:
            yield reading()
        following, steps = None, min(loop.chunk, tokens)
        if steps:  # a device that captures goes on while the host looks at the tokens before
            loop.run(steps)
            following = loop.read_back(steps)
            tokens -= steps
        if loop.captures:
            yield reading()
        reading = following
