"""`python -m bench.serve`: at toy size beside a stand-in for a server, and with our own server."""

import json
import sys
from types import SimpleNamespace

import pytest
from in_process import printed

from bench import serve
from bench.clients import Answer, Load, Server, talk
from smollm2.errors import LoadError, UsageError

# A server that gives every question its last word, four times. It takes llama-server's flags and ours.
STAND_IN = """#!{python}
import json, sys, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        body = json.dumps({{"data": [{{"id": "stand-in"}}]}}).encode()
        self.send_response(200)
        self.send_header("Content-Length", len(body))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert asked["model"] == "stand-in" and asked["stream"] and asked["temperature"] == 0
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        word = asked["messages"][-1]["content"].split()[-1]
        pieces = ["", word, word + " ", word, word][: asked["max_tokens"] + 1]
        for piece in pieces:
            self.event({{"choices": [{{"delta": {{"content": piece}}, "finish_reason": None}}]}})
            time.sleep(0.001)
        self.event({{"choices": [{{"delta": {{}}, "finish_reason": "length"}}]}})
        usage = {{"prompt_tokens": 9, "completion_tokens": len(pieces) - 1}}
        self.event({{"choices": [], "usage": {{**usage, "prompt_tokens_details": {{"cached_tokens": 5}}}}}})
        for data in (b"data: [DONE]\\n\\n", b""):
            self.chunk(data)

    def event(self, content):
        self.chunk(b"data: " + json.dumps(content).encode() + b"\\n\\n")

    def chunk(self, data):
        self.wfile.write(b"%x\\r\\n%s\\r\\n" % (len(data), data))

if "--version" in sys.argv:
    print("version: 7 (stand-in)")
elif "--fail" in sys.argv:
    sys.exit("no room for the model")
else:
    port = int(sys.argv[sys.argv.index("--port") + 1])
    ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


@pytest.fixture
def stand_in(tmp_path):
    """The path of a program that serves without a model."""
    path = tmp_path / "llama-server"
    path.write_text(STAND_IN.format(python=sys.executable), encoding="utf-8")
    path.chmod(0o755)
    return path


def test_both_servers_are_asked_the_same_in_turns_and_every_count_has_its_figures(
    stand_in, tmp_path, monkeypatch
):
    asked, real = [], serve.talk

    def noted(server, conversations, max_tokens):
        asked.append((server.port, conversations))
        return real(server, conversations, max_tokens)

    monkeypatch.setattr(serve, "talk", noted)
    monkeypatch.setattr(serve, "python", lambda module, *flags: [str(stand_in), *map(str, flags)])
    variants, path = ("compiled int8", "llama.cpp Q8_0"), tmp_path / "serve.json"
    flags = ("--tiny", "--clients", 3, 1, "--rounds", 2, "--max-tokens", 3, "--json", path)
    stdout = printed(serve.main, *flags, "--llama-server", stand_in, "--variants", *variants)
    content = json.loads(path.read_text(encoding="utf-8"))
    section = content["serve"]
    assert section["peers"] == {"llama-server": {"version": "7 (stand-in)", "used": True, "why": None}}
    assert {"device", "versions", "commit"} <= content.keys() and "toy" in section["model"]
    found = [(row["clients"], row["variant"]) for row in section["rows"]]
    assert found == [(count, name) for count in (1, 3) for name in variants]
    for row in section["rows"]:
        assert row["answers"] == 2 * 2 * row["clients"] and row["tokens"] == 3 * row["answers"]
        assert (row["prompt_tokens"], row["cached_tokens"], row["ended_early"]) == (9, 5, 0)
        assert 0 < row["first_token_ms"] <= row["first_token_p95_ms"] and row["same_as_fewest_clients"] == 1.0
        assert row["client_tokens_per_second"] > 0 and len(row["rounds"]) == 2
    assert "3 clients" in stdout and "compiled int8 over llama.cpp Q8_0: " in stdout

    for first in (0, 6):  # two to warm up, then in turns
        ports, questions = zip(*asked[first : first + 6], strict=True)
        assert ports[0] != ports[1] and ports[2:] == ports[:2] * 2
        assert questions[2] == questions[3] and questions[4] == questions[5]
    # one client asks what the first of three does
    assert [talks[0] for talks in asked[8][1:]] == asked[2][1]
    words = [turn[1]["content"] for _, talks in asked[6::2] for talk in talks for turn in talk]
    assert len({*words}) == len(words) == 3 + 2 * 3 * 2, "no question is asked twice"


def test_our_own_server_answers_clients_that_come_together(tmp_path):
    for package in ("fastapi", "uvicorn"):
        pytest.importorskip(package, reason=f"serving needs {package}")
    path = tmp_path / "serve.json"
    flags = ("--tiny", "--clients", 3, "--rounds", 1, "--max-tokens", 4, "--variants", "compiled fp32")
    stdout = printed(serve.main, *flags, "--json", path)
    (row,) = json.loads(path.read_text(encoding="utf-8"))["serve"]["rows"]
    assert "failed" not in row, stdout
    assert row["answers"] == 6 and row["answers"] < row["tokens"] <= 4 * row["answers"]
    assert 9 < row["cached_tokens"] < row["prompt_tokens"], "the system prompt was read once"


def test_a_server_that_does_not_start_is_a_row_with_its_reason(stand_in, monkeypatch):
    monkeypatch.setattr(serve, "python", lambda *_: [str(stand_in), "--fail"])
    stdout = printed(serve.main, "--tiny", "--clients", 1, "--rounds", 1, "--variants", "compiled bf16")
    assert "the server ended with exit code 1: no room for the model" in stdout
    assert "not measured: llama-server" in stdout


def test_what_is_no_answer_is_an_error(stand_in):
    with Server(lambda port: [str(stand_in), "--port", str(port)], {}) as server:
        server.model = "another"
        with pytest.raises(LoadError, match="no answer: "):
            talk(server, [[serve.question(0)]], 3)


def load(*texts, seconds=2.0):
    """A load of clients with one answer each, of a token for each word."""
    answers = [[Answer(text, len(text.split()), 0.5, 1.5, "length")] for text in texts]
    return Load(answers, seconds, 0.1)


def test_rates_are_of_what_the_clients_saw():
    row = serve.Row([load("a b c", "a b c d e"), load("a b c", "a b c d e", seconds=1.0)])
    found = serve.facts(row)
    assert found["rounds"] == [4.0, 8.0] and found["tokens_per_second"] == 6.0
    assert found["client_tokens_per_second"] == 3.0  # 2 and 4 tokens in a second behind the first
    assert (found["first_token_ms"], found["first_token_p95_ms"]) == (500.0, 500.0)


def test_texts_are_compared_question_by_question():
    tokenizer = SimpleNamespace(encode=lambda text, special: text.split())
    fewest, row = serve.Row([load("a b c d")]), serve.Row([load("a b c d", "x")])
    other = serve.Row([load("a b x d", "x")])
    assert (serve.same_share(row, fewest), serve.same_share(other, fewest)) == (1.0, 0.0)
    assert serve.agreement(row, other, tokenizer) == 0.75


def test_what_was_not_reached_is_said():
    row = {"clients": 4, "client_tokens_per_second": 9.0, "first_token_p95_ms": 9.0, "clients_cpu": 0.1}
    faster = {**row, "client_tokens_per_second": 10.0}
    rows = [
        {**row, "variant": "compiled bf16", "tokens_per_second": 90.0, "first_token_ms": 20.0},
        {**faster, "variant": "llama.cpp F16", "tokens_per_second": 90.0, "first_token_ms": 30.0},
    ]
    ratios = "1.00 x the tokens/s, 0.90 x of one client, first 1.50 x as soon, wanted 1.0 x"
    assert f"compiled bf16 over llama.cpp F16: {ratios}: NOT REACHED" in serve.show(4, rows)
    rows[1]["client_tokens_per_second"] = 9.0
    assert serve.show(4, rows).endswith(ratios.replace("0.90", "1.00"))


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--clients", "0"], "--clients: expected at least 1, got 0"),
        (["--max-tokens", "0"], "--max-tokens: expected at least 1, got 0"),
        (["--device", "cuda"], "both servers are measured on the CPU, got cuda"),
        (["--tiny", "--llama-server", "/absent"], "--llama-server /absent: expected a program, found none"),
    ],
)
def test_wrong_usage_is_one_line(flags, message):
    with pytest.raises(UsageError, match=message):
        serve.main(flags)
