"""A decode loop gives the tokens of the eager loop: every way to choose, every chunk, ends anywhere, one loop
for many prompts.
"""

from __future__ import annotations

import pytest
import torch
from generation_cases import (
    EVERYTHING,
    GREEDY,
    SAMPLED,
    eager,
    looped,
    pretend_to_capture,
    prompts,
    tiny_model,
)

from smollm2.engine.eager import Engine
from smollm2.engine.loops import DecodeLoops, captured_steps
from smollm2.engine.quantized import QuantizedEngine
from smollm2.errors import UsageError
from smollm2.generation.loop import generate_steps
from smollm2.sampling import SamplingParams

LENGTHS = (9, 1, 30, 17)
SEEDS = [7, -3, 7, 1 << 70]


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.mark.parametrize("chunk", [1, 4, 16])
@pytest.mark.parametrize(
    "params",
    [
        GREEDY,
        SAMPLED,
        EVERYTHING,
        SamplingParams(repetition_penalty=1.5),
        SamplingParams(suppress_tokens=tuple(range(0, 512, 2))),
    ],
    ids=["greedy", "sampled", "everything", "penalty", "suppressed"],
)
def test_tokens_are_those_of_the_eager_loop(model, params, chunk):
    ids, mask = prompts(LENGTHS)
    expected = eager(model, ids, mask, SEEDS, params=params, max_new_tokens=23)  # no multiple of a chunk
    found = looped(DecodeLoops(Engine(model), chunk), ids, mask, SEEDS, params=params, max_new_tokens=23)
    assert len(expected) == 23 and len({token for step in expected for token in step}) > 10
    assert found == expected


def with_ends(model, ids, mask, options, new):
    """(options with several end tokens, so that rows end apart and inside of chunks, the eager tokens)."""
    free = eager(model, ids, mask, SEEDS, max_new_tokens=new, **options)
    ends = [free[2][0], free[6][1], free[13][2], free[21][3]]
    options = dict(options, max_new_tokens=new, eos_token_ids=ends, pad_token_id=511)  # no token of the text
    expected = eager(model, ids, mask, SEEDS, **options)
    assert 2 < len(expected) < new and sum(511 in step for step in expected) > 1
    return options, free, expected


@pytest.mark.parametrize("chunk", [1, 4, 16])
@pytest.mark.parametrize("params", [GREEDY, EVERYTHING], ids=["greedy", "everything"])
def test_rows_end_where_the_eager_loop_ends_them(model, params, chunk):
    ids, mask = prompts(LENGTHS)
    options, _, expected = with_ends(model, ids, mask, dict(params=params), 40)
    assert looped(DecodeLoops(Engine(model), chunk), ids, mask, SEEDS, **options) == expected


@pytest.mark.parametrize("chunk", [1, 4, 16])
@pytest.mark.parametrize("params", [GREEDY, EVERYTHING], ids=["greedy", "everything"])
def test_reading_a_chunk_behind_gives_the_same_tokens(model, monkeypatch, params, chunk):
    captures = pretend_to_capture(monkeypatch)
    loops = DecodeLoops(Engine(model), chunk)
    for seed in (1, 2):
        ids, mask = prompts(LENGTHS, seed)
        options, free, expected = with_ends(model, ids, mask, dict(params=params), 23 if seed == 1 else 25)
        assert looped(loops, ids, mask, SEEDS, params=params, max_new_tokens=len(free)) == free
        assert looped(loops, ids, mask, SEEDS, **options) == expected
    assert len(loops.idle) == 1 and set(captures) == set(loops.idle)


def test_the_pad_may_be_the_end_token_and_the_first_token_may_end_a_row(model):
    ids, mask = prompts((5, 8))
    first = eager(model, ids, mask, [0, 1], params=GREEDY, max_new_tokens=1)[0]
    options = dict(params=GREEDY, max_new_tokens=20, eos_token_ids=[first[0]], pad_token_id=first[0])
    expected = eager(model, ids, mask, [0, 1], **options)
    assert [step[0] for step in expected] == [first[0]] * len(expected)
    assert looped(DecodeLoops(Engine(model), 4), ids, mask, [0, 1], **options) == expected
    options["eos_token_ids"] = first
    assert looped(DecodeLoops(Engine(model), 4), ids, mask, [0, 1], **options) == [first]


@pytest.mark.parametrize("pad", [-1, 512], ids=["a mark of some files", "beyond the vocabulary"])
def test_the_pad_need_not_be_a_token(model, pad):
    ids, mask = prompts(LENGTHS)
    options, *_ = with_ends(model, ids, mask, dict(params=GREEDY), 40)
    options["pad_token_id"] = pad
    expected = eager(model, ids, mask, SEEDS, **options)
    assert pad in expected[-1]
    assert looped(DecodeLoops(Engine(model), 4), ids, mask, SEEDS, **options) == expected


@pytest.mark.parametrize("kind", [torch.float64, torch.bfloat16])
def test_the_default_dtype_changes_no_draw(model, kind):
    ids, mask = prompts(LENGTHS)
    options = dict(params=SAMPLED, max_new_tokens=9)
    expected = eager(model, ids, mask, SEEDS, **options)
    torch.set_default_dtype(kind)
    try:
        found = looped(DecodeLoops(Engine(model), 4), ids, mask, SEEDS, **options)
        assert found == eager(model, ids, mask, SEEDS, **options) == expected
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("new_tokens", [0, 1, 2, 4, 5, 16, 17])
def test_any_number_of_new_tokens(model, new_tokens):
    ids, mask = prompts((5, 8))
    options = dict(params=SAMPLED, max_new_tokens=new_tokens)
    found = looped(DecodeLoops(Engine(model), 4), ids, mask, [0, 1], **options)
    assert found == eager(model, ids, mask, [0, 1], **options)


def test_an_empty_batch_yields_nothing_and_seeds_may_be_a_tensor(model):
    none = torch.empty(0, 3, dtype=torch.int64)
    loops, options = DecodeLoops(Engine(model)), dict(params=SAMPLED, max_new_tokens=12)
    assert list(captured_steps(loops, none, none[:, 0], seeds=[], **options)) == []
    ids, mask = prompts((5, 8))
    found = looped(loops, ids, mask, torch.tensor([4, -5]), **options)
    assert found == eager(model, ids, mask, [4, -5], **options)


@pytest.mark.parametrize("params", [GREEDY, EVERYTHING], ids=["greedy", "everything"])
def test_nothing_leaks_from_the_prompt_before(model, params):
    """One loop: a long text whose rows all ended, NaN and other tokens left everywhere, then a short one."""
    loops = DecodeLoops(Engine(model), 4)
    long_ids, long_mask = prompts((40, 33), seed=5)
    ends = list(range(0, 512, 3))
    looped(loops, long_ids, long_mask, [1, 2], params=EVERYTHING, max_new_tokens=20, eos_token_ids=ends)
    (loop,) = loops.idle
    assert loop.finished.all() and loop.seen.any()
    loop.cache.keys.fill_(float("nan"))
    loop.cache.values.fill_(float("nan"))
    ids, mask = prompts((3, 6), seed=6)
    found = looped(loops, ids, mask, [3, 4], params=params, max_new_tokens=50)
    assert loops.idle == [loop], "the test is about one loop"
    assert found == eager(model, ids, mask, [3, 4], params=params, max_new_tokens=50)


def test_a_generation_that_is_given_up_leaves_nothing_behind(model):
    loops = DecodeLoops(Engine(model), 4)
    ids, mask = prompts((5, 8))
    steps = captured_steps(loops, ids, mask.sum(1), params=SAMPLED, seeds=[0, 1], max_new_tokens=40)
    for _ in range(7):
        next(steps)
    steps.close()
    assert len(loops.idle) == 1
    options = dict(params=GREEDY, max_new_tokens=40)
    assert looped(loops, ids, mask, [0, 1], **options) == eager(model, ids, mask, [0, 1], **options)
    assert len(loops.idle) == 1


def test_two_generations_may_take_turns(model):
    loops, options = DecodeLoops(Engine(model), 4), dict(params=SAMPLED, max_new_tokens=20)
    cases = [prompts((5, 8), seed=seed) for seed in (1, 2)]
    steps = (captured_steps(loops, ids, mask.sum(1), seeds=[0, 1], **options) for ids, mask in cases)
    found = [[tokens.tolist() for tokens in pair] for pair in zip(*steps, strict=True)]
    expected = [eager(model, ids, mask, [0, 1], **options) for ids, mask in cases]
    assert found == [list(pair) for pair in zip(*expected, strict=True)]
    assert len(loops.idle) == 2


def test_the_triton_backend_gives_the_same_tokens():
    """In the interpreter where there is no GPU, hence few tokens of one layer."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, plain = (tiny_model(name, device, num_hidden_layers=1) for name in ("triton", "torch"))
    (ids, mask), loops = prompts((5, 2)), DecodeLoops(Engine(model), 2)
    odd = SamplingParams(suppress_tokens=tuple(range(0, 512, 2)))
    for params, new in ((GREEDY, 4), (SAMPLED, 3), (odd, 2)):
        options = dict(params=params, max_new_tokens=new)
        found = looped(loops, ids, mask, [0, 1], **options)
        assert found == eager(model, ids, mask, [0, 1], **options)
        assert found == eager(plain, ids, mask, [0, 1], **options)


def test_more_rows_than_the_fused_kernels_take():
    """Whole logits in the model's dtype; some rows end, some tokens are suppressed."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sizes = dict(hidden_size=32, intermediate_size=32, num_attention_heads=1, num_key_value_heads=1)
    model = tiny_model("triton", device, num_hidden_layers=1, vocab_size=128, **sizes)
    (ids, mask), params = prompts([2] * 17), SamplingParams(suppress_tokens=(1, 2))
    options = dict(params=params, max_new_tokens=3, eos_token_ids=range(64), pad_token_id=1)
    found = looped(DecodeLoops(Engine(model), 2), ids % 128, mask, [0] * 17, **options)
    assert found == eager(model, ids % 128, mask, [0] * 17, **options)
    assert 0 < found[1].count(1) < 17


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_quantised_engine_in_a_loop_gives_its_own_tokens(kind):
    model = tiny_model()
    engine, (ids, mask) = QuantizedEngine(model, kind), prompts((5, 9))
    for params in (GREEDY, SamplingParams(suppress_tokens=tuple(range(0, 512, 2)))):
        options = dict(params=params, max_new_tokens=12)
        steps = generate_steps(model, ids, mask, seed=[0, 1], engine=engine, **options)
        expected = [tokens.tolist() for tokens in steps]
        assert looped(DecodeLoops(engine), ids, mask, [0, 1], **options) == expected


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_logits_that_are_not_finite_end_the_text_with_an_error(params, backend):
    """From the second token on, which the loop chooses."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = tiny_model(backend, device, num_hidden_layers=1)
    ids, mask = prompts((5, 2))
    steps = captured_steps(
        DecodeLoops(Engine(model), 1), ids, mask.sum(1), params=params, seeds=[0, 1], max_new_tokens=9
    )
    next(steps)
    with torch.no_grad():
        model.model.norm.weight[3] = float("nan")
    with pytest.raises(UsageError, match="logits: expected finite numbers, got NaN or infinity"):
        list(steps)
