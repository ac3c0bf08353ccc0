"""What the pytest-benchmark suites share: --tiny, a clock that plays measured times back, and JSON that does not name its machine.

pytest-benchmark runs one variant after the other; here they alternate. So a suite measures all variants of a case in turns before the
case's first test, and every test shows its variant's times through `replay`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from bench.bench_generate import Playback

HERE = Path(__file__).resolve().parent
# Of the machine, beside the device in every figure's extra_info. Not its name and its kernel's: nobody's business in a committed file.
MACHINE = ("machine", "system", "python_implementation", "python_version")
PROCESSOR = ("brand_raw", "arch", "count", "family", "model")
PROJECT = "smollm2-kernels"  # pytest-benchmark would take the name of the folder

Replay = Callable[..., None]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--tiny", action="store_true", help="toy sizes in the suites of bench/: exercises the code, measures nothing")


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    kept: dict[str, Any] = {name: machine_info[name] for name in MACHINE if name in machine_info}
    cpu = machine_info.get("cpu", {})  # of its flags there are a hundred
    machine_info.clear()
    machine_info.update(kept, cpu={name: cpu[name] for name in PROCESSOR if name in cpu})


def pytest_benchmark_update_commit_info(config: pytest.Config, commit_info: dict[str, Any]) -> None:
    commit_info["project"] = PROJECT


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents and "replay" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.benchmark(timer=Playback()))


@pytest.fixture(scope="session")
def tiny(request: pytest.FixtureRequest) -> bool:
    """Whether only the code is exercised."""
    return bool(request.config.getoption("--tiny"))


@pytest.fixture
def replay(benchmark: Any, request: pytest.FixtureRequest) -> Replay:
    """replay(seconds, group, **facts): the times of this test, one a round, measured before; `facts` go to extra_info."""

    def show(seconds: Sequence[float], group: str, **facts: Any) -> None:
        marker = request.node.get_closest_marker("benchmark")
        marker.kwargs["timer"].durations = list(seconds)
        benchmark.group = group
        benchmark.pedantic(lambda: None, rounds=len(seconds))  # it ran already
        benchmark.extra_info.update(facts)

    return show
