"""Sharded runs (FSDP2 on gloo): the curve of one process, resumes on any number of ranks, damage in a shard,
and hybrid.

Each launch of torchrun is `several` runs one after the other in the same processes: the imports are most of
the time.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from train_cases import (
    DEADLINE,
    arguments,
    assert_same_curve,
    checkpoint_folder,
    curve,
    run_config,
    torchrun,
)

from smollm2 import SmolLM2ForCausalLM
from smollm2.errors import LoadError
from train.checkpoint import read_moments, verify
from train.config import RunConfig
from train.run import train

SEVERAL = """
import json, sys
from train.command_line import parse
from train.run import train

for keys in json.loads(sys.argv[1]):
    train(parse(keys)[0])
"""


def several(folder: Path, root: Path, ranks: int, *configs: RunConfig) -> str:
    """Trains one configuration after the other on that many processes; returns what they print."""
    program = folder / "several.py"
    program.write_text(SEVERAL, encoding="utf-8")
    done = subprocess.run(
        [*torchrun(ranks), str(program), json.dumps([arguments(config) for config in configs])], cwd=root,
        capture_output=True, text=True, timeout=DEADLINE,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def assert_same_checkpoint(one: RunConfig, other: RunConfig) -> None:
    """To the last bit, weights and moments."""
    ends = [checkpoint_folder(config, 6) for config in (one, other)]
    for tensors in (
        [load_file(end / "model.safetensors") for end in ends],
        [read_moments(end) for end in ends],
    ):
        assert tensors[0].keys() == tensors[1].keys() and len(tensors[0]) > 0
        assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0])


def first_part(config: RunConfig, folder: Path, name: str, steps: int = 3) -> None:
    """A copy of a run as it was at an earlier step."""
    shutil.copytree(config.output_dir, folder / name)
    for path in (folder / name / "checkpoints").glob("step-*"):
        if int(path.name.removeprefix("step-")) > steps:
            shutil.rmtree(path)


@pytest.mark.slow
def test_two_ranks_train_save_and_resume(tmp_path, project_root):
    changes = dict(batch_size=2, grad_accumulation=2, checkpoint_every=3, eval_every=3, eval_batches=3)
    changes |= dict(sample_every=5, sample_tokens=3)
    one = run_config(tmp_path, "one", **changes)
    train(one)
    full = run_config(tmp_path, "full", sharding="full", **changes)
    recomputed = run_config(tmp_path, "recomputed", sharding="full", gradient_checkpointing=True, **changes)
    half = run_config(tmp_path, "half", sharding="full", dtype="bf16", **changes)
    half_one = run_config(tmp_path, "half-one", dtype="bf16", **changes)
    train(half_one)
    out = several(tmp_path, project_root, 2, full, recomputed, half)
    assert out.count("2 processes, sharded over 2") == 3
    assert_same_curve(one, full)
    assert curve(full) == curve(recomputed), "recomputation changes nothing"
    for (_, loss, _), (_, other, _) in zip(curve(half_one), curve(half), strict=True):
        # bf16 has eight bits: the order of rows in a product already shows
        assert other == pytest.approx(loss, rel=2e-2)

    end = checkpoint_folder(full, 6)
    assert {path.name for path in (end / "shards").iterdir()} == {".metadata", "__0_0.distcp", "__1_0.distcp"}
    assert verify(end) > 1_000_000
    weights = load_file(end / "model.safetensors")
    model = SmolLM2ForCausalLM.from_pretrained(end, backend="torch")
    state = model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in weights.items())

    # 2 -> 2 to the last bit, with a damaged newest checkpoint; 2 -> DDP, 1 -> 2; and 2 -> 1 below.
    for name in ("same", "ddp", "alone"):
        first_part(full, tmp_path, name)
    first_part(one, tmp_path, "spread")
    shutil.copytree(end, tmp_path / "same" / "checkpoints" / "step-000006")
    shard = tmp_path / "same" / "checkpoints" / "step-000006" / "shards" / "__1_0.distcp"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(LoadError, match="__1_0.distcp: its sha256"):
        verify(shard.parent.parent)
    same = run_config(tmp_path, "same", sharding="full", resume="auto", **changes)
    ddp = run_config(tmp_path, "ddp", resume="auto", **changes)
    spread = run_config(tmp_path, "spread", sharding="full", resume="auto", **changes)
    out = several(tmp_path, project_root, 2, same, ddp, spread)
    assert "skipped a damaged checkpoint" in out and "__1_0.distcp" in out
    assert out.count("resumed at step 3") == 3
    assert curve(same) == curve(full)
    assert_same_checkpoint(same, full)
    assert_same_curve(one, ddp)
    assert_same_curve(one, spread)
    alone = run_config(tmp_path, "alone", resume="auto", **changes)
    train(alone)
    assert_same_curve(one, alone)


@pytest.mark.slow
def test_hybrid_with_four_ranks_has_the_curve_of_one_and_resumes_on_two(tmp_path, project_root):
    changes = dict(batch_size=4, grad_accumulation=2, checkpoint_every=3)
    one = run_config(tmp_path, "one", **changes)
    train(one)
    hybrid = run_config(tmp_path, "hybrid", sharding="hybrid", shard_size=2, **changes)
    assert "sharded over 2, 2 copies" in several(tmp_path, project_root, 4, hybrid)
    assert_same_curve(one, hybrid)
    first_part(hybrid, tmp_path, "fewer")
    fewer = run_config(tmp_path, "fewer", sharding="full", resume="auto", **changes)
    assert "ranks: 4 -> 2" in several(tmp_path, project_root, 2, fewer)
    assert_same_curve(one, fewer)
