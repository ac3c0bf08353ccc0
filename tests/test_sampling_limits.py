"""The ends of what a sampler accepts: parameters behave as their limits, and logits that are not finite are
an error in every loop.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from generation_cases import GREEDY, looped, tiny_model
from torch import Tensor

from smollm2 import SmolLM2ForCausalLM, generate
from smollm2.engine.eager import Engine
from smollm2.engine.loops import DecodeLoops
from smollm2.errors import UsageError
from smollm2.generation.batch import generate_many
from smollm2.generation.speculative import PromptLookup, speculative_steps
from smollm2.sampling import NOT_FINITE, Sampler, SamplingParams, read_tokens, sample

INF, NAN = float("inf"), float("nan")
LOGITS = torch.tensor([[0.0, 3.0, 1.0, -2.0], [2.0, -1.0, 0.0, 1.5]])
MESSAGE = "logits: expected finite numbers, got NaN or infinity"


def drawn(logits: Tensor, seen: Tensor | None = None, **params: Any) -> list[int]:
    """The tokens of every row under fifty seeds, each once."""
    chosen = SamplingParams(**{"temperature": 1.0, "top_k": 0, **params})
    chosen.validate(logits.shape[1])
    tokens = [sample(logits, chosen, [seed] * len(logits), [5] * len(logits), seen) for seed in range(50)]
    return torch.stack(tokens).unique(dim=0).flatten().tolist()


@pytest.mark.parametrize(
    "params",
    [
        *(dict(temperature=value) for value in (1e-10, 1e-40, 1e-45, 1e-46, 5e-324)),
        *(dict(top_p=value) for value in (1e-9, 1e-45, 1e-46, 5e-324)),
        dict(temperature=1e-46, top_p=1e-46, min_p=1.0), dict(min_p=1.0), dict(top_k=1),
        dict(temperature=0.0),
    ],
)  # fmt: skip
def test_the_limit_is_the_most_likely_token(params):
    assert drawn(LOGITS, **params) == [1, 0]
    assert drawn(3e37 * LOGITS, **params) == [1, 0]


def test_a_temperature_without_end_is_a_fair_draw():
    assert set(drawn(LOGITS[:1], temperature=3e38)) == {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("penalty", "expected"), [(1e300, 0), (3e38, 0), (1.0, 1), (1e-30, 1), (1e-46, 1), (5e-324, 1)]
)
@pytest.mark.parametrize("temperature", [0.0, 1e-3])
def test_a_penalty_of_any_size(penalty, expected, temperature):
    """Tokens 1 and 3 are seen; a penalty without end leaves them out, and one near zero insists on them."""
    logits, seen = torch.tensor([[1.0, 3.0, 0.0, 0.0]]), torch.tensor([[False, True, False, True]])
    assert drawn(logits, seen, repetition_penalty=penalty, temperature=temperature) == [expected]


BAD_ROWS = [[0.0, INF, 1.0, 2.0], [NAN] * 4, [0.0, NAN, 1.0, 2.0], [-INF] * 4, [INF, INF, 0.0, NAN]]


@pytest.mark.parametrize("bad", BAD_ROWS)
@pytest.mark.parametrize(
    "params",
    [
        dict(temperature=0.0), dict(), dict(top_k=2), dict(top_p=0.5), dict(min_p=0.1),
        dict(temperature=0.0, repetition_penalty=1e-30), dict(repetition_penalty=2.0, top_p=0.9),
    ],
)  # fmt: skip
def test_a_row_that_is_not_finite_is_marked_and_refused(bad, params):
    """On a device the mark travels with the tokens, and the next rows are right."""
    logits, seen = torch.cat([torch.tensor([bad]), LOGITS]), torch.ones(3, 4, dtype=torch.bool)
    chosen = SamplingParams(**{"temperature": 1.0, "top_k": 0, **params})
    noise = torch.full((3,), 0.25)
    tokens = Sampler(chosen, logits.device)(logits, noise, seen)
    assert tokens[0] == NOT_FINITE
    assert torch.equal(tokens[1:], Sampler(chosen, logits.device)(LOGITS, noise[1:], seen[1:]))
    for call in (lambda: read_tokens(tokens), lambda: drawn(logits, seen, **params)):
        with pytest.raises(UsageError, match=MESSAGE):
            call()


def test_tokens_ruled_out_by_the_caller_are_not_damage():
    logits = torch.tensor([[-INF, 1.0, -INF, 0.0]])
    assert set(drawn(logits)) == {1, 3}
    assert drawn(torch.tensor([[NAN, 1.0, INF, -3.0]]), suppress_tokens=(0, 2), temperature=0.0) == [1]


def text_of_many(model: SmolLM2ForCausalLM, ids: Tensor) -> object:
    return list(generate_many(model, ids.tolist(), max_new_tokens=3))


def text_of_a_loop(model: SmolLM2ForCausalLM, ids: Tensor) -> object:
    options = dict(params=GREEDY, max_new_tokens=4)
    return looped(DecodeLoops(Engine(model), 2), ids, torch.ones_like(ids), [0, 1], **options)


def guessed_text(model: SmolLM2ForCausalLM, ids: Tensor) -> object:
    return list(speculative_steps(model, ids[:1], draft=PromptLookup(), max_new_tokens=3))


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize(
    "text",
    [
        lambda model, ids: generate(model, ids[:1], max_new_tokens=3),
        lambda model, ids: generate(model, ids, max_new_tokens=3, temperature=0.8),
        text_of_many, text_of_a_loop, guessed_text,
    ],
)  # fmt: skip
def test_damaged_weights_end_every_loop_with_the_reason(text, value):
    model, ids = tiny_model(), torch.arange(1, 9).view(2, 4)
    model.model.layers[1].mlp.down_proj.weight.data[3, 5] = value
    with pytest.raises(UsageError, match=f"{MESSAGE}; the weights are damaged or training diverged"):
        text(model, ids)
