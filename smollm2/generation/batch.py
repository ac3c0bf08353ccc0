"""Many prompts through a fixed number of slots: continuous batching.

    for index, tokens in generate_many(model, prompts, max_new_tokens=64, slots=8):
        ...

A slot is a row of one key/value cache. A row that has ended leaves the work, and the next prompt takes its
slot: it is prefilled in a small cache of its own and copied over. Prompts go in from the longest to the
shortest: neighbours are then prefilled together with little padding, the short ones fill the gaps at the end,
and a lack of memory shows in the first step.

Noise is keyed by (seed of the row, position), and nothing else in a row depends on its neighbours: in fp32 a
row gives the same tokens alone, in any batch, in any slot, with any number of slots, captured or not, as long
as no two tokens score the same but for rounding (a library's product may round by the size of the batch).
"""

from __future__ import annotations

import functools
import math
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence

import torch

from smollm2.config import SmolLM2Config
from smollm2.engine.cache import USABLE_PERCENT, cache_bytes, free_memory, megabytes
from smollm2.engine.captured import Choice, capacity_for
from smollm2.engine.eager import Engine
from smollm2.engine.loops import CapturedEngine
from smollm2.engine.select import default_engine
from smollm2.errors import UsageError
from smollm2.generation.slots import PREFILL_TOKENS, End, LoopSlots, Row, Slots
from smollm2.model import SmolLM2ForCausalLM
from smollm2.sampling import SamplingParams


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
    prompt. eos_token_ids end a row and are among its tokens. slots: rows at work at once. engine: what runs
    the steps, by default as in `generate`. stop(index, new tokens so far) is asked after every token and ends
    the row by returning True. report takes lines such as the size of the cache.

    The cache is sized by the longest prompt with its new tokens; that of a captured loop has the next power
    of two where it fits. If so many slots do not fit the free memory, there are fewer, which is reported, or
    warned of without a `report`. Raises UsageError, before any work, naming the prompt that is empty, too
    long or has ids out of range, and when not even one slot fits.
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

    rows = [Row(*parts) for parts in zip(range(count), map(list, prompts), budgets, seeds, strict=True)]
    rows.sort(key=lambda row: -len(row.prompt))
    capacity = max(row.capacity for row in rows)
    engine, slots, free = engine or default_engine(model), min(slots, count), free_memory(model.device)
    longest, loops = capacity, None
    if isinstance(engine, CapturedEngine) and model.is_plain():
        loops = engine.loops
        rounded = capacity_for(longest, config.max_position_embeddings)
        needed = _needed(config, rounded, model.dtype, slots)
        if needed > _usable(free):
            loops.idle.clear()
            free = free_memory(model.device)
        if needed <= _usable(free):
            capacity = rounded
    fitting, line = fit_slots(config, slots, capacity, model.dtype, free)
    if report is not None:
        report(line)
    elif fitting < slots:
        warnings.warn(line, stacklevel=2)
    end = End(frozenset(eos_token_ids), stop)
    if loops is not None:
        choice = Choice(params, tuple(eos_token_ids))
        return LoopSlots(loops, choice, end, fitting).run(deque(rows), longest, capacity)
    return Slots(model, engine, params, end, fitting, capacity).run(deque(rows))


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
    needed, usable = functools.partial(_needed, config, capacity, dtype), _usable(free)
    size = f"{slots} x {capacity:,} tokens, {megabytes(needed(slots))}"
    if needed(slots) <= usable:
        return slots, f"cache: {size}"
    share = f"{megabytes(int(usable))} are available ({USABLE_PERCENT} % of what is free)"
    for rows in range(slots - 1, 0, -1):
        if needed(rows) <= usable:
            return rows, f"cache: {size}, but {share}: slots lowered to {rows}, {megabytes(needed(rows))}"
    raise UsageError(
        f"cache: one slot of {capacity:,} tokens needs {megabytes(needed(1))}, but {share}; "
        f"shorten the longest prompt, lower max_new_tokens or use a smaller dtype"
    )


def _needed(config: SmolLM2Config, capacity: int, dtype: torch.dtype, rows: int) -> int:
    """Bytes of the cache of so many rows, and of one in which prompts are prefilled."""
    prefilled = max(capacity, min(rows * capacity, PREFILL_TOKENS))
    return cache_bytes(config, rows, capacity, dtype) + cache_bytes(config, 1, prefilled, dtype)


def _usable(free: int | None) -> float:
    """Bytes of the free ones that caches may take."""
    return math.inf if free is None else free * USABLE_PERCENT // 100
