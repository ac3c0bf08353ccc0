"""pytest-benchmark suite of generation: `pytest bench/bench_generate.py`, compared between runs with
`pytest-benchmark compare`.

What is compared is that of bench/generate.py: what `python -m bench.generate` was asked for, its defaults
with --full, else `quick`. pytest-benchmark would run one variant after the other; they are to alternate. So
all variants of a case are measured in turns, before its first test, and the clock of each test plays those
times back.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import launches, roofline, work
from bench.generate import Plan
from bench.peak_memory import peak_memory
from bench.variant import Variant
from smollm2.compile import find_package
from smollm2.config import SmolLM2Config
from smollm2.engine.select import select_engine
from smollm2.errors import UsageError
from smollm2.model import SmolLM2ForCausalLM


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


ELSEWHERE = ("llama.cpp", "litgpt")  # their memory is not torch's, or not of this process


class QuickPlan(Plan):
    """A plan that compiles nothing: what has not been compiled before is named and left out."""

    def _variant(self, name: str, weights: SmolLM2ForCausalLM, folder: Path) -> Variant:
        kind, what, *_ = name.split()
        if kind == "compiled":
            quantize, dtype = (
                (what, torch.bfloat16)
                if what == "int8"
                else ("none", torch.bfloat16 if what == "bf16" else torch.float32)
            )
            engine = select_engine(self._load("auto", dtype), quantize=quantize, compiled=False)
            if find_package(engine) is None:
                raise UsageError(
                    "not compiled yet, which takes a minute; add --full, or python -m smollm2.compile"
                )
        return super()._variant(name, weights, folder)


def quick() -> Plan:
    """One and eight rows after a short prompt: a minute on two cores."""
    return QuickPlan(batches=(1, 8), prompts=(32,), new_tokens=16, rounds=3, seconds=45.0)


class Apart:
    """What is found beside the clock, once for each variant and case: memory and launches of a prefill and of
    a decode step.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._rates: dict[torch.dtype, float] = {}
        self._found: dict[tuple[int, int, str], dict[str, dict[str, Any]]] = {}

    def of(self, case: tuple[int, int], name: str, phase: str) -> dict[str, Any]:
        """peak_memory_bytes and launches, each None of what runs outside torch or compiled."""
        key = (*case, name)
        if key not in self._found:
            self._found[key] = self._measure(case, name)
        return self._found[key][phase]

    @torch.inference_mode()
    def _measure(self, case: tuple[int, int], name: str) -> dict[str, dict[str, Any]]:
        plan, device = self._plan, self._plan.device
        prompts: Tensor = plan._prompt_ids[: case[0], : case[1]].to(device)
        turns = plan._variants[name].begin(prompts, plan.new_tokens)
        first = turns.prefill()
        turns.decode(first, 1)  # compiles, captures
        calls: dict[str, Callable[[], object]] = {
            "prefill": turns.prefill,
            "decode": partial(turns.decode, first, 1),
        }
        counted = device.type == "cuda" or (
            find_spec("triton") and name.startswith(("eager", "transformers "))
        )
        return {
            phase: {
                "peak_memory_bytes": None if name.startswith(ELSEWHERE) else peak_memory(call, device),
                "launches": sum(launches.count(call, device).values()) if counted else None,
            }
            for phase, call in calls.items()
        }

    def work(self, case: tuple[int, int], name: str, phase: str, config: SmolLM2Config) -> work.Work:
        """The bytes of weights and cache that a prefill or a decode step cannot avoid, and its operations;
        both for all rows.
        """
        (batch, prompt), variant = case, self._plan._variants[name]
        if phase == "decode":
            items = work.token_items(config, batch, prompt + self._plan.new_tokens // 2, 2).values()
            flops = sum(item.times * item.cost.forward.flops for item in items)
            return work.Work(round(self._plan._step_bytes(name, case)), flops)
        layers = (
            sum(cost.forward.flops for cost in work.layer(config, batch, prompt, 2).values())
            * config.num_hidden_layers
        )
        logits = work.linear(batch, config.hidden_size, config.vocab_size, 2).forward.flops
        return work.Work(variant.weight_bytes + batch * prompt * variant.cache_bytes, layers + logits)

    def rate(self, name: str) -> float:
        """Operations per second of a large product in the variant's dtype: fp32, else bf16, in which
        quantised weights are multiplied.
        """
        dtype = torch.float32 if self._plan._variants[name].dtype == "float32" else torch.bfloat16
        if dtype not in self._rates:
            self._rates[dtype] = roofline.matmul_rate(dtype, self._plan.device, self._plan.tiny)
        return self._rates[dtype]


def pytest_generate_tests(metafunc: Any) -> None:
    config = metafunc.config
    if not hasattr(config, "generate_plan"):  # that of the command line
        tiny, full = (bool(config.getoption(name, False)) for name in ("--tiny", "--full"))
        whole = full or tiny or torch.cuda.is_available()
        config.generate_plan = Plan(tiny=tiny) if whole else quick()
    plan: Plan = config.generate_plan
    chosen = [
        (phase, *case, name) for case in plan.cases for phase in ("prefill", "decode") for name in plan.names
    ]
    metafunc.parametrize("phase, batch, prompt, variant", chosen)


@pytest.fixture(scope="module")
def apart(request: pytest.FixtureRequest, statuses: list[Callable[[], dict[str, Any]]]) -> Apart:
    plan: Plan = request.config.generate_plan  # type: ignore[attr-defined]
    statuses.append(plan.status)
    return Apart(plan)


@pytest.fixture(scope="module")
def config(request: pytest.FixtureRequest) -> SmolLM2Config:
    """That of the model that generates."""
    plan: Plan = request.config.generate_plan  # type: ignore[attr-defined]
    return plan._load("torch", torch.bfloat16).config


def test_generation(
    replay: Any,
    request: Any,
    apart: Apart,
    config: SmolLM2Config,
    phase: str,
    batch: int,
    prompt: int,
    variant: str,
) -> None:
    plan: Plan = request.config.generate_plan
    case = batch, prompt
    row = plan.rows(case)[variant]
    if row.failed:
        pytest.skip(row.failed)
    assert row.tokens is not None and row.tokens.shape == (batch, plan.new_tokens)
    facts, todo = plan.facts(variant, case, phase), apart.work(case, variant, phase, config)
    facts |= {"bytes": todo.bytes, "flops": todo.flops, **apart.of(case, variant, phase)}
    if phase == "prefill":
        seconds = batch * prompt / facts["tokens_per_second"]
        facts["percent_of_roof"] = round(100 * todo.floor(plan._bandwidth, apart.rate(variant)) / seconds, 1)
    replay(
        row.prefill if phase == "prefill" else row.decode, f"{phase}, batch {batch}, prompt {prompt}", **facts
    )
