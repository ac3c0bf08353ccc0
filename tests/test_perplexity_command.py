"""`python -m smollm2.perplexity`: its figures, its JSON, and mistakes as one line."""

from __future__ import annotations

import io
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from generation_cases import write_checkpoint

from smollm2 import SmolLM2ForCausalLM, load_tokenizer
from smollm2.cli import run_command
from smollm2.perplexity import main, perplexity

ROOT = Path(__file__).resolve().parent.parent
TEXT = "the quick brown fox jumps over the lazy dog, naïve 漢字 <|im_end|>\n" * 20


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"), vocab_size=304, initializer_range=96**-0.5)


def run(capsys: pytest.CaptureFixture[str], checkpoint: Path, *argv: str) -> tuple[int, str, str]:
    try:
        code = run_command(main, ["--model", str(checkpoint), "--device", "cpu", *argv])
    except SystemExit as leaving:  # argparse
        code = int(leaving.code or 0)
    return code, *capsys.readouterr()


def test_the_figures_are_those_of_the_function(checkpoint, tmp_path, capsys):
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    code, out, _ = run(capsys, checkpoint, "--dtype", "fp32", "--window", "128", "--stride", "32", str(path))
    model = SmolLM2ForCausalLM.from_pretrained(checkpoint, "torch", "cpu").eval()
    ids = load_tokenizer(checkpoint).encode(TEXT, special=False)
    score, size = perplexity(model, ids, 128, 32), len(TEXT.encode())
    assert code == 0
    assert out.splitlines() == [
        f"nats/token  {score.nats / (len(ids) - 1):.4f}",
        f"perplexity  {math.exp(score.nats / (len(ids) - 1)):.3f}",
        f"bits/byte   {score.nats / math.log(2) / size:.4f}",
        f"tokens      {len(ids):,}, {len(ids) - 1:,} scored; {size:,} bytes",
        f"windows     {score.windows} of 128 tokens, stride 32",
    ]


def test_json_has_every_text_and_the_whole(checkpoint, tmp_path, capsys):
    (tmp_path / "a.txt").write_text(TEXT, encoding="utf-8")
    texts = str(tmp_path / "a.txt"), "--text", "the lazy dog"
    code, out, _ = run(capsys, checkpoint, "--dtype", "fp32", "--json", *texts)
    found = json.loads(out)
    assert code == 0
    options = dict(window=512, stride=256, dtype="float32", quantize="none")
    assert {key: found[key] for key in options} == options
    assert [part["text"] for part in found["texts"]] == [str(tmp_path / "a.txt"), "--text 1"]
    for key in ("tokens", "scored", "bytes", "windows"):
        assert found[key] == sum(part[key] for part in found["texts"])
    nats = sum(part["nats_per_token"] * part["scored"] for part in found["texts"])
    assert found["nats_per_token"] == pytest.approx(nats / found["scored"], rel=1e-9)
    assert found["perplexity"] == pytest.approx(math.exp(found["nats_per_token"]), rel=1e-9)
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / found["bytes"], rel=1e-9)
    code, out, _ = run(capsys, checkpoint, *texts)
    first, second = out.splitlines()[:2]
    assert code == 0 and first.startswith(f"{texts[0]}: ") and second.startswith("--text 1: ")


def test_standard_input_is_a_text(checkpoint, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(TEXT.encode())))
    assert run(capsys, checkpoint, "-") == run(capsys, checkpoint, "--text", TEXT)


def test_quantised_weights_are_scored_by_their_decode_steps(checkpoint, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("SMOLLM2_CACHE", str(tmp_path))  # where quantised weights are kept
    options = "--json", "--dtype", "bf16", "--text", TEXT
    plain, quantised = (
        json.loads(run(capsys, checkpoint, *options, "--quantize", kind)[1]) for kind in ("none", "int8")
    )
    assert (plain["quantize"], quantised["quantize"]) == ("none", "int8")
    assert plain["scored"] == quantised["scored"]
    assert 0 < abs(quantised["nats_per_token"] / plain["nats_per_token"] - 1) < 0.01


def test_the_comparison_is_a_table_of_fp32_and_the_kinds(checkpoint, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("SMOLLM2_CACHE", str(tmp_path))
    code, out, _ = run(capsys, checkpoint, "--compare", "bf16,int8,int4", "--window", "16", "--text", TEXT)
    head, _, *rows = out.splitlines()
    ids = load_tokenizer(checkpoint).encode(TEXT, special=False)
    assert code == 0 and f": {len(ids) // 16} windows of 16 tokens of --text 1 (ids " in head
    table = {row.split()[0]: [float(cell) for cell in row.replace("%", "").split()[1:]] for row in rows}
    assert list(table) == ["fp32", "bf16", "int8", "int4"]
    assert table["fp32"][2] == 100.0
    for nats, perplexity_, agreement, _ in table.values():
        assert math.exp(nats) == pytest.approx(perplexity_, rel=1e-3)
        assert 0 <= agreement <= 100
    model = SmolLM2ForCausalLM.from_pretrained(checkpoint, "torch", "cpu").eval()
    score = perplexity(model, ids[: len(ids) // 16 * 16], 16, 16)
    assert table["fp32"][0] == pytest.approx(score.nats_per_token, abs=1e-3)
    for name in ("bf16", "int8"):
        assert table[name][0] == pytest.approx(table["fp32"][0], abs=0.1)
    megabytes = [row[3] for row in table.values()]
    assert megabytes == sorted(megabytes, reverse=True)


def test_without_a_text_the_comparison_takes_pythons_language_reference(checkpoint, capsys):
    code, out, _ = run(capsys, checkpoint, "--compare", "bf16")
    head, _, *rows = out.splitlines()
    assert code == 0 and ": 4 windows of 512 tokens of pydoc_data.topics of Python 3" in head
    assert [row.split()[0] for row in rows] == ["fp32", "bf16"]


@pytest.mark.parametrize(
    ("argv", "code", "words"),
    [
        ([], 2, ["text: expected files", "got none"]),
        (["--text", ""], 2, ["--text 1", "expected some text"]),
        (["--text", "t"], 2, ["--text 1", "at least 2 tokens", "got [1]"]),
        (["--text", "the fox", "--stride", "600"], 2, ["stride", "512", "got 600"]),
        (["--text", "the fox", "--window", "1024"], 2, ["window", "2 to 512", "got 1024"]),
        (["no-such-file.txt"], 1, ["no-such-file.txt", "cannot be read", "--text"]),
        (["."], 1, ["cannot be read"]),
        (["--text", "the fox", "--backend", "trition"], 2, ["unknown backend 'trition'"]),
        (["--text", "the fox", "--quantize", "int3"], 2, ["--quantize", "see --help"]),
        (["--compare", "int8,int2"], 2, ["--compare", "bf16, int8, int4", "'int2'"]),
        (["--compare", "int8", "--stride", "3"], 2, ["--compare", "with --stride"]),
        (["--compare", "int8", "--device", "cuda"], 2, ["--compare", "on the CPU", "got --device cuda"]),
        (["--compare", "int8", "--window", "0"], 2, ["--window", "from 2 to", "got 0"]),
        (["--compare", "int8", "--window", "513"], 2, ["--window", "2 to 512, the positions", "got 513"]),
        (["--compare", "int8", "--text", "the fox"], 2, ["--window", "the tokens of the text, got 512"]),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else str(value),
)
def test_a_mistake_is_one_line_and_its_code(checkpoint, capsys, argv, code, words):
    found, out, error = run(capsys, checkpoint, *argv)
    assert (found, out) == (code, "")
    assert error.startswith("error: ") and error.count("\n") == 1 and "Traceback" not in error
    for word in words:
        assert word in error


def test_a_file_that_is_no_utf8_is_named(checkpoint, tmp_path, capsys):
    (tmp_path / "latin.txt").write_bytes("naïve".encode("latin-1"))
    code, _, error = run(capsys, checkpoint, str(tmp_path / "latin.txt"))
    assert code == 1 and "latin.txt, line 1: expected text in UTF-8" in error and error.count("\n") == 1


def module(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", name, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)


def test_it_runs_as_a_module(checkpoint):
    done = module("smollm2.perplexity", "--model", str(checkpoint), "--text", "the quick brown")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("nats/token") and done.stderr == ""
