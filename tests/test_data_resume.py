"""What a resumed run asks of its data: the same held-out rows, and the same files, wherever they lie now."""

from __future__ import annotations

import functools
import json

import pytest
import torch
from train_cases import checkpoint_folder, run_config

from train import checkpoint
from train.build import Run, build, held_out_count
from train.checkpoint import Progress
from train.config import RunConfig
from train.data.state import DataState
from train.distributed import World
from train.run import train


@pytest.fixture
def configured(tmp_path):
    return functools.partial(run_config, tmp_path, steps=2, eval_every=2, validation_fraction=0.3)


def built(config: RunConfig) -> Run:
    return build(config, World(torch.device("cpu")))


def record_of(config: RunConfig) -> dict:
    path = checkpoint_folder(config, config.steps) / checkpoint.RECORD
    return json.loads(path.read_text(encoding="utf-8"))


# ---- held-out rows -----------------------------------------------------------------------------------------


def test_another_batch_size_evaluates_the_same_rows(configured, capsys):
    config = configured(batch_size=4, eval_batches=3)
    train(config)
    before = built(configured("other", batch_size=4, eval_batches=3)).held_out.ids
    assert len(before) == 12 and record_of(config)["data"]["held_out_rows"] == 12
    for size, steps in ((1, 4), (3, 6)):  # the second one resumes what the first resumed
        again = configured(
            batch_size=size, grad_accumulation=12 // size, eval_batches=3, steps=steps, resume="auto"
        )
        assert torch.equal(built(again).held_out.ids, before)
        train(again)
        assert record_of(again)["data"]["held_out_rows"] == 12
    assert "held-out rows" not in capsys.readouterr().out


def test_another_eval_batches_is_obeyed_and_said(configured, capsys):
    train(configured(batch_size=4, eval_batches=3))
    assert len(built(configured(batch_size=2, eval_batches=4, resume="auto")).held_out.ids) == 8
    assert "held-out rows: 12 -> 8; held-out losses before and after" in capsys.readouterr().out


def test_a_checkpoint_without_the_number_had_eval_batches_of_its_batch_size():
    saved = {"eval_batches": 3, "batch_size": 4}
    old = Progress(
        DataState.from_json({"fingerprint": "x", "cursor": {}}, DataState("").unique.state()), saved, "", ""
    )
    assert held_out_count(RunConfig(eval_batches=3, batch_size=1), old) == 12
    assert held_out_count(RunConfig(eval_batches=3, batch_size=1), None) == 3
