"""Requests that come at any time and share the steps of one batch.

    scheduler = Scheduler(engine, tokenizer, slots=8)
    scheduler.start()
    scheduler.submit(Request(ids, max_tokens=64, params=SamplingParams(), put=print))

One thread does all the work, in rounds: it lets go of rows that were cancelled, reads some tokens of the
prompts that wait, and takes a step with all rows that are under way. A long prompt is read in parts, so that
nobody waits for all of it. Rows lie side by side in the first slots of one cache, and those that are being
read in slots behind them. A prompt that begins like a text in the batch, or like one that was kept when it
ended (prefixes.py), takes over its keys and values and reads the rest; while another request is reading what
both begin with, it waits for that.

Every request draws by its own parameters and seed. In fp32 its tokens do not depend on who else is there, as
long as no two score the same but for rounding.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kernels.types import NOT_FINITE
from smollm2.engine.cache import free_memory
from smollm2.engine.captured import LogitsStep
from smollm2.engine.eager import Engine
from smollm2.engine.loops import CapturedEngine
from smollm2.errors import UsageError
from smollm2.generation.batch import check_prompts, fit_slots
from smollm2.generation.prompt_cache import common
from smollm2.generation.text import TextPieces
from smollm2.pretrained.tokenizer import Tokenizer
from smollm2.sampling import SamplingParams, draw
from smollm2.serving.prefix_cache import Prefix, PrefixCache

logger = logging.getLogger(__name__)

WORTH_WAITING = 16  # tokens that another request is about to read
MOST_LOGPROBS = 20


class Busy(Exception):
    """The queue is full."""


@dataclass(frozen=True)
class TokenLogprob:
    """The logarithm of a token's probability, in nats, before temperature and filters, and (id, the same) of
    the most likely tokens in its place.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Piece:
    """A part of an answer. text: may be empty, where a character is incomplete or may begin a stop text.
    tokens: drawn since the last piece, 0 for one that only ends. finish: "stop", "length", "cancelled" or
    "error" in the last piece, and in no other.
    """

    text: str
    tokens: int
    logprobs: TokenLogprob | None = None
    finish: str | None = None
    error: str = ""


@dataclass(eq=False)
class Request:
    """A prompt to be continued.

    put: takes the pieces, in the scheduler's thread, and must not wait. stop: texts before which the answer
    ends. logprobs: how many of the most likely tokens to name beside each, 0 to 20; None names nothing.
    cached: how many tokens of the prompt were not read, as the scheduler finds. cancelled: see `cancel`.
    """

    prompt: list[int]
    max_tokens: int
    params: SamplingParams
    put: Callable[[Piece], None]
    seed: int = 0
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    cached: int = 0
    cancelled: bool = False


@dataclass
class Totals:
    """What a scheduler has done since it began."""

    requests: int = 0
    finished: int = 0
    cancelled: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    new_tokens: int = 0
    steps: int = 0


@dataclass(eq=False)
class _Row:
    """A request at work. slot: its row of the cache; held: how many tokens of its text lie there."""

    request: Request
    pieces: TextPieces
    text: list[int]
    slot: int
    held: int = 0
    seen: Tensor | None = None  # [V] bool, with a repetition penalty
    drawn: int = 0


class Scheduler:
    """Runs requests on an engine whose model stays as it is.

    slots: rows at work at once, fewer where the memory does not hold them. context: the most tokens of a row,
    prompt and answer, by default those of the model. queue_size: requests that may wait for a slot.
    prefix_cache_bytes: memory for the keys and values of texts that have ended. Raises UsageError if not even
    one slot fits.

    running, queued: requests at work, and those that wait. failure: why the thread ended by itself.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        *,
        slots: int = 8,
        context: int | None = None,
        queue_size: int = 64,
        prefix_cache_bytes: int = 512 << 20,
    ) -> None:
        model = engine.model
        config, limit = model.config, model.config.max_position_embeddings
        self.context = limit if context is None else context
        for name, number, most in (
            ("slots", slots, None), ("context", self.context, limit), ("queue_size", queue_size, None),
        ):  # fmt: skip
            if number < 1 or (most is not None and number > most):
                expected = "a number >= 1" if most is None else f"1 to {most} tokens"
                raise UsageError(f"{name}: expected {expected}, got {number}")
        free = free_memory(model.device)
        self.slots, line = fit_slots(config, slots, self.context, model.dtype, free)
        if self.slots < slots:
            logger.warning("%s", line)
        self.engine, self.tokenizer, self.queue_size = engine, tokenizer, queue_size
        engine.frozen = True
        self.ends = tokenizer.end_ids(config.vocab_size, *config.eos_token_ids)
        self.totals, self.failure = Totals(), ""
        self._cache = engine.allocate(self.slots, self.context)
        self._captured: LogitsStep | None = None
        self._prefixes = PrefixCache(prefix_cache_bytes)
        self._rows: list[_Row] = []  # in slots 0, 1, ...
        self._reading: list[_Row] = []  # in any slots behind them, the first to come first
        self._queue: deque[Request] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="scheduler", daemon=True)

    @property
    def running(self) -> int:
        return len(self._rows) + len(self._reading)

    @property
    def queued(self) -> int:
        return len(self._queue)

    @property
    def prefix_cache_used(self) -> int:
        """Memory that texts which have ended take now."""
        return self._prefixes.size

    def start(self) -> None:
        self._thread.start()

    def check(self, request: Request) -> None:
        """Raises UsageError for a request that cannot be continued."""
        config = self.engine.model.config
        check_prompts(config, [request.prompt], [request.max_tokens], lambda _: "prompt")
        if len(request.prompt) + request.max_tokens > self.context:
            raise UsageError(
                f"prompt: expected at most {self.context} tokens, prompt and new ones together, "
                f"got {len(request.prompt)} + {request.max_tokens}"
            )
        request.params.validate(config.vocab_size)
        if request.logprobs is not None and not 0 <= request.logprobs <= MOST_LOGPROBS:
            raise UsageError(f"logprobs: expected 0 to {MOST_LOGPROBS}, got {request.logprobs}")

    def submit(self, *requests: Request) -> None:
        """Takes requests, all or none, from any thread. Raises Busy if too many wait, UsageError for what
        cannot be continued, and RuntimeError if the scheduler has ended.
        """
        for request in requests:
            self.check(request)
        with self._changed:
            if self._closed or self.failure:
                raise RuntimeError(self.failure or "the scheduler is closed")
            free = max(0, self.slots - self.running)
            if len(self._queue) + len(requests) > self.queue_size + free:
                raise Busy(f"the queue is full: {self.queue_size} may wait beside the {self.slots} that run")
            self._queue.extend(requests)
            self.totals.requests += len(requests)
            self._changed.notify()

    def cancel(self, request: Request) -> None:
        """Ends a request before the next step, from any thread; nothing if it has ended."""
        request.cancelled = True

    def close(self, grace: float | None = None) -> None:
        """Takes no more requests and finishes those that it has, within `grace` seconds; then it cancels."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if not self._thread.ident:
            return
        self._thread.join(grace)
        if self._thread.is_alive():
            with self._changed:
                for request in (*(row.request for row in (*self._rows, *self._reading)), *self._queue):
                    request.cancelled = True
            self._thread.join()

    def _run(self) -> None:
        with torch.inference_mode():
            try:
                if isinstance(self.engine, CapturedEngine):
                    self._captured = LogitsStep(self.engine, self._cache)
                while self._wait():
                    try:
                        self._round()
                    except Exception as error:  # noqa: BLE001 - of the step that all rows share
                        logger.exception("a step failed")
                        self._fail(f"{type(error).__name__}: {error}")
            except BaseException as error:
                self.failure = f"the scheduler has ended: {type(error).__name__}: {error}"
                with self._changed:
                    self._queue, waiting = deque(), [*self._queue]
                for request in waiting:
                    self._put(request, Piece("", 0, finish="error", error=self.failure))
                self._fail(self.failure)
                raise

    def _wait(self) -> bool:
        """Waits for work. False when there will be none."""
        with self._changed:
            while not (self._queue or self._rows or self._reading):
                if self._closed:
                    return False
                self._changed.wait()
            return True

    def _round(self) -> None:
        for row in [row for row in (*self._rows, *self._reading) if row.request.cancelled]:
            self._end(row, Piece("", 0, finish="cancelled"))
        with self._changed:
            gone = [request for request in self._queue if request.cancelled]
            self._queue = deque(request for request in self._queue if not request.cancelled)
        self.totals.cancelled += len(gone)
        for request in gone:
            self._put(request, Piece("", 0, finish="cancelled"))
        while self._queue and self.running < self.slots and self._begin(self._queue[0]):
            with self._changed:
                self._queue.popleft()
        if self._reading:
            self._read()
        if self._rows:
            self._step()

    def _begin(self, request: Request) -> bool:
        """Gives a request a free slot, with what is known of its text; False if it should wait."""
        prompt, model, cache = np.array(request.prompt), self.engine.model, self._cache
        most = prompt[:-1]  # what follows the last token is wanted
        kept, held = self._prefixes.find(most)
        keys, values = (kept.keys, kept.values) if kept is not None else (None, None)
        for row in (*self._rows, *self._reading):
            if (found := common(most, row.text)) > held:
                if found > row.held + WORTH_WAITING:
                    return False
                if (found := min(found, row.held)) > held:
                    held, keys, values = found, cache.keys[:, row.slot], cache.values[:, row.slot]
        held -= held % self.engine.prefix_block
        taken = {row.slot for row in self._reading}
        slot = next(slot for slot in range(len(self._rows), self.slots) if slot not in taken)
        if keys is not None and values is not None:
            cache.keys[:, slot, :held] = keys[:, :held]
            cache.values[:, slot, :held] = values[:, :held]
        cache.lengths[slot] = held
        pieces = TextPieces(self.tokenizer, self.ends, request.stop)
        row = _Row(request, pieces, list(request.prompt), slot, held)
        if request.params.repetition_penalty != 1.0:
            row.seen = torch.zeros(model.config.vocab_size, dtype=torch.bool, device=model.device)
            row.seen[torch.tensor(prompt, device=model.device)] = True
        request.cached = held
        self.totals.prompt_tokens += len(prompt)
        self.totals.cached_tokens += held
        self._reading.append(row)
        return True

    def _read(self) -> None:
        """Reads on in the prompts; rows of which nothing is left to read join those under way."""
        budget = self.engine.reads_at_once
        if self._rows:
            budget = min(budget, self.engine.reads_between_steps)
        parts: list[list[int]] = []
        for row in self._reading:
            if budget:
                parts.append(row.text[row.held : row.held + budget])
                budget -= len(parts[-1])
        some = self._reading[: len(parts)]
        logits = self.engine.extend(parts, [row.slot for row in some], self._cache)
        for row, part in zip(some, parts, strict=True):
            row.held += len(part)
        whole = [index for index, row in enumerate(some) if row.held == len(row.text)]
        for index in whole:
            self._reading.remove(some[index])
            self._place(some[index], len(self._rows))
            self._rows.append(some[index])
        if whole:
            self._draw(logits[whole], [some[index] for index in whole])

    def _step(self) -> None:
        """The next token of all rows."""
        rows, count = list(self._rows), len(self._rows)
        last = torch.tensor([[row.text[-1]] for row in rows], device=self.engine.model.device)
        if self._captured is None:
            view = self._cache.part(0, count, max(row.held for row in rows))
            logits = self.engine.decode(last, view)[:, -1]
        else:
            held = {row.slot: row.held for row in self._reading}
            logits = self._captured(last, [held.get(slot, 0) for slot in range(count, self.slots)])
        self.totals.steps += 1
        for row in rows:
            row.held += 1
        self._draw(logits, rows)

    def _draw(self, logits: Tensor, rows: Sequence[_Row]) -> None:
        """Gives every row its next token, from logits [B, V]."""
        tokens = [NOT_FINITE] * len(rows)
        alike: dict[SamplingParams, list[int]] = {}
        for index, row in enumerate(rows):
            alike.setdefault(row.request.params, []).append(index)
        for params, indices in alike.items():
            some = [rows[index] for index in indices]
            seen = [row.seen for row in some if row.seen is not None]
            drawn = draw(
                logits if len(some) == len(rows) else logits[indices], params,
                [row.request.seed for row in some], [len(row.text) for row in some],
                torch.stack(seen) if seen else None,
            )  # fmt: skip
            for index, token in zip(indices, drawn.tolist(), strict=True):
                tokens[index] = token
        for row, token, scores in zip(rows, tokens, logits, strict=True):
            self._take(row, token, scores)

    def _take(self, row: _Row, token: int, scores: Tensor) -> None:
        request = row.request
        if token == NOT_FINITE:
            error = "logits: expected finite numbers, got NaN or infinity; the weights are damaged"
            return self._end(row, Piece("", 0, finish="error", error=error))
        row.text.append(token)
        row.drawn += 1
        self.totals.new_tokens += 1
        if row.seen is not None:
            row.seen[token] = True
        text, finish = row.pieces.take(token), row.pieces.finish
        if finish is None and row.drawn == request.max_tokens:
            text, finish = text + row.pieces.rest(), "length"
        logprobs = None if request.logprobs is None else _logprobs(scores, token, request.logprobs)
        piece = Piece(text, 1, logprobs, finish)
        if finish is not None:
            self._end(row, piece)
        elif not self._put(request, piece):
            request.cancelled = True

    def _end(self, row: _Row, piece: Piece) -> None:
        """Keeps the text of a row for others, frees its slot, and puts its last piece."""
        keys, values = (
            whole[:, row.slot, : row.held].clone() for whole in (self._cache.keys, self._cache.values)
        )
        if piece.finish != "error":
            self._prefixes.add(Prefix(np.array(row.text[: row.held]), keys, values))
        if row in self._reading:
            self._reading.remove(row)
        else:
            last = self._rows.pop()
            if last is not row:
                slot = row.slot
                self._rows[slot] = last
                self._move(last, slot)
        counted = {"cancelled": "cancelled", "error": "failed"}.get(piece.finish or "", "finished")
        setattr(self.totals, counted, getattr(self.totals, counted) + 1)
        self._put(row.request, piece)

    def _place(self, row: _Row, slot: int) -> None:
        """Moves a row to a slot; one that is being read there changes places with it."""
        other = next((one for one in self._reading if one.slot == slot), None)
        if other is None:
            return self._move(row, slot)
        wholes = self._cache.keys, self._cache.values
        saved = [whole[:, slot, : other.held].clone() for whole in wholes]
        other.slot = row.slot
        self._move(row, slot)
        for whole, old in zip(wholes, saved, strict=True):
            whole[:, other.slot, : other.held] = old
        self._cache.lengths[other.slot] = other.held

    def _move(self, row: _Row, slot: int) -> None:
        if row.slot != slot:
            for whole in (self._cache.keys, self._cache.values):
                whole[:, slot, : row.held] = whole[:, row.slot, : row.held]
            self._cache.lengths[slot] = row.held
            row.slot = slot

    def _fail(self, error: str) -> None:
        """Ends everything that is at work."""
        at_work = [*self._rows, *self._reading]
        self._rows, self._reading = [], []
        self.totals.failed += len(at_work)
        for row in at_work:
            self._put(row.request, Piece("", 0, finish="error", error=error))

    @staticmethod
    def _put(request: Request, piece: Piece) -> bool:
        """Hands a piece over; whether somebody took it."""
        try:
            request.put(piece)
        except Exception:  # noqa: BLE001 - of a reader that is gone; the others go on
            logger.exception("a request's reader failed")
            return False
        return True


def _logprobs(scores: Tensor, token: int, most: int) -> TokenLogprob:
    logprobs = scores.float().log_softmax(-1)
    values, ids = logprobs.topk(most)
    top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
    return TokenLogprob(token, float(logprobs[token]), top)
