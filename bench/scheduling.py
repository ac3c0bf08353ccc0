"""Requests to the server's scheduler, without HTTP and without a tokenizer."""

from __future__ import annotations

import threading
import time
from functools import partial
from typing import Any

from smollm2.engine.eager import Engine
from smollm2.sampling import SamplingParams
from smollm2.serving.scheduler import Piece, Request, Scheduler

PARAMS = SamplingParams(temperature=0.8)


class _Bytes:
    """Stands in for a tokenizer: no token ends a text, and each is one letter of it."""

    def end_ids(self, *_: int) -> tuple[int, ...]:
        return ()

    def token_bytes(self, _: int) -> bytes:
        return b"a"


def seconds_to_answer(
    engine: Engine, prompts: list[list[int]], new_tokens: int, slots: int
) -> tuple[float, list[float]]:
    """Seconds from the moment at which the last `slots` prompts are submitted together until all have their
    answers, and until the first token of each. Those before are answered first, as many at a time: they
    compile and capture. Raises RuntimeError for an answer that does not come to its end.
    """
    tokenizer: Any = _Bytes()
    context = max(map(len, prompts)) + new_tokens
    scheduler = Scheduler(engine, tokenizer, slots=slots, context=context, prefix_cache_bytes=0)
    scheduler.start()
    try:
        for first in range(0, len(prompts), slots):
            found = _answer(scheduler, prompts[first : first + slots], new_tokens)
    finally:
        scheduler.close(0.0)
    return found


def _answer(scheduler: Scheduler, prompts: list[list[int]], new_tokens: int) -> tuple[float, list[float]]:
    firsts, ends, ended = dict[int, float](), list[Piece](), threading.Event()

    def put(index: int, piece: Piece) -> None:
        firsts.setdefault(index, time.perf_counter() - began)
        if piece.finish:
            ends.append(piece)
        if len(ends) == len(prompts):
            ended.set()

    requests = [
        Request(prompt, new_tokens, PARAMS, partial(put, index), seed=index)
        for index, prompt in enumerate(prompts)
    ]
    began = time.perf_counter()
    scheduler.submit(*requests)
    ended.wait()
    seconds = time.perf_counter() - began
    for piece in ends:
        if piece.finish != "length":
            raise RuntimeError(piece.error or f"an answer ended with {piece.finish}")
    return seconds, list(firsts.values())
