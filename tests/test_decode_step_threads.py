"""The compiled decode step in forks, among threads and in whole texts."""

from __future__ import annotations

import hashlib
import multiprocessing
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection

import pytest
import torch
from generation_cases import random_ids as ids
from test_decode_step_cpp import ODD, compiled_engine, filled, model_of, not_called, threads

from smollm2 import generate
from smollm2.engine import native
from smollm2.engine.compiled import CompiledEngine
from smollm2.engine.eager import Engine
from smollm2.generation.batch import generate_many
from smollm2.generation.speculative import PromptLookup, speculative_steps

pytestmark = pytest.mark.usefixtures("installed_step")


def fresh_library(engine: CompiledEngine) -> None:
    """Of a second copy, with threads of its own."""
    engine._step = native._loaded.__wrapped__(native._installed().read_bytes()).smollm2_decode_step


def decode_many(engine: CompiledEngine, steps: int) -> bytes:
    """The sha256 of the logits of a text of so many steps, begun anew as often as the cache is full."""
    found = hashlib.sha256()
    cache = filled(engine.model, [3, 1], 100)
    for step in range(steps):
        if cache.longest == 100:
            cache.lengths.copy_(torch.tensor([3, 1]))
            cache.longest = 3
        found.update(engine.decode(torch.tensor([[step % 500], [7]]), cache).numpy().tobytes())
    return found.digest()


def child(work: Callable[[], bytes], pipe: Connection) -> None:
    pipe.send(work())


def in_a_fork(work: Callable[[], bytes], seconds: float = 60) -> bytes:
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=child, args=(work, theirs))
    process.start()
    theirs.close()
    try:
        assert ours.poll(seconds), "the child hangs"
        return ours.recv()
    finally:
        process.kill()
        process.join()


forks = pytest.mark.skipif(
    "fork" not in multiprocessing.get_all_start_methods(), reason="this system cannot fork"
)


@forks
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_decodes_the_same():
    """Threads stay in the parent; the child has none, and does not wait for them."""
    engine = compiled_engine(model_of(**ODD))
    with threads(4):
        expected = decode_many(engine, 30)
        assert in_a_fork(lambda: decode_many(engine, 30)) == expected
        assert decode_many(engine, 30) == expected


@forks
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_more_threads_than_cores_beside_a_busy_one_come_to_an_end():
    engine = compiled_engine(model_of(**ODD))
    with threads(1):
        expected = decode_many(engine, 400)

    def work() -> bytes:
        fresh_library(engine)
        block, over = bytes(1 << 24), threading.Event()

        def busy() -> None:
            while not over.is_set():
                hashlib.sha256(block)  # without Python's lock

        others = [threading.Thread(target=busy, daemon=True) for _ in range(2)]
        for thread in others:
            thread.start()
        torch.set_num_threads(4)
        return decode_many(engine, 400)

    assert in_a_fork(work) == expected


def test_two_python_threads_with_two_engines_do_not_disturb_each_other():
    models = [model_of(**ODD), model_of(seed=1).bfloat16()]
    engines = [compiled_engine(model) for model in models]
    expected, found = [decode_many(engine, 60) for engine in engines], dict[int, bytes]()

    def run(index: int) -> None:
        found[index] = decode_many(engines[index], 60)

    running = [threading.Thread(target=run, args=(index,)) for index in range(2)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    assert [found[0], found[1]] == expected


@pytest.fixture(scope="module")
def model():
    return model_of()


@pytest.mark.parametrize(
    "options", [dict(temperature=0.0), dict(temperature=0.9, top_p=0.9, repetition_penalty=1.2)]
)
@pytest.mark.parametrize("length", [1, 40])
def test_its_text_is_the_eager_one(model, options, length):
    ours, expected = (
        generate(model, ids(2, length), max_new_tokens=30, seed=3, eos_token_id=[], engine=engine, **options)
        for engine in (compiled_engine(model), Engine(model))
    )
    assert torch.equal(ours, expected)


@pytest.mark.parametrize("rows", [3, 18])
def test_a_batch_on_it_is_its_rows(model, rows):
    """More rows than it takes run in the engine below, until some have ended."""
    prompts, engine = [row.tolist() for row in ids(rows, 12)], compiled_engine(model)
    budgets = [5 + 3 * (row % 4) for row in range(rows)]
    together = dict(generate_many(model, prompts, max_new_tokens=budgets, slots=rows, engine=engine))
    for row in range(rows):
        expected = generate(
            model,
            ids(rows, 12)[row : row + 1],
            max_new_tokens=budgets[row],
            eos_token_id=[],
            engine=Engine(model),
        )
        assert together[row] == expected[0, 12:].tolist()


def test_guesses_are_read_on_it(model):
    prompt = torch.cat((ids(1, 12), ids(1, 12)), 1)
    engine = compiled_engine(model)
    engine.fallback.decode = not_called  # type: ignore[method-assign]
    steps = speculative_steps(model, prompt, draft=PromptLookup(7), max_new_tokens=30, engine=engine)
    expected = generate(model, prompt, max_new_tokens=30, eos_token_id=[], engine=Engine(model))
    assert [token for step in steps for token in step] == expected[0, 24:].tolist()
