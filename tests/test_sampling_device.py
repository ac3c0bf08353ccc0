"""Sampling on the device: the noise of the host, one token for lists and tensors, alone and in a batch."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from smollm2.errors import UsageError
from smollm2.sampling import Sampler, SamplingParams, as_words, sample, uniform, uniforms

EXTREMES = [0, 1, -1, 2, (1 << 31) - 1, -(1 << 31), 1 << 40, (1 << 63) - 1, -(1 << 63), 123456789]
PINNED = [0.6524484753608704, 0.2762335538864136, 0.3681895136833191, 0.005278229713439941]
FILTERS = [
    SamplingParams(temperature=1.0, top_k=0),
    SamplingParams(temperature=0.7, top_k=5),
    SamplingParams(temperature=1.3, top_k=0, top_p=0.6),
    SamplingParams(temperature=1.0, top_k=10, min_p=0.2),
    SamplingParams((1, 5), repetition_penalty=1.4, temperature=0.8, top_k=30, top_p=0.8, min_p=0.05),
    SamplingParams((1, 5), repetition_penalty=1.4),
]


def logits(rows: int, vocabulary: int = 300) -> torch.Tensor:
    return 3 * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(3))


def test_noise_is_pinned():
    """A change of these would change what a seed generates."""
    assert [uniform(0, 0), uniform(0, 1), uniform(1, 0), uniform(-1, 5)] == PINNED
    assert uniforms(torch.tensor([0, 0, 1, -1]), torch.tensor([0, 1, 0, 5])).tolist() == PINNED


def test_noise_of_tensors_is_that_of_integers_bit_for_bit(generator):
    drawn = torch.randint(-(1 << 63), (1 << 63) - 1, (500,), generator=generator)
    seeds = torch.cat((torch.tensor(EXTREMES), drawn))
    drawn = torch.randint(0, 8192, (30,), generator=generator)
    positions = torch.cat((torch.arange(10), drawn, torch.tensor([(1 << 63) - 1, -1])))
    table = uniforms(seeds[:, None], positions)
    assert table.dtype == torch.float32 and table.shape == (len(seeds), len(positions))
    pairs = itertools.product(seeds.tolist(), positions.tolist())
    assert table.flatten().tolist() == [uniform(seed, position) for seed, position in pairs]


def test_seeds_of_any_size_are_their_lowest_64_bits():
    seeds = [1 << 64, (1 << 64) - 1, 1 << 63, -(1 << 63), 5 - (1 << 90), 7]
    words = as_words(seeds, torch.device("cpu"))
    assert words.tolist() == [0, -1, -(1 << 63), -(1 << 63), 5, 7]
    assert uniforms(words, torch.full((6,), 3)).tolist() == [uniform(seed, 3) for seed in seeds]


@pytest.mark.parametrize("params", FILTERS)
def test_lists_and_tensors_give_the_same_tokens(params):
    rows = logits(400)
    seen = torch.rand(rows.shape, generator=torch.Generator().manual_seed(4)) < 0.2
    seeds, positions = [row % 7 - 3 for row in range(400)], list(range(400))
    expected = sample(rows, params, seeds, positions, seen)
    assert expected.dtype == torch.int64 and expected.shape == (400,) and len(expected.unique()) > 10
    assert torch.equal(sample(rows, params, torch.tensor(seeds), torch.tensor(positions), seen), expected)
    assert torch.equal(sample(rows, params, seeds, torch.tensor(positions), seen), expected)
    prepared = Sampler(params, rows.device)
    assert torch.equal(prepared(rows, uniforms(torch.tensor(seeds), torch.tensor(positions)), seen), expected)


@pytest.mark.parametrize("params", FILTERS)
def test_a_row_alone_is_the_row_in_a_batch(params):
    rows = logits(60)
    seen = torch.rand(rows.shape, generator=torch.Generator().manual_seed(4)) < 0.2
    batch = sample(rows, params, list(range(60)), [9] * 60, seen)
    alone = [sample(rows[row : row + 1], params, [row], [9], seen[row : row + 1]).item() for row in range(60)]
    assert batch.tolist() == alone


@pytest.mark.parametrize("noise", [0.0, 1 - 2**-24])
def test_the_ends_of_the_noise_give_the_first_and_the_last_token_that_is_kept(noise):
    rows = torch.tensor([[0.0, 2.0, 1.0, -1.0]])
    drawn = Sampler(SamplingParams(temperature=1.0, top_k=3), rows.device)(rows, torch.tensor([noise]))
    assert drawn.tolist() == [1 if noise == 0.0 else 0]


def test_the_border_between_two_tokens_belongs_to_the_second():
    rows = torch.tensor([[1.0, 1.0, -9.0]]).expand(2, 3)
    first, second = rows[0].topk(2).indices.tolist()
    sampler = Sampler(SamplingParams(temperature=1.0, top_k=2), rows.device)
    assert sampler(rows, torch.tensor([0.5 - 2**-24, 0.5])).tolist() == [first, second]


def test_tokens_without_a_chance_are_never_drawn():
    """Below 2^-32 of the most likely one, suppressed, or of logit -inf: also at the top of the noise."""
    rows = torch.full((1, 50), -30.0)
    rows[:, 7], rows[:, 9], rows[:, 11] = 0.0, -math.inf, 5.0
    sampler = Sampler(SamplingParams((11,), temperature=1.0, top_k=0), rows.device)
    noise = torch.linspace(0, 1 - 2**-24, 1001)
    assert sampler(rows.expand(1001, 50), noise).unique().tolist() == [7]


def test_a_tiny_temperature_is_greedy_and_half_precision_is_widened():
    rows, params = logits(40), SamplingParams(temperature=1e-30, top_k=0)
    assert torch.equal(sample(rows, params, [0] * 40, range(40)), rows.argmax(-1))
    half, params = rows.bfloat16(), SamplingParams(temperature=0.9)
    drawn, expected = (sample(each, params, range(40), [1] * 40) for each in (half, half.float()))
    assert torch.equal(drawn, expected)


def test_the_suppressed_tokens_serve_where_gradients_are_recorded():
    params = SamplingParams((250, 251, 252))
    with torch.inference_mode():
        sample(logits(2), params, [0, 0], [0, 0])
    rows = logits(2).requires_grad_()
    assert not torch.isin(sample(rows, params, [0, 0], [0, 0]), torch.tensor(params.suppress_tokens)).any()


def test_suppressing_everything_is_refused():
    with pytest.raises(UsageError, match="suppress_tokens: expected at least one of the 4 ids to be left"):
        SamplingParams(tuple(range(4)), top_k=0).validate(4)
    SamplingParams((0, 1, 2, 2), top_k=0).validate(4)


def test_lists_of_different_lengths_are_refused():
    with pytest.raises(ValueError):
        sample(logits(2), SamplingParams(temperature=1.0), [0, 1], [0])
