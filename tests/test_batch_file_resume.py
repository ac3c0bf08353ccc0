"""A command that is killed or interrupted and given again leaves what an undisturbed one leaves; one with
other options is refused.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from generation_cases import write_checkpoint

from smollm2 import SmolLM2ForCausalLM, load_tokenizer
from smollm2.errors import LoadError, UsageError
from smollm2.generation.batch_file import run_file
from smollm2.sampling import SamplingParams

ROOT = Path(__file__).resolve().parent.parent
PARAMS = SamplingParams(temperature=1.0, top_k=50, suppress_tokens=(1, 2))
OPTIONS = dict(params=PARAMS, max_new_tokens=40)
COMMAND = """
import signal, sys
from smollm2.cli import run_command
from smollm2.generation import batch_file
from smollm2.pretrained.load import load_model, load_tokenizer
from smollm2.sampling import SamplingParams

signal.signal(signal.SIGINT, signal.default_int_handler)  # the child of a background shell would ignore it
checkpoint, prompts, output, pause = sys.argv[1:]

class Bar(batch_file.tqdm):
    # Waits for a signal after so many lines, so that no speed decides where it comes.
    lines = 0

    def update(self):
        super().update()
        self.lines += 1
        if self.lines == int(pause):
            open(output + ".paused", "w").close()
            signal.pause()

def main(argv):
    batch_file.tqdm = Bar
    params = SamplingParams(temperature=1.0, top_k=50, suppress_tokens=(1, 2))
    batch_file.run_file(load_model(checkpoint, "torch", "cpu"), load_tokenizer(checkpoint), prompts, output,
                        params=params, max_new_tokens=40, slots=2)
    return 0

sys.exit(run_command(main))
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    lines = [{"prompt": "the quick brown fox " * (1 + index % 5) + str(index)} for index in range(16)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def loaded(checkpoint):
    return SmolLM2ForCausalLM.from_pretrained(checkpoint, "torch", "cpu").eval(), load_tokenizer(checkpoint)


@pytest.fixture(scope="module")
def whole(loaded, prompts, tmp_path_factory):
    """The output of an undisturbed run."""
    output = tmp_path_factory.mktemp("whole") / "out.jsonl"
    run_file(*loaded, prompts, output, **OPTIONS)
    return output


@pytest.fixture(scope="module")
def undisturbed(whole):
    return in_order(whole)


def in_order(path: Path) -> list[str]:
    return sorted(path.read_text(encoding="utf-8").splitlines(), key=lambda line: json.loads(line)["index"])


def start(checkpoint: Path, prompts: Path, output: Path, pause: int = 0) -> subprocess.Popen[str]:
    """The command; it waits for a signal when it has written `pause` lines (0: never)."""
    command = [sys.executable, "-c", COMMAND, *map(str, (checkpoint, prompts, output, pause))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True)


def wait_until_paused(process: subprocess.Popen[str], output: Path) -> None:
    marker, deadline = output.with_name(output.name + ".paused"), time.monotonic() + 600
    while not marker.exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    marker.unlink()


def test_killed_and_given_again_it_gives_the_undisturbed_lines(checkpoint, prompts, undisturbed, tmp_path):
    output = tmp_path / "out.jsonl"
    for before, lines in ((0, 2), (2, 5)):
        process = start(checkpoint, prompts, output, lines - before)
        wait_until_paused(process, output)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert output.read_bytes().count(b"\n") == lines
    with output.open("ab") as file:
        file.write(undisturbed[0].encode()[:-20])  # as if the kill had come within a write
    process = start(checkpoint, prompts, output)
    _, error = process.communicate(timeout=600)
    assert process.returncode == 0, error
    assert "5 of 16 prompts are answered; going on with 11" in error
    assert in_order(output) == undisturbed


def test_interrupted_it_says_how_to_go_on(checkpoint, prompts, undisturbed, loaded, tmp_path):
    output = tmp_path / "out.jsonl"
    process = start(checkpoint, prompts, output, 2)
    wait_until_paused(process, output)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=600)
    assert process.returncode == 130 and "Traceback" not in error
    assert f"2 of 16 prompts are answered in {output}; the same command goes on from there" in error
    summary = run_file(*loaded, prompts, output, slots=3, **OPTIONS)
    assert (summary.resumed, summary.rows) == (2, 14)
    assert in_order(output) == undisturbed


@pytest.fixture
def finished(whole, tmp_path):
    """A copy of it, with its record."""
    return Path(shutil.copytree(whole.parent, tmp_path / "finished")) / whole.name


def test_a_finished_output_is_left_as_it_is(loaded, prompts, finished, undisturbed, capsys):
    summary = run_file(*loaded, prompts, finished, **OPTIONS)
    assert (summary.rows, summary.resumed) == (0, 16)
    assert "16 of 16 prompts are answered; going on with 0" in capsys.readouterr().err
    assert in_order(finished) == undisturbed


@pytest.fixture
def begun(finished, undisturbed):
    """An output with three of the sixteen lines."""
    finished.write_text("".join(line + "\n" for line in undisturbed[3:6]), encoding="utf-8")
    return finished


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(max_new_tokens=41), r"with max_new_tokens \(40, now 41\)"),
        (dict(seed=1), r"with seed \(0, now 1\)"),
        (dict(stop=["x"]), r'with stop \(\[\], now \["x"\]\)'),
        (dict(params=dataclasses.replace(PARAMS, temperature=0.5)), r"with temperature \(1.0, now 0.5\)"),
        (dict(made_with={"quantize": "int8"}), r'with quantize \(null, now "int8"\)'),
    ],
)
def test_other_options_are_refused_by_name(loaded, prompts, begun, change, message):
    before = begun.read_bytes()
    with pytest.raises(UsageError, match=message):
        run_file(*loaded, prompts, begun, **OPTIONS | change)
    assert begun.read_bytes() == before


def test_other_prompts_and_another_model_are_refused(loaded, prompts, begun, tmp_path):
    model, tokenizer = loaded
    other = tmp_path / "other.jsonl"
    other.write_bytes(prompts.read_bytes() + b'{"prompt": "one more"}\n')
    message = r"with other prompts \(\w{16}, now \w{16}\); go on as it was begun, choose another --output"
    with pytest.raises(UsageError, match=message):
        run_file(model, tokenizer, other, begun, **OPTIONS)
    torch.manual_seed(1)
    another = SmolLM2ForCausalLM(model.config, "torch").eval()
    with pytest.raises(UsageError, match="with another model"):
        run_file(another, tokenizer, prompts, begun, **OPTIONS)


def test_an_output_that_is_not_ours_or_is_damaged_is_refused(loaded, prompts, begun, undisturbed, tmp_path):
    foreign = tmp_path / "notes.jsonl"
    foreign.write_text("mine\n")
    with pytest.raises(UsageError, match=r"not empty, and without notes\.jsonl\.run\.json it cannot be"):
        run_file(*loaded, prompts, foreign, **OPTIONS)
    assert foreign.read_text() == "mine\n"
    for line in ("\0\0\0", '{"index": 99}', '{"index": "3"}', "[]", undisturbed[3]):
        begun.write_text(f"{undisturbed[3]}\n{line}\n{undisturbed[4]}\n", encoding="utf-8")
        with pytest.raises(LoadError, match=r"out\.jsonl, line 2: not a line of this command"):
            run_file(*loaded, prompts, begun, **OPTIONS)


def test_a_deleted_output_begins_anew_with_other_options(loaded, prompts, begun):
    begun.unlink()
    summary = run_file(*loaded, prompts, begun, params=SamplingParams(), max_new_tokens=2)
    assert (summary.rows, summary.resumed) == (16, 0)


def test_two_commands_cannot_write_one_output(loaded, prompts, begun):
    fcntl = pytest.importorskip("fcntl", reason="this system has no file locks of this kind")
    with begun.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UsageError, match="another command is writing to it"):
            run_file(*loaded, prompts, begun, **OPTIONS)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a disk that is always full")
def test_a_full_disk_is_said(loaded, prompts, tmp_path, monkeypatch):
    full = os.open("/dev/full", os.O_WRONLY)
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(full, data))
    with pytest.raises(LoadError, match="cannot be written: No space left on device; make room"):
        run_file(*loaded, prompts, tmp_path / "out.jsonl", params=PARAMS, max_new_tokens=2)
    monkeypatch.undo()
    os.close(full)
