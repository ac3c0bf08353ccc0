"""Generation on random weights: the same tokens cached and uncached, alone and in a batch; sampling against
its definition.
"""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from generation_cases import random_ids as ids
from generation_cases import tiny_model

from smollm2 import generate
from smollm2.errors import UsageError
from smollm2.generation import loop
from smollm2.generation.loop import stream_text
from smollm2.sampling import SamplingParams, sample, uniform

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def test_cached_is_uncached(model):
    tokens = ids(2, 17)
    expected = tokens
    for _ in range(24):
        with torch.no_grad():
            expected = torch.cat((expected, model(expected).logits[:, -1:].argmax(-1)), 1)
    assert torch.equal(generate(model, tokens, max_new_tokens=24, eos_token_id=[]), expected)


@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("side", ["left", "right", "scattered"])
def test_a_row_in_a_ragged_batch_is_the_row_alone(model, temperature, side):
    tokens, mask = ids(4, 21), torch.ones(4, 21, dtype=torch.int64)
    for row, padding in enumerate((0, 5, 13, 20)):
        if side == "left":
            mask[row, :padding] = 0
        elif side == "right":
            mask[row, 21 - padding :] = 0
        else:
            mask[row, torch.randperm(21, generator=torch.Generator().manual_seed(row))[:padding]] = 0
    options = dict(max_new_tokens=12, temperature=temperature, repetition_penalty=1.2, top_p=0.9)
    batch = generate(model, tokens, mask, seed=7, eos_token_id=[], **options)
    for row in range(4):
        prompt = tokens[row][mask[row].bool()][None]
        alone = generate(model, prompt, seed=7 + row, eos_token_id=[], **options)
        assert torch.equal(alone[0, prompt.shape[1] :], batch[row, 21:])


def test_seeds_may_be_a_list(model):
    tokens = ids(1, 5).expand(2, 5)
    drawn = generate(model, tokens, temperature=1.5, seed=[3, 3], max_new_tokens=12, eos_token_id=[])
    assert torch.equal(drawn[0], drawn[1])
    other = generate(model, tokens, temperature=1.5, seed=3, max_new_tokens=12, eos_token_id=[])
    assert torch.equal(other[0], drawn[0]) and not torch.equal(other[1], drawn[1])


def test_finished_rows_are_padded_and_all_finished_stops(model):
    tokens = ids(3, 9)
    free = generate(model, tokens, max_new_tokens=12, eos_token_id=[])[:, 9:]
    end = int(free[0, 4])
    out = generate(model, tokens, max_new_tokens=12, eos_token_id=end, pad_token_id=511)[:, 9:]
    longest = 0
    for row in range(3):
        hits = (free[row] == end).nonzero()
        stop = int(hits[0]) if len(hits) else 11
        longest = max(longest, stop + 1)
        assert torch.equal(out[row, : stop + 1], free[row, : stop + 1])
        assert (out[row, stop + 1 :] == 511).all()
    assert out.shape[1] == longest


def test_no_new_tokens_and_an_empty_batch(model):
    assert torch.equal(generate(model, ids(2, 3), max_new_tokens=0), ids(2, 3))
    assert generate(model, torch.empty(0, 3, dtype=torch.int64)).shape == (0, 3)


def test_generation_leaves_the_model_trainable(model):
    tokens = ids(1, 6)
    with torch.inference_mode():
        # .float() forgets the packing: it is made anew in here
        generate(model.float(), tokens, max_new_tokens=2)
    model(tokens, labels=tokens).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    model.zero_grad()


def probabilities(scores, params):
    """The definition, one token at a time."""
    order = sorted(range(len(scores)), key=lambda token: -scores[token])[: params.top_k or len(scores)]
    weights = {token: math.exp((scores[token] - scores[order[0]]) / params.temperature) for token in order}
    total = sum(weights.values())
    kept, reached = {}, 0.0
    for token in order:
        if reached / total < params.top_p:
            kept[token] = weights[token]
        reached += weights[token]
    kept = {token: weight for token, weight in kept.items() if weight >= params.min_p * weights[order[0]]}
    return {token: weight / sum(kept.values()) for token, weight in kept.items()}


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=1.0, top_k=0),
        SamplingParams(temperature=0.7, top_k=5),
        SamplingParams(temperature=1.3, top_k=0, top_p=0.6),
        SamplingParams(temperature=1.0, top_k=10, min_p=0.2),
        SamplingParams(temperature=0.8, top_k=8, top_p=0.8, min_p=0.05),
    ],
)
def test_sampled_frequencies_are_the_defined_probabilities(params):
    scores = torch.randn(12, generator=torch.Generator().manual_seed(4))
    draws = 20_000
    tokens = sample(scores.expand(draws, 12), params, [11] * draws, range(draws))
    expected = probabilities(scores.tolist(), params)
    counts = torch.bincount(tokens, minlength=12)
    for token in range(12):
        probability = expected.get(token, 0.0)
        deviation = 5 * math.sqrt(probability * (1 - probability) / draws)
        assert abs(counts[token].item() / draws - probability) <= deviation, token


def test_noise_is_uniform_and_depends_on_both_words():
    values = torch.tensor([uniform(seed, position) for seed in range(200) for position in range(200)])
    assert 0 <= values.min() and values.max() < 1
    assert abs(values.mean().item() - 0.5) < 0.01 and abs(values.var().item() - 1 / 12) < 0.005
    grid = values.view(200, 200)
    assert abs(torch.corrcoef(torch.stack((grid[:-1].flatten(), grid[1:].flatten())))[0, 1].item()) < 0.03
    assert uniform(-1, 0) == uniform((1 << 64) - 1, 0)


def test_repetition_penalty_and_suppression():
    logits = torch.tensor([[2.0, 1.9, -1.0, 0.5]])
    seen = torch.tensor([[True, False, True, False]])
    assert sample(logits, SamplingParams(repetition_penalty=1.5), [0], [0], seen).item() == 1
    assert sample(logits, SamplingParams(suppress_tokens=(0, 1)), [0], [0]).item() == 3


class Characters:
    """A tokenizer with one byte a token."""

    def token_bytes(self, token):
        return bytes([token % 256])

    def end_ids(self, vocab_size, *others):
        return others


@pytest.fixture
def streamed(model, monkeypatch):
    """The pieces of text of a model that generates these bytes."""

    def pieces(data, stop=()):
        steps = lambda *args, **kwargs: (torch.tensor([byte]) for byte in data)  # noqa: E731
        monkeypatch.setattr(loop, "generate_steps", steps)
        options = dict(max_new_tokens=99, params=SamplingParams(), stop=stop)
        return list(stream_text(model, Characters(), [1], **options))

    return pieces


def test_streamed_text_never_splits_a_character(streamed):
    text = "naïve 🙂 漢字"
    pieces = streamed(text.encode())
    assert "".join(pieces) == text and len(pieces) == len(text.encode())
    assert not any("\ufffd" in piece for piece in pieces)
    assert "".join(streamed("a🙂".encode()[:-1])) == "a\ufffd", "one that is unfinished at the end is marked"


@pytest.mark.parametrize(
    "stop, expected",
    [(["lo w"], "hel"), (["xyz"], "hello world"), (["world", "o"], "hell"), (["d!"], "hello world")],
)
def test_stop_strings_end_the_text_before_them(streamed, stop, expected):
    assert "".join(streamed(b"hello world", stop)) == expected


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(temperature=-1.0), "temperature: expected a number >= 0"),
        (dict(temperature=float("nan")), "temperature"),
        (dict(top_k=513), r"top_k: expected 0 \(off\) or 1 to 512"),
        (dict(top_p=0.0), "top_p"),
        (dict(min_p=1.5), "min_p"),
        (dict(repetition_penalty=0.0), "repetition_penalty"),
        (dict(max_new_tokens=-1), "max_new_tokens"),
        (dict(max_new_tokens=510), "at most 512 together, got 4 \\+ 510"),
        (dict(seed=[1, 2, 3]), "seed: expected one number or 2"),
        (dict(suppress_tokens=[512]), "suppress_tokens"),
        (dict(attention_mask=torch.ones(2, 3)), "attention_mask"),
        (dict(attention_mask=torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0]])), "at least one token in every row"),
    ],
)
def test_wrong_arguments_are_named(model, options, message):
    with pytest.raises(UsageError, match=message):
        generate(model, ids(2, 4), **options)


def test_wrong_ids_are_named(model):
    with pytest.raises(UsageError, match=r"ids in \[0, 512\), got 600"):
        generate(model, torch.tensor([[600]]))
    with pytest.raises(UsageError, match="empty"):
        generate(model, torch.empty(1, 0, dtype=torch.int64))


@pytest.mark.parametrize("first", ["smollm2.generate", "smollm2", "smollm2.generation.loop"])
def test_generate_of_the_package_is_the_function(first):
    """Importing the command of that name leaves it so, whichever module comes first."""
    code = f"import {first}; import smollm2, smollm2.generate; from smollm2 import generate, model; "
    code += "assert generate is smollm2.generate is smollm2.generation.loop.generate; "
    code += "model.SmolLM2ForCausalLM.from_pretrained('no-such-folder/x/y')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=600)
    error = done.stderr.strip()
    assert error.endswith("LoadError: 'no-such-folder/x/y': no such file or folder"), error
