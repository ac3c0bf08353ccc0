"""The server's application: OpenAI's endpoints in front of a Scheduler.

A body is parsed, rendered and tokenised in a worker thread. The event loop only passes on what comes: pieces
of text go from the scheduler's thread into a queue per request, so that a slow reader holds up no row.
Whatever ends a request early (its client is gone, its time is over) cancels its rows.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import hmac
import json
import random
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, StreamingResponse
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send

from smollm2.errors import UsageError
from smollm2.pretrained.tokenizer import Tokenizer
from smollm2.sampling import SamplingParams
from smollm2.serving.api import ApiError, ChatRequest, CompletionRequest, parse, token_text
from smollm2.serving.scheduler import Busy, Piece, Scheduler, TokenLogprob
from smollm2.serving.scheduler import Request as Row

PAGE = Path(__file__).with_name("page.html")
# The page loads nothing from elsewhere, and no other page may frame it.
POLICY = {"Content-Security-Policy": "default-src 'self' 'unsafe-inline' data:; frame-ancestors 'none'"}
GONE = 499  # nginx's code for a client that did not wait; nobody reads it
SLOW_READER = 10.0  # seconds beyond a request's time limit in which a stream may still be read
Body = ChatRequest | CompletionRequest


@dataclass(eq=False)
class Job:
    """One HTTP request: its rows, prompt by prompt with n of each, and the pieces that come of them.

    limit: seconds that a client may wait for its last piece, counted from `arrival` on the loop's clock.
    """

    asked: Body
    model: str
    tokenizer: Tokenizer
    loop: asyncio.AbstractEventLoop
    arrival: float
    limit: float
    rows: list[Row] = field(default_factory=list)
    queue: asyncio.Queue[tuple[int, Piece]] = field(default_factory=asyncio.Queue)
    new_tokens: int = 0

    def __post_init__(self) -> None:
        self.frame = {
            "id": self.asked.prefix + uuid.uuid4().hex,
            "object": self.asked.kind,
            "created": int(time.time()),
            "model": self.model,
        }

    def put(self, index: int, piece: Piece) -> None:
        """Takes a piece of a row, in the scheduler's thread."""
        with contextlib.suppress(RuntimeError):  # the loop has ended, nobody reads any more
            self.loop.call_soon_threadsafe(self.queue.put_nowait, (index, piece))

    async def pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        """What comes of all rows until each has ended. Raises ApiError if one fails or time is over."""
        left = len(self.rows)
        while left:
            try:
                async with asyncio.timeout_at(self.arrival + self.limit):
                    index, piece = await self.queue.get()
            except TimeoutError:
                message = f"the time limit of {self.limit:g} s is over; ask for fewer tokens"
                # a client that tries again would wait as long again
                headers = {"x-should-retry": "false"}
                raise ApiError(504, message, code="timeout", headers=headers) from None
            if piece.finish == "cancelled":
                raise ApiError(503, "the server is shutting down", code="shutting_down")
            if piece.finish == "error":
                raise ApiError(500, f"the generation failed: {piece.error}", code="generation_failed")
            self.new_tokens += piece.tokens
            left -= piece.finish is not None
            yield index, piece

    def usage(self) -> dict[str, Any]:
        prompts = self.rows[:: self.asked.n or 1]
        read, cached = sum(len(row.prompt) for row in prompts), sum(row.cached for row in prompts)
        return {
            "prompt_tokens": read,
            "completion_tokens": self.new_tokens,
            "total_tokens": read + self.new_tokens,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    def logprobs(self, tokens: Sequence[TokenLogprob | None], offset: int = 0) -> Any:
        known = [token for token in tokens if token is not None]
        if self.asked.likely() is None:
            return None
        return self.asked.logprobs_of(known, self.tokenizer, offset)

    async def answer(self) -> dict[str, Any]:
        """The whole answer."""
        texts: list[list[str]] = [[] for _ in self.rows]
        tokens: list[list[TokenLogprob | None]] = [[] for _ in self.rows]
        ends: list[str | None] = [None for _ in self.rows]
        async for index, piece in self.pieces():
            texts[index].append(piece.text)
            tokens[index].append(piece.logprobs)
            ends[index] = piece.finish
        choices = [
            self.asked.choice(index, "".join(texts[index]), self.logprobs(tokens[index]), ends[index])
            for index in range(len(self.rows))
        ]
        return {**self.frame, "choices": choices, "usage": self.usage()}

    async def events(self) -> AsyncIterator[bytes]:
        """The answer as server-sent events, which end with [DONE] or with an error."""
        asked, offsets = self.asked, [0] * len(self.rows)
        frame = {**self.frame, "object": asked.chunk, **({"usage": None} if asked.with_usage else {})}
        try:
            if isinstance(asked, ChatRequest):
                for index in range(len(self.rows)):
                    yield _event({**frame, "choices": [asked.part(index, None, None, None)]})
            async for index, piece in self.pieces():
                logprobs = self.logprobs([piece.logprobs], offsets[index])
                if piece.logprobs:
                    offsets[index] += len(token_text(self.tokenizer, piece.logprobs.token))
                if piece.text or piece.logprobs or piece.finish:
                    part = asked.part(index, piece.text, logprobs, piece.finish)
                    yield _event({**frame, "choices": [part]})
            if asked.with_usage:
                yield _event({**frame, "choices": [], "usage": self.usage()})
            yield b"data: [DONE]\n\n"
        except ApiError as error:
            yield _event(error.body())


def _event(value: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()


class EventStream(StreamingResponse):
    """A job's events. Its rows are cancelled when the client is gone, or does not read what was sent."""

    def __init__(self, job: Job, scheduler: Scheduler) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # nginx shall not collect them
        super().__init__(job.events(), media_type="text/event-stream", headers=headers)
        self.job, self.scheduler = job, scheduler

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with asyncio.timeout_at(self.job.arrival + self.job.limit + SLOW_READER):
                await super().__call__(scope, receive, send)
        except TimeoutError:
            pass  # uvicorn closes a connection whose answer has no end
        finally:
            for row in self.job.rows:
                self.scheduler.cancel(row)


class Service:
    """What the endpoints share, with the options of `create_app`."""

    def __init__(
        self,
        scheduler: Scheduler,
        tokenizer: Tokenizer,
        model: str,
        params: SamplingParams,
        max_tokens: int,
        timeout: float,
        max_body: int,
    ) -> None:
        self.scheduler, self.tokenizer, self.model = scheduler, tokenizer, model
        self.params, self.max_tokens, self.timeout, self.max_body = params, max_tokens, timeout, max_body
        longest = max(len(tokenizer.token_bytes(token)) for token in range(tokenizer.vocab_size))
        self.most_bytes = scheduler.context * longest  # of a text: more are too many tokens, whichever
        self.created = int(time.time())

    async def serve(self, kind: type[ChatRequest] | type[CompletionRequest], http: Request) -> Response:
        loop = asyncio.get_running_loop()
        arrival = loop.time()
        if http.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            # A page of another site can send anything else without asking the browser first.
            raise ApiError(415, "expected a body of JSON; send Content-Type: application/json")
        body = bytearray()
        try:
            async with asyncio.timeout_at(arrival + self.timeout):
                async for chunk in http.stream():
                    body += chunk
                    if len(body) > self.max_body:
                        message = f"body: expected at most {self.max_body:,} bytes, got more"
                        raise ApiError(413, f"{message}; shorten the text", code="body_too_large")
        except TimeoutError:
            raise ApiError(408, f"body: not complete after {self.timeout:g} s; send it at once") from None
        job = await asyncio.to_thread(self.accept, kind, bytes(body), loop, arrival)
        if job.asked.stream:
            return EventStream(job, self.scheduler)
        tasks = asyncio.create_task(job.answer()), asyncio.create_task(_disconnect(http))
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            return JSONResponse(tasks[0].result()) if tasks[0].done() else Response(status_code=GONE)
        finally:
            for task in tasks:
                task.cancel()
            for row in job.rows:
                self.scheduler.cancel(row)

    def accept(
        self,
        kind: type[ChatRequest] | type[CompletionRequest],
        body: bytes,
        loop: asyncio.AbstractEventLoop,
        arrival: float,
    ) -> Job:
        """Submits what a body asks for. Raises ApiError for what cannot be met."""
        asked: Body = parse(kind, body)
        self.check_model(asked.model)
        job = Job(asked, self.model, self.tokenizer, loop, arrival, self.timeout)
        try:
            likely = asked.likely()
            if isinstance(asked, ChatRequest) and len(asked.messages) > self.scheduler.context:
                raise self.too_long(asked, f"{len(asked.messages):,} messages, each of which takes some")
            if asked.size() > self.most_bytes:
                raise self.too_long(asked, f"{asked.size():,} bytes of text, which are more")
            params = dataclasses.replace(self.params, **asked.sampling)
            stop = tuple(asked.stop or ())
            seed = random.getrandbits(63) if asked.seed is None else asked.seed
            most = self.scheduler.slots + self.scheduler.queue_size
            if asked.count() * (asked.n or 1) > most:
                raise UsageError(f"n: expected at most {most} answers, got {asked.count()} x {asked.n or 1}")
            for prompt in asked.prompts(self.tokenizer):
                room = self.scheduler.context - len(prompt)
                budget = asked.budget(room, self.max_tokens)
                if room < max(budget, 1):
                    raise self.too_long(asked, f"{len(prompt):,} and {max(budget, 1):,} new ones")
                for choice in range(asked.n or 1):
                    put = functools.partial(job.put, len(job.rows))
                    job.rows.append(Row(prompt, budget, params, put, seed + choice, stop, likely))
            self.scheduler.submit(*job.rows)
        except UsageError as error:
            name = str(error).partition(":")[0]
            raise ApiError(400, str(error), param=name if name in kind.model_fields else None) from None
        except Busy as error:
            raise ApiError(429, str(error), code="queue_full", headers={"Retry-After": "1"}) from None
        except RuntimeError:
            raise ApiError(503, "the server takes no requests any more", code="unavailable") from None
        return job

    def too_long(self, asked: Body, got: str) -> ApiError:
        expected = f"expected at most {self.scheduler.context:,} tokens, with those of the answer"
        message = f"{asked.source}: {expected}, got {got}; shorten the text or lower max_tokens"
        return ApiError(400, message, param=asked.source, code="context_length_exceeded")

    def check_model(self, name: str | None) -> None:
        if name not in (None, self.model):
            message = f"model: expected {self.model!r}, the one that is served, got {name!r:.80}"
            raise ApiError(404, message, param="model", code="model_not_found")

    def model_card(self) -> dict[str, Any]:
        card = {"id": self.model, "object": "model", "created": self.created, "owned_by": "smollm2"}
        return {**card, "max_model_len": self.scheduler.context}

    def metrics(self) -> str:
        """Prometheus' text format."""
        now = {name: getattr(self.scheduler, name) for name in ("running", "queued", "slots")}
        figures = [(f"smollm2_{name}", "gauge", value) for name, value in now.items()]
        totals = dataclasses.asdict(self.scheduler.totals)
        figures += [(f"smollm2_{name}_total", "counter", value) for name, value in totals.items()]
        return "".join(f"# TYPE {name} {kind}\n{name} {value}\n" for name, kind, value in figures)


class KnownHosts:
    """Refuses requests to other names than these.

    Any site can have its name resolve to 127.0.0.1, and its pages are then of this server's origin for a
    browser (DNS rebinding); the Host header still has that name. Only a program sends none. Starlette's
    TrustedHostMiddleware answers in another form, and older ones know no IPv6.
    """

    def __init__(self, app: ASGIApp, names: Sequence[str]) -> None:
        self.app, self.names = app, {_host_name(name) for name in names} - {""}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        given = Headers(scope=scope).get("host") if scope["type"] == "http" else None
        if given is None or _host_name(given) in self.names:
            return await self.app(scope, receive, send)
        how = "start the server with --allow-host NAME, or with an API key, to use it by that name"
        message = f"Host: expected localhost or another name of this server, got {given!r:.80}; {how}"
        error = ApiError(403, message, code="host_not_allowed")
        await JSONResponse(error.body(), error.status)(scope, receive, send)


def _host_name(host: str) -> str:
    """Of a Host header, which may have a port, or of an IPv6 address without brackets; "" if malformed."""
    try:
        in_brackets = f"[{host}]" if host.count(":") > 1 and not host.startswith("[") else host
        return (urlsplit(f"//{in_brackets}").hostname or "").removesuffix(".")
    except ValueError:
        return ""


async def _disconnect(http: Request) -> None:
    """Waits until the client is gone."""
    while (await http.receive())["type"] != "http.disconnect":
        pass


def create_app(
    scheduler: Scheduler,
    tokenizer: Tokenizer,
    model: str,
    *,
    params: SamplingParams,
    max_tokens: int = 1024,
    api_key: str | None = None,
    cors: Sequence[str] = (),
    hosts: Sequence[str] | None = None,
    timeout: float = 600.0,
    max_body: int = 4 << 20,
) -> FastAPI:
    """The application for one model.

    model: its name to clients. params, max_tokens: how tokens are chosen, and how many of a chat's answer,
    where a request does not say; 0: to the end of the context. api_key: what clients must send as a bearer
    token, None: nothing. cors: origins whose pages may ask. hosts: names by which the server may be reached,
    None: any. timeout: seconds from a request's arrival to its last piece. max_body: bytes.
    """
    service = Service(scheduler, tokenizer, model, params, max_tokens, timeout, max_body)
    app = FastAPI(openapi_url=None)  # nor the pages that show it, which load scripts from elsewhere
    if cors:
        app.add_middleware(
            CORSMiddleware, allow_origins=list(cors), allow_methods=["GET", "POST"], allow_headers=["*"]
        )

    if hosts is not None:
        app.add_middleware(KnownHosts, names=hosts)

    async def check_key(http: Request) -> None:
        scheme, _, given = http.headers.get("authorization", "").partition(" ")
        known = hmac.compare_digest(given.encode("latin-1"), (api_key or "").encode())
        if api_key is not None and not (known and scheme.lower() == "bearer"):  # in any case: RFC 9110, 11.1
            message = "expected the server's key as Authorization: Bearer KEY, got none or another"
            raise ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})

    keyed = APIRouter(dependencies=[Depends(check_key)])

    @keyed.post("/v1/chat/completions")
    async def chat(http: Request) -> Response:
        return await service.serve(ChatRequest, http)

    @keyed.post("/v1/completions")
    async def completions(http: Request) -> Response:
        return await service.serve(CompletionRequest, http)

    @keyed.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [service.model_card()]}

    @keyed.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        service.check_model(name)
        return service.model_card()

    @keyed.get("/metrics")
    async def metrics() -> Response:
        return PlainTextResponse(service.metrics(), media_type="text/plain; version=0.0.4")

    @app.api_route("/health", methods=["GET", "HEAD"])  # some who watch a server ask for the head alone
    async def health() -> dict[str, str]:
        if scheduler.failure:
            raise ApiError(503, f"the generation has ended: {scheduler.failure}", code="unavailable")
        return {"status": "ok"}

    @app.api_route("/", methods=["GET", "HEAD"])
    async def page() -> Response:
        if not PAGE.is_file():
            raise HTTPException(404)
        return FileResponse(PAGE, headers=POLICY)

    app.include_router(keyed)

    @app.exception_handler(ApiError)
    async def refuse(http: Request, error: ApiError) -> Response:
        return JSONResponse(error.body(), error.status, error.headers)

    @app.exception_handler(HTTPException)
    async def refuse_otherwise(http: Request, error: HTTPException) -> Response:
        there_is = "/v1/chat/completions, /v1/completions, /v1/models, /health, /metrics"
        message = f"{http.method} {http.url.path:.80}: {error.detail}; what there is: {there_is}"
        return await refuse(http, ApiError(error.status_code, message, headers=dict(error.headers or {})))

    @app.exception_handler(ClientDisconnect)
    async def leave(http: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=GONE)

    @app.exception_handler(Exception)
    async def fail(http: Request, error: Exception) -> Response:
        return await refuse(http, ApiError(500, "the server failed; its log says how", code="internal"))

    return app
