"""`python -m train.verify_resume`: says bit-identical of runs that are, and not of one that is not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from train_cases import TINY, write_corpus

from smollm2 import SmolLM2Config, SmolLM2ForCausalLM
from smollm2.cli import run_command
from smollm2.pretrained.tokenizer import train_tokenizer
from train import build, checkpoint, step, verify_resume
from train.data import mixture
from train.data.packing import tensors
from train.verify_resume import main

KEYS = [f"{name}={value}" for name, value in TINY.items() if name != "steps"]


def verify(folder: Path, project_root: Path, *arguments: str) -> list[str]:
    """The lines that the command prints of a run on a small corpus in `folder`, from where it is started;
    they end with its verdict.
    """
    corpus = Path(write_corpus(folder / "numbers.jsonl"))
    command = [sys.executable, "-m", "train.verify_resume", *KEYS, f"paths={corpus.name}", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(project_root)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[-1] == "verdict: bit-identical"
    return lines


@pytest.mark.slow
@pytest.mark.parametrize(
    "keys",
    [
        "dtype=bf16 eval_every=3 sample_every=2 sample_tokens=3 workers=1 attention_dropout=0.1",
        "dtype=bf16 batch_size=4 grad_accumulation=2 attention_dropout=0.1 workers=1 --ranks 2",
    ],
    ids=["one-process", "two-ranks"],
)
def test_a_killed_run_is_the_run_that_was_not_killed(tmp_path, project_root, keys):
    lines = verify(tmp_path, project_root, *keys.split())
    assert lines[1] == "killed in step 6; newest checkpoint step-000004"
    assert lines[2] == "resumed, killed while writing the next checkpoint; newest checkpoint step-000004"
    assert lines[3].startswith("resumed, killed in the last step; newest checkpoint step-00000")
    assert lines[4].startswith("resumed")
    assert any(line.split()[:2] == ["loss", "equal"] for line in lines)
    assert any("batches of rank 0" in line for line in lines)


@pytest.mark.slow
def test_a_run_killed_at_random_moments(tmp_path, project_root):
    """With this seed at 0.56 and at 0.76 of the time that the undisturbed run took."""
    lines = verify(tmp_path, project_root, *"--steps 10 --more 150 --kills 2 --seed 35".split())
    assert lines[1].startswith("killed ")


class Killed(BaseException):
    pass


def die(*_: object) -> str:
    raise Killed


class HereAndNow:
    """A run in this process, in the place of one of its own. A kill is an exception that nothing catches."""

    def __init__(self, command: list[str], **_: Any) -> None:
        self.code = 0
        with pytest.MonkeyPatch.context() as patch:
            for owner, name in (
                (step.TrainStep, "_count_targets"),
                (step, "update"),
                (checkpoint, "manifest"),
            ):
                patch.setattr(owner, name, getattr(owner, name))  # taken back afterwards
            try:
                self.code = main(command[command.index("--child") :])
            except Killed:
                self.code = -signal.SIGKILL

    def wait(self) -> int:
        return self.code


@pytest.mark.parametrize("fault", [True, False])
def test_a_resume_that_loses_something_is_found_out(tmp_path, monkeypatch, capsys, fault):
    """A planted fault: second moments come back as zeros, in the runs and not where they are compared."""
    original = checkpoint.load_moments

    def load_moments(folder: Path, model: Any, optimizer: torch.optim.Optimizer) -> None:
        original(folder, model, optimizer)
        for entries in optimizer.state.values():
            entries["exp_avg_sq"].zero_()

    if fault:
        monkeypatch.setattr(build, "load_moments", load_moments)
    monkeypatch.setattr(verify_resume, "_die", die)
    monkeypatch.setattr(verify_resume.subprocess, "Popen", HereAndNow)
    keys = [*KEYS, f"paths={write_corpus(tmp_path / 'numbers.jsonl')}", "background_save=false"]
    assert run_command(main, keys) == int(fault)
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == f"verdict: {'NOT identical' if fault else 'bit-identical'}"
    rows = {line.strip().split("  ")[0]: line for line in out.splitlines() if line.startswith("  ")}
    assert ("DIFFERENT" in rows["weights"]) == ("DIFFERENT" in rows["loss"]) == fault
    assert "DIFFERENT" not in rows["batches of rank 0"]


TALK = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + m['content'] + '<|im_end|>' }}{% endfor %}"


@pytest.fixture
def adapting(tmp_path, monkeypatch):
    """The keys of a run that trains adapters on conversations, with paths as seen from the present folder."""
    monkeypatch.chdir(tmp_path)
    rows = [
        [{"role": "user", "content": f"{n} and {n}?"}, {"role": "assistant", "content": f"{2 * n}."}]
        for n in range(12)
    ]
    Path("talks.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    tokenizer = train_tokenizer(["1 and 2 and 3"], 300)
    tokenizer.chat_template = TALK
    SmolLM2ForCausalLM(SmolLM2Config.preset("tiny", vocab_size=300), "torch").save_pretrained("base")
    tokenizer.save("base")
    own = "model=base tokenizer=auto max_position_embeddings=null lora_rank=2 format=chat sequence_length=64"
    return [*KEYS, *own.split(), "paths=talks.jsonl", "background_save=false", "epochs=2"]


@pytest.mark.parametrize("fault", [False, True])
def test_adapters_and_what_is_learned_of_conversations_are_compared(adapting, monkeypatch, capsys, fault):
    """A planted fault: from its second start on the killed run learns what the straight one does not."""
    starts: list[Any] = []

    class Run(HereAndNow):
        def __init__(self, command: list[str], **options: Any) -> None:
            starts.append(options)
            super().__init__(command)

    def mixed(*given: Any) -> Any:
        made = tensors(*given)
        if fault and len(starts) > 2:
            made = made._replace(labels=made.ids.clone())
        return made

    monkeypatch.setattr(mixture, "tensors", mixed)
    monkeypatch.setattr(verify_resume, "_die", die)
    # in this module alone: a chat template is rendered in a process of its own
    own = SimpleNamespace(Popen=Run, STDOUT=subprocess.STDOUT)
    monkeypatch.setattr(verify_resume, "subprocess", own)
    assert run_command(main, adapting) == int(fault)
    rows = {line.strip().split("  ")[0]: line for line in capsys.readouterr().out.splitlines()}
    assert "tensors" in rows["weights"] and ("DIFFERENT" in rows["batches of rank 0"]) == fault
    assert all("cwd" not in one for one in starts)  # the user's own
    assert all(one["env"]["PYTHONPATH"].startswith(str(verify_resume.ROOT)) for one in starts)
    assert (verify_resume.ROOT / "train" / "run.py").is_file()


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
def test_wrong_arguments_are_refused_before_anything_runs(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr(verify_resume.subprocess, "Popen", lambda *_, **__: pytest.fail("a run was started"))
    assert run_command(main, arguments) == 2
    assert message in capsys.readouterr().err
