"""Texts and models given to commands: byte order marks, pipes, folders, binary files, folders of runs."""

from __future__ import annotations

import codecs
import hashlib
import json
import os
import shutil
import threading
from pathlib import Path

import pytest
import torch
from generation_cases import let_it_say, tiny_model, tiny_tokenizer, write_checkpoint

from smollm2 import SmolLM2Config, SmolLM2ForCausalLM, load_tokenizer
from smollm2.cli import run_command
from smollm2.errors import LoadError
from smollm2.generate import main as generate_main
from smollm2.generation.batch_file import parse_prompts
from smollm2.perplexity import main as perplexity_main
from smollm2.pretrained.load import load_model
from smollm2.pretrained.source import model_folder, resolve
from smollm2.pretrained.text import decode_text

ARGUMENTS = "--device", "cpu", "--dtype", "fp32"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"))


def run(capsys: pytest.CaptureFixture[str], main: object, model: Path, *argv: object) -> tuple[int, str, str]:
    code = run_command(main, ["--model", str(model), *ARGUMENTS, *map(str, argv)])
    return code, *capsys.readouterr()


def test_a_byte_order_mark_is_no_text(checkpoint, tmp_path, capsys):
    outputs = []
    for mark in (b"", codecs.BOM_UTF8):
        (tmp_path / "text.txt").write_bytes(mark + b"the quick brown fox")
        outputs.append(run(capsys, perplexity_main, checkpoint, tmp_path / "text.txt"))
    assert outputs[0] == outputs[1] and outputs[0][0] == 0


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("a\nb\n".encode("utf-16"), "got UTF-16; convert it: iconv"),
        ("a\nb\n".encode("utf-16-le"), "line 1: expected text in UTF-8, got a NUL byte"),
        (b"ok\n\x7fELF\x02\x00", "line 2: expected text in UTF-8, got a NUL byte"),
        (b"ok\nok\n\xff", "line 3: expected text in UTF-8, got the byte 0xFF"),
    ],
)
def test_what_is_no_text_is_named_with_its_line(checkpoint, tmp_path, capsys, content, words):
    for name, main in (("p.txt", generate_main), ("p.jsonl", generate_main), ("p.txt", perplexity_main)):
        path = tmp_path / name
        path.write_bytes(content)
        to = "--prompts", path, "--output", tmp_path / "o.jsonl"
        code, _, error = run(capsys, main, checkpoint, *(to if main is generate_main else (path,)))
        assert code == 1 and error.count("\n") == 1
        assert str(path) in error and words in error
    assert not (tmp_path / "o.jsonl").exists()


def test_line_ends_of_windows_are_no_part_of_a_prompt():
    assert [one.content for one in parse_prompts(Path("p.txt"), b"a\r\nb \r\n\r\n")] == ["a", "b "]
    assert decode_text(b"a\r\n", "p") == "a\r\n", "what is scored stays as it is"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_prompts_come_through_a_pipe(checkpoint, tmp_path, capsys):
    pipe, output = tmp_path / "pipe", tmp_path / "o.jsonl"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=(b"the\nfox\n",))
    writer.start()
    to = "--prompts", pipe, "--output", output, "--max-new-tokens", 2
    code, _, error = run(capsys, generate_main, checkpoint, *to)
    writer.join()
    assert code == 0, error
    assert {json.loads(line)["prompt"] for line in output.read_text().splitlines()} == {"the", "fox"}


def test_an_output_that_is_no_file_is_refused(checkpoint, tmp_path, capsys):
    (tmp_path / "p.txt").write_text("a\n")
    os.mkfifo(tmp_path / "pipe")
    for output, code, words in (
        (tmp_path / "pipe", 1, "pipe: is not a regular file"), ("/dev/null", 2, "/dev/null: is no file of"),
    ):  # fmt: skip
        to = "--prompts", tmp_path / "p.txt", "--output", output
        found, _, error = run(capsys, generate_main, checkpoint, *to)
        assert found == code and words in error


def test_prompts_in_a_folder_are_refused(checkpoint, tmp_path, capsys):
    to = "--prompts", tmp_path, "--output", tmp_path / "o.jsonl"
    code, _, error = run(capsys, generate_main, checkpoint, *to)
    assert code == 1 and f"{tmp_path}: no such file" in error


@pytest.mark.parametrize("text", ["", "\udcff"])
def test_a_stop_that_is_no_text_is_refused(checkpoint, capsys, text):
    code, _, error = run(capsys, generate_main, checkpoint, "--stop", text, "hi")
    assert code == 2 and error.startswith("error: stop: expected texts that are not empty")


def test_bytes_on_the_command_line_that_are_no_text_are_refused(checkpoint, capsys):
    for text in ("\udcff", "a\udcffb"):
        code, _, error = run(capsys, generate_main, checkpoint, text)
        assert (code, error) == (
            2, f"error: tokenizer: expected text that UTF-8 can encode, got {text!r}\n"
        )  # fmt: skip


def test_an_answer_of_nothing_is_no_success(tmp_path, capsys):
    model, tokenizer = tiny_model(vocab_size=300), tiny_tokenizer()
    let_it_say(model, 0)  # <|endoftext|>
    model.save_pretrained(tmp_path)
    tokenizer.save(tmp_path)
    code, out, error = run(capsys, generate_main, tmp_path, "the fox")
    assert (code, out) == (1, "the fox\n")
    assert error == "no answer: the model stopped at once, or --stop matched at the start\n"


def test_what_follows_a_prompt_comes_without_it_and_a_cut_is_said(checkpoint, capsys):
    options = "--max-new-tokens", "7", "the fox"
    code, whole, error = run(capsys, generate_main, checkpoint, *options)
    assert code == 0 and whole.startswith("the fox")
    assert error.startswith("the text was cut at 7 tokens (--max-new-tokens)\n")
    for more in ([], ["--no-stream"]):
        code, after, _ = run(capsys, generate_main, checkpoint, "--no-echo", *more, *options)
        assert (code, "the fox" + after) == (0, whole)
    code, _, error = run(capsys, generate_main, checkpoint, "--stop", whole[10:12], *options)
    assert code == 0 and "cut" not in error


def test_flags_of_sampling_that_change_nothing_are_named(checkpoint, capsys, tmp_path):
    both, hint = ["--seed", "7", "--top-p", "0.9"], "to sample, add --temperature 0.8"
    for flags, words in (
        (both, "--top-p and --seed change nothing at --temperature 0"), (both[:2], "--seed changes nothing"),
        ([*both, "--temperature", "0.5"], ""), (["--repetition-penalty", "1.2"], ""), ([], ""),
    ):  # fmt: skip
        _, _, error = run(capsys, generate_main, checkpoint, "--max-new-tokens", "2", *flags, "the fox")
        assert (words in error and hint in error) if words else hint not in error
    (tmp_path / "p.txt").write_text("the fox")
    files = "--prompts", tmp_path / "p.txt", "--output", tmp_path / "out.jsonl"
    assert hint in run(capsys, generate_main, checkpoint, *both, *files)[2]


# ---- the folder of a run -----------------------------------------------------------------------------------


@pytest.fixture
def run_folder(checkpoint, tmp_path):
    """Three checkpoints, as train.checkpoint lays them out; `latest` names the second."""
    for step in (5, 40, 1000):
        folder = tmp_path / "run" / "checkpoints" / f"step-{step:06d}"
        shutil.copytree(checkpoint, folder)
        files = {
            path.name: {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
            for path in folder.iterdir()
        }
        (folder / "manifest.json").write_text(json.dumps({"schema": 2, "files": files}))
    (tmp_path / "run" / "checkpoints" / "latest").write_text("step-000040\n")
    return tmp_path / "run"


def test_the_folder_of_a_run_stands_for_its_latest_checkpoint(run_folder, capsys):
    code, out, error = run(capsys, generate_main, run_folder, "--max-new-tokens", 3, "the")
    latest = run_folder / "checkpoints" / "step-000040"
    assert code == 0 and out.startswith("the")
    assert error.splitlines()[0] == f"{run_folder}: its newest checkpoint, {latest}"
    assert run(capsys, perplexity_main, run_folder, "--text", "the fox")[0] == 0
    assert load_model(run_folder, "torch").config == load_model(latest, "torch").config
    assert load_tokenizer(str(run_folder)).vocab_size == load_tokenizer(latest).vocab_size


def test_its_checkpoints_and_the_pointer_in_there_stand_for_the_run(run_folder, monkeypatch):
    checkpoints = run_folder / "checkpoints"
    for name in (checkpoints, checkpoints / "latest"):
        assert model_folder(name) == checkpoints / "step-000040"
        assert load_tokenizer(name).vocab_size == load_tokenizer(run_folder).vocab_size
    monkeypatch.chdir(checkpoints)
    assert model_folder("latest") == Path("step-000040")
    assert model_folder("step-000005") == "step-000005"
    (checkpoints / "step-000005" / "latest").write_text("v2")
    assert model_folder("step-000005") == "step-000005", "a model that has a file of that name"
    (run_folder / "latest").write_text("v2")
    assert model_folder(run_folder / "latest") == run_folder / "latest", "beside the checkpoints"


def test_damaged_checkpoints_of_a_run_are_passed_over(run_folder, caplog):
    checkpoints = run_folder / "checkpoints"
    weights = checkpoints / "step-000040" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert model_folder(run_folder) == checkpoints / "step-001000"
    assert "skipped a damaged checkpoint" in caplog.text and str(weights) in caplog.text
    (checkpoints / "latest").unlink()
    (checkpoints / "step-001000" / "manifest.json").write_text("[]")
    assert model_folder(run_folder) == checkpoints / "step-000005"
    (checkpoints / "step-000005" / "config.json").unlink()
    with pytest.raises(LoadError, match="expected a sound checkpoint, found none among 3"):
        load_model(run_folder)


@pytest.mark.parametrize("name", ["7B", "135m", "1.7B"])
def test_a_size_in_place_of_a_model_lists_what_there_is(name):
    with pytest.raises(LoadError, match=rf"'{name}': a size, expected a model; SmolLM2 has 135M, 360M, 1.7B"):
        resolve(name)


def test_other_folders_stand_for_themselves(checkpoint, tmp_path):
    assert model_folder(checkpoint) == checkpoint
    assert model_folder("") == "" and model_folder("hub/name") == "hub/name"
    (tmp_path / "model" / "checkpoints").mkdir(parents=True)
    (tmp_path / "model" / "config.json").write_text("{}")
    assert model_folder(tmp_path / "model") == tmp_path / "model", "a model that has a folder of that name"


def test_ids_that_the_tokenizer_lacks_are_not_sampled(tmp_path, capsys):
    write_checkpoint(tmp_path)
    config = SmolLM2Config.preset("tiny", vocab_size=4096)
    torch.manual_seed(0)
    SmolLM2ForCausalLM(config, "torch").save_pretrained(tmp_path)  # most of its ids have no text
    code, out, _ = run(capsys, generate_main, tmp_path, "--max-new-tokens", 8, "hi")
    assert code == 0 and len(out) > len("hi\n")
