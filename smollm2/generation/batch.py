"""Many prompts through a fixed number of slots: continuous batching.

    for index, tokens in generate_many(model, prompts, max_new_tokens=64, slots=8):
        ...

A slot is a row of one key/value cache. A row that has ended leaves the work at once, and the next prompt
takes its slot: it is prefilled in a small cache of its own and copied over. When no prompt is left, the rows
that still run move together and the batch becomes smaller, so that ended rows cost nothing. Prompts go in
from the longest to the shortest: neighbours are then prefilled together with little padding, the short ones
fill the gaps at the end, and a lack of memory shows in the first step.

Noise is keyed by (seed of the row, position), and nothing else in a row depends on its neighbours: in fp32 a
row gives the same tokens alone, in any batch, in any slot and with any number of slots.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from smollm2.config import SmolLM2Config
from smollm2.engine.cache import USABLE_PERCENT, KVCache, cache_bytes, free_memory, megabytes
from smollm2.engine.eager import Engine
from smollm2.errors import UsageError
from smollm2.model import SmolLM2ForCausalLM
from smollm2.sampling import SamplingParams, read_tokens, sample

PREFILL_TOKENS = 4096  # of prompts prefilled together, padding included: more costs memory and is not faster


def generate_many(
    model: SmolLM2ForCausalLM,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int | Sequence[int] = 64,
    params: SamplingParams | None = None,
    seed: int | Sequence[int] = 0,
    eos_token_ids: Sequence[int] = (),
    slots: int = 8,
    engine: Engine | None = None,
    stop: Callable[[int, list[int]], bool] | None = None,
    report: Callable[[str], None] | None = None,
) -> Iterator[tuple[int, list[int]]]:
    """Continues every prompt and yields (its index, its new tokens) as rows end, in no particular order.

    max_new_tokens: one number, or one per prompt. seed: prompt i draws with seed + i; or a list with one per
    prompt. eos_token_ids end a row and are among its tokens. slots: rows at work at once. engine: None runs
    the model eagerly. stop(index, new tokens so far) is asked after every token and ends the row by returning
    True. report takes lines such as the size of the cache.

    The cache is sized by the longest prompt with its new tokens. If so many slots do not fit the free memory,
    there are fewer, which is reported, or warned of without a `report`. Raises UsageError, before any work,
    naming the prompt that is empty, too long or has ids out of range, and when not even one slot fits.
    """
    config, params, count = model.config, params or SamplingParams(), len(prompts)
    budgets = [max_new_tokens] * count if isinstance(max_new_tokens, int) else list(max_new_tokens)
    seeds = [seed + index for index in range(count)] if isinstance(seed, int) else list(seed)
    for name, given in (("max_new_tokens", budgets), ("seed", seeds)):
        if len(given) != count:
            one = f"one number or {count} of them, one per prompt"
            raise UsageError(f"{name}: expected {one}, got {len(given)}")
    if slots < 1:
        raise UsageError(f"slots: expected a number >= 1, got {slots}")
    params.validate(config.vocab_size)
    check_prompts(config, prompts, budgets)
    if not count:
        return iter(())

    rows = [_Row(*parts) for parts in zip(range(count), map(list, prompts), budgets, seeds, strict=True)]
    rows.sort(key=lambda row: -len(row.prompt))
    capacity = max(row.capacity for row in rows)
    free = free_memory(model.device)
    fitting, line = fit_slots(config, min(slots, count), capacity, model.dtype, free)
    if report is not None:
        report(line)
    elif fitting < min(slots, count):
        warnings.warn(line, stacklevel=2)
    ends, engine = frozenset(eos_token_ids), engine or Engine(model)
    return _Slots(model, engine, params, ends, stop, fitting, capacity).run(deque(rows))


def check_prompts(
    config: SmolLM2Config,
    prompts: Sequence[Sequence[int]],
    budgets: Sequence[int],
    name: Callable[[int], str] = lambda index: f"prompt {index}",
) -> None:
    """Raises UsageError for the first prompt that cannot be continued by its budget; name(index) names it."""
    for index, (prompt, budget) in enumerate(zip(prompts, budgets, strict=True)):
        if budget < 1:
            raise UsageError(f"{name(index)}: expected max_new_tokens >= 1, got {budget}")
        if not len(prompt):
            hint = "start from the beginning-of-text token"
            raise UsageError(f"{name(index)}: expected at least one token, got none; {hint}")
        limit = config.max_position_embeddings
        if len(prompt) + budget > limit:
            raise UsageError(
                f"{name(index)}: expected at most {limit} tokens, prompt and new ones together, "
                f"got {len(prompt)} + {budget}; shorten the prompt or lower max_new_tokens"
            )
        config.check_ids(name(index), min(prompt), max(prompt))


def fit_slots(
    config: SmolLM2Config, slots: int, capacity: int, dtype: torch.dtype, free: int | None
) -> tuple[int, str]:
    """How many of `slots` rows of `capacity` tokens fit into `free` bytes of memory (None: unknown), and a
    line that says so.

    The caches in which prompts are prefilled count too. Raises UsageError when not even one row fits.
    """

    def needed(rows: int) -> int:
        prefilled = max(capacity, min(rows * capacity, PREFILL_TOKENS))
        return cache_bytes(config, rows, capacity, dtype) + cache_bytes(config, 1, prefilled, dtype)

    size = f"{slots} x {capacity:,} tokens, {megabytes(needed(slots))}"
    usable = math.inf if free is None else free * USABLE_PERCENT // 100
    if needed(slots) <= usable:
        return slots, f"cache: {size}"
    share = f"{megabytes(int(usable))} can be had ({USABLE_PERCENT} % of what is free)"
    for rows in range(slots - 1, 0, -1):
        if needed(rows) <= usable:
            return rows, f"cache: {size}, but {share}: slots lowered to {rows}, {megabytes(needed(rows))}"
    raise UsageError(
        f"cache: one slot of {capacity:,} tokens needs {megabytes(needed(1))}, but {share}; "
        f"shorten the longest prompt, lower max_new_tokens or use a smaller dtype"
    )


@dataclass
class _Row:
    """A prompt and what has been drawn for it."""

    index: int
    prompt: list[int]
    budget: int
    seed: int
    tokens: list[int] = field(default_factory=list)

    @property
    def capacity(self) -> int:
        """Tokens that it needs room for."""
        return len(self.prompt) + self.budget

    @property
    def length(self) -> int:
        """Tokens of it so far: the position of the one drawn next."""
        return len(self.prompt) + len(self.tokens)


class _Slots:
    """The cache, and the row in each of its slots (None: free). The first len(rows) slots are at work."""

    def __init__(
        self,
        model: SmolLM2ForCausalLM,
        engine: Engine,
        params: SamplingParams,
        ends: frozenset[int],
        stop: Callable[[int, list[int]], bool] | None,
        slots: int,
        capacity: int,
    ) -> None:
        self.engine, self.params, self.ends, self.stop = engine, params, ends, stop
        self.device = model.device
        self.rows: list[_Row | None] = [None] * slots
        self.cache = engine.allocate(slots, capacity)
        self.seen: Tensor | None = None
        if params.repetition_penalty != 1.0:
            self.seen = torch.zeros(slots, model.config.vocab_size, dtype=torch.bool, device=self.device)

    @torch.inference_mode()
    def run(self, queue: deque[_Row]) -> Iterator[tuple[int, list[int]]]:
        """Takes the queue from the left until it is empty and every row has ended."""
        self.engine.renewed = False
        while True:
            while queue and None in self.rows:
                yield from self._admit(queue)
            self._close_ranks()
            if not self.rows:
                return
            yield from self._step()

    def _admit(self, queue: deque[_Row]) -> list[tuple[int, list[int]]]:
        """Prefills the next prompts into free slots and draws their first tokens; returns rows that ended."""
        free = [slot for slot, row in enumerate(self.rows) if row is None]
        longest = len(queue[0].prompt)  # of all that are left
        size = max(1, min(len(free), len(queue), PREFILL_TOKENS // longest))
        group, free = [queue.popleft() for _ in range(size)], free[:size]
        input_ids = torch.zeros(size, longest, dtype=torch.int64)
        for number, row in enumerate(group):
            input_ids[number, : len(row.prompt)] = torch.tensor(row.prompt)
        small = self.engine.allocate(size, longest)
        lengths = torch.tensor([len(row.prompt) for row in group], device=self.device)
        renewed = self.engine.renewed  # the weights are looked at once a batch, not at every prompt
        logits = self.engine.prefill(input_ids.to(self.device), lengths, small)
        self.engine.renewed = renewed
        for number, (slot, row) in enumerate(zip(free, group, strict=True)):
            self.rows[slot] = row
            _copy(small, number, self.cache, slot, len(row.prompt))
            if self.seen is not None:
                self.seen[slot] = False
                self.seen[slot, torch.tensor(row.prompt, device=self.device)] = True
        return self._draw(logits, group, free)

    def _step(self) -> list[tuple[int, list[int]]]:
        """Feeds every row its last token and draws the next; returns the rows that it ended."""
        rows = [row for row in self.rows if row is not None]
        self.cache.longest = max(row.length for row in rows) - 1  # rows came and went
        last = torch.tensor([[row.tokens[-1]] for row in rows], device=self.device)
        return self._draw(self.engine.decode(last, self.cache)[:, -1], rows, list(range(len(rows))))

    def _draw(self, logits: Tensor, rows: list[_Row], slots: list[int]) -> list[tuple[int, list[int]]]:
        """Draws the next token of rows [B], which are in those slots, from logits [B, V].

        Frees the slots of the rows that it ended, and returns these.
        """
        seen = None if self.seen is None else self.seen[slots]
        chosen = sample(logits, self.params, [row.seed for row in rows], [row.length for row in rows], seen)
        tokens = read_tokens(chosen).tolist()
        if self.seen is not None:
            self.seen[slots, chosen] = True
        ended = []
        for row, slot, token in zip(rows, slots, tokens, strict=True):
            row.tokens.append(token)
            stopped = self.stop is not None and self.stop(row.index, row.tokens)
            if stopped or token in self.ends or len(row.tokens) == row.budget:
                self.rows[slot] = None
                ended.append((row.index, row.tokens))
        return ended

    def _close_ranks(self) -> None:
        """Moves rows from the end into free slots until none is free, and cuts the cache to them."""
        before = len(self.rows)
        while None in self.rows:
            row = self.rows.pop()
            if row is not None:
                hole, slot = self.rows.index(None), len(self.rows)
                self.rows[hole] = row
                _copy(self.cache, slot, self.cache, hole, row.length - 1)
                if self.seen is not None:
                    self.seen[hole] = self.seen[slot]
        if len(self.rows) < before:
            self.cache = keep(self.cache, len(self.rows))


def _copy(source: KVCache, row: int, target: KVCache, slot: int, length: int) -> None:
    """Copies the first `length` tokens of a row of one cache into a slot of another, or of the same one."""
    target.keys[:, slot, :length] = source.keys[:, row, :length]
    target.values[:, slot, :length] = source.values[:, row, :length]
    target.lengths[slot] = length


def keep(cache: KVCache, rows: int) -> KVCache:
    """The first rows of a cache, as views of it: what is written to one is written to both."""
    keys, values, lengths = cache.keys[:, :rows], cache.values[:, :rows], cache.lengths[:rows]
    return dataclasses.replace(cache, keys=keys, values=values, lengths=lengths)
