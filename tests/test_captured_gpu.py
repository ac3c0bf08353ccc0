"""Captured decoding on a GPU: the eager tokens, no wait inside of a replay, one launch per token."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from generation_cases import EVERYTHING, GREEDY, SAMPLED, eager, looped, prompts, tiny_model

from smollm2 import SmolLM2ForCausalLM
from smollm2.engine.captured import Choice, DecodeLoop, LogitsStep
from smollm2.engine.eager import Engine
from smollm2.engine.loops import CapturedEngine, DecodeLoops
from smollm2.generation.batch import generate_many
from smollm2.sampling import SamplingParams

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU"),
]


@pytest.fixture(scope="module", params=["torch", "triton"])
def model(request):
    return tiny_model(request.param, "cuda")


def started(model: SmolLM2ForCausalLM, params: SamplingParams, chunk: int = 16) -> DecodeLoop:
    """A captured loop with a prompt in it."""
    ids, mask = prompts((9, 1, 30))
    loop = DecodeLoop(Engine(model), 3, 256, chunk)
    loop.start(ids, mask.sum(1), [1, 2, 3], Choice(params))
    return loop


@pytest.mark.parametrize("params", [GREEDY, SAMPLED, EVERYTHING], ids=["greedy", "sampled", "everything"])
def test_captured_tokens_are_the_uncaptured_ones(model, params):
    """Several prompts through one loop, with ends in the middle of chunks, and against the eager loop."""
    loops = DecodeLoops(Engine(model))
    for seed in (1, 2):
        ids, mask = prompts((9, 1, 30, 17), seed=seed)
        free = eager(model, ids, mask, [0, 1, 2, 3], params=params, max_new_tokens=40)
        ends = [free[2][0], free[6][1], free[13][2], free[37][3]]
        options = dict(params=params, max_new_tokens=40, eos_token_ids=ends, pad_token_id=511)
        expected = eager(model, ids, mask, [0, 1, 2, 3], **options)
        assert looped(loops, ids, mask, [0, 1, 2, 3], **options) == expected
    (loop,) = loops.idle
    assert len(loop._steps) == 2, "the end tokens differ"
    assert all(step.graph is not None for step in loop._steps.values())


def test_a_replay_computes_the_step(model):
    captured, plain = started(model, SAMPLED), started(model, SAMPLED)
    assert plain._step is not None
    plain._step = replace(plain._step, graph=None)
    for loop in (captured, plain):
        loop.run(16)
    assert torch.equal(captured.read_back(16)(), plain.read_back(16)())
    assert torch.equal(captured.cache.lengths, plain.cache.lengths)


@pytest.mark.parametrize("params", [GREEDY, EVERYTHING], ids=["greedy", "everything"])
def test_nothing_waits_for_the_device_in_a_chunk(model, params):
    loop = started(model, params)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loop.run(16)
        first = loop.read_back(16)
        loop.run(16)
        second = loop.read_back(16)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not torch.equal(first(), second())


@pytest.mark.parametrize("params", [GREEDY, SAMPLED, EVERYTHING], ids=["greedy", "sampled", "everything"])
def test_many_prompts_through_one_graph_are_each_the_prompt_alone(model, params):
    generator = torch.Generator().manual_seed(3)
    ids = [torch.randint(30, 512, (n,), generator=generator).tolist() for n in (9, 1, 30, 17, 5, 44, 3)]
    options = dict(params=params, max_new_tokens=40, eos_token_ids=range(30), slots=3)
    expected = dict(generate_many(model, ids, engine=Engine(model), **options))
    assert len({len(tokens) for tokens in expected.values()}) > 2
    engine = CapturedEngine(model)
    for _ in range(2):
        assert dict(generate_many(model, ids, engine=engine, **options)) == expected
    (loop,) = engine.loops.idle
    (step,) = loop._steps.values()
    assert step.graph is not None and len(loop._costs) == 1


@pytest.mark.parametrize("params", [GREEDY, EVERYTHING], ids=["greedy", "everything"])
def test_nothing_waits_for_the_device_while_a_row_is_refilled(model, params):
    loop, ids = DecodeLoop(Engine(model), 3, 256, 16), prompts((9, 30))[0]
    loop.open(Choice(params, (1, 2)))
    pieces = []
    for go in ("default", "error"):  # the first time compiles and allocates
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode(go)
        try:
            pieces += [loop.refill([2, 0], ids, torch.tensor([9, 30]), [1, 2])]
            loop.park([1])
            loop.run(8)
            pieces += [loop.read_back(8)]
        finally:
            torch.cuda.set_sync_debug_mode("default")
    first, steps, again, repeated = (piece() for piece in pieces)
    assert torch.equal(first, again) and steps.shape == repeated.shape == (8, 3)
    assert torch.equal(steps[:, [0, 2]], repeated[:, [0, 2]])


def test_a_token_is_one_launch(model):
    loop = started(model, GREEDY)
    loop.run(16)
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        loop.run(16)
        torch.cuda.synchronize()
    calls = {event.key: event.count for event in profile.key_averages()}
    assert calls["cudaGraphLaunch"] == 16
    outside = calls.get("cudaLaunchKernel", 0) + calls.get("cuLaunchKernelEx", 0)
    assert outside <= 1, "only the output's position is set"
    assert "2 steps to warm up took" in loop.describe()


def test_recorded_logits_are_those_of_the_eager_step(model):
    """Of the first rows, while one behind them is being read and the last is free."""
    engine, (ids, mask) = Engine(model), prompts((9, 1, 30, 17))
    step = LogitsStep(engine, engine.allocate(4, 64))
    assert step.graph is not None
    plain = engine.allocate(4, 64)
    lengths = mask.sum(1).cuda()
    for cache in (step.cache, plain):
        cache.longest, cache.fixed = 0, False
        engine.prefill(ids.cuda(), lengths, cache)
    step.cache.longest, step.cache.fixed = step.cache.capacity, True
    for token in range(5, 9):
        tokens = torch.tensor([[token], [token + 1]], device="cuda")
        expected = engine.decode(torch.cat([tokens, tokens]), plain)[:2, -1]
        torch.testing.assert_close(step(tokens, [30, 0]), expected, rtol=1e-4, atol=1e-4)
    assert step.cache.lengths.tolist() == [13, 5, 30, 0]
