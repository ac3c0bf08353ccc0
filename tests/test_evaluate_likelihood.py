"""Log-likelihoods of continuations: shared contexts, batches and engines change nothing."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from generation_cases import random_ids, tiny_model

from smollm2.engine.eager import Engine
from smollm2.errors import UsageError
from smollm2.generation import likelihood
from smollm2.generation.likelihood import Likelihood, log_likelihoods

LIMIT = 48
Pair = tuple[list[int], list[int]]


@pytest.fixture(scope="module")
def model():
    return tiny_model(max_position_embeddings=LIMIT)


def pairs(model) -> list[Pair]:
    """Contexts with one continuation and several, of one token and more; too long ones; a likely one."""
    ids = iter(random_ids(40, 64).tolist())
    found = [(next(ids)[:20], next(ids)[:n]) for n in (1, 5, 9)]
    for length, sizes in ((17, (1, 4, 2)), (24, (3, 3, 1, 7)), (30, (1, 1)), (16, (2, 2))):
        context = next(ids)[:length]
        found += [(context, next(ids)[:n]) for n in sizes]
    context = next(ids)[:40]
    found += [(context, next(ids)[:n]) for n in (4, 9, 10, 11, 30)]  # at the limit, and beyond it
    found += [(next(ids), next(ids)[:LIMIT]), ([1], next(ids)[:3])]
    with torch.inference_mode():
        likely = found[0][0]
        for _ in range(3):
            best = model(torch.tensor([likely])).logits[0, -1].argmax().item()
            likely = [*likely, best]
    return [*found, (found[0][0], likely[-3:]), (found[0][0], [*likely[-3:-1], likely[-2]])]


def alone(model, context: list[int], continuation: list[int]) -> Likelihood:
    """By the definition: all logits of one row."""
    ids = torch.tensor([(context + continuation)[-LIMIT - 1 :]])
    with torch.inference_mode():
        logits = model(ids[:, :-1]).logits[0, -len(continuation) :].double()
    targets = ids[0, -len(continuation) :]
    nats = -F.cross_entropy(logits, targets, reduction="sum").item()
    return Likelihood(nats, bool((logits.argmax(-1) == targets).all()))


@pytest.mark.parametrize("options", [{}, {"batch_size": 1}, {"batch_size": 4}, {"engine": True}], ids=str)
def test_every_way_to_read_gives_the_definition(model, options, monkeypatch):
    monkeypatch.setitem(likelihood.BATCH_TOKENS, "cpu", 200)  # some batches, of several texts each
    monkeypatch.setattr(likelihood, "ENGINE_TOKENS", 7)
    given, done = pairs(model), []
    engine = Engine(model) if options.pop("engine", None) else None
    found = log_likelihoods(model, given, engine=engine, report=done.append, **options)
    expected = [alone(model, *pair) for pair in given]
    assert [one.is_greedy for one in found] == [one.is_greedy for one in expected]
    assert sum(one.is_greedy for one in found) >= 1
    for one, other in zip(found, expected, strict=True):
        assert one.nats == pytest.approx(other.nats, abs=2e-4)
    assert sum(done) == len(given)


def test_answers_to_one_question_read_it_once(model, monkeypatch):
    read = []
    forward = model.model.forward
    monkeypatch.setattr(
        model.model,
        "forward",
        lambda ids, *rest, **more: (read.append(ids.shape), forward(ids, *rest, **more))[1],
    )
    context, *answers = random_ids(5, 20).tolist()
    log_likelihoods(model, [(context, answer[:3]) for answer in answers])
    assert read == [(1, 20), (4, 2)]
    read.clear()
    log_likelihoods(model, [(context, answer[:1]) for answer in answers])
    assert read == [(1, 20)]


@pytest.mark.parametrize("pair", [([], [1]), ([1], []), ([1], [2] * (LIMIT + 1)), ([1], [512])], ids=len)
def test_what_cannot_be_scored_is_named(model, pair):
    with pytest.raises(UsageError, match="pair 1"):
        log_likelihoods(model, [([1], [2]), pair])
