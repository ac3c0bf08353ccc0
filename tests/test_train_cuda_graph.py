"""A captured step gives the eager numbers, on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from train_cases import checkpoint_folder, curve, run_config

from smollm2.pretrained.load import load_model
from train.run import train

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize(
    "changes",
    [
        dict(dtype="fp32"),
        dict(dtype="bf16", backend="triton"),
        dict(dtype="bf16", grad_accumulation=2, schedule="wsd", spike_zscore=6.0),
    ],
    ids=["fp32", "bf16-triton", "bf16-accumulation-wsd"],
)
def test_capture_and_replay_give_the_eager_numbers(tmp_path, changes):
    eager = run_config(tmp_path, "eager", device="cuda", steps=12, cuda_graph=False, **changes)
    captured = run_config(tmp_path, "captured", device="cuda", steps=12, cuda_graph=True, **changes)
    train(eager)
    train(captured)
    assert curve(captured) == curve(eager)
    one, other = (load_model(checkpoint_folder(config, 12)).state_dict() for config in (eager, captured))
    assert all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("cuda_graph", [False, True])
def test_nothing_waits_for_the_device_between_log_lines(tmp_path, cuda_graph, monkeypatch):
    """torch raises at any operation that synchronises, from after one log line until before the next; a save
    follows the last.
    """
    from train import metrics, step

    original_log, original_call = metrics.Reporter.log, step.TrainStep._count_targets
    done: list[int] = []
    steps = 20

    def log(self: metrics.Reporter, *values: float) -> None:
        original_log(self, *values)
        # beyond the first steps, in which memory is allocated, kernels are compiled and the graph is captured
        if 5 <= len(done) < steps:
            torch.cuda.set_sync_debug_mode("error")

    def count(self: step.TrainStep, batch: Any) -> int:
        done.append(1)
        if len(done) % 5 == 0:
            torch.cuda.set_sync_debug_mode("default")  # this step ends with a log line
        return original_call(self, batch)

    monkeypatch.setattr(metrics.Reporter, "log", log)
    monkeypatch.setattr(step.TrainStep, "_count_targets", count)
    try:
        train(
            run_config(tmp_path, device="cuda", steps=steps, log_every=5, cuda_graph=cuda_graph, dtype="bf16")
        )
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(done) == steps
