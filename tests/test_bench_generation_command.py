"""The steps that `python -m bench.generation` times: same cache, same logits; a row that fails is a row. The
whole command runs in test_bench_gpu_command.py.
"""

import argparse
import json
import sys
from importlib.util import find_spec

import pytest
import torch

from bench import decode_steps, generation
from bench.record import Part
from bench.scheduling import seconds_to_answer
from bench.summary import generation_lines
from smollm2.config import SmolLM2Config
from smollm2.engine.eager import Engine

TINY = SmolLM2Config.preset("tiny", num_hidden_layers=1)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model():
    return generation.build(None, TINY, "torch", CPU, torch.float32)


@pytest.fixture
def bench(tmp_path):
    """A Bench of toy sizes that saves to generation.json."""

    def make(seconds=100.0):
        part = Part(
            "generation",
            argparse.Namespace(device="cpu", tiny=True, json=tmp_path / "generation.json", seconds=seconds),
        )
        return generation.Bench(part, TINY, torch.float32, None, generation.TINY)

    return make


def saved(tmp_path):
    return json.loads((tmp_path / "generation.json").read_text(encoding="utf-8"))["generation"]


@torch.inference_mode()
def test_all_ways_to_step_see_the_same_cache(model):
    steps = [decode_steps.EagerSteps(model, 2, 24, 3), decode_steps.LoopSteps(model, 2, 24, 4)]
    expected = steps[0].first()
    assert steps[1].same_tokens(steps[1].first()) == 1.0
    if find_spec("transformers") is not None:
        llama = decode_steps.build_llama(model)
        steps += [decode_steps.LlamaSteps(llama, 2, 24, 3), decode_steps.LlamaSteps(llama, 2, 24, 3, "eager")]
    for one in steps:
        for _ in range(2):
            torch.testing.assert_close(one.first(), expected, rtol=1e-4, atol=1e-5)
        sample, timed = decode_steps.clock(one, CPU, repeats=3, seconds=0.001)
        assert sample.us > 0 and timed % one.chunk == 0
    wrong = decode_steps.EagerSteps(model, 2, 24, 3)
    wrong.cache.keys[:, :, 12].zero_()
    assert ((wrong.first() - expected).abs().max() / expected.abs().max()).item() > 1e-3


def test_requests_are_answered_whole_and_the_first_rounds_do_not_count(model):
    engine, prompts = Engine(model), [[1, 2, 3]] * 4
    calls, decode = list[int](), engine.decode
    engine.decode = lambda tokens, cache: calls.append(len(tokens)) or decode(tokens, cache)
    seconds, firsts = seconds_to_answer(engine, prompts, 5, slots=2)
    assert len(firsts) == 2 and 0 < min(firsts) <= max(firsts) < seconds
    assert sum(calls) == 4 * 4, "the first token of an answer is of its prompt"


def test_an_answer_that_fails_is_an_error(model):
    engine = Engine(model)
    engine.decode = lambda tokens, cache: torch.full((len(tokens), 1, TINY.vocab_size), torch.nan)
    with pytest.raises(RuntimeError, match="finite"):
        seconds_to_answer(engine, [[1, 2, 3]], 5, slots=1)


def test_layers_are_joined_while_they_are_to_be():
    decode_layers = pytest.importorskip("kernels.decode_layers", reason="triton is not installed")
    with decode_steps.joined():
        assert decode_layers.joins_layers(CPU)
    assert not decode_layers.joins_layers(CPU)


@torch.inference_mode()
def test_timed_steps_end_where_the_cache_is_full(model):
    for steps in (decode_steps.EagerSteps(model, 2, 24, 3), decode_steps.LoopSteps(model, 2, 24, 3)):
        steps.rewind(steps.chunk)
        steps.go(steps.chunk)
        assert steps.cache.lengths.tolist() == [24, 24] and steps.cache.capacity == 24


def test_a_row_that_fails_does_not_end_the_others(bench, tmp_path):
    def fails():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 48 GiB")

    made = bench()
    made.add("rows", {"variant": "triton captured", "batch": 1, "keys": 8}, fails)
    made.add(
        "rows",
        {"variant": "torch captured", "batch": 1, "keys": 8},
        lambda: made.decode("torch captured", 1, 8),
    )
    first, second = saved(tmp_path)["rows"]
    assert first["failed"].startswith("OutOfMemoryError: CUDA out of memory") and second["step_us"] > 0
    lines = generation_lines(saved(tmp_path))
    assert (
        lines[1].startswith("  8 keys, batch 1: - (") and "1 triton captured: OutOfMemoryError" in lines[-1]
    )


def test_peers_decode_at_the_same_batches_as_we_do():
    sizes = generation.Sizes()
    for points in (sizes.first, sizes.others, sizes.compiled):
        assert {1, 8, 64, 256} <= {batch for batch, _ in points}
    assert "transformers" in generation.MAIN and sizes.modes == ("+compile+graph", "+compile")


def test_nothing_new_begins_without_time(bench, tmp_path):
    bench(seconds=-1.0).add(
        "rows", {"variant": "torch captured", "batch": 1, "keys": 8}, lambda: pytest.fail("it began")
    )
    assert saved(tmp_path)["rows"][0]["failed"] == "no time was left"


def test_without_transformers_a_row_names_it(bench, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    part = bench(seconds=-1.0).part
    generation.measure(part, TINY, torch.float32, None, generation.TINY)
    named = [row for row in saved(tmp_path)["rows"] if row["variant"].startswith("transformers")]
    assert len(named) == 1 and "transformers" in named[0]["failed"]
    assert "transformers" in generation_lines(saved(tmp_path))[-1]
