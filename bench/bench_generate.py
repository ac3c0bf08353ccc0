"""pytest-benchmark suite of generation: `pytest bench/bench_generate.py`.

The variants are those of bench/generate.py: its defaults with --full or on a GPU, else one and eight rows
after a short prompt, and nothing that would have to be compiled first. `python -m bench.generate` measures
them in turns.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch

from bench.generate_plan import Case, Plan, Row, begun
from bench.record import one_line
from bench.timing import synchronize
from bench.variant import Turns


def pytest_generate_tests(metafunc: Any) -> None:
    config = metafunc.config
    if not hasattr(config, "generate_plan"):
        tiny, full = (bool(config.getoption(name, False)) for name in ("--tiny", "--full"))
        config.generate_plan = (
            Plan(tiny=tiny)
            if full or tiny or torch.cuda.is_available()
            else Plan(prompts=(32,), new_tokens=16, rounds=3)
        )
    plan: Plan = config.generate_plan
    phases = ("prefill", "decode")
    chosen = [(*case, name, phase) for case in plan.cases for name in plan.names for phase in phases]
    metafunc.parametrize("batch, prompt, variant, phase", chosen)


class Begun:
    """The batch of one variant and case, for its two tests."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._key: tuple[Case, str] | None = None
        self._turns: Turns | None = None

    def of(self, case: Case, name: str) -> Turns:
        """Raises what its beginning raises."""
        if self._key != (case, name):
            self._turns = None
            gc.collect()
            self._turns = begun(self.plan.variants[name], self.plan.prompt_ids(case), self.plan.new_tokens)
            self._key = case, name
        assert self._turns is not None
        return self._turns


@pytest.fixture(scope="module")
def batches(request: pytest.FixtureRequest, statuses: list[Callable[[], dict[str, Any]]]) -> Begun:
    plan: Plan = request.config.generate_plan  # type: ignore[attr-defined]
    plan.prepare()
    statuses.append(plan.status)
    return Begun(plan)


def test_generation(
    timed: Any, benchmark: Any, batches: Begun, phase: str, batch: int, prompt: int, variant: str
) -> None:
    plan, case, row = batches.plan, (batch, prompt), Row()
    row.failed = plan.unavailable.get(variant, "")
    try:
        turns = None if row.failed else batches.of(case, variant)
    except Exception as failure:  # noqa: BLE001 - a result like any other
        row.failed = one_line(failure)
    if row.failed:
        plan.note(case, variant, row)
        pytest.skip(row.failed)
    assert turns is not None
    first, steps = turns.prefill(), plan.new_tokens - 1

    def prefill() -> None:
        turns.prefill()
        synchronize(plan.device)

    def decode() -> None:
        row.tokens = torch.cat([first, turns.decode(first, steps)], 1).cpu()

    group = f"{phase}, batch {batch}, prompt {prompt}"
    if phase == "prefill":
        row.prefill = timed(prefill, group, plan.rounds)
        decode()
    else:
        row.decode = [seconds / steps for seconds in timed(decode, group, plan.rounds, setup=prefill)]
    assert row.tokens is not None and row.tokens.shape == (batch, plan.new_tokens)
    plan.note(case, variant, row)
    benchmark.extra_info.update(plan.facts(variant, case, phase))
