"""The score of a text: the definition token by token, transformers on the same windows, each token once."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from generation_cases import tiny_model

from smollm2.engine.eager import Engine
from smollm2.errors import UsageError
from smollm2.perplexity import Score, perplexity, windows


@pytest.fixture(scope="module")
def model():
    return tiny_model(initializer_range=0.1)


@pytest.fixture(scope="module")
def ids():
    return torch.randint(0, 512, (700,), generator=torch.Generator().manual_seed(2))


def test_every_token_but_the_first_is_scored_once_with_enough_context():
    for tokens in (2, 3, 7, 8, 9, 16, 23):
        for window in (2, 3, 5, 8, 30):
            for stride in range(1, window):
                scored: list[int] = []
                for number, (begin, first, end) in enumerate(windows(tokens, window, stride)):
                    assert begin < first < end <= tokens and end - begin <= window
                    assert number == 0 or first - begin == window - stride
                    scored += range(first, end)
                assert scored == list(range(1, tokens))


def test_windows_without_overlap_leave_out_their_first_tokens():
    assert list(windows(9, 4, 4)) == [(0, 1, 4), (4, 5, 8)]  # the ninth token alone has no context
    assert list(windows(10, 4, 4)) == [(0, 1, 4), (4, 5, 8), (8, 9, 10)]


def test_stride_1_is_the_definition_token_by_token(model, ids):
    text, window = ids[:40], 16
    nats = 0.0
    for position in range(1, len(text)):
        context = text[max(0, position - window + 1) : position]
        with torch.no_grad():
            logits = model(context[None]).logits[0, -1].double()
        nats -= torch.log_softmax(logits, -1)[text[position]].item()
    score = perplexity(model, text, window, 1)
    assert score.nats == pytest.approx(nats, rel=1e-5)
    assert (score.tokens, score.scored, score.windows) == (40, 39, 25)


@pytest.fixture(scope="module")
def theirs(model, tmp_path_factory):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    folder: Path = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    return transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize(
    ("tokens", "window", "stride"),
    [(700, 512, 256), (700, 64, 32), (700, 64, 64), (699, 100, 7), (100, 128, 50), (2, 2, 1)],
)
def test_the_score_is_that_of_transformers_on_the_same_windows(model, theirs, ids, tokens, window, stride):
    """The loop of Hugging Face's guide to perplexity, its mean losses weighted by their labels."""
    nats, scored, reached = 0.0, 0, 0
    for begin in range(0, tokens, stride):
        end = min(begin + window, tokens)
        window_ids = ids[None, begin:end]
        labels = window_ids.clone()
        labels[:, : -(end - reached)] = -100
        count = int((labels[:, 1:] != -100).sum())  # the model shifts the labels
        if count:
            with torch.no_grad():
                nats += theirs(window_ids, labels=labels).loss.item() * count
            scored += count
        reached = end
        if end == tokens:
            break
    score = perplexity(model, ids[:tokens], window, stride)
    assert score.scored == scored
    assert score.nats_per_token == pytest.approx(nats / scored, rel=1e-5)
    assert score.perplexity == pytest.approx(math.exp(nats / scored), rel=1e-4)


@pytest.mark.parametrize(
    ("tokens", "window", "stride"), [(150, 64, 32), (64, 64, 64), (20, 8, 3), (2, 2, 1), (150, 64, 1)]
)
def test_an_engine_scores_by_its_own_steps_what_the_model_scores(model, ids, tokens, window, stride):
    found = (
        perplexity(model, ids[:tokens], window, stride, engine=engine) for engine in (None, Engine(model))
    )
    ours, engines = found
    assert engines.nats == pytest.approx(ours.nats, rel=1e-5)
    assert (engines.scored, engines.windows) == (ours.scored, ours.windows)


def test_a_model_that_knows_nothing_scores_ln_of_the_vocabulary(ids):
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    score = perplexity(model, ids, 128, 64)
    assert score.nats_per_token == pytest.approx(math.log(512), rel=1e-6)
    assert score.perplexity == pytest.approx(512, rel=1e-5)


def test_a_list_is_as_good_as_a_tensor_and_scores_add_up(model, ids):
    first, second = perplexity(model, ids[:50].tolist(), 32, 16), perplexity(model, ids[50:90], 32, 16)
    assert first == perplexity(model, ids[:50], 32, 16)
    total = first + second
    assert (total.nats, total.scored) == (first.nats + second.nats, 49 + 39)
    assert total.windows == first.windows + second.windows
    assert total.bits_per_byte is None
    assert (Score(math.log(2) * 8, 3, 2, 1, 4) + Score(0.0, 2, 1, 1, 4)).bits_per_byte == pytest.approx(1.0)
    assert Score(1e6, 2, 1, 1).perplexity == math.inf


@pytest.mark.parametrize(
    ("tokens", "window", "stride", "message"),
    [
        ([], 8, 4, "at least 2 tokens"),
        ([3], 8, 4, "at least 2 tokens"),
        ([[1, 2]], 8, 4, "at least 2 tokens"),
        ([1, 2], 8, 9, "stride: expected a number from 1 to 8, the window, got 9"),
        ([1, 2], 8, 0, "stride"),
        ([1, 2], 513, 4, "window: expected a number from 2 to 512, the positions of the model, got 513"),
        ([1, 2], 1, 1, "window"),
        ([1, 512], 8, 4, r"ids in \[0, 512\), got 512"),
    ],
)
def test_wrong_arguments_are_named(model, tokens, window, stride, message):
    with pytest.raises(UsageError, match=message):
        perplexity(model, tokens, window, stride)


def test_a_score_that_is_no_number_is_an_error(ids):
    model = tiny_model()
    with torch.no_grad():
        model.model.norm.weight[3] = math.nan
    with pytest.raises(UsageError, match="score: expected a finite number, got nan"):
        perplexity(model, ids, 64, 32)
