"""`python -m bench.tuning`: a launch is forced for its operation alone, and one that computes something else
is named, not timed.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
import torch

from bench import tuning
from bench.case import Case, Shapes
from bench.ops import cases
from bench.weight_ops import mlp, optimizer_step
from bench.work import Cost, Work
from kernels import TORCH
from kernels.launch_config import TABLE, LaunchConfig, launch_config
from smollm2.config import SmolLM2Config

CPU = torch.device("cpu")


def test_every_line_of_the_table_has_candidates_and_a_case():
    assert {op.partition(" ")[0] for op in tuning.CANDIDATES} == set(TABLE)
    shapes = Shapes(SmolLM2Config.preset("tiny", num_hidden_layers=1), 1, 8, torch.float32, CPU)
    found = {case.op: case for case in (*cases(shapes, TORCH, "eager"), optimizer_step(shapes))}
    assert {case for case, _, _ in tuning.CANDIDATES.values()} <= found.keys()


def test_every_module_that_asks_the_table_is_told():
    launch = LaunchConfig(7, 7, 7)
    with tuning.forced("swiglu", launch) as table:
        for name in tuning.MODULES:
            module = import_module(f"kernels.{name}")
            assert module.launch_config("swiglu", torch.float32, CPU, 8) == launch
            other = ("rope", torch.float32, CPU, 8)
            assert module.launch_config(*other) == launch_config(*other)
    assert table == [launch_config("swiglu", torch.float32, CPU, 8)]
    assert import_module("kernels.swiglu").launch_config is launch_config


def test_the_candidates_of_the_fused_form_are_timed_in_it(monkeypatch):
    """It asks for its line as `launch_config.launch_config`, and the default form would not ask."""
    shapes, asked = Shapes(SmolLM2Config.preset("tiny"), 1, 8, torch.float32, CPU), []
    case = mlp(shapes, TORCH, lambda function: function)
    kernel = import_module("kernels.mlp")
    plan = kernel._plan
    monkeypatch.setattr(kernel, "_plan", lambda *given: asked.append(found := plan(*given)) or found)
    first, second = tuning.measure(case, "mlp_fwd", "forward", [LaunchConfig(32, 64, 4)], shapes, tiny=True)
    assert first["of_table"] and {(64, 128, 64), (32, 64, 64)} == {
        tuple(options[f"BLOCK_{axis}"] for axis in "MNK") for _, options in asked
    }
    assert "us" in second and second["distance"] < 1e-5


class Plus(torch.autograd.Function):
    """2 x + what the forced launch says: a stand-in for a kernel whose launch changes its result."""

    @staticmethod
    def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
        chosen = import_module("kernels.swiglu").launch_config("swiglu", x.dtype, x.device, 8)
        return 2 * x + chosen.num_stages - 1

    @staticmethod
    def backward(ctx: object, dy: torch.Tensor) -> torch.Tensor:
        return 2 * dy


def rows_of(*candidates: LaunchConfig) -> list[dict[str, Any]]:
    """The rows of bench.tuning for `Plus`, timed as an operation that asks for the launch of swiglu."""
    shapes = Shapes(SmolLM2Config.preset("tiny"), 1, 4, torch.float32, CPU)
    cost, variants = Cost(Work(1, 1), Work(1, 1)), {"triton": Plus.apply}
    case = Case("double", cost, lambda seed: [torch.ones(4, requires_grad=True)], variants)
    return tuning.measure(case, "swiglu", "forward", candidates, shapes, tiny=True)


def test_the_line_of_the_table_is_timed_once():
    known = launch_config("swiglu", torch.float32, CPU, 8)
    rows = rows_of(known, LaunchConfig(4, 512, 4, 1), LaunchConfig(2, 512, 2))
    assert [row["of_table"] for row in rows] == [True, False]


@pytest.mark.parametrize("stages, wrong", [(1, False), (100, True)])
def test_a_launch_with_another_result_is_not_timed(stages, wrong):
    first, second = rows_of(LaunchConfig(2, 512, 4, stages))
    assert first["of_table"] and "us" in first
    assert ("failed" in second) == wrong and ("us" in second) != wrong
