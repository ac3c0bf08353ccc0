"""Trackers beside metrics.jsonl: the same figures, one run however often it is resumed, no network, and no
training that stops for them.
"""

from __future__ import annotations

import importlib
import os
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from train_cases import run_config

from smollm2.errors import UsageError
from train import tracking
from train.metrics import read_metrics
from train.run import train


class FakeTrackio(types.ModuleType):
    """Records its calls; fails in the method that `broken` names."""

    def __init__(self, broken: str = "") -> None:
        super().__init__("trackio")
        self.broken, self.begun, self.logged, self.finished = broken, [], [], 0  # type: ignore[var-annotated]
        self.space: list[str | None] = []

    def init(self, **keys: Any) -> None:
        self._fail("init")
        self.begun.append(keys)
        self.space.append(os.environ.get("TRACKIO_SPACE_ID"))

    def log(self, metrics: dict[str, Any], step: int) -> None:
        self._fail("log")
        self.logged.append((step, metrics))

    def finish(self) -> None:
        self._fail("finish")
        self.finished += 1

    def _fail(self, name: str) -> None:
        if self.broken == name:
            raise ConnectionError("the server\nis away")


class FakeWandb(types.ModuleType):
    """A module and its run in one."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.begun: list[dict[str, Any]] = []
        self.logged: list[dict[str, Any]] = []
        self.defined: list[tuple[str, str]] = []
        self.finished = 0

    def Settings(self, **keys: Any) -> dict[str, Any]:  # noqa: N802 - its name there
        return keys

    def init(self, **keys: Any) -> FakeWandb:
        self.begun.append(keys)
        return self

    def define_metric(self, name: str, step_metric: str) -> None:
        self.defined.append((name, step_metric))

    def log(self, metrics: dict[str, Any]) -> None:
        self.logged.append(metrics)

    def finish(self) -> None:
        self.finished += 1


def numbers(folder: Path) -> list[tuple[int, dict[str, Any]]]:
    """The lines of metrics.jsonl as (step, what is a number in them)."""
    lines = [dict(line) for line in read_metrics(folder)]
    found = [
        (
            line.pop("step"),
            {
                name: value
                for name, value in line.items()
                if isinstance(value, (int, float)) and not isinstance(value, bool)
            },
        )
        for line in lines
    ]
    return [(step, values) for step, values in found if values]


def test_trackio_gets_the_figures_and_a_resumed_run_continues_its_run(tmp_path, monkeypatch):
    fake = FakeTrackio()
    monkeypatch.setitem(sys.modules, "trackio", fake)
    monkeypatch.setenv("TRACKIO_SPACE_ID", "somebody/space")
    config = run_config(tmp_path, tracker="trackio", tracker_project="mine", steps=2, eval_every=2)
    train(config)
    folder = Path(config.output_dir)
    assert fake.logged == numbers(folder) and fake.finished == 1
    assert {"loss", "lr", "gradient_norm", "tokens"} <= fake.logged[0][
        1
    ].keys() and "held_out_loss" in fake.logged[-1][1]
    config.steps, config.resume = 4, "auto"
    train(config)
    first, second = fake.begun
    assert first["name"] == second["name"] == (folder / "tracker.txt").read_text(encoding="utf-8").strip()
    assert (first["project"], first["resume"], first["config"]["steps"]) == ("mine", "allow", 2)
    assert [step for step, values in fake.logged if "loss" in values] == [1, 2, 3, 4]
    assert fake.space == [None, None] and os.environ["TRACKIO_SPACE_ID"] == "somebody/space", (
        "nothing leaves the machine unasked"
    )
    other = run_config(tmp_path, "other", tracker="trackio", tracker_online=True, steps=1)
    train(other)
    assert fake.space[-1] == "somebody/space" and fake.begun[-1]["name"] != first["name"]


def test_wandb_gets_the_figures_offline_and_by_their_step(tmp_path, monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    config = run_config(tmp_path, tracker="wandb", steps=2)
    train(config)
    config.steps, config.resume, config.tracker_online = 3, "auto", True
    train(config)
    first, second = fake.begun
    assert (
        first["id"] == second["id"]
        and first["resume"] == "allow"
        and first["name"] == "run"
        and first["dir"] == config.output_dir
    )
    assert (first["mode"], second["mode"]) == ("offline", None)
    assert fake.defined[0] == ("*", "step") and fake.finished == 2
    assert [(line.pop("step"), line) for line in map(dict, fake.logged)] == numbers(Path(config.output_dir))
    assert [line["step"] for line in fake.logged if "loss" in line] == [1, 2, 3]
    monkeypatch.setenv("WANDB_MODE", "disabled")
    train(run_config(tmp_path, "other", tracker="wandb", steps=1))
    assert fake.begun[-1]["mode"] == "disabled"


@pytest.mark.parametrize(("broken", "kept"), [("init", 0), ("log", 0), ("finish", 2)])
def test_a_tracker_that_fails_is_told_once_and_training_goes_on(tmp_path, monkeypatch, capsys, broken, kept):
    fake = FakeTrackio(broken)
    monkeypatch.setitem(sys.modules, "trackio", fake)
    config = run_config(tmp_path, tracker="trackio", steps=2, warmup_steps=1)
    assert train(config) == 0
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert warnings == [
        "warning: trackio failed (ConnectionError: the server is away); training goes on without it, "
        "metrics.jsonl has everything"
    ]
    assert len(fake.logged) == kept
    assert [line["step"] for line in read_metrics(Path(config.output_dir)) if "loss" in line] == [1, 2]


@pytest.mark.parametrize(
    "keys",
    [dict(tensorboard=True), dict(tracker="tensorboard"), dict(tensorboard=True, tracker="tensorboard")],
)
def test_tensorboard_by_either_key_once(tmp_path, monkeypatch, capsys, keys):
    written: list[tuple[str, str, float, int]] = []
    kept: list[int] = []  # how much was written when the writer was asked to keep it
    purged: list[int | None] = []

    class Writer:
        def __init__(self, folder: str, purge_step: int | None = None) -> None:
            self.folder = folder
            purged.append(purge_step)

        def flush(self) -> None:
            kept.append(len(written))

        def add_scalar(self, name: str, value: float, step: int) -> None:
            written.append((self.folder, name, value, step))

        def close(self) -> None:
            pass

    monkeypatch.setattr(tracking, "summary_writer", lambda: Writer)
    config = run_config(tmp_path, steps=2, warmup_steps=1, **keys)
    train(config)
    folder = Path(config.output_dir)
    expected = [
        (str(folder / "tensorboard"), name, value, step)
        for step, values in numbers(folder)
        for name, value in values.items()
    ]
    assert written == expected and len(written) > 10
    assert kept == [len(written)] and purged == [None]
    config.steps, config.resume = 3, "auto"
    train(config)
    assert purged == [None, 3], "what a killed run has logged after its checkpoint is hidden"
    assert "warning" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["trackio", "wandb"])
def test_a_missing_package_is_reported_before_anything_is_written(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    config = run_config(tmp_path, tracker=name)
    with pytest.raises(
        UsageError, match=f"tracker={name} needs the package {name}; install it with: pip install {name}"
    ):
        train(config)
    assert not Path(config.output_dir).exists()


def test_no_tracker_imports_nothing(tmp_path, monkeypatch):
    asked: list[str] = []
    original = importlib.import_module
    monkeypatch.setattr(
        importlib, "import_module", lambda name, *rest: asked.append(name) or original(name, *rest)
    )
    config = run_config(tmp_path, steps=1)
    train(config)
    assert not {"trackio", "wandb"} & set(asked) and not (Path(config.output_dir) / "tracker.txt").exists()
    with pytest.raises(
        UsageError, match="tracker: expected one of none, tensorboard, trackio, wandb, got 'mlflow'"
    ):
        run_config(tmp_path, tracker="mlflow").validate()
