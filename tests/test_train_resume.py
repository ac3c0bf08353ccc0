"""Resuming a run: to the last bit, with changed keys, after signals; what checkpoints survive is in
test_train_checkpoint_faults.py.
"""

from __future__ import annotations

import functools
import json
import os
import random
import signal
import threading
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from train_cases import arguments, checkpoint_folder, curve, run_config, wait_for

from smollm2.cli import run_command
from smollm2.errors import UsageError
from smollm2.pretrained.load import load_model
from train import checkpoint
from train.checkpoint import newest_checkpoint
from train.distributed import StopRequest, World
from train.rng import rng_states, seed_generators, set_rng_states
from train.run import main, train
from train.verify_resume import _same


@pytest.fixture
def configured(tmp_path):
    return functools.partial(run_config, tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        dict(dtype="fp32"),
        dict(dtype="bf16"),
        dict(grad_accumulation=2, attention_dropout=0.1, workers=2),
        dict(dtype="bf16", grad_accumulation=2, schedule="wsd", sequence_length=300, seed=5),
    ],
    ids=["fp32", "bf16", "accumulation-dropout", "bf16-long-rows"],
)
def test_three_steps_and_three_more_are_six_steps_to_the_last_bit(configured, changes):
    straight, parts = configured("straight", **changes), configured("parts", **changes, checkpoint_every=3)
    train(straight)
    # a schedule depends on the number of steps: then the run goes back to its checkpoint of step 3
    whole = parts.schedule != "constant"
    parts.steps, total = parts.steps if whole else 3, parts.steps
    train(parts)
    parts.steps, parts.resume = total, str(checkpoint_folder(parts, 3)) if whole else "auto"
    torch.manual_seed(99)  # whatever the process did in between
    train(parts)
    assert curve(parts) == curve(straight)
    ends = [checkpoint_folder(config, 6) for config in (straight, parts)]
    weights = [load_model(end).state_dict() for end in ends]
    moments = [load_file(end / checkpoint.MOMENTS) for end in ends]
    assert len(moments[0]) == 3 * len(weights[0]) - 3  # exp_avg, exp_avg_sq, step; the head is the embedding
    states = [torch.load(end / checkpoint.STATE, weights_only=True) for end in ends]
    assert _same(*weights) and _same(*moments) and _same(*states)
    records = [json.loads((end / checkpoint.RECORD).read_text(encoding="utf-8")) for end in ends]
    assert records[0]["data"] == records[1]["data"] and records[0]["tokens"] == records[1]["tokens"]


def test_a_checkpoint_records_what_made_it(configured):
    config = configured(steps=2)
    train(config)
    record = json.loads((checkpoint_folder(config, 2) / checkpoint.RECORD).read_text(encoding="utf-8"))
    assert (record["step"], record["tokens"], record["backend"]) == (2, 2 * 2 * 40, "torch")
    assert record["config"]["lr"] == 3e-3
    assert record["versions"]["torch"] == version("torch") and "python" in record["versions"]
    assert record["data"]["fingerprint"].startswith("local 1 files")
    assert (Path(config.output_dir) / "checkpoints" / "latest").read_text(
        encoding="utf-8"
    ).strip() == "step-000002"


def test_only_the_newest_checkpoints_are_kept(configured):
    config = configured(checkpoint_every=1, keep_checkpoints=2)
    train(config)
    names = sorted(path.name for path in (Path(config.output_dir) / "checkpoints").iterdir())
    assert names == ["latest", "step-000005", "step-000006"]


def test_changed_keys_are_printed_or_refused(configured, capsys):
    train(configured(steps=1))
    with pytest.raises(
        UsageError, match=r"resume: the checkpoint was made with sequence_length=40 \(got 30\)"
    ):
        train(configured(resume="auto", sequence_length=30))
    capsys.readouterr()
    train(configured(resume="auto", steps=2, lr=1e-3))
    out = capsys.readouterr().out
    assert "changed since the checkpoint: lr: 0.003 -> 0.001" in out and "steps: 1 -> 2" in out
    train(configured(resume="auto", steps=2, lr=1e-3))
    assert "nothing to do: 2 of 2 steps are done" in capsys.readouterr().out


def test_changed_files_are_refused(configured, tmp_path):
    data = tmp_path / "data.txt"
    data.write_text("some text to train on. " * 500, encoding="utf-8")
    config = configured(paths=[str(data)], steps=1, validation_fraction=0.0)
    train(config)
    data.write_text("other text to train on. " * 400, encoding="utf-8")
    config.resume, config.steps = "auto", 2
    with pytest.raises(UsageError, match="expected the data of the checkpoint .local 1 files"):
        train(config)


def test_resume_auto_without_a_checkpoint_starts_from_scratch(configured):
    config = configured(resume="auto", steps=1)
    assert train(config) == 0
    assert [step for step, _, _ in curve(config)] == [1]


def test_every_generator_continues_where_it_was():
    def draw() -> list[float]:
        return [torch.rand(()).item(), random.random(), float(np.random.rand())]

    seed_generators(5)
    seeded = draw()
    seed_generators(5)
    assert draw() == seeded
    states = rng_states()
    first = draw()
    draw()
    set_rng_states(states)
    assert draw() == first


def test_the_first_signal_is_noted_and_the_second_ends_the_process(monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    left: list[int] = []
    monkeypatch.setattr(os, "_exit", left.append)
    with StopRequest(World(torch.device("cpu"))) as stop:
        assert stop.agree() == 0
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.agree() == signal.SIGTERM and left == []
        os.kill(os.getpid(), signal.SIGINT)
        assert left == [130]
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_finishes_the_step_saves_and_sets_the_exit_code(configured, number, code, capsys):
    config = configured(steps=100_000)

    def send() -> None:
        wait_for(lambda: len(curve(config)) >= 2)
        os.kill(os.getpid(), number)

    sender = threading.Thread(target=send)
    sender.start()
    assert run_command(main, arguments(config)) == code
    sender.join()
    out, err = capsys.readouterr()
    assert "; once more leaves at once" in err and "continue with resume=auto" in out
    newest = newest_checkpoint(Path(config.output_dir), print)
    assert newest is not None
    assert curve(config)[-1][0] == int(newest.name.removeprefix("step-"))
