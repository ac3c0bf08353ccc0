"""What the tests of the server share: a tiny model with a chat template, served by uvicorn in a thread. Where
the packages for that are not installed, tests that import this are skipped.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
from generation_cases import alone, tiny_model, tiny_tokenizer

from smollm2.engine.eager import Engine
from smollm2.generation.text import TextPieces
from smollm2.pretrained.tokenizer import Tokenizer
from smollm2.sampling import SamplingParams

for package in ("fastapi", "uvicorn", "httpx2", "openai"):
    pytest.importorskip(package, reason=f"{package} is not installed (the extra test has it)")

import httpx2  # noqa: E402
import openai  # noqa: E402

from smollm2.serving.app import create_app  # noqa: E402
from smollm2.serving.scheduler import Request, Scheduler  # noqa: E402
from smollm2.serving.server import Server, bind, run, url  # noqa: E402

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def chat_tokenizer() -> Tokenizer:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


TOKENIZER = chat_tokenizer()
MODEL = tiny_model(vocab_size=TOKENIZER.vocab_size)
ENDS = TOKENIZER.end_ids(TOKENIZER.vocab_size, *MODEL.config.eos_token_ids)
# as the command makes it
PARAMS = SamplingParams(TOKENIZER.banned_ids(TOKENIZER.vocab_size, ENDS), temperature=0.9, top_k=20)
CHAT, TEXTS = "/v1/chat/completions", "/v1/completions"
HI = [{"role": "user", "content": "the quick fox"}]


def chat_ids(messages: Sequence[dict[str, str]]) -> list[int]:
    return TOKENIZER.encode(TOKENIZER.apply_chat_template(messages))


def expected(
    prompt: list[int], new: int, seed: int, params: SamplingParams = PARAMS, stop: Sequence[str] = ()
) -> tuple[str, str, list[int]]:
    """What `generate` gives alone: the text, why it ended, and its tokens."""
    pieces, text, tokens = TextPieces(TOKENIZER, ENDS, stop), "", []
    for token in alone(MODEL, prompt, params, seed, ENDS, new):
        text += pieces.take(token)
        tokens.append(token)
        if pieces.finish:
            return text, pieces.finish, tokens
    return text + pieces.rest(), "length", tokens


class Gated(Engine):
    """An engine whose decode steps wait until `gate` is set."""

    def __init__(self) -> None:
        super().__init__(MODEL)
        self.gate = threading.Event()

    def decode(self, *arguments: Any) -> Any:
        assert self.gate.wait(120)
        return super().decode(*arguments)


class Served:
    """A server, its clients, and the requests that its scheduler was given."""

    def __init__(self, scheduler: Scheduler, server: Server, address: str) -> None:
        self.scheduler, self.server, self.url = scheduler, server, address
        self.requests: list[Request] = []
        submit = scheduler.submit

        def recorded(*requests: Request) -> None:
            submit(*requests)
            self.requests += requests

        scheduler.submit = recorded  # type: ignore[method-assign]
        self.http = httpx2.Client(base_url=address, timeout=120)
        self.openai = openai.OpenAI(base_url=f"{address}/v1", api_key="secret", max_retries=0, timeout=120)

    def post(self, path: str = TEXTS, **body: Any) -> httpx2.Response:
        return self.http.post(path, json=body)


def until(condition: Callable[[], Any]) -> None:
    """Waits until that is so, for as long as a slow machine may take."""
    pause = threading.Event()
    for _ in range(12000):
        if condition():
            return
        pause.wait(0.01)
    raise AssertionError("it did not come to be")


@contextmanager
def served(
    engine: Engine | None = None, *, start: bool = True, slots: int = 4, queue_size: int = 64,
    grace: int = 60, **options: Any,
) -> Iterator[Served]:  # fmt: skip
    """A server on a free port. start: whether its scheduler works; else what it is given waits."""
    scheduler = Scheduler(engine or Engine(MODEL), TOKENIZER, slots=slots, context=128, queue_size=queue_size)
    app = create_app(scheduler, TOKENIZER, "tiny", **{"params": PARAMS, **options})
    ready = threading.Event()
    with bind("127.0.0.1", 0) as bound:
        server = Server(app, scheduler, grace=grace, ready=ready.set, log=False)
        if not start:
            scheduler.start = lambda: None  # type: ignore[method-assign]
        thread = threading.Thread(target=run, args=(server, bound), daemon=True)
        thread.start()
        assert ready.wait(60)
        one = Served(scheduler, server, url(bound))
        try:
            yield one
        finally:
            one.http.close()
            one.openai.close()
            server.should_exit = True
            thread.join(60)
            assert not thread.is_alive(), "the server did not end"
