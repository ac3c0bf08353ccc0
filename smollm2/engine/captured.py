"""Decoding that lives on the device: a step from one token to the next needs nothing from the host.

    embed -> layers -> norm -> lm_head -> sample -> ended? -> output      one CUDA graph, read back in chunks

Greedy decoding takes three launches besides the layers' (kernels/decode_step.py, decode_head.py).

The kernels of a small model's step take less time than their launches from Python, and a host that waits for
every token adds to that. So everything that a step reads or writes lies in buffers that stay where they are
(`DecodeLoop`): the token, the cache and how far it is filled, the noise of every position, which rows have
ended, the tokens put out. The step is recorded once and replayed. The host looks for end tokens once per
chunk, while the next chunk is already running; what a chunk computes beyond the end of all rows is dropped.

A graph holds for one batch, one capacity of the cache and one way to choose tokens. Capacities are powers of
two, and loops are kept for later prompts (`DecodeLoops`), so that each is captured once. Prompts are not
captured: a prefill is few launches for much work. A device without graphs runs the same step operation by
operation.

The rows of a loop may also hold texts that come and go (`open`, `refill`, `park`): between two runs a new
prompt is prefilled beside the loop and copied into a row, and the same graph goes on.

A capacity beyond the text costs nothing in the Triton kernels, which end at a row's length. torch's attention
reads the whole capacity and masks, at most twice the keys needed.

Source: CUDA graphs in PyTorch, pytorch.org/blog/accelerating-pytorch-with-cuda-graphs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kernels.types import TokenState
from smollm2.engine.cache import KVCache
from smollm2.engine.eager import Engine
from smollm2.errors import UsageError
from smollm2.sampling import Sampler, SamplingParams, as_words, sample, uniforms

SMALLEST_CAPACITY = 64
CHUNK = 16  # tokens between two read-backs of a captured loop
WARM_UP_STEPS = 2  # before a capture: kernels are compiled, libraries set up their workspaces
KEPT_GRAPHS = 4  # per loop, one for every way to choose tokens


@dataclass(frozen=True)
class Choice:
    """What a recorded step has built in besides the sizes: how it chooses tokens, and which end a row."""

    params: SamplingParams
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int = 0


@dataclass
class _Step:
    """One way to choose tokens, and the graph of a step with it (None: the step runs uncaptured)."""

    sampler: Sampler
    ends: Tensor  # [number of end tokens]
    pad: int
    greedy: bool  # the head finds the most likely token itself, and its logits need not exist
    suppressed: Tensor | None  # [V] bool, where greedy and where there are any
    graph: torch.cuda.CUDAGraph | None = None
    tables: object = None  # of the rotation, which the graph reads even when the model has longer ones


def capacity_for(tokens: int, limit: int) -> int:
    """The smallest of 64, 128, ... up to `limit` that holds `tokens`. Raises UsageError beyond the limit."""
    if tokens > limit:
        raise UsageError(
            f"prompt and new tokens: expected at most {limit} together, got {tokens}; "
            "shorten the prompt or lower max_new_tokens"
        )
    return min(limit, max(SMALLEST_CAPACITY, 1 << (tokens - 1).bit_length()))


class DecodeLoop:
    """The buffers of a batch and the steps recorded over them, for one generation at a time.

    `start` comes first, then `run` and `read_back` in turn, all on one CUDA stream. Or `open` comes first,
    and `refill` and `park` between the runs.
    """

    def __init__(self, engine: Engine, batch: int, capacity: int, chunk: int | None = None) -> None:
        """engine: its `decode` must be capturable on CUDA: no value is read on the host, and shapes follow
        from those of the arguments. chunk: the most steps between two read-backs (default 16 on CUDA,
        elsewhere 1). Raises UsageError if the cache does not fit.
        """
        model = engine.model
        if chunk is not None and chunk < 1:
            raise UsageError(f"chunk: expected a number of steps >= 1, got {chunk}")
        self.engine, self.device = engine, model.device
        self.captures = self.device.type == "cuda"
        self.chunk = chunk or (CHUNK if self.captures else 1)
        self.cache = KVCache.allocate(model.config, batch, capacity, self.device, model.dtype)
        self.tokens = torch.zeros(batch, 1, dtype=torch.int64, device=self.device)  # the next to be fed
        self.finished = torch.zeros(batch, dtype=torch.bool, device=self.device)
        # `seen` is written with a penalty only
        self.seen = torch.zeros(batch, model.config.vocab_size, dtype=torch.bool, device=self.device)
        # By position, made once per text: hashing in the step would take thirty launches, a look-up one.
        self.noise = torch.zeros(batch, capacity, dtype=torch.float32, device=self.device)
        self.output = torch.zeros(self.chunk, batch, dtype=torch.int64, device=self.device)
        # the next row of `output`, counted by each row of the batch for itself
        self.slot = torch.zeros(batch, dtype=torch.int64, device=self.device)
        # Two, because one chunk is read on the host while the next is written.
        self._pinned = [self._pinned_like(self.output) for _ in range(2)]
        self._steps: dict[Choice, _Step] = {}  # the one used last at the end
        self._step: _Step | None = None
        self._weights: tuple[object, ...] = ()
        self._pool: Any = None  # the memory that the graphs compute in, of which one runs at a time
        self._costs: list[str] = []

    @property
    def batch(self) -> int:
        return self.tokens.shape[0]

    def describe(self) -> str:
        """One line: the sizes, and what its captures took."""
        absent = f"not captured, there are no CUDA graphs on {self.device.type}"
        costs = "; ".join(self._costs) or ("nothing captured yet" if self.captures else absent)
        sizes = f"batch {self.batch}, capacity {self.cache.capacity}"
        return f"decode loop, {sizes}, read back every {self.chunk} tokens: {costs}"

    @torch.inference_mode()
    def start(
        self, input_ids: Tensor, lengths: Tensor, seeds: Sequence[int] | Tensor, choice: Choice
    ) -> None:
        """Begins a generation: prefills, and chooses the first token of every row, to be read back.

        input_ids [B, T], row b holding lengths[b] tokens and then anything; lengths [B]; seeds [B]. Nothing
        of the generation before remains. The first use of a `choice` captures.
        """
        input_ids, lengths = input_ids.to(self.device), lengths.to(self.device)
        step = self._prepare(choice)  # first, because it runs steps
        self.cache.clear()
        self.finished.zero_()
        self.slot.zero_()
        if step.sampler.needs_noise:
            self.noise.copy_(self._noise_of(as_words(seeds, self.device)))
        if step.sampler.needs_seen:
            self.seen.copy_(self._seen_in(input_ids, lengths))
        logits = self.engine.prefill(input_ids, lengths, self.cache)
        self.cache.fixed = True
        self._choose(step, logits)
        self._step = step

    @torch.inference_mode()
    def open(self, choice: Choice) -> None:
        """Begins a generation whose texts come and go. Every row is to be parked or refilled before a run.

        Nothing of the generation before remains. The first use of a `choice` captures.
        """
        self._step = self._prepare(choice)
        self.cache.clear()
        self.cache.longest, self.cache.fixed = self.cache.capacity, True

    @torch.inference_mode()
    def refill(
        self, slots: Sequence[int], input_ids: Tensor, lengths: Tensor, seeds: Sequence[int]
    ) -> Callable[[], Tensor]:
        """Puts new texts into P rows and chooses the first token of each; the other rows do not notice.

        slots [P]: the rows; input_ids [P, T], row p holding lengths[p] tokens and then anything; lengths [P];
        seeds [P]; all on the host. On CUDA nothing waits for the device. The first tokens are read as those
        of `read_back`: [1, P]. Raises UsageError if the cache of the prefill does not fit.
        """
        assert self._step is not None, "open comes first"
        step, seeds_sent = self._step, self._send(as_words(seeds, torch.device("cpu")))
        rows, input_ids, lengths = self._send(torch.tensor(slots)), self._send(input_ids), self._send(lengths)
        small = self.engine.allocate(*input_ids.shape)
        logits = self.engine.prefill(input_ids, lengths, small)
        for whole, new in ((self.cache.keys, small.keys), (self.cache.values, small.values)):
            whole.index_fill_(1, rows, 0)  # for the reason of KVCache.clear
            whole[:, :, : new.shape[2]].index_copy_(1, rows, new)
        self.cache.lengths.index_copy_(0, rows, lengths)
        seen = self._seen_in(input_ids, lengths) if step.sampler.needs_seen else None
        chosen = sample(logits, step.sampler.params, seeds_sent, lengths, seen)
        tokens = chosen[:, None].clamp(min=0)
        self.tokens.index_copy_(0, rows, tokens)
        self.finished.index_copy_(0, rows, (tokens == step.ends).any(1))
        if step.sampler.needs_noise:
            self.noise.index_copy_(0, rows, self._noise_of(seeds_sent))
        if seen is not None:
            self.seen.index_copy_(0, rows, seen.scatter_(1, tokens, True))
        return self._to_host(chosen[None], self._pinned_like(chosen[None]))

    @torch.inference_mode()
    def park(self, slots: Sequence[int]) -> None:
        """Leaves rows without a text: they put out the pad, and begin the next run with no key, so that
        attention reads next to nothing. To be repeated before every run, which counts on in every row.
        """
        rows = self._send(torch.tensor(slots))
        self.cache.lengths.index_fill_(0, rows, 0)
        self.finished.index_fill_(0, rows, True)

    @torch.inference_mode()
    def run(self, steps: int) -> None:
        """Computes the next `steps` <= chunk tokens of every row. On CUDA it does not wait for them.

        No row may reach the capacity: the last position is that of a token which is chosen and not fed.
        """
        assert self._step is not None and steps <= self.chunk, "start comes first; a chunk is the most"
        self.slot.zero_()
        for _ in range(steps):
            if self._step.graph is not None:
                self._step.graph.replay()
            else:
                self._advance(self._step)

    @torch.inference_mode()
    def read_back(self, steps: int) -> Callable[[], Tensor]:
        """Sends the tokens of the last `steps` to the host without waiting; two may be under way at most.

        The function that is returned waits, and returns a copy of them, [steps, B].
        """
        self._pinned.reverse()
        return self._to_host(self.output[:steps], self._pinned[0][:steps])

    def _to_host(self, tokens: Tensor, buffer: Tensor) -> Callable[[], Tensor]:
        """Sends tokens into a buffer on the host; what is returned waits for them, and returns a copy."""
        buffer.copy_(tokens, non_blocking=self.captures)
        if not self.captures:
            return buffer.clone
        arrived = torch.cuda.Event()
        arrived.record(torch.cuda.current_stream(self.device))

        def wait() -> Tensor:
            arrived.synchronize()
            return buffer.clone()

        return wait

    def _pinned_like(self, tokens: Tensor) -> Tensor:
        """A buffer on the host, which the device writes by itself."""
        return torch.zeros(tokens.shape, dtype=tokens.dtype, pin_memory=self.device.type == "cuda")

    def _send(self, values: Tensor) -> Tensor:
        """Values of the host on the device. Unless it is pinned, a copy waits for all that is under way."""
        pinned = values.pin_memory() if self.device.type == "cuda" else values
        return pinned.to(self.device, non_blocking=True)

    def _noise_of(self, seeds: Tensor) -> Tensor:
        """Words of seeds [P] -> the noise of every position [P, capacity]."""
        return uniforms(seeds[:, None], torch.arange(self.cache.capacity, device=self.device))

    def _seen_in(self, input_ids: Tensor, lengths: Tensor) -> Tensor:
        """Which tokens occur in prompts [P, T] of lengths [P]: [P, V] bool."""
        inside = torch.arange(input_ids.shape[1], device=self.device) < lengths[:, None]
        # What follows a row's tokens stands for its first one, which is seen anyway.
        ids = torch.where(inside, input_ids, input_ids[:, :1])
        return self.seen.new_zeros(len(ids), self.seen.shape[1]).scatter_(1, ids, True)

    def _advance(self, step: _Step) -> None:
        """The step that is captured."""
        if step.greedy:
            self._put_out(step, *self.engine.decode_best(self.tokens, self.cache, step.suppressed))
        else:
            self._choose(step, self.engine.decode(self.tokens, self.cache)[:, -1])

    def _choose(self, step: _Step, logits: Tensor) -> None:
        """logits [B, V] -> the next token, put out.

        Its index in its text is `cache.lengths`, the number of tokens fed so far.
        """
        noise = None
        if step.sampler.needs_noise:
            noise = self.noise.gather(1, self.cache.lengths[:, None]).squeeze(1)
        self._put_out(step, None, step.sampler(logits, noise, self.seen)[:, None])
        if step.sampler.needs_seen:
            self.seen.scatter_(1, self.tokens, True)

    def _put_out(self, step: _Step, scores: Tensor | None, ids: Tensor | None) -> None:
        """The best of the candidates [B, P] into `tokens` and `output`, and which rows have ended. `output`
        keeps the mark of a row that is not finite, for read_tokens.
        """
        state = TokenState(self.tokens, self.finished, self.output, self.slot)
        self.engine.model.backend.next_token(scores, ids, state, step.ends, step.pad)

    def _prepare(self, choice: Choice) -> _Step:
        """The step of that choice, captured now unless it was used before. Overwrites the buffers."""
        # moved since, by `.to()` or assignment: the graphs would read freed memory
        if self._weights != (weights := self._addresses()):
            self._steps.clear()
            self._pool, self._weights = None, weights
        step = self._steps.pop(choice, None)
        if step is None:
            step = self._new_step(choice)
            if self.captures:
                self._capture(step)
                step.tables = self.engine.model.model.rotary(self.device, self.cache.capacity)
        self._steps[choice] = step
        if len(self._steps) > KEPT_GRAPHS:
            del self._steps[next(iter(self._steps))]
        return step

    def _new_step(self, choice: Choice) -> _Step:
        model, params, sampler = self.engine.model, choice.params, Sampler(choice.params, self.device)
        ends = torch.tensor(choice.eos_token_ids, dtype=torch.int64, device=self.device)
        greedy = not (sampler.needs_noise or sampler.needs_seen) and model.is_plain()
        suppressed = None
        if greedy and params.suppress_tokens:
            mask = torch.zeros(model.config.vocab_size, dtype=torch.bool)
            mask[list(params.suppress_tokens)] = True
            suppressed = mask.to(self.device)
        return _Step(sampler, ends, choice.pad_token_id, greedy, suppressed)

    def _addresses(self) -> tuple[object, ...]:
        model = self.engine.model
        if not model.is_plain():
            if self.captures:
                raise UsageError(
                    "decode loop: a graph would not call the adapters and hooks of this model again; "
                    "merge or remove them, or generate with engine=Engine(model)"
                )
            return ()
        tensors = [*model.parameters(), *(weight for layer in model.pack() for weight in layer)]
        return tuple((tensor.data_ptr(), tensor.dtype, tensor.shape) for tensor in tensors)

    def _warm_up(self, step: _Step) -> None:
        """Steps over an empty cache; what they leave in the buffers, `start` clears."""
        self.cache.fixed = True
        for _ in range(WARM_UP_STEPS):
            self.cache.lengths.zero_()
            self.slot.zero_()
            self._advance(step)

    def _capture(self, step: _Step) -> None:
        """Records a step after others that warm up."""
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        step.graph, cost = _record(
            lambda: self._warm_up(step), lambda: self._advance(step), self.device, self._pool
        )
        self._costs.append(cost)


class LogitsStep:
    """A decode step of all rows of a cache up to its logits: where tokens are chosen outside, by parameters
    that differ from row to row. One CUDA graph, recorded here; elsewhere it runs operation by operation.
    """

    def __init__(self, engine: Engine, cache: KVCache) -> None:
        """cache: an empty one, whose tensors the graph keeps to."""
        self.engine, self.cache = engine, replace(cache, longest=cache.capacity, fixed=True)
        device, rows = engine.model.device, len(cache.lengths)
        self.tokens = torch.zeros(rows, 1, dtype=torch.int64, device=device)
        self.logits = torch.zeros(rows, engine.model.config.vocab_size, device=device)
        self.graph: torch.cuda.CUDAGraph | None = None
        self._tables = engine.model.model.rotary(device, cache.capacity)  # which the graph reads
        if device.type == "cuda":
            self.graph, _ = _record(self._warm_up, self._advance, device, torch.cuda.graph_pool_handle())
        cache.clear()

    @torch.inference_mode()
    def __call__(self, tokens: Tensor, others: Sequence[int]) -> Tensor:
        """The next step of the first rows: tokens [n, 1] -> logits [n, V] in fp32, valid until the next.
        others: how many tokens each row behind them holds, 0 for a free one; these stay as they are.
        """
        rows, lengths = len(tokens), self.cache.lengths
        self.tokens[:rows] = tokens
        held = torch.tensor(others, dtype=torch.int64, device=lengths.device)
        lengths[rows:] = held
        if self.graph is not None:
            self.graph.replay()
        else:
            self._advance()
        lengths[rows:] = held
        return self.logits[:rows]

    def _advance(self) -> None:
        self.logits.copy_(self.engine.decode(self.tokens, self.cache)[:, -1])

    def _warm_up(self) -> None:
        for _ in range(WARM_UP_STEPS):
            self.cache.lengths.zero_()
            self._advance()


def _record(
    warm_up: Callable[[], None], advance: Callable[[], None], device: torch.device, pool: Any
) -> tuple[torch.cuda.CUDAGraph, str]:
    """The graph of a step, recorded on a stream of its own as torch asks, and what that took."""
    began = time.perf_counter()
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        warm_up()
    stream.synchronize()
    warm = time.perf_counter()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, stream=stream):
        advance()
    torch.cuda.current_stream(device).wait_stream(stream)
    took = f"{WARM_UP_STEPS} steps to warm up took {warm - began:.2f} s"
    return graph, f"{took}, their capture {time.perf_counter() - warm:.2f} s"
