"""`python -m bench.kernels` on a CPU at toy size, and the pieces that its figures are made of."""

import json
import math
import os
import subprocess
import sys

import pytest
import torch

from bench import kernels, launches, timing
from bench.kernels import Variant, error
from bench.ops import Case
from bench.part import INTERPRETER_NOTE
from bench.work import Cost, Work

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def measured(tmp_path_factory, project_root):
    """(stdout, section of the JSON file) of two operations."""
    path = tmp_path_factory.mktemp("kernels") / "kernels.json"
    command = [sys.executable, "-m", "bench.kernels", "--device", "cpu", "--tiny", "--dtype", "fp16", "--json", str(path)]
    done = subprocess.run(
        [*command, "--op", "add_rms_norm", "--op", "decode_attention"],
        cwd=project_root, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, json.loads(path.read_text(encoding="utf-8"))["kernels"]


def test_rows_say_all_that_is_needed(measured):
    stdout, section = measured
    assert INTERPRETER_NOTE in stdout and section["note"] == INTERPRETER_NOTE
    assert section["dtype"] == "fp16"
    found = {(row["op"], row["phase"], row["variant"]): row for row in section["rows"] if "failed" not in row}
    for phase in ("forward", "backward"):
        for variant in ("triton", "reference", "compile", "F.rms_norm"):
            row = found["add_rms_norm", phase, variant]
            assert row["us"] > 0 and row["gb_per_s"] >= 0 and row["percent_of_roof"] >= 0 and row["error"] < 5e-3
            assert row["plain_us" if phase == "forward" else "autograd_us"] > 0
    assert ("decode_attention", "forward", "triton") in found
    assert ("decode_attention", "backward", "triton") not in found  # a cache has no gradient


def test_launches_and_bytes_are_printed(measured):
    stdout, section = measured
    ours = section["launches"]["triton"]
    # norm twice, rope, attention, swiglu; backward: each norm in two launches, rope, attention in two, swiglu
    assert (ours["forward"]["triton"], ours["backward"]["triton"]) == (5, 8)
    assert ours["forward"]["launches"] < section["launches"]["torch"]["forward"]["launches"]
    assert "launches per layer, triton: forward" in stdout
    assert set(section["work"]) == {"layer", "step"}
    assert "step: least work" in stdout


@pytest.mark.parametrize("arguments", [["--device", "cpu"], ["--device", "cpu", "--tiny", "--dtype", "bf16"]])
def test_what_cannot_be_measured_here_is_refused(arguments, project_root):
    done = subprocess.run(
        [sys.executable, "-m", "bench.kernels", *arguments], cwd=project_root, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2
    assert "--tiny" in done.stderr or "fp32 or fp16" in done.stderr


def case(**variants) -> Case:
    """y = 2 x, with a reference and other variants."""
    return Case(
        "double", Cost(Work(8, 4), Work(8, 4)), lambda seed: [torch.ones(4, requires_grad=True)], {"reference": lambda x: x + x, **variants}
    )


class _WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x + x

    @staticmethod
    def backward(ctx, dy):
        return dy


def test_a_wrong_variant_is_named_and_not_timed():
    def broken(x):
        raise RuntimeError("no kernel image")

    def absent(x):
        raise ModuleNotFoundError("No module named 'nothing'", name="nothing")

    shapes = kernels.Shapes(None, 1, 4, torch.float32, CPU)
    wrong = case(triton=_WrongGradient.apply, nan=lambda x: x * math.nan, broken=broken, absent=absent, right=lambda x: 2 * x)
    rows = kernels.measure(wrong, shapes, 1e9, 1e9, tiny=True)
    timed = {row["variant"] for row in rows if "us" in row}
    assert timed == {"reference", "right"}
    failed = {row["variant"]: row["failed"] for row in rows if "failed" in row}
    assert failed["triton"].startswith("wrong: relative error 5.0e-01")
    assert failed["nan"].startswith("wrong")
    assert failed["broken"] == "RuntimeError: no kernel image"
    assert failed["absent"] == "nothing is not installed"


def test_a_gradient_is_compared_too():
    right, wrong = case(other=lambda x: 2 * x), case(other=_WrongGradient.apply)
    truth = Variant(right, "reference", 1).results(torch.float64)
    assert error(Variant(right, "other", 1).results(), truth) == 0.0
    assert error(Variant(wrong, "other", 1).results(), truth) == 0.5


def test_launches_are_counted():
    x = torch.ones(4, 4)
    found = launches.count(lambda: torch.empty_like(x).copy_((x @ x).t().reshape(16)[:4] + 1.0), CPU)
    assert found == {"mm": 1, "clone": 1, "add": 1, "copy_": 1}
    assert launches.triton_part(found) == 0


def test_a_sample_is_a_median_with_its_spread():
    sample = timing.Sample.of([10.0, 11.0, 12.0, 13.0, 100.0])
    assert sample.us == 12.0 and 0 < sample.spread < 5
    assert timing.Sample.of([7.0]) == timing.Sample(7.0, 0.0)
