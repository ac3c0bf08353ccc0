"""What a sharded run refuses before anything is built, and what it is estimated to take."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from train_cases import run_config

from smollm2.config import SmolLM2Config
from smollm2.errors import UsageError
from train import estimate, sharding
from train.distributed import World
from train.run import train

CPU = torch.device("cpu")
RANKS = "expected 0, or with sharding=hybrid a number of processes"
TORCHRUN = "torchrun --nproc-per-node N -m train.run ..."


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(sharding="some"), "sharding: expected one of none, full, hybrid, got 'some'"),
        (dict(sharding="full", compile=True), "compile: expected false with sharding=full, got true"),
        (dict(sharding="hybrid", cuda_graph=True), "cuda_graph: expected false with sharding=hybrid"),
        (dict(cuda_graph=True), "cuda_graph: needs a CUDA device, got cpu"),
        (dict(cuda_graph=True, gradient_checkpointing=True), "a captured step cannot recompute activations"),
        (dict(sharding="full", optimizer="muon"), "optimizer: expected adamw with sharding=full, got muon"),
        (dict(sharding="full", shard_size=2), f"shard_size: {RANKS}, got 2"),
        (dict(sharding="hybrid", shard_size=-1), f"shard_size: {RANKS}, got -1"),
        (dict(shard_size=2), "shard_size: only read with sharding=hybrid, got sharding=none"),
        (dict(sharding="full"), f"sharding: full needs several processes ({TORCHRUN}), got one"),
    ],
)
def test_what_does_not_go_together_is_refused(tmp_path, changes, message):
    config = run_config(tmp_path, **changes)
    with pytest.raises(UsageError) as refused:
        train(config)
    assert message in str(refused.value)
    assert not Path(config.output_dir).exists()


@pytest.mark.parametrize(
    ("shard_size", "got"),
    [(3, "got 3 (shard_size)"), (4, "got 4 (shard_size)"), (1, "got 1"), (0, "got 4 (shard_size=0")],
)
def test_groups_that_do_not_divide_the_processes_are_refused(tmp_path, monkeypatch, shard_size, got):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    config = run_config(tmp_path, sharding="hybrid", shard_size=shard_size)
    with pytest.raises(
        UsageError, match="expected a divisor of the 4 processes, at least 2 and below 4"
    ) as refused:
        sharding.check(config, World(CPU, size=4))
    assert got in str(refused.value)


def test_by_default_a_node_holds_one_copy(tmp_path, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    config = run_config(tmp_path, sharding="hybrid")
    sharding.check(config, World(CPU, size=32))
    assert sharding.group_size(config, 32) == 8
    assert sharding.describe(config, World(CPU, size=32)) == ", sharded over 8, 4 copies"
    assert sharding.group_size(dataclasses.replace(config, sharding="full"), 32) == 32
    assert sharding.group_size(dataclasses.replace(config, sharding="none"), 32) == 1


def test_the_estimate_divides_what_is_sharded(tmp_path):
    model = SmolLM2Config.preset("1.7B")
    config = run_config(tmp_path, dtype="bf16", gradient_checkpointing=True, sequence_length=2048)
    whole, shards = (estimate.memory_of(config, model, torch.device("cuda"), 4, parts) for parts in (1, 8))
    fixed = [memory.parameters + memory.gradients + memory.moments for memory in (whole, shards)]
    assert fixed[0] == 16 * model.num_parameters() and fixed[1] == pytest.approx(fixed[0] / 8, rel=1e-6)
    embedding = model.vocab_size * model.hidden_size
    layer = (model.num_parameters() - embedding) // 24
    assert whole.gathered == 0
    # weights and a second gradient; two layers; a gradient in bf16 and fp32
    assert shards.gathered == 8 * embedding + (2 * 2 + 2 + 4) * layer
    assert whole.activations_checkpointed == shards.activations_checkpointed
    assert shards.total < 20e9 < whole.total
