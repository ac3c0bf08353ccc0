"""Rows that come and go in a fixed number of slots, step by step or on a captured loop.

`Slots` runs any engine. A row leaves as soon as it has ended. When no prompt is left, the rows that still run
move together and the batch becomes smaller, so that ended rows cost nothing.

`LoopSlots` runs a captured loop, whose rows are the slots of one CUDA graph, recorded once whatever comes and
goes. The device always has work for the time in which the host reads the tokens before: some steps, or a
prefill. So an end token is seen late, and what its row computes meanwhile is dropped. A row at its budget is
known without reading. An empty slot stays in the graph, with one key to read. A smaller graph for the last
rows would cost a capture and a second cache, more than it could save in the steps that are left.

Steps of a loop by when the host sees that a row has ended, counted for rows of exponentially distributed
lengths: 64 rows in 8 slots that end by themselves after 40 tokens on average, and 128 rows in 16 slots with
budgets of 60 on average. Equal budgets cost no step more.

    looking every    at once    4 steps    8 steps    16 steps
    end tokens       446        484        520        576
    budgets          719        728        748        780
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from smollm2.engine.cache import KVCache
from smollm2.engine.captured import Choice, DecodeLoop
from smollm2.engine.eager import Engine
from smollm2.engine.loops import DecodeLoops
from smollm2.model import SmolLM2ForCausalLM
from smollm2.sampling import SamplingParams, read_tokens, sample

PREFILL_TOKENS = 4096  # of prompts prefilled together, padding included: more costs memory and is not faster
# Of a captured loop between two looks for rows that have ended. Fewer would leave too little time to launch a
# prefill behind them, which takes Python a few ms.
STEPS = 8


@dataclass(eq=False)
class Row:
    """A prompt and what has been drawn for it."""

    index: int
    prompt: list[int]
    budget: int
    seed: int
    tokens: list[int] = field(default_factory=list)
    computed: int = 0  # tokens that a loop was told to compute, whether read or not
    ended: bool = False

    @property
    def capacity(self) -> int:
        """Tokens that it needs room for."""
        return len(self.prompt) + self.budget

    @property
    def length(self) -> int:
        """Tokens of it so far: the position of the one drawn next."""
        return len(self.prompt) + len(self.tokens)


@dataclass(frozen=True)
class End:
    """What ends a row besides its budget."""

    tokens: frozenset[int]
    stop: Callable[[int, list[int]], bool] | None

    def takes(self, row: Row, token: int) -> bool:
        """Gives a row its next token; whether that is the last."""
        row.tokens.append(token)
        stopped = self.stop is not None and self.stop(row.index, row.tokens)
        row.ended = stopped or token in self.tokens or len(row.tokens) == row.budget
        return row.ended


def next_group(queue: deque[Row], free: int) -> tuple[list[Row], Tensor, Tensor]:
    """Takes from the queue what is prefilled next, at most `free` rows: (rows, ids [P, T], lengths [P])."""
    longest = len(queue[0].prompt)  # of all that are left
    size = max(1, min(free, len(queue), PREFILL_TOKENS // longest))
    group = [queue.popleft() for _ in range(size)]
    input_ids = torch.zeros(size, longest, dtype=torch.int64)
    for number, row in enumerate(group):
        input_ids[number, : len(row.prompt)] = torch.tensor(row.prompt)
    return group, input_ids, torch.tensor([len(row.prompt) for row in group])


class Slots:
    """The cache, and the row in each of its slots (None: free). The first len(rows) slots are at work."""

    def __init__(
        self,
        model: SmolLM2ForCausalLM,
        engine: Engine,
        params: SamplingParams,
        end: End,
        slots: int,
        capacity: int,
    ) -> None:
        self.engine, self.params, self.end = engine, params, end
        self.device = model.device
        self.rows: list[Row | None] = [None] * slots
        self.cache = engine.allocate(slots, capacity)
        self.seen: Tensor | None = None
        if params.repetition_penalty != 1.0:
            self.seen = torch.zeros(slots, model.config.vocab_size, dtype=torch.bool, device=self.device)

    @torch.inference_mode()
    def run(self, queue: deque[Row]) -> Iterator[tuple[int, list[int]]]:
        """Takes the queue from the left until it is empty and every row has ended."""
        self.engine.renewed = False
        while True:
            while queue and None in self.rows:
                yield from self._admit(queue)
            self._close_ranks()
            if not self.rows:
                return
            yield from self._step()

    def _admit(self, queue: deque[Row]) -> list[tuple[int, list[int]]]:
        """Prefills the next prompts into free slots and draws their first tokens; returns rows that ended."""
        free = [slot for slot, row in enumerate(self.rows) if row is None]
        group, input_ids, lengths = next_group(queue, len(free))
        free = free[: len(group)]
        small = self.engine.allocate(*input_ids.shape)
        frozen, self.engine.frozen = self.engine.frozen, True  # looked at once a batch, not at every prompt
        try:
            logits = self.engine.prefill(input_ids.to(self.device), lengths.to(self.device), small)
        finally:
            self.engine.frozen = frozen
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

    def _draw(self, logits: Tensor, rows: list[Row], slots: list[int]) -> list[tuple[int, list[int]]]:
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
            if self.end.takes(row, token):
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
            self.cache = self.cache.part(0, len(self.rows), self.cache.longest)


def _copy(source: KVCache, row: int, target: KVCache, slot: int, length: int) -> None:
    """Copies the first `length` tokens of a row of one cache into a slot of another, or of the same one."""
    target.keys[:, slot, :length] = source.keys[:, row, :length]
    target.values[:, slot, :length] = source.values[:, row, :length]
    target.lengths[slot] = length


# The rows [B] that a piece of a loop's work computes tokens of, and what waits for the tokens: [steps, B].
Piece = tuple[Sequence[Row | None], Callable[[], Tensor]]


class LoopSlots:
    """The rows of a captured loop, and which prompt each of them computes (None: free).

    The device is sent one piece of work, some steps or a prefill, before the host reads the tokens of the one
    before.
    """

    def __init__(self, loops: DecodeLoops, choice: Choice, end: End, slots: int) -> None:
        self.loops, self.choice, self.end = loops, choice, end
        self.rows: list[Row | None] = [None] * slots

    def run(self, queue: deque[Row], longest: int, capacity: int) -> Iterator[tuple[int, list[int]]]:
        """Takes the queue from the left until it is empty and every row has ended. longest: tokens that the
        longest row needs room for; capacity: those of a new loop.
        """
        with self.loops.borrow(len(self.rows), longest, capacity) as loop:
            loop.open(self.choice)
            under_way: deque[Piece] = deque()
            for piece in self._pieces(loop, queue):
                under_way.append(piece)
                if len(under_way) > int(loop.captures):  # else nothing would run while the host reads
                    yield from self._read(*under_way.popleft())
            for piece in under_way:
                yield from self._read(*piece)

    def _pieces(self, loop: DecodeLoop, queue: deque[Row]) -> Iterator[Piece]:
        """Sends the device one piece of work after the other, until there is none."""
        while True:
            free = [slot for slot, row in enumerate(self.rows) if row is None]
            if queue and free:
                group, input_ids, lengths = next_group(queue, len(free))
                free, steps = free[: len(group)], 1
                for slot, row in zip(free, group, strict=True):
                    self.rows[slot] = row
                owners: Sequence[Row | None] = group
                reading = loop.refill(free, input_ids, lengths, [row.seed for row in group])
            elif len(free) < len(self.rows):
                if free:
                    loop.park(free)
                owners, steps = list(self.rows), self._steps(loop)
                loop.run(steps)
                reading = loop.read_back(steps)
            else:
                return
            for row in filter(None, owners):
                row.computed += steps
            # One at its budget is over, though the tokens are still to be read.
            self.rows = [row if row is not None and row.computed < row.budget else None for row in self.rows]
            yield owners, reading

    def _steps(self, loop: DecodeLoop) -> int:
        """How many steps come next: no more than the row with most to do needs, and none beyond the cache, in
        which a row that has ended goes on until it is seen.
        """
        rows = [row for row in self.rows if row is not None]
        needed = max(row.budget - row.computed for row in rows)
        room = min(loop.cache.capacity - len(row.prompt) - row.computed for row in rows)
        return min(STEPS, loop.chunk, needed, room)

    def _read(
        self, owners: Sequence[Row | None], reading: Callable[[], Tensor]
    ) -> list[tuple[int, list[int]]]:
        """Gives the rows their tokens; returns those that ended. What comes after a row's end is dropped."""
        ended = []
        for tokens in reading():
            at_work = [
                (column, row) for column, row in enumerate(owners) if row is not None and not row.ended
            ]
            used = read_tokens(tokens[[column for column, _ in at_work]]).tolist()
            for (_, row), token in zip(at_work, used, strict=True):
                if self.end.takes(row, token):
                    ended.append((row.index, row.tokens))
        self.rows = [None if row is None or row.ended else row for row in self.rows]
        return ended
