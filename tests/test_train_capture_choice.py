"""Whether a step is captured in a CUDA graph: on one GPU unless something in the way is named, and never
against the user's word.
"""

from __future__ import annotations

from dataclasses import asdict

import pytest
import torch

from smollm2.errors import UsageError
from train.config import RunConfig
from train.distributed import World
from train.resume import compare_for_resume
from train.step import capture_choice

GPU = World(torch.device("cuda"))
CPU = World(torch.device("cpu"))


def test_auto_captures_on_one_gpu():
    assert capture_choice(RunConfig(), GPU) == (True, "auto: one GPU")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (dict(optimizer="muon"), "auto: Muon cannot be captured"),
        (dict(gradient_checkpointing=True), "auto: a captured step cannot recompute activations"),
        (dict(compile=True), "auto: compile=true has graphs of its own"),
        (dict(attention_dropout=0.1), "auto: dropout draws anew in every step"),
    ],
)
def test_auto_names_what_is_in_the_way(changes, reason):
    config = RunConfig(**changes)
    config.validate()
    assert capture_choice(config, GPU) == (False, reason)


def test_auto_on_other_devices_and_with_several_processes():
    assert capture_choice(RunConfig(), CPU) == (False, "auto: the device is cpu")
    several = World(torch.device("cuda"), rank=0, size=2)
    reason = "auto: there are 2 processes, which only cuda_graph=true captures"
    assert capture_choice(RunConfig(), several) == (False, reason)
    assert capture_choice(RunConfig(cuda_graph="true"), several) == (True, "asked for")


@pytest.mark.parametrize("given", [True, "true", "True", "yes", "on", "1"])
def test_true_is_taken_at_its_word(given):
    config = RunConfig(cuda_graph=given, attention_dropout=0.1)
    config.validate()
    assert capture_choice(config, GPU) == (True, "asked for")
    with pytest.raises(UsageError, match="cuda_graph: needs a CUDA device, got cpu"):
        capture_choice(config, CPU)


@pytest.mark.parametrize("given", [False, "false", "no", "off", "0"])
def test_false_is_taken_at_its_word(given):
    config = RunConfig()
    config.cuda_graph = given  # what is assigned later counts once it is checked
    config.validate()
    assert capture_choice(config, GPU) == (False, "asked for")


def test_a_checkpoint_from_when_it_was_a_boolean_is_not_a_change():
    before = {**asdict(RunConfig()), "cuda_graph": False}
    assert compare_for_resume(before, RunConfig(cuda_graph="false")) == []
    assert compare_for_resume(before, RunConfig()) == ["cuda_graph: false -> auto"]


def test_another_word_is_refused():
    with pytest.raises(UsageError, match="cuda_graph: expected one of auto, true, false, got 'perhaps'"):
        RunConfig(cuda_graph="perhaps").validate()
