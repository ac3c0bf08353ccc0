"""Continuous batching on a captured loop: one graph, in which every row is the prompt alone; no row beyond
its cache, and nothing of the text before in its slot.
"""

from __future__ import annotations

import pytest
import torch
from generation_cases import (
    EVERYTHING,
    GREEDY,
    SAMPLED,
    alone,
    captured_engine,
    pretend_to_capture,
    tiny_model,
)

from smollm2.engine import cache
from smollm2.engine.cache import cache_bytes
from smollm2.engine.captured import Choice, DecodeLoop
from smollm2.engine.eager import Engine
from smollm2.engine.loops import CapturedEngine
from smollm2.errors import UsageError
from smollm2.generation import batch
from smollm2.generation.batch import generate_many
from smollm2.generation.slots import STEPS, End, LoopSlots, Row
from smollm2.sampling import NOT_FINITE

LENGTHS = (3, 40, 1, 17, 9, 38, 1, 5, 24)  # of the prompts, out of order
NEW, SEED, ENDS = 22, 50, tuple(range(30))  # NEW is no multiple of a chunk; some rows end sooner


def prompts_of(lengths=LENGTHS):
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(30, 512, (length,), generator=generator).tolist() for length in lengths]


def many(engine, prompts=None, **options):
    """What generate_many yields, in the order of the prompts."""
    prompts = prompts_of() if prompts is None else prompts
    options = {"max_new_tokens": NEW, "seed": SEED, "eos_token_ids": ENDS, **options}
    return [tokens for _, tokens in sorted(generate_many(engine.model, prompts, engine=engine, **options))]


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture
def captures(monkeypatch):
    """The loops that captured a step."""
    return pretend_to_capture(monkeypatch)


@pytest.fixture(scope="module")
def expected(model):
    prompts = list(enumerate(prompts_of(), SEED))
    return {
        params: [alone(model, prompt, params, seed, ENDS, NEW) for seed, prompt in prompts]
        for params in (GREEDY, SAMPLED, EVERYTHING)
    }


@pytest.mark.parametrize("slots, chunk", [(1, 16), (2, 1), (3, 16), (3, 4), (8, 2), (50, 16)])
@pytest.mark.parametrize("params", [GREEDY, EVERYTHING], ids=["greedy", "everything"])
def test_a_row_is_the_prompt_alone_in_any_slot_and_with_any_chunk(
    model, captures, expected, params, slots, chunk
):
    lengths = {len(tokens) for tokens in expected[params]}
    assert len(lengths) > 3 and NEW in lengths, "the prompts were to end at different times"
    engine = captured_engine(model, chunk)
    assert many(engine, params=params, slots=slots) == expected[params]
    assert len(captures) == 1, "whatever comes and goes, a loop is captured once"


def test_without_an_engine_it_is_the_default_one(model, captures, expected, monkeypatch):
    engine = captured_engine(model)
    monkeypatch.setattr(batch, "default_engine", lambda model: engine)  # as on a GPU
    options = dict(max_new_tokens=NEW, seed=SEED, eos_token_ids=ENDS, slots=3)
    assert dict(generate_many(model, prompts_of(), **options)) == dict(enumerate(expected[GREEDY]))
    assert len(engine.loops.idle) == 1


def test_on_a_device_without_graphs_too(model, expected):
    engine = CapturedEngine(model)
    assert many(engine, params=SAMPLED, slots=3) == expected[SAMPLED]
    assert [loop.captures for loop in engine.loops.idle] == [False]


def test_the_triton_backend_gives_the_same_tokens(monkeypatch):
    """In the interpreter where there is no GPU, hence few tokens of one layer."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        pretend_to_capture(monkeypatch)
    model, plain = (tiny_model(name, device, num_hidden_layers=1) for name in ("triton", "torch"))
    options = dict(max_new_tokens=[1, 3, 2], params=SAMPLED, slots=2)
    prompts = prompts_of((7, 2, 19))
    assert many(captured_engine(model, 2), prompts, **options) == many(Engine(plain), prompts, **options)


def test_the_loop_of_the_call_before_is_used_again(model, captures, expected):
    engine = captured_engine(model)
    for params in (SAMPLED, GREEDY, SAMPLED):
        assert many(engine, params=params, slots=3) == expected[params]
    assert len(engine.loops.idle) == 1 and len(captures) == 2, "once for each way to choose tokens"


def test_two_calls_may_take_turns_and_one_may_be_given_up(model, captures, expected):
    engine = captured_engine(model)
    options = dict(max_new_tokens=NEW, seed=SEED, eos_token_ids=ENDS, slots=2, engine=engine)
    first, second = (
        generate_many(model, prompts_of(), params=params, **options) for params in (GREEDY, SAMPLED)
    )
    next(first)
    assert dict([next(second) for _ in LENGTHS]) == dict(enumerate(expected[SAMPLED]))
    first.close()
    second.close()
    assert len(engine.loops.idle) == 2
    assert many(engine, params=SAMPLED, slots=2) == expected[SAMPLED]


def test_a_callback_that_fails_gives_up_its_loop(model, captures):
    engine = captured_engine(model)
    with pytest.raises(RuntimeError, match="enough"):
        many(engine, stop=lambda index, tokens: (_ for _ in ()).throw(RuntimeError("enough")))
    assert engine.loops.idle == [], "its state is unknown"


def test_a_model_with_a_hook_runs_step_by_step(expected):
    """A graph would not call the hook again."""
    model = tiny_model()
    calls, engine = [], captured_engine(model)
    model.model.layers[0].register_forward_hook(lambda *_: calls.append(1) and None)
    assert many(engine, params=GREEDY, slots=3) == expected[GREEDY]
    assert engine.loops.idle == [] and len(calls) > NEW


def test_no_row_reaches_the_end_of_its_cache_and_an_empty_slot_has_few_keys(model, captures, monkeypatch):
    """Rows of very different budgets, in a cache of no position more than the longest needs."""
    needed = batch._needed(model.config, 52, torch.float32, 3)
    monkeypatch.setattr(batch, "free_memory", lambda device: int(needed / 0.9) + 1)
    advance, seen = DecodeLoop._advance, []

    def watched(self, step):
        seen.append((self.cache.lengths.tolist(), self.finished.tolist()))
        advance(self, step)
        assert int(self.cache.lengths.max()) < self.cache.capacity

    monkeypatch.setattr(DecodeLoop, "_advance", watched)
    engine, budgets = captured_engine(model), [44, 12, 30, 2, 1, 3, 5, 20, 1]
    found = many(engine, max_new_tokens=budgets, slots=3, params=EVERYTHING, eos_token_ids=())
    assert [len(tokens) for tokens in found] == budgets
    (loop,) = engine.loops.idle
    assert loop.cache.capacity == 52
    lengths, finished = seen[-1]
    assert sorted(length <= STEPS for length in lengths) == [False, True, True]
    assert [length <= STEPS for length in lengths] == finished


def test_ends_that_are_known_before_cost_no_step(model, captures, monkeypatch):
    steps, run = [], DecodeLoop.run
    monkeypatch.setattr(DecodeLoop, "run", lambda self, count: (steps.append(count), run(self, count)))
    many(captured_engine(model), max_new_tokens=NEW, slots=3, eos_token_ids=())
    assert sum(steps) == (NEW - 1) * len(LENGTHS) // 3
    steps.clear()
    many(captured_engine(model), slots=3)
    eager = RowCount(model)
    many(eager, slots=3)
    assert sum(steps) <= eager.steps + 2 * STEPS * len(LENGTHS) / 3


def test_the_device_has_the_next_piece_of_work_before_the_host_reads(model, captures, monkeypatch):
    log, to_host = [], DecodeLoop._to_host

    def logged(self, tokens, buffer):
        wait = to_host(self, tokens, buffer)
        log.append("sent")
        return lambda: (log.append("read"), wait())[1]

    monkeypatch.setattr(DecodeLoop, "_to_host", logged)
    many(captured_engine(model), slots=3)
    pieces = log.count("sent")
    assert pieces > len(LENGTHS) / 3 + 2
    assert log == ["sent"] + ["sent", "read"] * (pieces - 1) + ["read"], "two under way, never more"


class RowCount(Engine):
    """Counts its steps."""

    steps = 0

    def decode(self, tokens, cache):
        self.steps += 1
        return super().decode(tokens, cache)


def test_nothing_of_the_text_before_is_left_in_a_slot(model):
    """Not even NaN, in the cache or in the place of its next token, and the rows beside it do not notice."""
    loop, prompts = DecodeLoop(Engine(model), 3, 64, 4), prompts_of((9, 30, 5, 3))
    loop.open(Choice(EVERYTHING, tuple(range(512))))  # every token ends its row
    found = {}

    def refill(slot, index):
        ids = torch.tensor([prompts[index]])
        found[index] = loop.refill([slot], ids, torch.tensor([ids.shape[1]]), [SEED + index])()[0].tolist()
        loop.finished[slot] = False

    def run(steps, slots):
        loop.run(steps)
        for column, index in slots.items():
            found[index] += loop.read_back(steps)()[:, column].tolist()
        loop.finished[list(slots)] = False

    refill(0, 0)
    refill(2, 1)
    loop.park([1])
    run(1, {0: 0, 2: 1})
    loop.cache.keys[:, 2], loop.cache.values[:, 2] = float("nan"), float("inf")
    loop.seen[2] = True
    refill(2, 2)
    loop.park([1])
    run(1, {0: 0, 2: 2})
    refill(1, 3)
    for _ in range(3):
        run(1, {0: 0, 1: 3, 2: 2})
    assert found.pop(1)
    for index, tokens in found.items():
        assert tokens == alone(model, prompts[index], EVERYTHING, SEED + index, (), len(tokens))
    assert {index: len(tokens) for index, tokens in found.items()} == {0: 6, 2: 5, 3: 4}


def test_what_a_row_computes_beyond_its_end_is_dropped_whatever_it_is():
    slots = LoopSlots(None, Choice(GREEDY), End(frozenset([7]), None), 4)
    rows = slots.rows = [Row(0, [1], 1, 0), None, Row(2, [1], 9, 0), Row(3, [1], 3, 0)]
    tokens = [[5, NOT_FINITE, 7, 1], [NOT_FINITE, 2, NOT_FINITE, 4], [6, 6, 6, 4], [NOT_FINITE] * 4]
    assert slots._read(rows, lambda: torch.tensor(tokens)) == [(0, [5]), (2, [7]), (3, [1, 4, 4])]
    assert slots.rows == [None] * 4
    with pytest.raises(UsageError, match="logits: expected finite numbers"):
        slots._read([Row(0, [1], 9, 0)], lambda: torch.tensor([[3], [NOT_FINITE]]))


@pytest.mark.parametrize("params", [GREEDY, EVERYTHING], ids=["greedy", "everything"])
def test_damaged_weights_end_it_with_the_reason(captures, params):
    model = tiny_model()
    engine = captured_engine(model)
    results = generate_many(
        model, prompts_of(), params=params, slots=2, max_new_tokens=[4] * 8 + [9], engine=engine
    )
    next(results)
    model.model.norm.weight.data[3] = float("nan")  # where it is: the next replay reads it
    with pytest.raises(UsageError, match="logits: expected finite numbers, got NaN or infinity"):
        list(results)
    assert engine.loops.idle == []


def memory_for(rows, capacity, config):
    """Free bytes in which just so many rows of that capacity fit."""
    return int(batch._needed(config, capacity, torch.float32, rows) / 0.9) + 1


@pytest.mark.parametrize(
    "rows, capacity, fitting, made",
    [(3, 64, 3, 64), (3, 62, 3, 62), (2, 62, 2, 62), (1, 64, 1, 62)],
)
def test_the_memory_counts_the_power_of_two_where_it_fits(
    model, captures, expected, monkeypatch, rows, capacity, fitting, made
):
    """The longest row needs 62 positions."""
    free = memory_for(rows, capacity, model.config)
    monkeypatch.setattr(batch, "free_memory", lambda device: free)
    engine, lines = captured_engine(model), []
    assert many(engine, params=SAMPLED, slots=3, report=lines.append) == expected[SAMPLED]
    (loop,) = engine.loops.idle
    assert (loop.batch, loop.cache.capacity) == (fitting, made)
    (line,) = lines
    assert line.startswith(f"cache: 3 x {made} tokens, ")
    assert ("slots lowered" in line) == (fitting < 3)


def test_idle_loops_make_room(model, captures, expected, monkeypatch):
    engine = captured_engine(model)

    def taken():
        return sum(cache_bytes(model.config, loop.batch, 64, torch.float32) for loop in engine.loops.idle)

    free = memory_for(3, 64, model.config)
    for module in (batch, cache):
        monkeypatch.setattr(module, "free_memory", lambda device: free - taken())
    for slots in (2, 3, 3):
        assert many(engine, params=SAMPLED, slots=slots) == expected[SAMPLED]
        assert [loop.batch for loop in engine.loops.idle] == [slots]
