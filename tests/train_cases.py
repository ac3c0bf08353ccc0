"""A run small enough for a test: its keys, its corpus, and what it left behind."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from train.config import RunConfig
from train.metrics import read_metrics

TINY: dict[str, Any] = dict(
    model="tiny", data="local", validation_fraction=0.1, tokenizer="train", vocab_size=300,
    sequence_length=40, steps=6, batch_size=2, lr=3e-3, warmup_steps=2, workers=0, log_every=1, eval_every=0,
    sample_every=0, device="cpu",
)  # fmt: skip


DEADLINE = 900  # seconds for what a sub-process does: far more than ten times what it takes


def torchrun(ranks: int) -> list[str]:
    """What starts a module or script in so many processes."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]


def wait_for(event: Callable[[], bool]) -> None:
    end = time.monotonic() + DEADLINE
    while not event():
        assert time.monotonic() < end
        time.sleep(0.05)


def wait_for_steps(config: RunConfig, steps: int, process: subprocess.Popen[str]) -> None:
    """Returns when the running process has logged so many steps."""
    wait_for(lambda: len(curve(config)) >= steps or process.poll() is not None)
    assert process.poll() is None


def write_corpus(path: Path) -> str:
    """Sixty documents of unequal length in a .jsonl file; returns its path."""
    texts = [f"{index} and {index + 1} and {index * index}. " * (1 + index % 4) for index in range(60)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return str(path)


def run_config(folder: Path, name: str = "run", **changes: Any) -> RunConfig:
    """The configuration of a run in folder/name, on the corpus in that folder (or the one that a link there
    leads to).
    """
    corpus = folder / "numbers.jsonl"
    if not corpus.exists():
        write_corpus(corpus)
    return RunConfig(
        **{**TINY, "paths": [str(corpus.resolve())], "output_dir": str(folder / name), **changes}
    )


def arguments(config: RunConfig) -> list[str]:
    """The keys of a configuration that differ from the defaults, as a command line has them."""
    default = RunConfig()
    found = []
    for name, value in vars(config).items():
        if value != getattr(default, name):
            text = "[" + ",".join(map(str, value)) + "]" if isinstance(value, list) else str(value)
            found.append(f"{name}={text.lower() if isinstance(value, bool) else text}")
    return found


def checkpoint_folder(config: RunConfig, step: int) -> Path:
    return Path(config.output_dir) / "checkpoints" / f"step-{step:06d}"


def curve(config: RunConfig) -> list[tuple[int, float, float]]:
    """(step, loss, gradient norm) of every logged step."""
    return [
        (line["step"], line["loss"], line["gradient_norm"])
        for line in read_metrics(Path(config.output_dir))
        if "loss" in line
    ]


# The same global batch, summed in another order: fp32 rounding, which AdamW's division by small second
# moments magnifies.
TOLERANCE = 2e-4


def assert_same_curve(one: RunConfig, other: RunConfig) -> None:
    """Of six steps each, but for the order of sums."""
    assert [step for step, _, _ in curve(one)] == [step for step, _, _ in curve(other)] == [1, 2, 3, 4, 5, 6]
    for (_, loss, norm), (_, other_loss, other_norm) in zip(curve(one), curve(other), strict=True):
        assert other_loss == pytest.approx(loss, rel=TOLERANCE)
        assert other_norm == pytest.approx(norm, rel=10 * TOLERANCE)
