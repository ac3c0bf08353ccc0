"""The figures of metrics.jsonl, sent to TensorBoard, trackio or Weights & Biases through their own libraries.

metrics.jsonl stays the record. A tracker is a copy to look at: when it fails, a line says so, and training
goes on without it. A resumed run continues its run there, whose name is in RUN/tracker.txt. Nothing uses the
network unless tracker_online says so.
"""

from __future__ import annotations

import importlib
import os
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from smollm2.errors import UsageError
from smollm2.pretrained.files import write_files
from train.config import RunConfig

NAME_FILE = "tracker.txt"
REMOTES = ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL")  # where trackio would send everything to


class Tracker(Protocol):
    """May raise anything, since `Guarded` calls it."""

    def log(self, step: int, scalars: Mapping[str, float]) -> None: ...

    def flush(self) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in RUN/tensorboard. step: from which the run continues; TensorBoard hides later ones."""

    def __init__(self, run: Path, step: int) -> None:
        again = dict(purge_step=step + 1) if step else {}
        self._writer = summary_writer()(str(run / "tensorboard"), **again)

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class Trackio:
    """A run of that name in trackio's database on this machine, or online where REMOTES say."""

    def __init__(self, run: Path, config: RunConfig) -> None:
        self._library = _library("trackio")
        names = [] if config.tracker_online else [name for name in REMOTES if name in os.environ]
        hidden = {name: os.environ.pop(name) for name in names}
        try:
            self._library.init(
                project=config.tracker_project, name=run_name(run), config=config.as_written(),
                resume="allow", embed=False,
            )  # fmt: skip
        finally:
            os.environ.update(hidden)

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        self._library.log(dict(scalars), step=step)

    def flush(self) -> None:
        """Its own thread sends what there is."""

    def close(self) -> None:
        self._library.finish()


class WandB:
    """A run of that id, in RUN/wandb; `wandb sync` sends later what was not sent online.

    The step is logged as a figure, the axis of all others: W&B's own counter never goes back, as a run that
    is resumed from an earlier checkpoint does.
    """

    def __init__(self, run: Path, config: RunConfig) -> None:
        wandb = _library("wandb")
        disabled = os.environ.get("WANDB_MODE") == "disabled"
        name = run_name(run)
        self._run = wandb.init(
            project=config.tracker_project, id=name, name=run.resolve().name, config=config.as_written(),
            dir=str(run), resume="allow",
            mode=None if config.tracker_online else "disabled" if disabled else "offline",
            settings=wandb.Settings(console="off"),
        )  # fmt: skip
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        self._run.log({"step": step, **scalars})

    def flush(self) -> None:
        """Its own process keeps what it was given, also when this one is killed."""

    def close(self) -> None:
        self._run.finish()


class Guarded:
    """A tracker that cannot stop a training run: its first failure is reported, and ends the tracker."""

    def __init__(self, name: str, begin: Callable[[], Tracker], warn: Callable[[str], None]) -> None:
        self._name, self._warn = name, warn
        self._tracker: Tracker | None = None
        self._tracker = self._attempt(begin)

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Sends what is a number; texts, flags and None are left out."""
        tracker = self._tracker
        numbers = {name: value for name, value in values.items() if type(value) in (int, float)}
        if tracker is not None and numbers:
            self._attempt(lambda: tracker.log(step, numbers))

    def flush(self) -> None:
        if self._tracker is not None:
            self._attempt(self._tracker.flush)

    def close(self) -> None:
        tracker, self._tracker = self._tracker, None
        if tracker is not None:
            self._attempt(tracker.close)

    def _attempt(self, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except Exception as error:  # each library raises its own
            self._tracker = None
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            rest = "training goes on without it, metrics.jsonl has everything"
            self._warn(f"warning: {self._name} failed ({reason}); {rest}")
            return None


def wanted(config: RunConfig) -> list[str]:
    """The names of the trackers that a run asks for."""
    names = ["tensorboard"] if config.tensorboard or config.tracker == "tensorboard" else []
    return names + ([config.tracker] if config.tracker in ("trackio", "wandb") else [])


def check(config: RunConfig) -> None:
    """Raises UsageError when the package of a tracker is missing: called before anything is written."""
    for name in wanted(config):
        if name == "tensorboard":
            summary_writer()
        else:
            _library(name)


def open_trackers(run: Path, config: RunConfig, warn: Callable[[str], None], step: int = 0) -> list[Guarded]:
    """The trackers of the run in that folder. warn: gets a line of text where one fails. step: from which the
    run continues.
    """
    begin: dict[str, Callable[[], Tracker]] = {
        "tensorboard": lambda: TensorBoard(run, step),
        "trackio": lambda: Trackio(run, config),
        "wandb": lambda: WandB(run, config),
    }
    return [Guarded(name, begin[name], warn) for name in wanted(config)]


def run_name(run: Path) -> str:
    """What the run is called in trackio and W&B: the same when it is resumed, another in every folder."""
    file = run / NAME_FILE
    if not file.is_file():
        name = f"{run.resolve().name}-{secrets.token_hex(4)}\n"
        write_files(run, {NAME_FILE: lambda path: path.write_text(name, encoding="utf-8")})
    return file.read_text(encoding="utf-8").strip()


def summary_writer() -> Any:
    """TensorBoard's SummaryWriter class. Raises UsageError when its package is missing."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ModuleNotFoundError:
        raise UsageError(
            "tracker=tensorboard needs the package tensorboard; install it with: pip install tensorboard"
        ) from None
    return SummaryWriter


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        remedy = f"install it with: pip install {name}"
        raise UsageError(f"tracker={name} needs the package {name}; {remedy}") from None
