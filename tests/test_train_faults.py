"""Faults in the middle of a run: memory that runs out, data that end or do not come, workers that die."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from train_cases import DEADLINE, checkpoint_folder, curve, run_config, wait_for

from smollm2.errors import LoadError, UsageError
from train import run
from train.checkpoint import checkpoints, verify
from train.config import RunConfig
from train.data import worker_pool
from train.data.local import LocalSource
from train.distributed import Interrupted, StopRequest, World
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


# ---- signals while a run waits for its data ----------------------------------------------------------------


class Stuck:
    """A source that gives nothing from its read number `reads` on, and tries again whatever happens, until
    the signal has come. It comes when `ready` says so.
    """

    def __init__(self, patch: pytest.MonkeyPatch, reads: int, ready: Callable[[], bool]) -> None:
        self._reads, self._ready, self._calls = reads, ready, 0
        self._begun, self.over = threading.Event(), False
        original_read, original_note = LocalSource.read, StopRequest._note

        def read(source: LocalSource, *where: int) -> Iterator[Any]:
            self._calls += 1
            if self._calls < self._reads:
                yield from original_read(source, *where)
                return
            self._begun.set()
            try:
                while not self.over:  # in short sleeps: a signal just before a long one would not end it
                    time.sleep(0.02)
            except Exception:  # noqa: BLE001 - as a source that takes every error for one of the network
                pass
            raise LoadError("the network is gone")

        def note(*given: Any) -> None:
            try:
                original_note(*given)
            finally:
                self.over = True

        patch.setattr(LocalSource, "read", read)
        patch.setattr(StopRequest, "_note", note)

    def send(self, number: int) -> threading.Thread:
        def wait_and_send() -> None:
            assert self._begun.wait(DEADLINE)
            wait_for(self._ready)
            os.kill(os.getpid(), number)

        sender = threading.Thread(target=wait_and_send)
        sender.start()
        return sender


def short_epochs(folder: Path, name: str, **changes: Any) -> RunConfig:
    """A run whose documents are read again after a few steps."""
    corpus = folder / "numbers.jsonl"
    texts = [f"{index} and {index + 1} and {index * index}. " for index in range(24)]
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return run_config(folder, name, steps=12, validation_fraction=0.0, **changes)


@pytest.mark.parametrize(("workers", "number"), [(0, signal.SIGTERM), (1, signal.SIGINT)])
def test_a_signal_while_the_data_do_not_come_saves_and_ends(tmp_path, monkeypatch, capsys, workers, number):
    straight = short_epochs(tmp_path, "straight")
    train(straight)
    with monkeypatch.context() as patch, pytest.raises(LoadError):  # how many steps the first epoch has
        Stuck(patch, 3, lambda: True).over = True
        train(short_epochs(tmp_path, "broken"))
    steps = len(curve(short_epochs(tmp_path, "broken")))
    assert 2 <= steps < 12
    config = short_epochs(tmp_path, "stopped", workers=workers)
    capsys.readouterr()
    with monkeypatch.context() as patch:
        # what was read before may still be with the workers: then there is no step yet
        sender = Stuck(patch, 3, lambda: workers > 0 or len(curve(config)) == steps).send(number)
        assert train(config) == 128 + number
        sender.join()
    if not workers:
        end = checkpoint_folder(config, steps)
        assert f"stopped at step {steps}, saved in {end}" in capsys.readouterr().out and verify(end) > 0
    config.resume = "auto"
    assert train(config) == 0
    assert curve(config) == curve(straight)
    ends = [load_file(checkpoint_folder(one, 12) / "model.safetensors") for one in (config, straight)]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[1])


def test_a_signal_before_the_first_step_has_nothing_to_save(tmp_path, monkeypatch, capsys):
    config = run_config(tmp_path)
    with monkeypatch.context() as patch:
        sender = Stuck(patch, 2, lambda: True).send(signal.SIGTERM)
        assert train(config) == 128 + signal.SIGTERM
        sender.join()
    assert "stopped before the first step: there is nothing to save" in capsys.readouterr().out
    assert checkpoints(Path(config.output_dir)) == []


def test_a_wait_is_left_at_once_and_only_by_a_process_that_trains_alone(monkeypatch, capsys):
    left: list[int] = []
    monkeypatch.setattr(os, "_exit", left.append)
    alone, of_two = World(torch.device("cpu")), World(torch.device("cpu"), size=2)
    with StopRequest(alone) as stop:
        with pytest.raises(Interrupted), stop.waiting():
            os.kill(os.getpid(), signal.SIGTERM)
            pytest.fail("waited on")
        assert stop.agree() == signal.SIGTERM and left == []
        with pytest.raises(Interrupted), stop.waiting():  # noted before
            pytest.fail("began to wait")
        os.kill(os.getpid(), signal.SIGTERM)
        assert left == [143]
    assert "SIGTERM: the wait for data ends here; once more leaves at once" in capsys.readouterr().err
    with StopRequest(of_two) as stop, stop.waiting():
        os.kill(os.getpid(), signal.SIGTERM)
    assert left == [143]
