"""A server in a process of its own, and clients that talk to it as OpenAI's do, over HTTP with a stream for
every answer.

Clients are threads of this process that read lines and note when they came; what a line says is looked at
when all is over. On a machine whose cores the server needs, that costs it little: `Load.cpu` says how much.
"""

from __future__ import annotations

import http.client
import json
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from smollm2.errors import LoadError

HOST = "127.0.0.1"
START_SECONDS, ANSWER_SECONDS, STOP_SECONDS = 300.0, 300.0, 30.0
Message = dict[str, str]


@dataclass(frozen=True)
class Answer:
    """One answer. first, end: seconds from its request to its first text and to its last.

    tokens, prompt, cached: new ones, those of the prompt, and of these those that the server had kept, as it
    counts them. finish: why it ended.
    """

    text: str
    tokens: int
    first: float
    end: float
    finish: str
    prompt: int = 0
    cached: int = 0

    @property
    def rate(self) -> float:
        """Tokens per second behind the first."""
        return (self.tokens - 1) / max(self.end - self.first, 1e-9)


@dataclass(frozen=True)
class Load:
    """What clients got: their answers, one list a client; wall-clock seconds of all; processor seconds of
    this process over those.
    """

    answers: list[list[Answer]]
    seconds: float
    cpu: float

    @property
    def every(self) -> list[Answer]:
        return [answer for answers in self.answers for answer in answers]

    @property
    def rate(self) -> float:
        """Tokens per second of all clients together, prompts included in the time."""
        return sum(answer.tokens for answer in self.every) / self.seconds


class Server(AbstractContextManager["Server"]):
    """A process that serves on a port of its own. It is ended with the block; its output goes to a file."""

    def __init__(self, command: Callable[[int], Sequence[str]], environment: Mapping[str, str]) -> None:
        """command(port). Raises LoadError where it ends or is not ready within START_SECONDS."""
        with socket.socket() as free:
            free.bind((HOST, 0))
            self.port: int = free.getsockname()[1]
        self._output = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            command(self.port), stdin=subprocess.DEVNULL, stdout=self._output, stderr=self._output,
            env=environment,
        )  # fmt: skip
        try:
            self._wait()
            self.model: str = json.loads(self.get("/v1/models")[1])["data"][0]["id"]
        except BaseException:
            self.close()
            raise

    def __exit__(self, *_: object) -> None:
        self.close()

    def get(self, path: str) -> tuple[int, bytes]:
        """Status and body."""
        connection = http.client.HTTPConnection(HOST, self.port, timeout=10)
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def close(self) -> None:
        """Asks the process to end, and ends it if it does not."""
        self._process.terminate()
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._output.close()

    def _wait(self) -> None:
        """Until it says that it is healthy."""
        until = time.monotonic() + START_SECONDS
        while time.monotonic() < until:
            if self._process.poll() is not None:
                self._output.seek(0)
                last = self._output.read().decode(errors="replace").strip().rpartition("\n")[2]
                raise LoadError(f"the server ended with exit code {self._process.returncode}: {last}")
            try:
                if self.get("/health")[0] == 200:
                    return
            except (OSError, http.client.HTTPException):
                pass
            time.sleep(0.05)
        raise LoadError(f"the server was not ready after {START_SECONDS:.0f} s")


def talk(server: Server, conversations: Sequence[Sequence[list[Message]]], max_tokens: int) -> Load:
    """Each client asks for one answer after the other; all begin together. conversations: of each client the
    messages of its requests. Raises LoadError for what is no answer.
    """
    ready = threading.Barrier(len(conversations) + 1)

    def client(requests: Sequence[list[Message]]) -> list[Answer]:
        bodies = [_body(server.model, messages, max_tokens) for messages in requests]
        ready.wait()
        return [_parsed(*_asked(server.port, body)) for body in bodies]

    with ThreadPoolExecutor(len(conversations)) as pool:
        under_way = [pool.submit(client, requests) for requests in conversations]
        ready.wait()
        began, cpu = time.perf_counter(), time.process_time()
        answers = [one.result() for one in under_way]
        seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    return Load(answers, seconds, cpu / seconds)


def _body(model: str, messages: list[Message], max_tokens: int) -> bytes:
    return json.dumps({
        "model": model, "messages": messages, "max_tokens": max_tokens, "temperature": 0, "stream": True,
        "stream_options": {"include_usage": True},
    }).encode()  # fmt: skip


def _asked(port: int, body: bytes) -> tuple[float, list[tuple[float, bytes]]]:
    """(when it was asked, when each line of the stream came, and the line)."""
    connection = http.client.HTTPConnection(HOST, port, timeout=ANSWER_SECONDS)
    try:
        began = time.perf_counter()
        headers = {"Content-Type": "application/json"}
        connection.request("POST", "/v1/chat/completions", body, headers)
        response = connection.getresponse()
        if response.status != 200:
            raise LoadError(f"expected an answer, got status {response.status}: {response.read()[:200]!r}")
        return began, [(time.perf_counter(), line) for line in response if line.startswith(b"data: {")]
    except (OSError, http.client.HTTPException) as failure:
        raise LoadError(f"no answer: {type(failure).__name__}: {failure}") from None
    finally:
        connection.close()


def _parsed(began: float, lines: list[tuple[float, bytes]]) -> Answer:
    """The answer that a stream is. Raises LoadError for one without text, count or end."""
    pieces: list[tuple[float, str]] = []
    finish, usage = "", dict[str, Any]()
    for when, line in lines:
        event = json.loads(line.removeprefix(b"data: "))
        if "error" in event:
            raise LoadError(f"the server answered with an error: {event['error']}")
        usage = event.get("usage") or usage
        for choice in event["choices"]:
            finish = choice["finish_reason"] or finish
            if content := choice["delta"].get("content"):
                pieces.append((when, content))
    if not (pieces and finish and usage):
        raise LoadError(f"expected text, usage and a reason of the end, got {len(lines)} events without")
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    return Answer(
        "".join(text for _, text in pieces), usage["completion_tokens"], pieces[0][0] - began,
        pieces[-1][0] - began, finish, usage["prompt_tokens"], cached,
    )  # fmt: skip
