"""Commands whose stdin, stdout and stderr are closed, full, narrow in encoding or left by their reader, and
Ctrl-C while they import torch.
"""

from __future__ import annotations

import contextlib
import io
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

import pytest

from smollm2.cli import run_command

ROOT = Path(__file__).resolve().parent.parent
FULL = Path("/dev/full")
needs_full = pytest.mark.skipif(not FULL.exists(), reason="needs /dev/full, a device that is always full")


@contextlib.contextmanager
def stream(kind: str) -> Iterator[TextIO]:
    """A text stream on a descriptor of its own."""
    if kind == "left":
        reader, writer = os.pipe()
        os.close(reader)
    else:
        names = {"closed": os.devnull, "full": FULL}
        writer = os.open(names[kind], os.O_RDONLY if kind == "closed" else os.O_WRONLY)
    with open(writer, "w", encoding="utf-8") as opened:
        yield opened


def command(steps: list[int]) -> Callable[[object], int]:
    """Prints to both streams in every step; appends what it has done to `steps`."""

    def main(argv: object) -> int:
        for step in range(3):
            print("a fact", file=sys.stderr, flush=True)
            print("a line", flush=True)
            steps.append(step)
        return 0

    return main


@pytest.mark.parametrize(
    ("kind", "code", "reason"),
    [
        pytest.param("full", 1, "No space left on device", marks=needs_full),
        ("closed", 1, "Bad file descriptor"),
        ("left", 141, None),
    ],
)
def test_a_stdout_that_takes_no_text_ends_a_command_with_a_code(monkeypatch, capsys, kind, code, reason):
    steps = []
    with stream(kind) as out:
        monkeypatch.setattr(sys, "stdout", out)
        assert run_command(command(steps), []) == code
        print("what Python flushes at exit", file=out, flush=True)
    expected = "" if reason is None else f"error: standard output: cannot be written: {reason}\n"
    assert capsys.readouterr().err == "a fact\n" + expected
    assert steps == []


def test_text_that_only_the_exit_would_flush_is_not_lost_in_silence(monkeypatch, capsys):
    with stream("closed") as out:
        monkeypatch.setattr(sys, "stdout", out)
        assert run_command(lambda argv: print("in the buffer") or 0, []) == 1
    assert capsys.readouterr().err == "error: standard output: cannot be written: Bad file descriptor\n"


@pytest.mark.parametrize("kind", [pytest.param("full", marks=needs_full), "closed", "left"])
def test_a_stderr_that_takes_no_text_changes_nothing(monkeypatch, capsys, kind):
    steps = []
    with stream(kind) as err:
        monkeypatch.setattr(sys, "stderr", err)
        assert run_command(command(steps), []) == 0
        print("what Python flushes at exit", file=err, flush=True)
    assert capsys.readouterr().out == "a line\n" * 3
    assert steps == [0, 1, 2]


def test_a_broken_pipe_that_is_not_stdout_is_a_failure(capsys):
    def main(argv: object) -> int:
        raise BrokenPipeError(32, "Broken pipe")  # of a worker, say

    assert run_command(main, []) == 1
    assert "error: BrokenPipeError" in capsys.readouterr().err


@pytest.mark.parametrize(("encoding", "shown"), [("ascii", b"? ?"), ("latin-1", b"\xe9 ?")])
def test_a_character_that_the_encoding_lacks_is_a_question_mark(monkeypatch, encoding, shown):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding))
    assert run_command(lambda argv: print("é \N{GRINNING FACE}", end="") or 0, []) == 0
    assert written.getvalue() == shown


CLOSED = """
import os, runpy, sys
for number in (0, 1, 2): os.close(number)
sys.stdin = sys.stdout = sys.stderr = None   # as Python finds them when it starts without
from smollm2.streams import open_missing
open_missing()
numbers = [stream.fileno() for stream in (sys.stdin, sys.stdout, sys.stderr)]
facts = numbers, sys.stdin.read(), sys.stdin.isatty(), print("lost", file=sys.stderr, flush=True)
try:
    print("lost", flush=True)
except OSError as error:
    open(sys.argv[1], "w").write(repr((facts, error.errno)))
    os._exit(0)
"""


def test_closed_streams_are_opened_with_their_own_numbers(tmp_path):
    """So that no checkpoint takes the number of stdout."""
    report = tmp_path / "report"
    subprocess.run([sys.executable, "-c", CLOSED, report], cwd=ROOT, check=True, timeout=600)
    assert report.read_text(encoding="utf-8") == "(([0, 1, 2], '', False, None), 9)"


INTERRUPTED = """
import os, signal, sys, types
sys.path.insert(0, os.getcwd())
torch = types.ModuleType("torch")
torch.__getattr__ = lambda name: signal.raise_signal(signal.SIGINT)   # Ctrl-C while torch is imported
sys.modules["torch"] = torch
import runpy
sys.argv[0] = "-m"
runpy.run_module(sys.argv[1], run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize("module", ["smollm2.generate", "smollm2.perplexity", "train.run", "bench.kernels"])
def test_ctrl_c_during_the_imports_is_quiet(module):
    command = [sys.executable, "-c", INTERRUPTED, module]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_a_command_that_runs_is_interrupted_as_before(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["generate.py"])
    before = signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # as the imports leave it
    try:
        assert run_command(lambda argv: signal.raise_signal(signal.SIGINT) or 0) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().err == "\ninterrupted\n"
