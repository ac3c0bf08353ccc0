"""pytest-benchmark suite of the operations: `pytest bench/bench_kernels.py`, compared between runs with `pytest-benchmark compare`.

On a GPU: 32 x 512 tokens of the 135M model in bf16, one CUDA graph replay per round (several calls on different inputs; us per call is in
extra_info). On a CPU: 64 tokens in fp32, where torch and torch.compile are measured and Triton's interpreter only runs.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
import torch._functorch.config

from bench import timing
from bench.kernels import ERROR_BOUND, FULL, OPS, Variant, error
from bench.ops import Case, Shapes, cases
from bench.part import INTERPRETER_NOTE, provenance
from kernels import select_backend
from smollm2.config import SmolLM2Config

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if DEVICE.type == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are imported
ROWS, DTYPE = (FULL, torch.bfloat16) if DEVICE.type == "cuda" else ((1, 64), torch.float32)
SETS = 4 if DEVICE.type == "cuda" else 1
SHAPES = Shapes(SmolLM2Config.preset("135M"), *ROWS, DTYPE, DEVICE)
CASES = {case.op: case for case in cases(SHAPES, select_backend("triton", DEVICE), "inductor")}
PROVENANCE = provenance(DEVICE)
torch._functorch.config.donated_buffer = False  # a compiled backward pass may otherwise run only once


@pytest.mark.parametrize("variant", ("reference", "compile", "triton"))
@pytest.mark.parametrize("backward", (False, True), ids=("forward", "backward"))
@pytest.mark.parametrize("op", OPS)
def test_operation(benchmark: Any, op: str, backward: bool, variant: str) -> None:
    case = CASES[op]
    if variant not in case.variants:
        pytest.skip(f"{op} is one call of torch: there is nothing to compile")
    implementation = Variant(case, variant, SETS)
    phases = implementation.phases()
    if backward and len(phases) == 1:
        pytest.skip(f"{op} has no backward pass")
    phase = list(phases)[backward]
    wide = torch.float64 if DTYPE == torch.float32 else torch.float32
    assert error(implementation.results(), Variant(case, "reference", 1).results(wide)) <= ERROR_BOUND[DTYPE]
    run = timing.replayable(phases[phase], DEVICE)

    def timed() -> None:
        run()
        timing.synchronize(DEVICE)

    benchmark.group = f"{op} {phase}"
    benchmark.pedantic(timed, rounds=2 if variant == "triton" and DEVICE.type == "cpu" else 30, warmup_rounds=1)
    torch.compiler.reset()
    benchmark.extra_info.update(facts(case, phase, benchmark.stats.stats.median / SETS))
    if variant == "triton" and DEVICE.type == "cpu":
        benchmark.extra_info["note"] = INTERPRETER_NOTE


def facts(case: Case, phase: str, seconds: float) -> dict[str, Any]:
    """What a figure must carry to be worth anything."""
    todo = {"forward": case.cost.forward, "backward": case.cost.backward}.get(phase, case.cost.forward + case.cost.backward)
    rates = {
        "us": round(seconds * 1e6, 2),
        "gb_per_s": round(todo.bytes / seconds / 1e9, 2),
        "tflops": round(todo.flops / seconds / 1e12, 4),
    }
    return {**PROVENANCE, "bytes": todo.bytes, "flops": todo.flops, **rates}
