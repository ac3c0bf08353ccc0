"""What the pytest-benchmark suites share: --tiny and --full, a clock that plays times back, and JSON that
names libraries and no machine.

pytest-benchmark runs one variant after the other; here they alternate. So a suite measures all variants of a
case in turns before the case's first test, and every test shows its variant's times through `replay`.

On a CPU a plain `pytest bench --benchmark-only` is a plan of small cases and few rounds: about four minutes
on two cores. --full adds the large cases, whatever compiles for a minute, and more rounds: much longer. On a
GPU both are the whole.

`peers` of the JSON says which libraries were measured, with their versions, and why each other was not; the
session ends with a line for each of the latter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest

import bench.generate  # noqa: F401 - first: it imports torch before smollm2, which may send idle threads to sleep; llama.cpp needs them
from bench.bench_generate import Playback
from bench.part import FACTS
from bench.peers.status import NOT_ASKED, not_measured

HERE = Path(__file__).resolve().parent
# Of the machine, beside the device in every figure's extra_info. Not its name and its kernel's: nobody's
# business in a committed file.
MACHINE = ("machine", "system", "python_implementation", "python_version")
PROCESSOR = ("brand_raw", "arch", "count", "family", "model")
PROJECT = "smollm2-kernels"  # pytest-benchmark would take the name of the folder

QUICK = "bench: small cases and few rounds on a CPU; --full adds the large cases and the compiled ones"

Replay = Callable[..., None]
Status = dict[str, dict[str, Any]]  # of bench.peers.status.peer_status
STATUSES = pytest.StashKey[list[Callable[[], Status]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--tiny",
        action="store_true",
        help="toy sizes in the suites of bench/: exercises the code, measures nothing",
    )
    parser.addoption(
        "--full",
        action="store_true",
        help="also the large and the compiled cases of the suites of bench/ on a CPU",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[STATUSES] = []


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    for line in not_measured(joined([status() for status in config.stash[STATUSES]])):
        terminalreporter.write_line(line)
    if not (config.getoption("--full") or config.getoption("--tiny")):
        terminalreporter.write_line(QUICK)


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    kept: dict[str, Any] = {name: machine_info[name] for name in MACHINE if name in machine_info}
    cpu = machine_info.get("cpu", {})  # of its flags there are a hundred
    machine_info.clear()
    machine_info.update(kept, cpu={name: cpu[name] for name in PROCESSOR if name in cpu})


def pytest_benchmark_update_json(config: pytest.Config, output_json: dict[str, Any]) -> None:
    if config.stash[STATUSES]:  # else no suite ran that has libraries beside it
        output_json["peers"] = joined([status() for status in config.stash[STATUSES]])


def joined(statuses: Iterable[Status]) -> Status:
    """That of several suites: a library is used where one of them measured it; else the first that asked for
    it says why not.
    """
    found: Status = {}
    for status in statuses:
        for peer, row in status.items():
            before = found.get(peer)
            asked = before is not None and before["why"] == NOT_ASKED
            if before is None or (row["used"] and not before["used"]) or (asked and row["why"] != NOT_ASKED):
                found[peer] = row
    return found


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


@pytest.fixture(scope="session")
def full(request: pytest.FixtureRequest) -> bool:
    """Whether a CPU measures its large cases too."""
    return bool(request.config.getoption("--full"))


@pytest.fixture(scope="session")
def statuses(request: pytest.FixtureRequest) -> list[Callable[[], Status]]:
    """Where a suite leaves the function that says which libraries it measured, for the JSON and for the end
    of the session.
    """
    return request.config.stash[STATUSES]


@pytest.fixture
def replay(benchmark: Any, request: pytest.FixtureRequest) -> Replay:
    """replay(seconds, group, **facts): the times of this test, one a round, measured before. `facts` go to extra_info; of bench.part.FACTS
    those that are not given stand there as None."""

    def show(seconds: Sequence[float], group: str, **facts: Any) -> None:
        marker = request.node.get_closest_marker("benchmark")
        marker.kwargs["timer"].durations = list(seconds)
        benchmark.group = group
        benchmark.pedantic(lambda: None, rounds=len(seconds))  # it ran already
        benchmark.extra_info.update(dict.fromkeys(FACTS) | facts)

    return show
