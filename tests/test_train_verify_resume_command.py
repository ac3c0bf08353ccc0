"""`python -m train.verify_resume`: says bit-identical of runs that are, and not of one that is not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from train_cases import TINY, write_corpus

from smollm2.cli import run_command
from train import verify_resume
from train.verify_resume import main

KEYS = [f"{name}={value}" for name, value in TINY.items() if name != "steps"]


def verify(folder: Path, project_root: Path, *arguments: str) -> list[str]:
    """The lines that the command prints of a run on a small corpus in `folder`; they end with its verdict."""
    corpus = write_corpus(folder / "numbers.jsonl")
    command = [sys.executable, "-m", "train.verify_resume", *KEYS, f"paths={corpus}", *arguments]
    done = subprocess.run(command, cwd=project_root, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[-1] == "verdict: bit-identical"
    return lines


@pytest.mark.slow
@pytest.mark.parametrize(
    "keys",
    [
        "dtype=fp32 eval_every=3 sample_every=2 sample_tokens=3 workers=1",
        "dtype=bf16 grad_accumulation=2 attention_dropout=0.1 spike_zscore=4 background_save=false",
        "dtype=bf16 batch_size=4 grad_accumulation=2 attention_dropout=0.1 workers=1 --ranks 2",
    ],
    ids=["fp32-samples-workers", "bf16-accumulation-dropout", "two-ranks"],
)
def test_a_killed_run_is_the_run_that_was_not_killed(tmp_path: Path, project_root: Path, keys: str) -> None:
    lines = verify(tmp_path, project_root, *keys.split())
    assert lines[1] == "killed in step 6; newest checkpoint step-000004"
    assert lines[2] == "resumed, killed while writing the next checkpoint; newest checkpoint step-000004"
    assert lines[3].startswith("resumed, killed in the last step; newest checkpoint step-00000")
    assert lines[4].startswith("resumed")
    assert any(line.split()[:2] == ["loss", "equal"] for line in lines)
    assert any("batches of rank 0" in line for line in lines)


@pytest.mark.slow
def test_a_run_killed_at_random_moments(tmp_path: Path, project_root: Path) -> None:
    """With this seed at a third, at a half and at two thirds of the time that the undisturbed run took. So
    none is over before, should the machine be faster by then.
    """
    lines = verify(tmp_path, project_root, *"--steps 10 --more 150 --kills 3 --seed 669".split())
    assert lines[1].startswith("killed ")


FAULT = """
import sys
import train.checkpoint as checkpoint

original = checkpoint.load_file

def load_file(path):
    return {name: x.zero_() if "exp_avg_sq" in name else x for name, x in original(path).items()}

checkpoint.load_file = load_file
from train.verify_resume import main

sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_resume_that_loses_something_is_found_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A planted fault: second moments come back as zeros, in the runs and not where they are compared."""
    original = subprocess.Popen

    def start(command: list[str], **keys: Any) -> subprocess.Popen[bytes]:
        module = command.index("-m")
        return original([*command[:module], "-c", FAULT, *command[module + 2 :]], **keys)

    monkeypatch.setattr(verify_resume.subprocess, "Popen", start)
    assert run_command(main, [*KEYS, f"paths={write_corpus(tmp_path / 'numbers.jsonl')}"]) == 1
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == "verdict: NOT identical"
    rows = {line.strip().split("  ")[0]: line for line in out.splitlines() if line.startswith("  ")}
    assert (
        "DIFFERENT" in rows["weights"]
        and "DIFFERENT" in rows["loss"]
        and "DIFFERENT" not in rows["batches of rank 0"]
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--more", "1"], "--more of at least 3"),
        (["--kills", "2", "--ranks", "2"], "--kills: expected one process"),
        (["stps=3"], "did you mean 'steps'?"),
        (["--keep", "."], "expected a folder that does not exist yet"),
        (["lr=0"], "lr: expected a number above 0"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_runs(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify_resume.subprocess, "Popen", lambda *_, **__: pytest.fail("a run was started"))
    assert run_command(main, arguments) == 2
    assert message in capsys.readouterr().err
