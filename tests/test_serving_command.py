"""`python -m smollm2.serve`: what is wrong is one line before anything is loaded, the end orderly."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from generation_cases import tiny_model
from serving_cases import CHAT, HI, TOKENIZER, httpx2

from smollm2 import serve
from smollm2.cli import run_command
from smollm2.errors import UsageError

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("served") / "tiny-chat"
    tiny_model(vocab_size=TOKENIZER.vocab_size, max_position_embeddings=2048).save_pretrained(folder)
    TOKENIZER.save(folder)
    return folder


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """What `python -m smollm2.serve` says to that, on one line, with the code of wrong usage."""
    assert run_command(serve.main, list(argv)) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    return captured.err


@pytest.fixture
def no_model(monkeypatch):
    def load(args):
        raise AssertionError("nothing is to be loaded")

    monkeypatch.setattr(serve, "load", load)


@pytest.mark.parametrize("argv, words", [
    (["--port", "70000"], "65535"), (["--port", "-1"], "--port"), (["--slots", "0"], "--slots"),
    (["--prefix-cache-mb", "-1"], "--prefix-cache-mb"),
    (["--host", "no.such.host.invalid"], "no.such.host.invalid"), (["--host", "192.0.2.1"], "192.0.2.1"),
    (["--timeout", "0"], "--timeout"), (["--temperature", "-1"], "temperature"), (["--top-p", "0"], "top_p"),
    (["--top-k", "-1"], "top_k"), (["--min-p", "2"], "min_p"), (["--max-tokens", "-1"], "--max-tokens"),
    (["--repetition-penalty", "0"], "repetition_penalty"),
    (["--api-key", " "], "--api-key"), (["--name", ""], "--name"), (["--nonsense"], "--help"),
])  # fmt: skip
def test_what_is_wrong_is_said_before_a_model_is_loaded(no_model, capsys, argv, words):
    assert words in refused(capsys, *argv)


def test_a_port_in_use_is_said_before_a_model_is_loaded(no_model, capsys):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        assert port in (line := refused(capsys, "--port", port)) and "in use" in line


def test_missing_packages_are_named(no_model, capsys, monkeypatch):
    monkeypatch.delitem(sys.modules, "smollm2.serving.server")
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert "uvicorn" in (line := refused(capsys)) and "pip install fastapi 'pydantic>=2.8' " in line


def test_a_model_or_context_that_does_not_fit_is_one_line(checkpoint, capsys, monkeypatch):
    options = "--model", str(checkpoint), "--device", "cpu", "--port", "0"
    assert "1 to 2048 tokens" in refused(capsys, *options, "--context", "4096")
    monkeypatch.setattr("smollm2.serving.scheduler.free_memory", lambda device: 1000)
    assert "one slot of 2,048 tokens" in refused(capsys, *options)


def test_how_much_is_kept_of_texts_that_ended_is_an_option(checkpoint, capsys, monkeypatch):
    given = []

    def scheduler(*parts, prefix_cache_bytes, **options):
        given.append(prefix_cache_bytes)
        raise UsageError("enough")

    monkeypatch.setattr("smollm2.serving.scheduler.Scheduler", scheduler)
    options = "--model", str(checkpoint), "--device", "cpu", "--port", "0"
    for more in ([], ["--prefix-cache-mb", "3"], ["--prefix-cache-mb", "0"]):
        refused(capsys, *options, *more)
    assert given == [512 << 20, 3 << 20, 0]


@pytest.fixture
def given(checkpoint, capsys, monkeypatch):
    """Starts the command with these options, and tells what it would make its application of."""

    def start(*options: str, model: str = "") -> tuple[str, dict[str, Any]]:
        made = []

        def create_app(scheduler, tokenizer, name, **given):
            made.append((name, given))
            raise UsageError("enough")

        monkeypatch.setattr("smollm2.serving.app.create_app", create_app)
        argv = ["--model", model or str(checkpoint), "--device", "cpu", "--port", "0", *options]
        assert run_command(serve.main, argv) == 2
        assert capsys.readouterr().err.endswith("error: enough\n")
        return made[0]

    return start


def test_the_model_is_named_after_its_folder_or_as_told(given, checkpoint, tmp_path, monkeypatch):
    (tmp_path / "linked").symlink_to(checkpoint)
    monkeypatch.chdir(checkpoint)
    for model in (str(checkpoint), f"{checkpoint}/", ".", "./", "../tiny-chat"):
        assert given(model=model)[0] == "tiny-chat"
    assert given(model=str(tmp_path / "linked"))[0] == "linked"
    assert given("--name", "mine/chat", model=".")[0] == "mine/chat"


def test_on_a_loopback_address_without_a_key_other_names_are_refused(given):
    own = ["localhost", "127.0.0.1", "::1"]
    assert given()[1]["hosts"] == [*own, "127.0.0.1"]
    options = "--host", "localhost", "--allow-host", "my.box", "--allow-host", "b"
    assert given(*options)[1]["hosts"] == [*own, "localhost", "my.box", "b"]
    assert given("--api-key", "secret")[1]["hosts"] is given("--host", "0.0.0.0")[1]["hosts"] is None


def test_what_a_request_does_not_say_is_an_option(given, checkpoint, capsys):
    found = given()[1]
    params = found["params"]
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (0.2, 0.9, 40, 0)
    assert params.repetition_penalty == 1 and found["max_tokens"] == 1024
    options = "--temperature 1.5 --top-p 0.5 --top-k 7 --min-p 0.1 --repetition-penalty 1.2 --max-tokens 0"
    found = given(*options.split())[1]
    params = found["params"]
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (1.5, 0.5, 7, 0.1)
    assert params.repetition_penalty == 1.2 and found["max_tokens"] == 0
    options = "--model", str(checkpoint), "--device", "cpu", "--port", "0", "--top-k", "301"
    assert "1 to 291, the size of the vocabulary, got 301" in refused(capsys, *options)


@pytest.mark.skipif(os.name != "posix", reason="signals as POSIX has them")
@pytest.mark.parametrize(
    "signals", [[signal.SIGTERM], [signal.SIGINT, signal.SIGINT]], ids=["term", "int twice"]
)
def test_it_says_where_it_is_and_ends_as_it_is_told(checkpoint, signals):
    """SIGTERM: when what runs is finished. Ctrl-C twice: at once."""
    command = [sys.executable, "-m", "smollm2.serve", "--model", str(checkpoint), "--port", "0", "--verbose"]
    options = ["--device", "cpu", "--dtype", "fp32", "--temperature", "1.5"]
    environment = {**os.environ, "SMOLLM2_API_KEY": "secret"}
    process = subprocess.Popen(
        command + options,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    ready = process.stdout.readline()
    assert ready.startswith("tiny-chat is served at http://127.0.0.1:"), process.communicate()
    address = ready.split()[4].rstrip(";")
    body = {"model": "tiny-chat", "messages": HI, "stream": True}
    key = {"Authorization": "Bearer secret"}
    assert httpx2.post(address + CHAT, json=body, timeout=60).status_code == 401
    got = []
    with httpx2.stream("POST", address + CHAT, json=body, headers=key, timeout=120) as response:
        lines = (line for line in response.iter_lines() if line)
        got.append(next(lines))
        for number in signals:
            process.send_signal(number)
        with suppress(httpx2.RemoteProtocolError):  # cut off by the second Ctrl-C
            got += lines
    out, error = process.communicate(timeout=60)
    assert process.returncode == (0 if len(signals) == 1 else 130)
    if len(signals) == 1:
        *_, last, done = got
        assert done == "data: [DONE]"
        end = json.loads(last.removeprefix("data: "))["choices"][0]["finish_reason"]
        assert end in ("stop", "length")
    asked = [line for line in error.splitlines() if "POST" in line]
    assert out == "" and [line.split()[-1] for line in asked] == ["401", "200"]
    assert "Traceback" not in error
