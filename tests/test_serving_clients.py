"""Clients that leave, do not read, come in crowds or send nonsense: the rows of one end, those of the others
are what each would get alone, and nothing is left.
"""

from __future__ import annotations

import gc
import json
import random
import socket
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from serving_cases import (
    CHAT,
    HI,
    TEXTS,
    TOKENIZER,
    Gated,
    Served,
    chat_ids,
    expected,
    httpx2,
    served,
    until,
)

from smollm2.engine.eager import Engine
from smollm2.serving import app


def send(server: Served, path: str, body: bytes | dict[str, Any], buffer: int = 0) -> socket.socket:
    """A connection on which a request was sent. buffer: bytes that the client's side takes unread."""
    client = socket.socket()
    if buffer:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    client.settimeout(120)
    client.connect(("127.0.0.1", int(server.url.rpartition(":")[2])))
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: tiny\r\nContent-Type: application/json\r\n"
    client.sendall(f"{head}Content-Length: {len(content)}\r\nConnection: close\r\n\r\n".encode() + content)
    return client


def read_all(client: socket.socket) -> bytes:
    with client:
        return b"".join(iter(lambda: client.recv(65536), b""))


def events(stream: Iterator[str]) -> Iterator[dict[str, Any]]:
    """The JSON of a stream's events, up to [DONE], which must come."""
    for line in stream:
        if line == "data: [DONE]":
            return
        if line:
            yield json.loads(line.removeprefix("data: "))
    raise AssertionError("the stream has no end")


def text_of(parts: Iterator[dict[str, Any]]) -> tuple[str, str]:
    """What a streamed chat says, and why it ended."""
    text, finish = "", ""
    for part in parts:
        (choice,) = part["choices"]
        text, finish = text + choice["delta"].get("content", ""), choice["finish_reason"] or finish
    return text, finish


def idle(server: Served) -> bool:
    scheduler, state = server.scheduler, server.server.server_state
    return not (scheduler.running or scheduler.queued or state.tasks)


def test_a_full_queue_is_429_and_clients_that_leave_are_cancelled():
    with served(start=False, slots=1, queue_size=1) as server:
        clients = [send(server, CHAT, {"messages": HI, "stream": stream}) for stream in (True, False)]
        until(lambda: len(server.requests) == 2)
        refused = server.post(CHAT, messages=HI)
        assert refused.status_code == 429 and refused.json()["error"]["code"] == "queue_full"
        message = refused.json()["error"]["message"]
        assert message == "the queue is full: 1 may wait beside the 1 that run"
        assert refused.headers["retry-after"] == "1"
        assert not any(request.cancelled for request in server.requests)
        for client in clients:
            client.close()
        until(lambda: all(request.cancelled for request in server.requests))


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_slot(stream):
    engine = Gated()
    with served(engine, slots=1) as server:
        client = send(server, CHAT, {"messages": HI, "stream": stream, "seed": 5})
        until(lambda: server.scheduler.running and server.requests)
        client.close()
        until(lambda: server.requests[0].cancelled)
        engine.gate.set()
        until(lambda: idle(server))
        assert server.scheduler.totals.cancelled == 1 and server.scheduler.totals.new_tokens < 5
        assert server.post(CHAT, messages=HI, max_tokens=2).status_code == 200


def test_a_request_has_limited_time():
    with served(start=False, timeout=0.1) as server:
        late = server.post(CHAT, messages=HI)
        assert late.status_code == 504 and late.json()["error"]["code"] == "timeout"
        assert late.headers["x-should-retry"] == "false"
        with server.http.stream("POST", CHAT, json={"messages": HI, "stream": True}) as response:
            *_, last = [json.loads(line[6:]) for line in response.iter_lines() if line]
        assert last["error"]["code"] == "timeout"
        until(lambda: [request.cancelled for request in server.requests] == [True, True])
        unfinished = socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])))
        head = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
        unfinished.sendall(head + b"Content-Length: 9\r\n\r\n{")
        with unfinished:
            assert unfinished.recv(1000).startswith(b"HTTP/1.1 408 ")


def test_a_stream_that_nobody_reads_is_cut_off(monkeypatch):
    monkeypatch.setattr(app, "SLOW_READER", 0.2)
    # more than all buffers between the two hold
    monkeypatch.setattr(app, "_event", lambda value: b"data: " + b"x" * 5_000_000 + b"\n\n")
    with served(start=False, timeout=0.1) as server:
        client = send(server, CHAT, {"messages": HI, "stream": True}, buffer=4096)
        until(lambda: server.requests and server.requests[0].cancelled)
        client.close()
        until(lambda: not server.server.server_state.tasks)


class Broken(Engine):
    def __init__(self, fault: BaseException) -> None:
        super().__init__(Gated().model)
        self.fault = fault

    def prefill(self, *arguments: Any) -> Any:
        raise self.fault


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_failure_is_500_and_the_end_of_the_scheduler_503():
    with served(Broken(ValueError("no such thing"))) as server:
        failed = server.post(CHAT, messages=HI)
        assert failed.status_code == 500 and failed.json()["error"]["type"] == "server_error"
        assert "no such thing" in failed.text and "Traceback" not in failed.text and ".py" not in failed.text
        assert server.http.get("/health").status_code == 200
    with served(Broken(SystemExit("enough"))) as server:
        assert server.post(CHAT, messages=HI).status_code == 500
        until(lambda: server.scheduler.failure)
        for response in (server.http.get("/health"), server.post(CHAT, messages=HI)):
            assert response.status_code == 503 and response.json()["error"]["code"] == "unavailable"


def test_a_fault_of_the_server_shows_nothing_of_it(monkeypatch):
    with served(start=False) as server:
        monkeypatch.setattr(app, "parse", lambda *_: 1 / 0)
        response = server.post(prompt="a")
        assert response.status_code == 500 and response.json()["error"]["code"] == "internal"
        assert "division" not in response.text


@pytest.mark.parametrize("grace", [60, 0])
def test_at_the_end_what_runs_is_finished_or_told(grace, capsys):
    engine = Gated()
    with served(engine, grace=grace) as server:
        with server.http.stream(
            "POST", CHAT, json={"messages": HI, "stream": True, "seed": 5, "max_tokens": 9}
        ) as response:
            lines = response.iter_lines()
            parts = [json.loads(next(line for line in lines if line).removeprefix("data: "))]
            server.server.should_exit = True
            until(lambda: server.scheduler._closed)
            if not grace:
                until(lambda: server.requests[0].cancelled)
            engine.gate.set()
            if grace:
                parts += events(lines)
                assert text_of(iter(parts)) == expected(chat_ids(HI), 9, seed=5)[:2]
            else:
                *_, last = [json.loads(line[6:]) for line in lines if line]
                assert last["error"]["code"] == "shutting_down"
        with pytest.raises(httpx2.ConnectError):
            until(lambda: httpx2.get(f"{server.url}/health") is None)
    line = f"ending: 1 request has {grace} s to finish; Ctrl-C again ends at once\n"
    assert capsys.readouterr().err.count(line) == 1


def test_a_server_that_waits_for_nobody_ends_without_a_word(capsys):
    with served() as server:
        server.post(TEXTS, prompt="the", max_tokens=1)
        until(lambda: server.scheduler.running == 0)
    assert capsys.readouterr().err == ""


def test_a_crowd_gets_what_each_would_get_alone_and_leaves_nothing():
    """32 clients, three requests each: those that read, that leave, that are slow, and that send nonsense."""
    words = "the quick brown fox jumps over the lazy dog".split()
    with served(slots=4, queue_size=200) as server, ThreadPoolExecutor(32) as pool:
        slow_may_read, survivors = threading.Event(), []
        lock = threading.Lock()

        def survive(prompt: list[int], new: int, seed: int, got: tuple[str, str]) -> None:
            with lock:
                survivors.append((prompt, new, seed, got))

        def client(number: int) -> None:
            draw = random.Random(number)
            for turn in range(3):
                content, new = " ".join(draw.choices(words, k=draw.randrange(1, 9))), draw.randrange(1, 25)
                seed = 100 * number + turn
                messages = [{"role": "user", "content": content}]
                body = {"messages": messages, "max_tokens": new, "seed": seed, "stream": True}
                kind = ("whole", "stream", "slow", "leave", "leave whole", "nonsense", "openai", "cut")[
                    number % 8
                ]
                if kind == "whole":
                    choice = server.post(prompt=content, max_tokens=new, seed=seed).json()["choices"][0]
                    survive(TOKENIZER.encode(content), new, seed, (choice["text"], choice["finish_reason"]))
                elif kind == "stream":
                    with server.http.stream("POST", CHAT, json=body) as response:
                        survive(chat_ids(messages), new, seed, text_of(events(response.iter_lines())))
                elif kind == "slow":
                    connection = send(server, CHAT, body, buffer=2048)
                    assert slow_may_read.wait(120)
                    chunks = read_all(connection).partition(b"\r\n\r\n")[2].decode().split("\r\n")
                    lines = iter("".join(chunks[1::2]).split("\n"))  # a line with the size before each chunk
                    survive(chat_ids(messages), new, seed, text_of(events(lines)))
                elif kind == "openai":
                    answer = server.openai.chat.completions.create(model="tiny", **{**body, "stream": False})
                    choice = answer.choices[0]
                    survive(chat_ids(messages), new, seed, (choice.message.content, choice.finish_reason))
                elif kind == "nonsense":
                    assert b" 400 " in read_all(send(server, TEXTS, draw.randbytes(200)))[:20]
                else:
                    content_ = json.dumps({**body, "stream": kind == "leave"}).encode()
                    connection = send(server, CHAT, content_[:-9] if kind == "cut" else content_)
                    if kind == "leave":
                        connection.recv(20)
                    connection.close()

        clients = [pool.submit(client, number) for number in range(32)]
        until(lambda: all(one.done() for number, one in enumerate(clients) if number % 8 != 2))
        until(lambda: server.scheduler.running == 0)  # the slow ones do not hold their rows
        slow_may_read.set()
        for one in clients:
            one.result(120)
        until(lambda: idle(server))
        assert len(survivors) == 4 * 4 * 3
        for prompt, new, seed, got in survivors:
            assert got == expected(prompt, new, seed)[:2]
        totals = server.scheduler.totals
        assert totals.requests == totals.finished + totals.cancelled and totals.failed == 0
        left = weakref.WeakSet(server.requests)  # a job is reached from its requests, and they from it
        server.requests.clear()
        gc.collect()
        assert len(left) == 0
