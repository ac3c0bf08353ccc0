"""keep_best: which checkpoint it keeps, across rotation, signals and resumes, and what finetune merges."""

from __future__ import annotations

import errno
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from train_cases import checkpoint_folder, curve, run_config

from smollm2 import SmolLM2Config, SmolLM2ForCausalLM
from smollm2.errors import UsageError
from smollm2.pretrained.load import load_model
from smollm2.pretrained.tokenizer import train_tokenizer
from train import checkpoint, finetune, run
from train.checkpoint import best_checkpoint, verify
from train.config import RunConfig
from train.distributed import StopRequest
from train.run import train

LOSSES = {1: 3.0, 2: 2.0, 3: 1.0, 4: 2.5, 5: float("nan"), 6: 4.0, 7: 1.5, 8: 0.5, 9: 0.7}


@pytest.fixture
def configured(tmp_path, monkeypatch):
    """A run with an evaluation after every step, whose losses are those of LOSSES."""
    config = run_config(
        tmp_path, eval_every=1, checkpoint_every=2, keep_checkpoints=1, keep_best=True,
        validation_fraction=0.2,
    )  # fmt: skip
    monkeypatch.setattr(run, "evaluate", lambda *_: LOSSES[len(curve(config))])
    return config


def kept(config: RunConfig) -> list[str]:
    return sorted(path.name for path in (Path(config.output_dir) / "checkpoints").iterdir())


def record(config: RunConfig, step: int) -> dict[str, Any]:
    return json.loads((checkpoint_folder(config, step) / "run.json").read_text())["best"]


def test_the_best_is_saved_spared_and_named(configured, capsys):
    assert train(configured) == 0
    assert kept(configured) == ["latest", "step-000003", "step-000006"]
    best = checkpoint_folder(configured, 3)
    assert f"best: {best}, held-out loss 1.000" in capsys.readouterr().out
    assert verify(best) > 0 and best_checkpoint(Path(configured.output_dir)) == best
    configured.resume, configured.steps = "auto", 9
    assert train(configured) == 0  # a better one takes its place
    assert kept(configured) == ["latest", "step-000008", "step-000009"]
    best = record(configured, 9)
    assert (best["step"], best["held_out_loss"]) == (8, 0.5)


@pytest.mark.parametrize("step", [3, 4])
def test_a_signal_changes_nothing_of_it(configured, monkeypatch, step):
    original = StopRequest.agree

    def agree(self: StopRequest) -> int:
        if len(curve(configured)) == step - 1:  # the step that is not logged yet
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self)

    with monkeypatch.context() as patch:
        patch.setattr(StopRequest, "agree", agree)
        assert train(configured) == 143
    configured.resume = "auto"
    assert train(configured) == 0
    assert kept(configured) == ["latest", "step-000003", "step-000006"]
    best = record(configured, 6)
    assert (best["step"], best["held_out_loss"]) == (3, 1.0)


@pytest.mark.parametrize("background", [True, False])
def test_one_that_cannot_be_saved_leaves_the_former_one(configured, monkeypatch, capsys, background):
    original, configured.background_save = checkpoint._begin, background

    def begin(folder: Path, *given: Any) -> Any:
        if "000003" in str(folder):
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(folder, *given)

    monkeypatch.setattr(checkpoint, "_begin", begin)
    assert train(configured) == 0
    assert kept(configured) == ["latest", "step-000002", "step-000006"]
    out = capsys.readouterr().out
    assert "step-000003: the checkpoint cannot be saved" in out and "held-out loss 2.000" in out
    assert record(configured, 6)["step"] == 2


def test_without_held_out_rows_there_is_no_best(configured):
    configured.validation_fraction = 1e-9
    with pytest.raises(UsageError, match="keep_best: expected held-out documents to choose by, got none"):
        train(configured)


def test_a_loss_on_other_rows_is_no_bar(configured):
    assert train(configured) == 0
    configured.resume, configured.steps, configured.eval_batches = "auto", 7, 3
    assert train(configured) == 0
    assert record(configured, 7)["step"] == 7 and kept(configured) == ["latest", "step-000007"]


def test_without_it_or_in_another_folder_the_best_is_forgotten(configured, tmp_path):
    assert train(configured) == 0
    other = RunConfig(
        **{**vars(configured), "output_dir": str(tmp_path / "other"), "resume": configured.output_dir}
    )
    other.steps = 7
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "evaluate", lambda *_: 9.0)
        assert train(other) == 0
    assert (record(other, 7)["step"], record(other, 7)["held_out_loss"]) == (7, 9.0)
    configured.resume, configured.keep_best, configured.steps = "auto", False, 7
    assert train(configured) == 0
    assert kept(configured) == ["latest", "step-000007"]
    assert best_checkpoint(Path(configured.output_dir)) is None


def test_it_needs_evaluations(tmp_path):
    with pytest.raises(UsageError, match="keep_best: expected eval_every above 0, got 0"):
        run_config(tmp_path, keep_best=True, eval_every=0).validate()


@pytest.mark.parametrize(("keep_best", "merged"), [(True, 1), (False, 3)])
def test_finetune_merges_the_best_when_asked(tmp_path, monkeypatch, capsys, keep_best, merged):
    tokenizer = train_tokenizer(["1 and 2 and 3"], 300)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + m['content'] + '<|im_end|>' }}{% endfor %}"
    )
    SmolLM2ForCausalLM(SmolLM2Config.preset("tiny", vocab_size=300), "torch").save_pretrained(
        tmp_path / "base"
    )
    tokenizer.save(tmp_path / "base")
    rows = [
        [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": f"{2 * n}."}]
        for n in range(12)
    ]
    data, out = tmp_path / "talks.jsonl", tmp_path / "run"
    data.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    losses = iter((5.0, 1.0, 2.0, 3.0))  # before the first step, and after each
    monkeypatch.setattr(run, "evaluate", lambda *_: next(losses))
    keys = "steps=3 eval_every=1 sample_every=0 batch_size=1 sequence_length=64 workers=0 device=cpu".split()
    keys += [f"model={tmp_path / 'base'}", f"output_dir={out}", f"keep_best={str(keep_best).lower()}"]
    assert finetune.main([str(data), *keys]) == 0
    said = capsys.readouterr().out
    of = ", of step-000001, the best" if keep_best else ""
    assert f"merged: {out / 'merged'}, a whole model for transformers{of}\n" in said
    end = out / "checkpoints" / f"step-{merged:06d}"
    assert f"smollm2.chat --model {end if keep_best else out}\n" in said
    ours, theirs = (load_model(path, "torch").parameters() for path in (out / "merged", end))
    assert all(torch.equal(*pair) for pair in zip(ours, theirs, strict=True))
