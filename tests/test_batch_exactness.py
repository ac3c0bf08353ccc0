"""Continuous batching on random weights in fp32: every row is the prompt alone, whatever slots there are; and
ended rows cost nothing.
"""

from __future__ import annotations

import pytest
import torch
from generation_cases import GREEDY, alone, captured_engine, pretend_to_capture, tiny_model

from smollm2 import SmolLM2ForCausalLM
from smollm2.engine.eager import Engine
from smollm2.engine.select import select_engine
from smollm2.generation.batch import generate_many
from smollm2.generation.slots import PREFILL_TOKENS
from smollm2.sampling import SamplingParams

LENGTHS = (1, 200, 17, 3, 64, 65, 1, 120, 33, 8, 199)  # of the prompts, out of order
NEW, SEED, ENDS = 24, 100, tuple(range(30))  # of 512 random tokens, every 17th ends its row
SAMPLED = SamplingParams(temperature=0.9, top_k=50, top_p=0.9, repetition_penalty=1.3)
FULL = SamplingParams(temperature=1.2, top_k=0, min_p=0.01, suppress_tokens=(5, 6))


def prompts_of(lengths: tuple[int, ...] = LENGTHS) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(30, 512, (length,), generator=generator).tolist() for length in lengths]


def many(model: SmolLM2ForCausalLM, prompts: list[list[int]], **options) -> list[list[int]]:
    """What generate_many yields, in the order of the prompts."""
    found = dict(generate_many(model, prompts, **{"max_new_tokens": NEW, "seed": SEED, **options}))
    return [found[index] for index in range(len(prompts))]


class Recorder(Engine):
    """The eager engine, with what was asked of it."""

    def __init__(self, model: SmolLM2ForCausalLM) -> None:
        super().__init__(model)
        self.allocated: list[tuple[int, int]] = []
        self.prefilled: list[list[int]] = []
        self.decoded: list[tuple[int, int]] = []  # rows, keys read

    def allocate(self, batch, capacity):
        self.allocated.append((batch, capacity))
        return super().allocate(batch, capacity)

    def prefill(self, input_ids, lengths, cache):
        self.prefilled.append(lengths.tolist())
        return super().prefill(input_ids, lengths, cache)

    def decode(self, tokens, cache):
        logits = super().decode(tokens, cache)
        assert cache.lengths.shape == (tokens.shape[0],) and int(cache.lengths.max()) == cache.longest
        self.decoded.append((tokens.shape[0], cache.longest))
        return logits


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(params=["eager", "captured"])
def engine(request, model, monkeypatch):
    if request.param == "eager":
        return Engine(model)
    pretend_to_capture(monkeypatch)
    return captured_engine(model)


@pytest.fixture(scope="module")
def expected(model):
    prompts = list(enumerate(prompts_of(), SEED))
    return {
        params: [alone(model, prompt, params, seed, ENDS, NEW) for seed, prompt in prompts]
        for params in (GREEDY, SAMPLED, FULL)
    }


@pytest.mark.parametrize("slots", [1, 2, 3, 8, 50])
@pytest.mark.parametrize("params", [GREEDY, SAMPLED, FULL], ids=["greedy", "sampled", "full"])
def test_a_row_is_the_prompt_alone_with_any_number_of_slots(model, expected, params, slots):
    engine = Recorder(model)
    options = dict(params=params, eos_token_ids=ENDS, slots=slots, engine=engine)
    assert many(model, prompts_of(), **options) == expected[params]
    lengths = {len(tokens) for tokens in expected[params]}
    assert len(lengths) > 3 and NEW in lengths, "the prompts were to end at different times"
    # Every token but a row's first comes from one decode of that row, and nothing else is decoded.
    assert sum(rows for rows, _ in engine.decoded) == sum(len(tokens) - 1 for tokens in expected[params])
    assert sorted(length for group in engine.prefilled for length in group) == sorted(LENGTHS)
    at_work = min(slots, len(LENGTHS))
    assert engine.allocated[0] == (at_work, max(LENGTHS) + NEW)
    assert max(rows for rows, _ in engine.decoded) <= at_work


def test_the_order_of_the_prompts_decides_seeds_and_nothing_else(model, engine):
    prompts, seeds = prompts_of(), [7 * index for index in range(len(LENGTHS))]
    options = dict(params=SAMPLED, eos_token_ids=ENDS, slots=3, engine=engine)
    turned = many(model, prompts[::-1], **options, seed=seeds[::-1])
    assert turned[::-1] == many(model, prompts, **options, seed=seeds)


def test_every_row_may_have_a_budget_of_its_own(model, engine):
    budgets = [1, 5, 24, 2, 1, 9, 24, 3, 1, 1, 12]
    found = many(model, prompts_of(), max_new_tokens=budgets, params=SAMPLED, slots=3, engine=engine)
    assert [len(tokens) for tokens in found] == budgets
    rows = enumerate(zip(prompts_of(), budgets, strict=True), SEED)
    assert found == [alone(model, prompt, SAMPLED, seed, (), budget) for seed, (prompt, budget) in rows]


def test_a_callback_ends_a_row_and_sees_every_token_once(model, engine, expected):
    seen: dict[int, list[int]] = {}

    def stop(index: int, tokens: list[int]) -> bool:
        seen.setdefault(index, []).append(tokens[-1])
        assert seen[index] == tokens
        return index % 2 == 0 and len(tokens) == 4

    options = dict(params=GREEDY, eos_token_ids=ENDS, slots=3, engine=engine)
    found = many(model, prompts_of(), **options, stop=stop)
    assert found == [tokens[: None if index % 2 else 4] for index, tokens in enumerate(expected[GREEDY])]
    assert seen == dict(enumerate(found))


def test_rows_are_yielded_as_they_end(model):
    """The short row comes while the long one, which went in with it, still runs."""
    engine = Recorder(model)
    results = generate_many(model, prompts_of((9, 5)), max_new_tokens=[20, 3], slots=2, engine=engine)
    assert next(results)[0] == 1
    assert [rows for rows, _ in engine.decoded] == [2, 2]
    assert next(results)[0] == 0
    assert [rows for rows, _ in engine.decoded] == [2] * 2 + [1] * 17
    assert next(results, None) is None


def test_keys_are_read_only_as_far_as_the_longest_row_at_work(model):
    engine = Recorder(model)
    list(generate_many(model, prompts_of((150, 4)), max_new_tokens=[2, 10], slots=2, engine=engine))
    assert engine.decoded == [(2, 151), *((1, 4 + step) for step in range(2, 10))]


def test_prompts_of_like_length_are_prefilled_together_up_to_a_limit(model):
    lengths = (400, 10, 400) + (300,) * 20
    engine = Recorder(model)
    list(generate_many(model, prompts_of(lengths), max_new_tokens=1, slots=16, engine=engine))
    assert engine.prefilled[0][:2] == [400, 400] and engine.prefilled[-1][-1] == 10
    assert all(len(group) * max(group) <= PREFILL_TOKENS for group in engine.prefilled)
    assert [len(group) for group in engine.prefilled] == [10, 13]


def test_an_empty_list_and_a_prompt_that_fills_the_context(model, engine):
    assert list(generate_many(model, [], max_new_tokens=4, engine=engine)) == []
    prompts = prompts_of((510, 3, 502))
    found = many(model, prompts, max_new_tokens=[2, 9, 10], slots=3, engine=engine)
    assert found == [alone(model, ids, new=new) for ids, new in zip(prompts, (2, 9, 10), strict=True)]


def test_an_abandoned_iterator_leaves_gradients_on(model, engine):
    results = generate_many(model, prompts_of((5, 6)), max_new_tokens=3, slots=1, engine=engine)
    next(results)
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    results.close()


def test_rows_alone_and_in_slots_agree_with_quantised_weights(model):
    engine = select_engine(model, quantize="int8", compiled=False)
    options = dict(params=SAMPLED, eos_token_ids=ENDS, engine=engine)
    found = [many(model, prompts_of(), slots=slots, **options) for slots in (1, 3, 8)]
    assert found[0] == found[1] == found[2]


def test_rows_alone_and_in_slots_agree_on_the_triton_decode_path():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = tiny_model("triton", device, num_hidden_layers=1)  # the interpreter is slow
    options = dict(max_new_tokens=[2, 3, 2], params=SAMPLED)
    first, second = (many(model, prompts_of((7, 2, 19)), slots=slots, **options) for slots in (1, 3))
    assert first == second and [len(tokens) for tokens in first] == [2, 3, 2]
