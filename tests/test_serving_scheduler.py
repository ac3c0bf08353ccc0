"""Requests that share a batch: each gets what it gets alone, whatever comes, goes and fails beside it."""

from __future__ import annotations

import queue
import random
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from generation_cases import EVERYTHING, GREEDY, SAMPLED, alone, let_it_say, tiny_model, tiny_tokenizer

from smollm2.engine.eager import Engine
from smollm2.engine.loops import CapturedEngine
from smollm2.engine.select import select_engine
from smollm2.errors import UsageError
from smollm2.sampling import SamplingParams
from smollm2.serving.prefix_cache import Prefix, PrefixCache
from smollm2.serving.scheduler import Busy, Piece, Request, Scheduler

TOKENIZER = tiny_tokenizer()
MODEL = tiny_model(vocab_size=TOKENIZER.vocab_size)
ENDS = TOKENIZER.end_ids(TOKENIZER.vocab_size, *MODEL.config.eos_token_ids)


class Answer:
    """A request, and what was put of its answer."""

    def __init__(
        self, prompt: list[int], new: int = 8, params: SamplingParams = GREEDY, **options: Any
    ) -> None:
        self.pieces, self.ended, self.begun = list[Piece](), threading.Event(), threading.Event()
        self.request = Request(prompt, new, params, self.put, **options)

    def put(self, piece: Piece) -> None:
        assert not self.ended.is_set(), "nothing comes after the last piece"
        self.pieces.append(piece)
        self.begun.set()
        if piece.finish:
            self.ended.set()

    def wait(self) -> Answer:
        assert self.ended.wait(120), "the request did not end"
        return self

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in self.pieces)

    @property
    def finish(self) -> str | None:
        return self.pieces[-1].finish


def expected(answer: Answer) -> tuple[str, str]:
    """The text of the same request alone, and why it ended."""
    request = answer.request
    tokens = alone(MODEL, request.prompt, request.params, request.seed, ENDS, request.max_tokens)
    ended = tokens[-1] in ENDS
    data = b"".join(TOKENIZER.token_bytes(token) for token in tokens if token not in ENDS)
    return data.decode(errors="replace"), "stop" if ended else "length"


@pytest.fixture
def serve() -> Iterator[Any]:
    """Begins schedulers, and sees that they end with nothing left."""
    running: list[Scheduler] = []

    def begin(engine: Engine | None = None, **options: Any) -> Scheduler:
        running.append(Scheduler(engine or Engine(MODEL), TOKENIZER, **{"context": 128, **options}))
        running[-1].start()
        return running[-1]

    yield begin
    for scheduler in running:
        scheduler.close()
        assert (scheduler.running, scheduler.queued) == (0, 0)


def test_each_gets_what_it_gets_alone(serve):
    draws = random.Random(7)
    answers = [
        Answer(
            [draws.randrange(3, 290) for _ in range(draws.randrange(1, 60))],
            draws.randrange(1, 40),
            draws.choice((GREEDY, SAMPLED, EVERYTHING)),
            seed=draws.randrange(1 << 40),
        )
        for _ in range(40)
    ]
    scheduler = serve(slots=5)
    for answer in answers:
        scheduler.submit(answer.request)
    for answer in answers:
        assert (answer.wait().text, answer.finish) == expected(answer)
    scheduler.close()
    totals = scheduler.totals
    assert totals.requests == totals.finished == 40 and totals.steps > 0
    assert totals.new_tokens == sum(piece.tokens for answer in answers for piece in answer.pieces)
    assert totals.prompt_tokens == sum(len(answer.request.prompt) for answer in answers)


def test_a_long_prompt_is_read_in_parts_while_others_go_on(serve, monkeypatch):
    engine, order = Engine(MODEL), list[int]()
    engine.reads_at_once = engine.reads_between_steps = 16
    prefill, decode = engine.prefill, engine.decode
    monkeypatch.setattr(
        engine, "prefill", lambda ids, *rest: (order.append(ids.shape[1]), prefill(ids, *rest))[1]
    )
    monkeypatch.setattr(engine, "decode", lambda ids, *rest: (order.append(0), decode(ids, *rest))[1])
    first, second = Answer([5, 6, 7], 60), Answer(list(range(10, 80)), 4)
    scheduler = serve(engine)
    scheduler.submit(first.request, second.request)
    for answer in (first.wait(), second.wait()):
        assert (answer.text, answer.finish) == expected(answer)
    assert order[:11] == [3, 13, 0, 16, 0, 16, 0, 16, 0, 9, 0]


def test_what_begins_alike_is_read_once(serve):
    system = list(range(40, 80))
    first = Answer([*system, 7, 8, 9], 6)
    scheduler = serve()
    scheduler.submit(first.request)
    first.wait()
    assert first.request.cached == 0
    said = alone(MODEL, first.request.prompt, new=6)
    others = [Answer([*system, 100 + index], 6, SAMPLED, seed=index) for index in range(4)]
    turn = Answer([*first.request.prompt, *said, 5, 5], 6)
    scheduler.submit(*[answer.request for answer in (*others, turn)])
    for answer in (*others, turn):
        assert (answer.wait().text, answer.finish) == expected(answer)
    assert [answer.request.cached for answer in others] == [40] * 4
    assert turn.request.cached == len(first.request.prompt) + 5, "the last token of an answer is not computed"
    same = Answer(turn.request.prompt, 6)
    scheduler.submit(same.request)
    assert (same.wait().text, same.finish) == expected(turn)
    assert same.request.cached == len(turn.request.prompt) - 1


def test_requests_that_come_together_share_what_they_begin_with(serve):
    answers = [Answer(list(range(20, 60)), 12, SAMPLED, seed=seed) for seed in range(4)]
    scheduler = serve()
    scheduler.submit(*[answer.request for answer in answers])
    for answer in answers:
        assert (answer.wait().text, answer.finish) == expected(answer)
    assert [answer.request.cached for answer in answers] == [0, 39, 39, 39]


def test_cancelled_rows_make_room(serve):
    endless = [Answer([9, index], 120) for index in range(3)]
    after = [Answer([50 + index], 10) for index in range(3)]
    scheduler = serve(slots=2)
    scheduler.submit(*[answer.request for answer in (*endless, *after)])
    endless[0].begun.wait(60)
    for answer in endless:
        scheduler.cancel(answer.request)
    for answer in after:
        assert (answer.wait().text, answer.finish) == expected(answer)
    assert [answer.wait().finish for answer in endless] == ["cancelled"] * 3
    scheduler.cancel(after[0].request)  # has ended: nothing
    assert scheduler.totals.cancelled == 3 and scheduler.totals.finished == 3


def test_one_that_is_cancelled_while_it_waits_leaves_its_place_at_once(serve, monkeypatch):
    engine, steps = Engine(MODEL), threading.Semaphore(0)
    decode = engine.decode
    monkeypatch.setattr(engine, "decode", lambda *args: (steps.acquire(timeout=60), decode(*args))[1])
    scheduler = serve(engine, slots=1, queue_size=1)
    busy, waiting, other = Answer([9, 9], 120), Answer([8, 8], 5), Answer([7, 7], 5)
    scheduler.submit(busy.request)
    busy.begun.wait(60)
    scheduler.submit(waiting.request)
    scheduler.cancel(waiting.request)
    steps.release()
    assert waiting.wait().finish == "cancelled" and not busy.ended.is_set()
    scheduler.submit(other.request)
    scheduler.cancel(busy.request)
    steps.release(10)
    assert (other.wait().text, other.finish) == expected(other)


def test_a_reader_that_fails_loses_its_row_alone(serve):
    def fails(piece: Piece) -> None:
        raise ConnectionResetError

    gone, other = Request([4, 5], 100, GREEDY, fails), Answer([6, 7], 20)
    scheduler = serve()
    scheduler.submit(gone, other.request)
    assert (other.wait().text, other.finish) == expected(other)
    scheduler.close()
    assert scheduler.totals.cancelled == 1


def test_stop_texts_and_logprobs(serve):
    whole = Answer([5, 6], 20)
    scheduler = serve()
    scheduler.submit(whole.request)
    text = whole.wait().text
    stop = text[6:8]
    cut = Answer([5, 6], 20, stop=(stop, "never"), logprobs=3)
    scheduler.submit(cut.request)
    assert cut.wait().text == text[: text.index(stop)] and cut.finish == "stop"
    logits = MODEL(torch.tensor([[5, 6]])).logits[0, -1].detach().log_softmax(-1)
    first = cut.pieces[0].logprobs
    assert (
        first is not None and first.token == int(logits.argmax()) == first.top[0][0] and len(first.top) == 3
    )
    assert first.logprob == pytest.approx(float(logits.max()), abs=1e-4) == first.top[0][1]


def test_the_end_token_ends_and_is_no_text(serve):
    model = tiny_model(vocab_size=TOKENIZER.vocab_size)
    let_it_say(model, ENDS[0])
    answer = Answer([5, 6], 20)
    serve(Engine(model)).submit(answer.request)
    assert answer.wait().text == "" and answer.finish == "stop" and answer.pieces[0].tokens == 1


def test_too_many_requests_are_refused_as_a_whole(serve, monkeypatch):
    engine, go = Engine(MODEL), threading.Event()
    prefill = engine.prefill
    monkeypatch.setattr(engine, "prefill", lambda *args: (go.wait(60), prefill(*args))[1])
    scheduler, answers = serve(engine, slots=2, queue_size=3), [Answer([5, index], 3) for index in range(5)]
    scheduler.submit(*[answer.request for answer in answers])
    more = [Answer([6], 3), Answer([7], 3)]
    for attempt in (more, more[:1]):
        with pytest.raises(Busy, match="the queue is full: 3 may wait beside the 2 that run"):
            scheduler.submit(*[answer.request for answer in attempt])
    go.set()
    for answer in answers:
        assert (answer.wait().text, answer.finish) == expected(answer)
    assert scheduler.totals.requests == 5 and not more[0].pieces
    scheduler.submit(more[0].request)
    assert more[0].wait().finish == "length"


def test_a_failed_step_ends_what_runs_and_nothing_else(serve, monkeypatch):
    engine = Engine(MODEL)
    decode, failures = engine.decode, iter([MemoryError("no memory")])

    def fails_once(*args: Any) -> torch.Tensor:
        for failure in failures:
            raise failure
        return decode(*args)

    monkeypatch.setattr(engine, "decode", fails_once)
    scheduler, first, second = serve(engine, slots=1), Answer([5], 9), Answer([6], 9)
    scheduler.submit(first.request, second.request)
    assert first.wait().finish == "error" and first.pieces[-1].error == "MemoryError: no memory"
    assert (second.wait().text, second.finish) == expected(second)
    assert scheduler.totals.failed == 1 and not scheduler.failure


def test_a_row_without_finite_logits_ends_alone(serve, monkeypatch):
    engine = Engine(MODEL)
    decode = engine.decode

    def poisoned(tokens: torch.Tensor, cache: Any) -> torch.Tensor:
        logits = decode(tokens, cache)
        logits[tokens[:, 0] == 77] = float("nan")
        return logits

    monkeypatch.setattr(engine, "decode", poisoned)
    monkeypatch.setattr(
        engine, "prefill", lambda ids, *rest: one_hot(ids, Engine.prefill(engine, ids, *rest))
    )

    def one_hot(ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        return torch.where(ids[:, :1] == 4, torch.eye(logits.shape[1])[77], logits)

    bad, good = Answer([4], 9), Answer([6], 9)
    scheduler = serve(engine)
    scheduler.submit(bad.request, good.request)
    assert bad.wait().finish == "error" and "NaN" in bad.pieces[-1].error and len(bad.pieces) == 2
    assert (good.wait().text, good.finish) == expected(good)


def test_closing_finishes_what_was_taken_or_cancels_it(serve):
    scheduler, answers = serve(slots=1), [Answer([5, index], 6) for index in range(3)]
    scheduler.submit(*[answer.request for answer in answers])
    scheduler.close()
    assert [(answer.text, answer.finish) for answer in answers] == [expected(answer) for answer in answers]
    with pytest.raises(RuntimeError, match="closed"):
        scheduler.submit(Answer([5], 6).request)
    scheduler, answers = serve(slots=1), [Answer([5, index], 120) for index in range(3)]
    scheduler.submit(*[answer.request for answer in answers])
    answers[0].begun.wait(60)
    scheduler.close(grace=0)
    assert {answer.finish for answer in answers} <= {"cancelled", "length"} and answers[
        2
    ].finish == "cancelled"


def test_an_end_of_the_thread_is_told(serve, monkeypatch):
    class Gone(BaseException):
        pass

    engine = Engine(MODEL)

    def ends(*args: Any) -> torch.Tensor:
        raise Gone("power")

    monkeypatch.setattr(engine, "decode", ends)
    monkeypatch.setattr(threading, "excepthook", lambda args: None)
    scheduler, answers = serve(engine, slots=1), [Answer([5], 9), Answer([6], 9)]
    scheduler.submit(*[answer.request for answer in answers])
    assert [answer.wait().finish for answer in answers] == ["error", "error"]
    with pytest.raises(RuntimeError, match="has ended: Gone: power"):
        scheduler.submit(Answer([5], 6).request)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(prompt=[]), "expected at least one token"),
        (dict(prompt=[5] * 125), "expected at most 128 tokens, prompt and new ones together, got 125 \\+ 8"),
        (dict(prompt=[300]), "300"),
        (dict(prompt=[5], new=0), "max_new_tokens >= 1"),
        (dict(prompt=[5], params=SamplingParams(top_p=2.0)), "top_p"),
        (dict(prompt=[5], logprobs=21), "logprobs: expected 0 to 20"),
    ],
)
def test_what_cannot_be_continued_is_refused_at_once(serve, options, message):
    scheduler = serve()
    with pytest.raises(UsageError, match=message):
        scheduler.submit(Answer([5]).request, Answer(**options).request)
    assert scheduler.totals.requests == 0


def test_sizes_out_of_range_are_refused():
    for options in (dict(slots=0), dict(context=0), dict(context=1 << 20), dict(queue_size=0)):
        with pytest.raises(UsageError, match=f"{next(iter(options))}: expected"):
            Scheduler(Engine(MODEL), TOKENIZER, **options)


def test_the_compiled_step_serves_too(serve, installed_step):
    engine = select_engine(MODEL)
    assert engine.name == "compiled"
    answers = [Answer([3 + index, 9, 9], 30, SAMPLED, seed=index) for index in range(20)]
    scheduler = serve(engine, slots=20)  # more rows than the step takes
    scheduler.submit(*[answer.request for answer in answers])
    for answer in answers:
        assert (answer.wait().text, answer.finish) == expected(answer)


def test_a_captured_step_serves_too(serve):
    engine = CapturedEngine(MODEL)
    engine.reads_between_steps = 16
    answers = [
        Answer(prompt, new, params, seed=index)
        for index, (new, params) in enumerate([(30, SAMPLED), (9, GREEDY), (1, EVERYTHING)] * 3)
        for prompt in ([3 + index, 9, 9], list(range(60 + index, 130 + index)))
    ]
    scheduler = serve(engine, slots=3)
    scheduler.submit(*[answer.request for answer in answers])
    for answer in answers:
        assert (answer.wait().text, answer.finish) == expected(answer)


def test_a_captured_engine_reads_prompts_together(serve, monkeypatch):
    engine, read = CapturedEngine(MODEL), list[tuple[int, ...]]()
    prefill = engine.prefill
    monkeypatch.setattr(
        engine, "prefill", lambda ids, *rest: (read.append(tuple(ids.shape)), prefill(ids, *rest))[1]
    )
    system = list(range(40, 80))
    answers = [Answer([*system, *[5 + index] * (index + 1)], 6, SAMPLED, seed=index) for index in range(6)]
    scheduler = serve(engine, slots=6)
    scheduler.submit(*[answer.request for answer in answers])
    for answer in answers:
        assert (answer.wait().text, answer.finish) == expected(answer)
    assert read == [(1, 41), (5, 14)], "32 of 40 tokens are taken over, and 8 + 6 read in the longest"
    assert [answer.request.cached for answer in answers] == [0, *[32] * 5]


def test_kept_prefixes_stay_within_their_memory():
    def prefix(*tokens: int) -> Prefix:
        keys = torch.zeros(2, len(tokens), 1, 4)
        return Prefix(np.array(tokens), keys, keys.clone())

    one = prefix(1).size
    kept = PrefixCache(6 * one)
    for tokens in ((1, 2), (1, 2, 3), (1, 2), (8, 9)):
        kept.add(prefix(*tokens))
    assert kept.size == 5 * one, "a beginning of another text takes no memory"
    assert kept.find(np.array([1, 2, 7]))[1] == 2 and kept.find(np.array([5]))[1] == 0
    kept.add(prefix(4, 5, 6))
    assert kept.size == 6 * one and kept.find(np.array([8]))[1] == 0, "the one not used for longest went"
    kept.add(prefix(*range(10, 20)))
    assert kept.size == 6 * one, "what cannot fit drives nothing out"
    nothing = PrefixCache(0)
    nothing.add(prefix(1, 2))
    assert nothing.size == 0 and nothing.find(np.array([1, 2])) == (None, 0)


def test_memory_stays_flat(serve):
    scheduler, finished = serve(slots=4, prefix_cache_bytes=200_000), queue.SimpleQueue[Piece]()
    sizes = []
    for round_number in range(6):
        for index in range(12):
            request = Request([3 + round_number, *range(50 + index, 80 + index)], 10, GREEDY, finished.put)
            scheduler.submit(request)
        ended = 0
        while ended < 12:
            ended += finished.get(timeout=60).finish is not None
        sizes.append(scheduler.prefix_cache_used)
    assert 0 < min(sizes[1:]) and max(sizes) <= 200_000
