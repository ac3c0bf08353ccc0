"""Several processes (gloo): the curve of one, the resume of any number from any number, one end for all."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from train_cases import (
    DEADLINE,
    arguments,
    assert_same_curve,
    checkpoint_folder,
    curve,
    run_config,
    torchrun,
    wait_for_steps,
)

from smollm2.errors import UsageError
from train.build import build
from train.checkpoint import newest_checkpoint
from train.config import RunConfig
from train.distributed import World
from train.run import train


def started(config: RunConfig, ranks: int, root: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*torchrun(ranks), "-m", "train.run", *arguments(config)], cwd=root, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def finished(config: RunConfig, ranks: int, root: Path) -> str:
    process = started(config, ranks, root)
    out, err = process.communicate(timeout=DEADLINE)
    assert process.returncode == 0, err[-3000:]
    return out


def record(config: RunConfig) -> dict[str, Any]:
    """The run.json of the last checkpoint."""
    return json.loads((checkpoint_folder(config, 6) / "run.json").read_text(encoding="utf-8"))


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_the_curve_of_several_processes_is_that_of_one(tmp_path, project_root, ranks):
    changes = dict(batch_size=4, grad_accumulation=2, eval_every=3, validation_fraction=0.2, eval_batches=2)
    one, several = run_config(tmp_path, "one", **changes), run_config(tmp_path, "several", **changes)
    train(one)
    out = finished(several, ranks, project_root)
    assert f"{ranks} processes" in out and out.count("step 6/6") == 1, "one rank speaks for all"
    assert_same_curve(one, several)
    records = [record(one), record(several)]
    assert records[0]["data"] == records[1]["data"]
    assert records[0]["tokens"] == records[1]["tokens"] == 6 * 8 * 40
    assert (records[0]["ranks"], records[1]["ranks"]) == (1, ranks)


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_a_run_resumes_on_another_number_of_processes(tmp_path, project_root, capsys, before, after):
    def run(config: RunConfig, ranks: int) -> str:
        if ranks > 1:
            return finished(config, ranks, project_root)
        train(config)
        return capsys.readouterr().out

    straight = run_config(tmp_path, "straight", batch_size=4)
    train(straight)
    first = run_config(tmp_path, "parts", batch_size=4, steps=3)
    run(first, before)
    out = run(run_config(tmp_path, "parts", batch_size=4, resume="auto"), after)
    assert f"ranks: {before} -> {after}; the rows of every step stay the same" in out
    assert_same_curve(straight, first)
    assert record(straight)["data"] == record(first)["data"]


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_after_the_same_step_with_one_checkpoint(tmp_path, project_root):
    config = run_config(tmp_path, batch_size=4, steps=100_000)
    process = started(config, 2, project_root)
    try:
        wait_for_steps(config, 3, process)
        # torchrun hands it to its processes, at slightly different moments
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=DEADLINE)
    finally:
        process.kill()
    assert process.returncode == 1  # torchrun's own
    newest = newest_checkpoint(Path(config.output_dir), print)
    assert newest is not None, err[-3000:]
    assert curve(config)[-1][0] == int(newest.name.removeprefix("step-"))


def test_a_number_of_processes_that_does_not_divide_the_rows_is_refused(tmp_path):
    config = run_config(tmp_path, batch_size=3)
    rows = r"the 3 rows of a step \(batch_size x grad_accumulation\)"
    with pytest.raises(UsageError, match=f"expected a number of processes that divides {rows}, got 2"):
        build(config, World(torch.device("cpu"), size=2))
    assert not Path(config.output_dir).exists()
