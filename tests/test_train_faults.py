"""Faults in the middle of a run: memory that runs out, data that end, workers that die."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from train_cases import checkpoint_folder, curve, run_config

from smollm2.errors import LoadError, UsageError
from train import run
from train.checkpoint import verify
from train.data import worker_pool
from train.run import train
from train.step import TrainStep


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore lines"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to "
            "allocate 9 bytes."
        ),
        MemoryError(),
    ],
    ids=["cuda", "cpu", "python"],
)
def test_out_of_memory_names_the_keys_that_need_less(tmp_path, monkeypatch, error):
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(TrainStep, "_compute", fail)
    with pytest.raises(
        UsageError,
        match="lower batch_size=2 and raise grad_accumulation=1.*gradient_checkpointing=true.*dtype=bf16",
    ):
        train(run_config(tmp_path))


def test_other_errors_stay_what_they_are(tmp_path, monkeypatch):
    def fail(*_: Any) -> None:
        raise RuntimeError("shapes cannot be multiplied")

    monkeypatch.setattr(TrainStep, "_compute", fail)
    with pytest.raises(RuntimeError, match="^shapes cannot be multiplied$"):
        train(run_config(tmp_path))


def test_data_that_end_leave_a_checkpoint_of_what_was_trained(tmp_path, monkeypatch):
    original = run.training_batches

    def failing(*arguments: Any, **keys: Any) -> Iterator[Any]:
        batches = original(*arguments, **keys)
        yield next(batches)
        yield next(batches)
        raise LoadError("the disk with the corpus is gone")

    straight, broken = run_config(tmp_path, "straight"), run_config(tmp_path, "broken")
    train(straight)
    with monkeypatch.context() as patch:
        patch.setattr(run, "training_batches", failing)
        with pytest.raises(LoadError, match="the disk with the corpus is gone"):
            train(broken)
    assert verify(checkpoint_folder(broken, 2)) > 0
    train(run_config(tmp_path, "broken", resume="auto"))
    assert curve(broken) == curve(straight)


@pytest.mark.slow
def test_a_worker_that_dies_ends_the_run_with_its_state_saved(tmp_path, monkeypatch):
    started: list[Any] = []
    original_start = worker_pool._WorkerProcess.start

    def start(self: Any) -> None:
        original_start(self)
        started.append(self)

    original_call = TrainStep.__call__

    def call(self: TrainStep, batch: Any) -> Any:
        for process in started:
            if process.is_alive():
                os.kill(process.pid, signal.SIGKILL)
        return original_call(self, batch)

    monkeypatch.setattr(worker_pool._WorkerProcess, "start", start)
    monkeypatch.setattr(TrainStep, "__call__", call)
    config = run_config(tmp_path, workers=1, steps=500)
    with pytest.raises(LoadError, match="worker"):
        train(config)
    assert started and curve(config)
    newest = max(
        int(path.name.removeprefix("step-"))
        for path in (Path(config.output_dir) / "checkpoints").glob("step-*")
    )
    assert verify(checkpoint_folder(config, newest)) > 0
