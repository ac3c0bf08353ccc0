"""Text on stdin beside a prompt: it is said that nobody reads it, and it stays there for others."""

from __future__ import annotations

import os
import sys

import pytest

import smollm2.generate  # noqa: F401 - the command, which smollm2.generate the function hides
from smollm2 import chat
from smollm2.cli import run_command

WORDS = "standard input is not read, as there is a prompt; leave the prompt out to use it"


@pytest.fixture(params=["pipe", "file"])
def text(request, tmp_path):
    """stdin with "hello" in it, as a pipe or a file that was opened."""
    if request.param == "pipe":
        descriptor, end = os.pipe()
        os.write(end, b"hello")
        os.close(end)
    else:
        (tmp_path / "text").write_bytes(b"hello")
        descriptor = os.open(tmp_path / "text", os.O_RDONLY)
    with open(descriptor) as stream:
        yield stream


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_it_is_said_and_the_text_stays(command, text, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", text)
    main = sys.modules[f"smollm2.{command}"].main
    assert run_command(main, ["a prompt", "--model", "/no/where"]) == 1
    assert WORDS in capsys.readouterr().err.splitlines()
    assert text.read() == "hello"
    run_command(main, ["a prompt", "--model", "/no/where"])
    assert WORDS not in capsys.readouterr().err, "nothing is left there"


def test_an_empty_stdin_is_not_worth_a_word(monkeypatch, capsys):
    for stream in (open(os.devnull), open(os.pipe()[0])):
        monkeypatch.setattr(sys, "stdin", stream)
        run_command(chat.main, ["a prompt", "--model", "/no/where"])
        assert WORDS not in capsys.readouterr().err
        stream.close()
