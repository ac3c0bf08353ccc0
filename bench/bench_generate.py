"""pytest-benchmark suite of generation: `pytest bench/bench_generate.py`, compared between runs with `pytest-benchmark compare`.

What is compared is that of bench/generate.py: its defaults, or what `python -m bench.generate` was asked for. pytest-benchmark would run
one variant after the other; they are to alternate. So all variants of a case are measured in turns, before its first test, and the
clock of each test plays those times back.
"""

from __future__ import annotations

from typing import Any

import pytest

from bench.generate import Plan


class Playback:
    """A clock that shows durations measured before, one between each pair of readings."""

    def __init__(self) -> None:
        self.durations: list[float] = []
        self._now, self._readings = 0.0, 0

    def __call__(self) -> float:
        if self._readings % 2:
            self._now += self.durations[self._readings // 2]
        self._readings += 1
        return self._now

    def __repr__(self) -> str:  # stands in the JSON
        return "perf_counter, variants in turns"


def pytest_generate_tests(metafunc: Any) -> None:
    config = metafunc.config
    if not hasattr(config, "generate_plan"):  # that of the command line
        config.generate_plan = Plan(tiny=bool(config.getoption("--tiny", False)))
    plan: Plan = config.generate_plan
    chosen = [(phase, *case, name) for case in plan.cases for phase in ("prefill", "decode") for name in plan.names]
    metafunc.parametrize(
        "phase, batch, prompt, variant", [pytest.param(*one, marks=pytest.mark.benchmark(timer=Playback())) for one in chosen]
    )


def test_generation(benchmark: Any, request: Any, phase: str, batch: int, prompt: int, variant: str) -> None:
    plan: Plan = request.config.generate_plan
    row = plan.rows((batch, prompt))[variant]
    if row.failed:
        pytest.skip(row.failed)
    assert row.tokens is not None and row.tokens.shape == (batch, plan.new_tokens)
    clock: Playback = request.node.get_closest_marker("benchmark").kwargs["timer"]
    clock.durations = row.prefill if phase == "prefill" else row.decode
    benchmark.group = f"{phase}, batch {batch}, prompt {prompt}"
    benchmark.pedantic(lambda: None, rounds=len(clock.durations))  # it ran already
    benchmark.extra_info.update(plan.facts(variant, (batch, prompt), phase))
