"""Decode loops as objects: which are kept and found again, what they say, and that a step could be captured,
shown without a GPU.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from generation_cases import EVERYTHING, GREEDY, SAMPLED, eager, looped, prompts, tiny_model
from kernel_cases import INTERPRETED
from torch.utils._python_dispatch import TorchDispatchMode

from bench.launches import count
from smollm2 import SmolLM2Config, SmolLM2ForCausalLM
from smollm2.engine.captured import KEPT_GRAPHS, Choice, DecodeLoop, capacity_for
from smollm2.engine.eager import Engine
from smollm2.engine.loops import KEPT_LOOPS, DecodeLoops, captured_steps
from smollm2.errors import UsageError
from smollm2.sampling import SamplingParams


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def test_capacities_are_powers_of_two_up_to_the_models_own():
    known = {1: 64, 64: 64, 65: 128, 128: 128, 129: 256, 4097: 8192, 8192: 8192}
    assert {tokens: capacity_for(tokens, 8192) for tokens in known} == known
    assert (capacity_for(1, 48), capacity_for(600, 1000)) == (48, 1000)
    with pytest.raises(UsageError, match="expected at most 1000 together, got 1001; shorten the prompt"):
        capacity_for(1001, 1000)


def test_a_prompt_beyond_the_table_is_refused_before_any_work(model):
    ids, mask = prompts((500, 3))
    loops = DecodeLoops(Engine(model))
    with pytest.raises(UsageError, match="at most 512 together, got 513"):
        next(captured_steps(loops, ids, mask.sum(1), params=GREEDY, seeds=[0, 1], max_new_tokens=13))
    assert loops.idle == []
    # filled to the last position
    assert len(looped(loops, ids, mask, [0, 1], params=GREEDY, max_new_tokens=12)) == 12


def test_loops_are_found_again_by_batch_and_capacity_and_the_latest_are_kept(model):
    loops, kept = DecodeLoops(Engine(model)), []
    for batch, tokens in ((1, 20), (1, 64), (2, 64), (1, 65), (1, 1)):
        with loops.borrow(batch, tokens) as loop:
            assert loop not in loops.idle
            kept.append(loop)
    assert kept[0] is kept[1] is kept[4] and len({id(loop) for loop in kept}) == 3
    assert [loop.cache.capacity for loop in loops.idle] == [64, 128, 64]
    for batch in range(1, KEPT_LOOPS + 3):
        with loops.borrow(batch, 10):
            pass
    assert [loop.batch for loop in loops.idle] == list(range(3, KEPT_LOOPS + 3))
    with pytest.raises(RuntimeError, match="halfway"), loops.borrow(KEPT_LOOPS + 2, 10):
        raise RuntimeError("halfway")
    assert len(loops.idle) == KEPT_LOOPS - 1, "a loop that failed is not used again"


def test_few_choices_are_kept_per_loop_the_latest(model):
    loop = DecodeLoop(Engine(model), 1, 64)
    ids, mask = prompts((4,))
    choices = [Choice(SamplingParams(temperature=0.5 + index)) for index in range(KEPT_GRAPHS + 1)]
    for choice in (*choices, choices[1]):
        loop.start(ids, mask.sum(1), [0], choice)
    assert list(loop._steps) == [*choices[2:], choices[1]]


def test_weights_that_moved_are_noticed():
    """A graph would go on reading the old ones."""
    model = tiny_model()
    loops = DecodeLoops(Engine(model))
    ids, mask = prompts((4,))
    looped(loops, ids, mask, [0], params=GREEDY, max_new_tokens=3)
    (loop,) = loops.idle
    (before,) = loop._steps.values()
    looped(loops, ids, mask, [0], params=GREEDY, max_new_tokens=3)
    assert list(loop._steps.values()) == [before]
    state = {name: tensor + 0.01 for name, tensor in model.state_dict().items()}
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    options = dict(params=GREEDY, max_new_tokens=9)
    assert looped(loops, ids, mask, [0], **options) == eager(model, ids, mask, [0], **options)
    assert next(iter(loop._steps.values())) is not before


def test_a_model_of_another_dtype_gets_a_loop_of_its_own():
    model = tiny_model()
    loops = DecodeLoops(Engine(model))
    ids, mask = prompts((4,))
    looped(loops, ids, mask, [0], params=GREEDY, max_new_tokens=3)
    model.to(torch.bfloat16)
    looped(loops, ids, mask, [0], params=GREEDY, max_new_tokens=3)
    assert [loop.cache.keys.dtype for loop in loops.idle] == [torch.bfloat16]


def test_loops_say_what_they_are(model):
    loops = DecodeLoops(Engine(model), 8)
    assert loops.describe() == "no decode loop yet"
    ids, mask = prompts((4, 5))
    looped(loops, ids, mask, [0, 1], params=GREEDY, max_new_tokens=3)
    if not torch.cuda.is_available():
        expected = "decode loop, batch 2, capacity 64, read back every 8 tokens: "
        expected += "not captured, there are no CUDA graphs on cpu"
        assert loops.describe() == expected
    with pytest.raises(UsageError, match="chunk: expected a number of steps >= 1, got 0"):
        DecodeLoop(Engine(model), 1, 64, chunk=0)


def test_the_buffers_serve_inside_and_outside_of_inference_mode(model):
    loops = DecodeLoops(Engine(model))
    ids, mask = prompts((4,))
    with torch.inference_mode():
        first = looped(loops, ids, mask, [0], params=EVERYTHING, max_new_tokens=5)
    assert looped(loops, ids, mask, [0], params=EVERYTHING, max_new_tokens=5) == first


class _HostTensors(TorchDispatchMode):
    """Counts operations, and notes those with a tensor on the host among their arguments or results."""

    def __init__(self) -> None:
        super().__init__()
        self.count, self.found = 0, list[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.count += 1
        leaves = torch.utils._pytree.tree_leaves((args, kwargs, result))
        if any(isinstance(leaf, torch.Tensor) and leaf.device.type == "cpu" for leaf in leaves):
            self.found.append(str(func))
        return result


@pytest.mark.parametrize("params", [GREEDY, SAMPLED, EVERYTHING], ids=["greedy", "sampled", "everything"])
@pytest.mark.parametrize("ends", [(), (2,), tuple(range(20))], ids=["no-end", "one-end", "many-ends"])
def test_a_step_needs_nothing_from_the_host_and_no_values(params, ends):
    """On the meta device there are no values: `.item()` and shapes that depend on data raise. Whatever else
    came from the host is noted.
    """
    model = SmolLM2ForCausalLM(SmolLM2Config.preset("tiny"), backend="torch").to("meta")
    loop = DecodeLoop(Engine(model), 3, 64, chunk=4)
    ids, lengths = torch.zeros(3, 5, dtype=torch.int64, device="meta"), torch.tensor([4, 2, 5], device="meta")
    loop.start(ids, lengths, [1, 2, 3], Choice(params, ends, 2))
    loop.run(1)  # the first step makes the rotary tables
    with _HostTensors() as step:
        loop.run(4)
    assert step.count > 4 * 2 * 10, "two layers of more than ten operations each"
    assert step.found == []


def test_a_refill_sends_its_arguments_and_needs_no_values(monkeypatch):
    model = SmolLM2ForCausalLM(SmolLM2Config.preset("tiny"), backend="torch").to("meta")
    loop = DecodeLoop(Engine(model), 3, 64, chunk=4)
    loop.open(Choice(EVERYTHING, (2, 3)))
    monkeypatch.setattr(
        loop, "_to_host", lambda tokens, buffer: tokens
    )  # a copy, for which there are no values
    ids, lengths = torch.zeros(2, 5, dtype=torch.int64), torch.tensor([5, 2])
    loop.refill([2, 0], ids, lengths, [1, 1 << 70])  # the first prefill makes the rotary tables
    with _HostTensors() as refill:
        assert loop.refill([2, 0], ids, lengths, [1, 1 << 70]).shape == (1, 2)
    sent = [name for name in refill.found if name.startswith(("aten.to.", "aten._to_copy."))]
    assert len(sent) == 4, "rows, tokens, lengths and seeds"
    made_there = {"aten.lift_fresh.default", "aten.detach_.default", "aten.zeros.default"}
    assert set(refill.found) - set(sent) <= made_there
    loop.park([1])
    loop.run(4)


@pytest.mark.skipif(
    not INTERPRETED, reason="the launches are counted where Triton's interpreter would run them"
)
@pytest.mark.parametrize(
    "batch, suppressed, around", [(1, (), 3), (16, (3, 5), 3), (17, (), 4), (17, (3, 5), 5)]
)
def test_a_greedy_step_is_its_layers_and_three_launches(batch, suppressed, around, monkeypatch):
    """What it begins with, norm and head, what it ends with. Above 16 rows norm and head are two launches,
    and to suppress tokens is one.
    """
    monkeypatch.setattr("triton.runtime.interpreter.InterpretedFunction.run", lambda *_, **__: None)

    def launches(layers):
        config = SmolLM2Config.preset("tiny", num_hidden_layers=layers)
        loop = DecodeLoop(Engine(SmolLM2ForCausalLM(config, "triton").to("meta")), batch, 64, chunk=4)
        ids = torch.ones(batch, 2, dtype=torch.int64, device="meta")
        loop.start(ids, ids.sum(1), [0] * batch, Choice(SamplingParams(suppressed), (2,)))
        loop.run(1)  # the first step makes the rotary tables
        return sum(count(lambda: loop.run(1), loop.device).values()) - 1  # but for the slots, set to 0

    one, two = launches(1), launches(2)
    assert one - (two - one) == around


def test_the_proof_sees_what_comes_from_the_host_and_refuses_values():
    values = torch.zeros(3, dtype=torch.int64, device="meta")
    for act in (lambda x: x + torch.tensor(1), lambda x: x.index_fill(0, torch.tensor([1]).to("meta"), 0)):
        with _HostTensors() as step:
            act(values)
        assert step.found
    with pytest.raises(RuntimeError, match="meta"):
        torch.zeros((), device="meta").item()
