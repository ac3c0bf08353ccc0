"""Prompt look-up against its definition, and what speculative decoding refuses."""

from __future__ import annotations

import random

import pytest
import torch
from generation_cases import tiny_model

from smollm2.engine.compiled import CompiledEngine
from smollm2.engine.eager import Engine
from smollm2.errors import UsageError
from smollm2.generation.speculative import (
    MAX_ROWS,
    SURE_NGRAM,
    DraftModel,
    PromptLookup,
    Stats,
    speculative_steps,
)
from smollm2.sampling import SamplingParams


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def guess(lookup: PromptLookup, text: list[int], limit: int) -> list[int]:
    proposer = lookup.start(len(text), SamplingParams(), 0)
    proposer.extend(text)
    return proposer.propose(limit)


def by_scanning(text: list[int], limit: int, ngram: int, shortest: int) -> list[int]:
    """The definition: the longest suffix that occurred before, and what followed its newest occurrence."""
    for size in range(min(ngram, len(text) - 1), shortest - 1, -1):
        for start in range(len(text) - size - 1, -1, -1):
            if text[start : start + size] == text[-size:]:
                grown = list(text)
                for index in range(start + size, start + size + limit):
                    grown.append(grown[index])
                return grown[len(text) :]
    return []


@pytest.mark.parametrize(
    "text, limit, expected",
    [
        ([1, 2, 3, 4, 5, 1, 2, 3], 2, [4, 5]),
        ([1, 2, 9, 3, 2, 7, 1, 2], 3, [9, 3, 2]),  # the longer match before the newer one
        ([2, 8, 2, 9, 2], 1, [9]),  # the newest of two
        ([1, 2, 1, 2], 5, [1, 2, 1, 2, 1]),  # a circle goes on
        ([7, 7], 3, [7, 7, 7]),
        ([1, 2, 3], 4, []),  # nothing occurred before
        ([1], 4, []),
    ],
)
def test_examples(text, limit, expected):
    assert guess(PromptLookup(), text, limit) == expected
    assert guess(PromptLookup(ngram=3, shortest=3), [1, 2, 3, 9, 2, 3], 4) == [], "two tokens are too few"


@pytest.mark.parametrize("ngram, shortest", [(1, 1), (3, 1), (3, 3), (5, 2), (12, 1)])
@pytest.mark.parametrize("kinds", [1, 2, 4, 30])
def test_the_index_finds_what_a_scan_finds(ngram, shortest, kinds):
    draws = random.Random(kinds)
    lookup = PromptLookup(8, ngram, shortest)
    proposer = lookup.start(100, SamplingParams(), 0)
    text: list[int] = []
    found = 0
    while len(text) < 100:
        new = [draws.randrange(kinds) for _ in range(draws.randint(1, 5))]
        proposer.extend(new)
        text += new
        limit = draws.randint(1, 8)
        guesses = proposer.propose(limit)
        assert guesses == by_scanning(text, limit, ngram, shortest)
        found += bool(guesses)
    assert found or (kinds == 30 and shortest > 1)


def test_texts_of_one_lookup_know_nothing_of_each_other():
    lookup = PromptLookup()
    first, second = lookup.start(10, SamplingParams(), 0), lookup.start(10, SamplingParams(), 0)
    first.extend([1, 2, 3, 1])
    second.extend([1])
    assert first.propose(2) == [2, 3] and second.propose(2) == []


def test_only_long_matches_are_worth_leaving_a_compiled_step(model):
    compiled = object.__new__(CompiledEngine)  # without a package: only what it is counts
    assert PromptLookup.suited_to(Engine(model)) == PromptLookup(MAX_ROWS - 1)
    assert PromptLookup.suited_to(compiled, 7) == PromptLookup(7, SURE_NGRAM, SURE_NGRAM)


def test_no_new_tokens_and_stats_of_nothing(model):
    assert list(speculative_steps(model, torch.tensor([[1]]), draft=PromptLookup(), max_new_tokens=0)) == []
    assert (Stats().acceptance, Stats().tokens_per_step) == (0.0, 0.0)
    assert str(Stats()) == "0 of 0 proposed tokens accepted (0%), 0.00 tokens per step"


def ones(*shape: int) -> torch.Tensor:
    return torch.ones(shape, dtype=torch.int64)


@pytest.mark.parametrize(
    "ids, options, message",
    [
        (ones(2, 3), {}, r"expected integer ids of one prompt, shape \[1, T\], got torch.int64 \[2, 3\]"),
        (ones(3), {}, r"shape \[1, T\], got torch.int64 \[3\]"),
        (ones(1, 3).float(), {}, "got torch.float32"),
        (ones(1, 0), {}, "prompt: expected at least one token"),
        (512 * ones(1, 1), {}, r"prompt: expected ids in \[0, 512\), got 512"),
        (ones(1, 500), dict(max_new_tokens=13), r"prompt: expected at most 512 tokens.*got 500 \+ 13"),
        (ones(1, 3), dict(max_new_tokens=-1), "max_new_tokens: expected a number >= 0, got -1"),
        (ones(1, 3), dict(params=SamplingParams(temperature=-1.0)), "temperature"),
    ],
)
def test_bad_requests_are_refused_before_the_first_step(model, ids, options, message):
    with pytest.raises(UsageError, match=message):
        speculative_steps(model, ids, draft=PromptLookup(), **options)


def test_a_draft_that_cannot_serve_the_model(model):
    ids = torch.ones(1, 60, dtype=torch.int64)
    other, short = tiny_model(vocab_size=500), tiny_model(max_position_embeddings=64)
    with pytest.raises(UsageError, match="expected the vocabulary of the model, 512 tokens, got 500"):
        speculative_steps(model, ids, draft=DraftModel(Engine(other)))
    with pytest.raises(UsageError, match="draft model: expected at most 64 tokens.*got 65"):
        speculative_steps(model, ids, draft=DraftModel(Engine(short)), max_new_tokens=5)


@pytest.mark.parametrize("tokens", [0, -1, MAX_ROWS])
def test_a_draft_of_no_or_too_many_tokens(model, tokens):
    for make in (PromptLookup, lambda tokens: DraftModel(Engine(model), tokens)):
        with pytest.raises(UsageError, match=f"expected 1 to 15 tokens at a time .* got {tokens}"):
            make(tokens)
    for ngram, shortest in ((0, 1), (2, 3), (3, 0)):
        with pytest.raises(UsageError, match=f"got shortest {shortest} and ngram {ngram}"):
            PromptLookup(8, ngram, shortest)
