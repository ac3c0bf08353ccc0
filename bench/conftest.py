"""What the pytest-benchmark suites share: --tiny and --full, `timed`, and JSON that names libraries and no
machine.

pytest-benchmark times the real call of every test, one test after the other. On a CPU a plain `pytest bench
--benchmark-only` runs small cases for a few rounds: some minutes on two cores. --full adds the large cases,
those that compile for a minute, and more rounds: much longer. A GPU measures all of them either way.

`peers` of the JSON says which libraries were measured, with their versions, and why each other was not; the
session ends with a line for each of the latter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest

# First: it imports torch before smollm2, which may send idle threads to sleep; llama.cpp needs them.
import bench.generate_plan  # noqa: F401
from bench.peers.status import NOT_ASKED, not_measured
from bench.suite import FACTS, PROJECT, machine_facts

QUICK = "bench: small cases and few rounds on a CPU; --full adds the large cases and the compiled ones"
FLAGS = {
    "--tiny": "toy sizes in the suites of bench/: exercises the code, measures nothing",
    "--full": "also the large and the compiled cases of the suites of bench/ on a CPU",
}

Timed = Callable[..., list[float]]
Status = dict[str, dict[str, Any]]  # of bench.peers.status.peer_status
STATUSES = pytest.StashKey[list[Callable[[], Status]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    for flag, what in FLAGS.items():
        parser.addoption(flag, action="store_true", help=what)


def pytest_configure(config: pytest.Config) -> None:
    config.stash[STATUSES] = []


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    for line in not_measured(joined([status() for status in config.stash[STATUSES]])):
        terminalreporter.write_line(line)
    if not (config.getoption("--full") or config.getoption("--tiny")):
        terminalreporter.write_line(QUICK)


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    kept = machine_facts(machine_info)
    machine_info.clear()
    machine_info.update(kept)


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
def timed(benchmark: Any) -> Timed:
    """timed(call, group, rounds, setup=None, **facts) -> seconds of every round, the real call's.

    `facts` go to extra_info; of bench.suite.FACTS those that are not given stand there as None. More are
    added by `benchmark.extra_info`. setup: what happens before each round, beside the clock.
    """

    def time(
        call: Callable[[], object],
        group: str,
        rounds: int,
        setup: Callable[[], object] | None = None,
        **facts: Any,
    ) -> list[float]:
        benchmark.group = group
        benchmark.extra_info.update(dict.fromkeys(FACTS) | facts)
        before = None if setup is None else lambda: [setup(), None][1]
        benchmark.pedantic(call, setup=before, rounds=rounds)
        seconds: list[float] = benchmark.stats.stats.data
        return seconds

    return time
