"""Speculative decoding on random weights in fp32: the tokens of `generate`, whatever the draft guesses, for
fewer steps of the model.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from generation_cases import GREEDY, alone, tiny_model

from smollm2 import SmolLM2ForCausalLM
from smollm2.engine.eager import Engine
from smollm2.generation.speculative import MAX_ROWS, Draft, DraftModel, PromptLookup, Stats, speculative_steps
from smollm2.sampling import SamplingParams

NEW, SEED = 60, 17
SAMPLED = SamplingParams(temperature=0.9, top_k=50, top_p=0.9)
PENALISED = SamplingParams(
    temperature=0.7, top_k=0, min_p=0.01, repetition_penalty=1.3, suppress_tokens=(5, 6)
)
GREEDY_PENALISED = SamplingParams(repetition_penalty=1.2)
PARAMS = pytest.mark.parametrize(
    "params", [GREEDY, SAMPLED, PENALISED, GREEDY_PENALISED], ids=["greedy", "sampled", "penalised", "both"]
)
RANDOM = torch.randint(512, (40,), generator=torch.Generator().manual_seed(3)).tolist()
PROMPTS = {"random": RANDOM, "repetitive": RANDOM[:7] * 6, "one token": RANDOM[:1]}


class Recorder(Engine):
    """The eager engine, with the number of tokens of each step."""

    def __init__(self, model: SmolLM2ForCausalLM) -> None:
        super().__init__(model)
        self.rows: list[int] = []

    def decode(self, tokens, cache):
        self.rows.append(tokens.shape[1])
        logits = super().decode(tokens, cache)
        assert int(cache.lengths[0]) == cache.longest <= cache.capacity
        return logits


class Scripted:
    """A draft that guesses by a function of the text and the limit, any guess at all."""

    tokens = 6

    def __init__(self, guess) -> None:
        self.guess = guess

    def check(self, config, capacity) -> None:
        pass

    def start(self, capacity, params, seed):
        self.text: list[int] = []
        return self

    def extend(self, tokens: Sequence[int]) -> None:
        self.text += tokens

    def propose(self, limit: int) -> list[int]:
        return self.guess(self.text, limit)


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def plain():
    """The new tokens by `generate`, computed once for each request."""
    known = {}

    def tokens(model, prompt, params=GREEDY, new=NEW, ends=()):
        key = id(model), tuple(prompt), params, new, ends
        if key not in known:
            known[key] = model, alone(model, prompt, params, SEED, ends, new)
        return known[key][1]

    return tokens


def runs(model, prompt, draft: Draft, params=GREEDY, new=NEW, ends=(), **options) -> list[list[int]]:
    """The new tokens by `speculative_steps`, step by step."""
    options |= dict(draft=draft, max_new_tokens=new, params=params, seed=SEED, eos_token_ids=ends)
    return list(speculative_steps(model, torch.tensor([prompt]), **options))


def flat(lists: list[list[int]]) -> list[int]:
    return [token for tokens in lists for token in tokens]


@PARAMS
@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS.keys())
@pytest.mark.parametrize("lookup", [PromptLookup(), PromptLookup(15, 1), PromptLookup(3, 4, 4)], ids=str)
def test_prompt_lookup_gives_the_tokens_of_generate(model, plain, prompt, lookup, params):
    assert flat(runs(model, prompt, lookup, params)) == plain(model, prompt, params)


@PARAMS
def test_a_text_that_goes_in_circles_is_guessed(plain, params):
    looping = tiny_model(initializer_range=0.05)  # greedily it falls into a short circle
    stats, engine, prompt = Stats(), Recorder(looping), PROMPTS["repetitive"]
    expected = plain(looping, prompt, params)
    assert flat(runs(looping, prompt, PromptLookup(), params, engine=engine, stats=stats)) == expected
    assert stats.tokens == NEW - 1 and stats.steps == len(engine.rows)
    if params is GREEDY:
        assert len(set(expected[-20:])) < 10, "the model was to fall into a circle"
        assert stats.tokens_per_step > 3 and max(engine.rows) == PromptLookup().tokens + 1


@PARAMS
@pytest.mark.parametrize("tokens", [1, 4, 15])
def test_the_model_as_its_own_draft_is_always_right(model, plain, params, tokens):
    stats, engine, draft = Stats(), Recorder(model), DraftModel(Engine(model), tokens)
    found = runs(model, RANDOM, draft, params, engine=engine, stats=stats)
    assert flat(found) == plain(model, RANDOM, params)
    assert stats.acceptance == 1.0 and stats.accepted == stats.proposed == stats.tokens - stats.steps
    assert stats.steps == len(engine.rows) == -(-(NEW - 1) // (tokens + 1))
    assert max(engine.rows) <= MAX_ROWS


@PARAMS
@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS.keys())
def test_another_model_as_the_draft(model, plain, prompt, params):
    other = tiny_model(seed=1, hidden_size=32, num_attention_heads=1, num_hidden_layers=1)
    stats = Stats()
    found = runs(model, prompt, DraftModel(Engine(other), 5), params, stats=stats)
    assert flat(found) == plain(model, prompt, params)
    assert stats.acceptance < 0.5 and stats.proposed > NEW


@PARAMS
def test_a_draft_that_is_sometimes_right(model, plain, params):
    """Weights a little off: every length of accepted run occurs; the draft's cache is truncated to each."""
    other = tiny_model()
    with torch.no_grad():
        for parameter in other.parameters():
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))
            parameter.mul_(1 + 0.02 * noise)
    stats = Stats()
    found = runs(model, RANDOM, DraftModel(Engine(other), 3), params, new=120, stats=stats)
    assert flat(found) == plain(model, RANDOM, params, new=120)
    assert {len(tokens) for tokens in found} == {1, 2, 3, 4}
    assert 0 < stats.accepted < stats.proposed


def test_the_draft_model_guesses_what_it_would_generate(plain):
    """After right and wrong guesses alike, its cache is that of the text."""
    other = tiny_model(seed=5)
    drafting, text = DraftModel(Engine(other), 4).start(200, GREEDY, SEED), list(RANDOM)
    drafting.extend(RANDOM)
    for right, own in ((0, 400), (4, 401), (2, 402), (3, 403), (4, 404)):
        guesses = drafting.propose(4)
        assert guesses == plain(other, text, new=4)
        text += [*guesses[:right], own]
        drafting.extend([*guesses[:right], own])


def test_guesses_of_every_kind_leave_the_text_as_it_is(model, plain):
    expected = plain(model, RANDOM, SAMPLED)

    def nothing(text, limit):
        return []

    def wrong(text, limit):
        return [(token + 1) % 512 for token in future(text, limit)]

    def future(text, limit):
        return expected[len(text) - len(RANDOM) :][:limit]

    def short(text, limit):
        return future(text, len(text) % 3)[:limit]

    def mixed(text, limit):
        right = len(text) % (limit + 1)
        return [*future(text, limit)[:right], *wrong(text, limit)[right:]]

    for guess, per_step in ((nothing, 1.0), (wrong, 1.0), (future, 59 / 9), (short, None), (mixed, None)):
        stats, engine = Stats(), Recorder(model)
        assert flat(runs(model, RANDOM, Scripted(guess), SAMPLED, engine=engine, stats=stats)) == expected
        assert stats.steps == len(engine.rows) and sum(engine.rows) == stats.steps + stats.proposed
        if per_step is None:
            assert 1 < stats.tokens_per_step < 7
        else:
            assert stats.tokens_per_step == per_step
    assert str(stats).startswith(f"{stats.accepted} of {stats.proposed} proposed tokens accepted (")


@pytest.mark.parametrize("place", range(12))
def test_an_end_token_inside_an_accepted_run_ends_the_text(model, plain, place):
    free = plain(model, RANDOM, SAMPLED)
    end = free[place]
    expected = free[: free.index(end) + 1]
    stats = Stats()
    found = runs(model, RANDOM, DraftModel(Engine(model), 7), SAMPLED, ends=(end,), stats=stats)
    assert flat(found) == expected == plain(model, RANDOM, SAMPLED, ends=(end,))
    assert stats.tokens == len(expected) - 1
    assert stats.accepted <= stats.tokens <= stats.accepted + stats.steps


@pytest.mark.parametrize("new", range(1, 14))
def test_max_new_tokens_inside_an_accepted_run(model, plain, new):
    stats, engine = Stats(), Recorder(model)
    found = runs(model, RANDOM, DraftModel(Engine(model), 5), new=new, engine=engine, stats=stats)
    assert flat(found) == plain(model, RANDOM)[:new]
    assert stats.acceptance == (1.0 if new > 2 else 0.0), "no guess is made that could not become text"
    assert all(tokens for tokens in found)


def test_the_text_may_fill_every_position(model, plain):
    prompt = (RANDOM * 13)[: model.config.max_position_embeddings - 20]
    for draft in (PromptLookup(15, 2), DraftModel(Engine(model), 15)):
        assert flat(runs(model, prompt, draft, new=20)) == plain(model, prompt, new=20)


def test_a_draft_serves_text_after_text(model, plain):
    stats, draft = Stats(), DraftModel(Engine(model), 4)
    for count, prompt in enumerate((RANDOM, RANDOM[:5], PROMPTS["repetitive"]), 1):
        found = runs(model, prompt, draft, SAMPLED, new=11, stats=stats)
        assert flat(found) == plain(model, prompt, SAMPLED, new=11)
        assert stats.tokens == 10 * count


def test_an_abandoned_text_has_counted_what_it_gave(model):
    stats = Stats()
    steps = speculative_steps(
        model, torch.tensor([RANDOM]), draft=DraftModel(Engine(model), 3), eos_token_ids=(), stats=stats
    )
    assert [len(next(steps)) for _ in range(3)] == [1, 4, 4]
    assert (stats.steps, stats.tokens, stats.proposed, stats.accepted) == (2, 8, 6, 6)


def test_on_the_triton_decode_path(plain):
    device, new = ("cuda", NEW) if torch.cuda.is_available() else ("cpu", 6)  # in the interpreter
    model = tiny_model("triton", device, vocab_size=128, num_hidden_layers=1)
    prompt = [token % 128 for token in RANDOM[:3]] * 2
    for draft in (PromptLookup(), DraftModel(Engine(model), 4)):
        assert flat(runs(model, prompt, draft, new=new)) == plain(model, prompt, new=new)
