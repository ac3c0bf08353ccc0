"""The chat on a terminal: editing, history, commands, Ctrl-C, and what comes of pipes."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import select
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from chat_cases import chat_checkpoint, conversation
from generation_cases import write_checkpoint
from in_process import printed

from smollm2 import chat
from smollm2.chat import Chat, open_history, open_prompt
from smollm2.cli import run_command
from smollm2.generate import main as generate_main
from smollm2.pretrained.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parent.parent
READY = b"\x1b[?2004h"  # the prompt is there: pasted text is bracketed from now on


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SMOLLM2_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return chat_checkpoint(tmp_path_factory.mktemp("chat"))


def typed(keys: str) -> list[str]:
    """What the prompt reads when these keys are pressed, up to Ctrl-D."""
    input_, output = pytest.importorskip("prompt_toolkit.input"), pytest.importorskip("prompt_toolkit.output")
    lines = []
    with input_.create_pipe_input() as pipe:
        pipe.send_text(keys + "\x04")
        read = open_prompt(input=pipe, output=output.DummyOutput())
        with contextlib.suppress(EOFError):
            while True:
                try:
                    lines.append(read())
                except KeyboardInterrupt:
                    lines.append("^C")
    return lines


@pytest.mark.parametrize(
    ("keys", "lines"),
    [
        ("Frence\x1b[D\x1b[D\x1b[D\x7fa\r", ["France"]),
        ("first\\\rsecond\r", ["first\nsecond"]),
        ("first\x1b\rsecond\r", ["first\nsecond"]),
        ('"""first\rsecond"""\r', ['"""first\nsecond"""']),
        ("\x1b[200~first\nsecond\x1b[201~\r", ["first\nsecond"]),
        ("half a line\x03whole\r", ["whole"]),
        ("\x03\x03", ["^C", "^C"]),
    ],
)  # fmt: skip
def test_a_line_is_edited_before_it_is_sent(keys, lines):
    assert typed(keys) == lines


def test_ctrl_z_suspends_the_chat_and_types_nothing(monkeypatch):
    application = pytest.importorskip("prompt_toolkit.application").Application
    suspended = []
    monkeypatch.setattr(application, "suspend_to_background", lambda self: suspended.append(self))
    assert typed("the \x1afox\r") == ["the fox"] and len(suspended) == 1


def test_a_terminal_that_moves_no_cursor_sends_lines(monkeypatch, capsys):
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setattr(sys, "stdin", io.StringIO('one\ntwo \\\nlines\n"""three\nfour"""\nlast'))
    read = open_prompt()
    assert [read() for _ in range(4)] == ["one", "two \nlines", '"""three\nfour"""', "last"]
    with pytest.raises(EOFError):
        read()
    out, err = capsys.readouterr()
    assert (out, err) == ("", "> > " + "  > " + "  > > ")


def test_what_was_typed_is_there_next_time_for_its_owner_alone(cache):
    assert typed("the fox\r") == ["the fox"]
    assert list(open_history().load_history_strings()) == ["the fox"]
    assert stat.S_IMODE((cache / chat.HISTORY).stat().st_mode) == 0o600


def test_without_a_place_for_the_history_there_is_none(cache):
    cache.write_text("a file where the folder should be")
    assert typed("the fox\r") == ["the fox"]
    assert list(open_history().load_history_strings()) == []


def script(*lines: str | type[BaseException]) -> Callable[[], str]:
    """A prompt at which these lines are typed, then Ctrl-D; a KeyboardInterrupt among them is Ctrl-C."""
    left: Iterator[str | type[BaseException]] = iter((*lines, EOFError))

    def read() -> str:
        line = next(left)
        if isinstance(line, str):
            return line
        raise line

    return read


def transcript(capsys: pytest.CaptureFixture[str], talk, *lines) -> tuple[str, str]:
    """What the chat prints on stdout and on stderr."""
    assert Chat(talk).run(script(*lines)) == 0
    out, error = capsys.readouterr()
    return out, error.partition("\n")[2]


def test_answers_go_to_stdout_and_all_else_to_stderr(capsys):
    out, error = transcript(capsys, conversation("a"), "the fox", "", "the dog")
    assert (out, error) == ("aaaaaa\naaaaaa\n", "the answer was cut at 6 tokens (--max-new-tokens)\n" * 2)


def test_ctrl_c_stops_an_answer_and_what_was_said_stays(capsys, monkeypatch):
    talk = conversation("a")
    engine, decode, left = talk.engine, talk.engine.decode, iter("xx")

    def decoding(*arguments):
        if next(left, None) is None:
            signal.raise_signal(signal.SIGINT)
        return decode(*arguments)

    monkeypatch.setattr(engine, "decode", decoding)
    read = script("the fox", "the dog")

    def reading() -> str:
        line = read()
        if line == "the dog":
            monkeypatch.undo()
        return line

    assert Chat(talk).run(reading) == 0
    out, error = capsys.readouterr()
    assert out == "aaa\naaaaaa\n" and error.count("stopped; what was said stays") == 1
    assert [message["content"] for message in talk.messages] == ["the fox", "aaa", "the dog", "aaaaaa"]
    assert talk.read < talk.prompt_tokens, "the keys and values of the first turn were kept"


def test_ctrl_c_twice_leaves_and_once_does_not(capsys):
    out, error = transcript(capsys, conversation("a"), KeyboardInterrupt, "the fox", KeyboardInterrupt)
    assert out == "aaaaaa\n" and error.count("Ctrl-C once more") == 2
    out, _ = transcript(capsys, conversation("a"), KeyboardInterrupt, KeyboardInterrupt, "never read")
    assert out == ""


def test_commands(capsys, tmp_path):
    path = tmp_path / "talk.json"
    talk = conversation("a")
    lines = [
        "/system be brief",
        "the fox",
        f"/save {path}",
        "/clear",
        "/retry",
        f"/load {path}",
        "/regen",
        "/bye",
        "x",
    ]
    out, error = transcript(capsys, talk, *lines)
    assert out == "aaaaaa\n" * 2
    assert [message["role"] for message in json.loads(path.read_text())["messages"]] == [
        "system",
        "user",
        "assistant",
    ]
    for words in (
        "system prompt: be brief",
        f"3 messages saved to {path}",
        "the conversation is forgotten",
        "error: retry: expected a question before it, got none yet",
        f"3 messages loaded from {path}",
        "every answer to a question is the same",
    ):
        assert words in error


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("/help", "/retry"),
        ("/?", "Ctrl-D leaves"),
        ("/hlep", "error: unknown command /hlep; /help lists them"),
        ("/save", "error: /save: expected the name of a file, got none"),
        ("/load /", "error: /: not a readable JSON file"),
        ("/system", "system prompt: that of the chat template"),
        ('/system ""', "system prompt: none"),
        ("x" * 900, "error: message: expected less than 512 tokens"),
        ("\ud800", "error: tokenizer: expected text that UTF-8 can encode"),
    ],
)
def test_what_is_no_question_is_answered_in_words_and_the_conversation_goes_on(capsys, line, words):
    out, error = transcript(capsys, conversation("a"), line, "the fox")
    assert out == "aaaaaa\n" and words in error and "Traceback" not in error


def test_the_template_s_own_system_prompt_comes_back(capsys):
    talk = conversation("a", system="")
    _, error = transcript(capsys, talk, "/system", "/system be brief", "/system default")
    assert error.splitlines() == [
        f"system prompt: {one}" for one in ("none", "be brief", "that of the chat template")
    ]
    assert talk.messages == []


def test_a_path_is_a_question_and_quotes_are_not_part_of_one(capsys):
    talk = conversation("a")
    transcript(capsys, talk, "/etc/passwd is what?", '"""one\ntwo"""')
    assert [message["content"] for message in talk.messages[::2]] == ["/etc/passwd is what?", "one\ntwo"]


def test_turns_that_are_forgotten_are_counted(capsys):
    talk = conversation("a", positions=128)
    for count, words in ((1, "turn is"), (3, "3 turns are")):
        talk.dropped = count
        Chat(talk).answer(piece for piece in "a")
        assert f"the context is full: the oldest {words} forgotten\n" in capsys.readouterr().err
    _, error = transcript(capsys, talk, *["the fox"] * 6)
    assert "the context is full" in error


def test_control_characters_do_not_reach_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    talk = conversation("a")
    assert Chat(talk).answer(piece for piece in ("a\x1b[2J", "\tb\n\x9b", "\x07"))
    assert capsys.readouterr().out == "a[2J\tb\n\n"


def piped(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))


def test_all_of_stdin_is_one_message(monkeypatch, checkpoint, capsys):
    for content, words in ((b"the fox\nthe dog\n", []), (b"never read", ["the", "fox"]), (b"the fox", ["-"])):
        piped(monkeypatch, content)
        flags = ["--model", checkpoint, "--max-new-tokens", "4", "--device", "cpu", "--dtype", "fp32", *words]
        assert printed(chat.main, *flags) == "aaaa\n"
        assert capsys.readouterr().err == "the answer was cut at 4 tokens (--max-new-tokens)\n"


def test_a_single_answer_has_an_end_whatever_the_model_says(monkeypatch, checkpoint, capsys):
    monkeypatch.setattr(chat, "SINGLE", 5)
    assert printed(chat.main, "--model", checkpoint, "--device", "cpu", "--dtype", "fp32", "fox") == "aaaaa\n"
    assert capsys.readouterr().err == "the answer was cut at 5 tokens (--max-new-tokens)\n"


@pytest.mark.parametrize(
    ("content", "code", "words"),
    [
        (b" \n", 2, "message: expected some text, got none"),
        (b"x\n\xff", 1, "standard input, line 2: expected text"),
    ],
)
def test_stdin_that_is_no_message_is_refused_before_anything_is_loaded(
    monkeypatch, capsys, content, code, words
):
    piped(monkeypatch, content)
    assert run_command(chat.main, ["--model", "absent"]) == code
    assert words in capsys.readouterr().err


def test_a_model_without_a_template_is_refused_in_one_line(monkeypatch, capsys, tmp_path):
    write_checkpoint(tmp_path / "plain")
    assert run_command(chat.main, ["--model", str(tmp_path / "plain"), "--device", "cpu", "hello"]) == 2
    error = capsys.readouterr().err
    assert "no chat template" in error and error.count("\n") == 1


def test_generate_reads_stdin_and_hands_conversations_to_chat(monkeypatch, checkpoint, capsys):
    flags = "--model", checkpoint, "--max-new-tokens", "4", "--device", "cpu", "--dtype", "fp32"
    for words, expected in (([], "the foxaaaa\n"), (["-"], "the foxaaaa\n"), (["--chat"], "aaaa\n")):
        piped(monkeypatch, b"the fox\n")
        assert printed(generate_main, *flags, *words) == expected
    read = []
    encode = Tokenizer.encode
    monkeypatch.setattr(Tokenizer, "encode", lambda self, *text: read.extend(text) or encode(self, *text))
    assert printed(generate_main, *flags, "--chat", "--system", "be brief", "the fox") == "aaaa\n"
    start = "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nthe fox<|im_end|>\n"
    assert start + "<|im_start|>assistant\n" in read
    assert "the answer was cut at 4 tokens" in capsys.readouterr().err
    given = []
    monkeypatch.setattr(chat, "main", lambda argv: given.append(argv) or 0)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys, "stdin", type("Terminal", (), {"isatty": lambda self: True})())
    assert printed(generate_main, "--chat", "--temperature", "0") == "" and given == [["--temperature", "0"]]
    assert run_command(generate_main, []) == 2, "nothing to continue on a terminal"


def test_an_instruct_model_given_a_plain_prompt_on_a_terminal_says_how_to_chat(
    monkeypatch, checkpoint, capsys
):
    flags = "--model", checkpoint, "--max-new-tokens", "2", "--device", "cpu", "the fox"
    hint = "this model answers questions: add --chat, or converse with smollm2 chat\n"
    printed(generate_main, *flags)
    assert hint not in capsys.readouterr().err
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    printed(generate_main, *flags)
    assert capsys.readouterr().err.startswith(hint)


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_a_whole_conversation_in_a_terminal(checkpoint, cache):
    """Ctrl-C in an answer without end, a second question, Ctrl-D."""
    fcntl, pty, termios = map(importlib.import_module, ("fcntl", "pty", "termios"))
    main, other = pty.openpty()
    flags = "--model", str(checkpoint), "--device", "cpu", "--top-k", "1"
    command = [sys.executable, "-m", "smollm2.chat", *flags]
    environment = {**os.environ, "SMOLLM2_CACHE": str(cache), "TERM": "xterm", "NO_COLOR": "1"}
    environment["PROMPT_TOOLKIT_NO_CPR"] = "1"  # nobody answers where the cursor is
    seen = b""

    def wait_for(words: bytes) -> None:
        """Returns when they are on the screen, after what was waited for before."""
        nonlocal seen
        while words not in seen:
            assert select.select([main], [], [], 300)[0], seen
            seen += os.read(main, 4096)
        seen = seen[seen.index(words) + len(words) :]

    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdin=other, stdout=other, stderr=other,
        start_new_session=True, preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    ) as process:  # fmt: skip
        os.close(other)
        try:
            wait_for(READY)
            os.write(main, b"the fox\r")
            wait_for(b"aaa")
            os.write(main, b"\x03")
            wait_for(b"stopped; what was said stays")
            wait_for(READY)
            os.write(main, b"/save " + os.fsencode(cache / "talk.json") + b"\r")
            wait_for(b"2 messages saved")
            wait_for(READY)
            os.write(main, b"\x04")
            assert process.wait(300) == 0
        finally:
            process.kill()
    os.close(main)
    first, second = json.loads((cache / "talk.json").read_text())["messages"]
    assert first["content"] == "the fox" and set(second["content"]) == {"a"}
