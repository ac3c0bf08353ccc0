"""Keys and values that are kept from one generation to the next: the same text, of which only what is new is
read.
"""

from __future__ import annotations

from types import MethodType

import pytest
import torch
from generation_cases import EVERYTHING, GREEDY, SAMPLED, alone, random_ids, tiny_model, tiny_tokenizer

from smollm2 import SmolLM2ForCausalLM
from smollm2.engine.eager import Engine
from smollm2.engine.select import select_engine
from smollm2.errors import UsageError
from smollm2.generation.loop import generate_steps, stream_text
from smollm2.generation.prompt_cache import PromptCache, common
from smollm2.generation.speculative import DraftModel, PromptLookup, speculative_steps

MODEL = tiny_model()


def counting(engine: Engine) -> list[int]:
    """How many tokens each later prefill of the engine reads."""
    read, prefill = list[int](), engine.prefill

    def counted(self: Engine, input_ids: torch.Tensor, *rest: object) -> torch.Tensor:
        read.append(input_ids.shape[1])
        return prefill(input_ids, *rest)  # type: ignore[arg-type]

    engine.prefill = MethodType(counted, engine)  # type: ignore[method-assign]
    return read


def steps(engine: Engine, prompt: list[int], kept: PromptCache, params=GREEDY, new=8, seed=0) -> list[int]:
    found = generate_steps(
        engine.model, [prompt], max_new_tokens=new, params=params, seed=seed, engine=engine, prompt_cache=kept
    )
    return [int(tokens) for tokens in found]


@pytest.mark.parametrize("params", [GREEDY, SAMPLED, EVERYTHING])
def test_turns_read_what_is_new_and_say_what_a_fresh_text_says(params):
    engine = Engine(MODEL)
    kept, read, text = PromptCache(engine, 200), counting(engine), random_ids(1, 11)[0].tolist()
    for turn in range(4):
        answer = steps(engine, text, kept, params, seed=turn)
        assert answer == alone(MODEL, text, params, seed=turn, new=8), f"turn {turn}"
        assert kept.tokens == [*text, *answer[:-1]]
        text += [*answer, *random_ids(1, 5, seed=turn)[0].tolist()]
    assert read == [11, 6, 6, 6], "the last token of an answer is not in the cache, and then come five"


def test_a_text_that_differs_is_read_from_there_on():
    engine = Engine(MODEL)
    kept, read, text = PromptCache(engine, 64), counting(engine), random_ids(1, 20)[0].tolist()
    steps(engine, text, kept)
    other = [*text[:7], (text[7] + 1) % 512, *text[8:]]
    for prompt, expected in ((other, 13), (other, 1), (text[:3], 1), (other[::-1], 20)):
        assert steps(engine, prompt, kept) == alone(MODEL, prompt, new=8)
        assert read[-1] == expected and len(prompt) - kept.found == expected


def test_a_generation_that_is_left_keeps_what_it_computed():
    engine = Engine(MODEL)
    kept, read, text = PromptCache(engine, 64), counting(engine), random_ids(1, 9)[0].tolist()
    running = generate_steps(MODEL, [text], max_new_tokens=30, engine=engine, prompt_cache=kept)
    answer = [int(next(running)) for _ in range(5)]
    running.close()
    assert kept.tokens == [*text, *answer[:4]]
    assert steps(engine, [*text, *answer], kept) == alone(MODEL, [*text, *answer], new=8) and read == [9, 1]


@pytest.mark.parametrize("where", ["prefill", "decode"])
def test_an_interruption_in_the_middle_of_a_step_leaves_a_text_that_goes_on(where, monkeypatch):
    engine, text = Engine(MODEL), random_ids(1, 9)[0].tolist()
    kept = PromptCache(engine, 64)
    steps(engine, text, kept, new=3)
    with monkeypatch.context() as patch:
        whole = getattr(engine, where)

        def interrupted(tokens: torch.Tensor, *rest: object) -> None:
            whole(tokens, *rest)
            raise KeyboardInterrupt

        patch.setattr(engine, where, interrupted)
        with pytest.raises(KeyboardInterrupt):
            steps(engine, [*text, 5, 6, 7], kept)
    for prompt in ([*text, 5, 6, 7], text):
        assert steps(engine, prompt, kept) == alone(MODEL, prompt, new=8)


@pytest.mark.parametrize("draft", [PromptLookup(4), DraftModel(Engine(tiny_model(seed=3)), 3)])
def test_speculation_keeps_what_was_accepted(draft):
    engine = Engine(MODEL)
    kept, read, text = PromptCache(engine, 200), counting(engine), random_ids(1, 11)[0].tolist() * 2
    for turn in range(3):
        runs = speculative_steps(
            MODEL, [text], draft=draft, max_new_tokens=8, engine=engine, prompt_cache=kept
        )
        answer = [token for run in runs for token in run]
        assert answer == alone(MODEL, text, new=8) and kept.tokens == [*text, *answer][: len(kept.tokens)]
        text += [*answer, 7, turn]
    assert read[0] == 22 and all(4 > more > 2 for more in read[1:])


def test_the_compiled_step_goes_on_too(installed_step):
    for dtype in (torch.float32, torch.bfloat16):
        model: SmolLM2ForCausalLM = tiny_model().to(dtype)
        engine = select_engine(model)
        assert engine.name == "compiled"
        engine.frozen = True
        kept, read, text = PromptCache(engine, 200), counting(engine), random_ids(1, 40)[0].tolist()
        for _ in range(2):
            answer = steps(engine, text, kept)
            if dtype == torch.float32:
                assert answer == alone(MODEL, text, new=8)
            text += [*answer, *range(100, 120)]
        assert read == [40, 21]


def test_what_does_not_fit_is_refused_and_clear_forgets():
    engine = Engine(MODEL)
    kept = PromptCache(engine, 16)
    with pytest.raises(UsageError, match="expected at most 16 tokens, prompt and new ones together, got 12"):
        steps(engine, list(range(12)), kept)
    with pytest.raises(UsageError, match="expected one prompt, got 2"):
        list(generate_steps(MODEL, [[1], [2]], engine=engine, prompt_cache=kept))
    steps(engine, [1, 2], kept)
    kept.clear()
    assert kept.tokens == []
    steps(engine, [1, 2, 3], kept)
    assert kept.found == 0
    assert common([1, 2, 3], [1, 2]) == 2 and common([], [1]) == 0 and common([4], [5]) == 0


def test_a_stream_says_why_it_ended():
    tokenizer = tiny_tokenizer()
    model = tiny_model(vocab_size=tokenizer.vocab_size)
    kept = PromptCache(Engine(model), 100)
    options = dict(params=GREEDY, engine=kept.engine, prompt_cache=kept)
    stream = stream_text(model, tokenizer, tokenizer.encode("the quick"), max_new_tokens=6, **options)
    first = next(stream)
    assert stream.finish is None and len(stream.tokens) == 1
    text = first + "".join(stream)
    assert stream.finish == "length" and len(stream.tokens) == 6
    begun, stop = text[:2], text[2:4]
    again = stream_text(
        model, tokenizer, tokenizer.encode("the quick"), max_new_tokens=6, stop=[stop], **options
    )
    assert "".join(again) == begun and again.finish == "stop"
    closed = stream_text(model, tokenizer, tokenizer.encode("the quick"), max_new_tokens=6, **options)
    next(closed)
    closed.close()
    assert closed.finish is None and list(closed) == []
