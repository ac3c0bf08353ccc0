"""`python -m bench.correctness`: the kernels' tests on this device, spread over processes by pytest-xdist.

Every test's outcome is saved as it comes. An illegal memory access ends a process's use of the GPU for good:
such a worker leaves at once, its test counts as failed, and another worker takes its place. The files of
ALONE hold much GPU memory, and have one worker each. On a GPU the same files run in float32, float16 and
bfloat16. Needs pytest. This module is also the plugin (`pytest -p bench.correctness`) that writes the
outcomes, a line of JSON each, into the file that SMOLLM2_OUTCOMES names.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bench.record import ROOT, Part, parser, python, write_json
from smollm2.cli import run_command

if TYPE_CHECKING:
    import pytest

# In the order in which they run, of which the time may allow a part only.
PATTERNS = (
    "test_kernel_*.py", "test_train_cuda_graph.py", "test_captured_gpu.py", "test_bench_kernels_command.py",
    "test_bench_timing.py", "test_backend_*.py", "test_model_*.py", "test_optim_adamw.py",
)  # fmt: skip
ALONE = ("test_kernel_offsets.py",)
TINY_FILE, TINY_TESTS = "test_kernel_swiglu.py", "test_packed_is_separate or test_large_gates"
GRACE = 4.0  # seconds to write a report after being asked to stop
GPU_LOST = 70  # the exit code of a process that can no longer use the GPU
KEPT_BYTES = 2 << 30  # of GPU memory, which a process gives back after a test: a dozen share the GPU
MESSAGES = 40  # failures whose text is kept


# in the processes that run tests

_worst_sent: dict[tuple[str, str], float] = {}


def pytest_configure(config: pytest.Config) -> None:
    path = os.environ.get("SMOLLM2_OUTCOMES")
    if path and not hasattr(config, "workerinput"):  # xdist's workers report to the process that started them
        distributed = config.getoption("numprocesses", None)
        config.pluginmanager.register(DistributedRecorder(path) if distributed else Recorder(path))


def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> None:
    """Sends the worst errors of tests/numerics.py with the last report of a test; leaves if the GPU is lost,
    before others fail for it.
    """
    if call.when != "teardown":
        return
    worst: dict[tuple[str, str], float] = getattr(sys.modules.get("numerics"), "WORST", {})
    if worst != _worst_sent:
        _worst_sent.update(worst)
        item.user_properties.append(("worst", [[*key, value] for key, value in worst.items()]))
    if torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
            if torch.cuda.memory_reserved() > KEPT_BYTES:
                torch.cuda.empty_cache()
        except RuntimeError as error:
            if path := os.environ.get("SMOLLM2_OUTCOMES"):
                message = f"the GPU is lost: {error}"[:1500]
                Recorder(path).write(id=item.nodeid, outcome="failed", seconds=0.0, message=message)
            os._exit(GPU_LOST)


class Recorder:
    """Writes what happens as it happens."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._collected = False

    def write(self, **values: Any) -> None:
        with open(self._path, "a", encoding="utf-8") as stream:
            stream.write(json.dumps(values) + "\n")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        outcome: str | None = report.outcome
        if report.when in ("setup", "teardown"):
            outcome = {"passed": None, "failed": "error"}.get(report.outcome, report.outcome)
        if hasattr(report, "wasxfail"):
            outcome = "xfail"
        more = {"message": report.longreprtext[-1500:]} if report.failed else {}
        worst = dict(report.user_properties).get("worst", [])
        self.write(id=report.nodeid, outcome=outcome, seconds=report.duration, worst=worst, **more)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.write(id=report.nodeid, outcome="error", seconds=0.0, message=report.longreprtext[-1500:])

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.collected([item.nodeid for item in session.items])

    def collected(self, ids: Sequence[str]) -> None:
        if not self._collected:
            self._collected = True
            self.write(collected=list(ids))


class DistributedRecorder(Recorder):
    """The same in the process that hands out tests to others: they collect."""

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        pass

    def pytest_xdist_node_collection_finished(self, node: Any, ids: Sequence[str]) -> None:
        self.collected(ids)


# in the process that starts those


@dataclass
class Session:
    """pytest on some files while it runs."""

    files: list[Path]
    log: Path
    records: Path
    process: subprocess.Popen[bytes]
    stopped: bool = False

    def read(self) -> list[dict[str, Any]]:
        """What was recorded so far."""
        if not self.records.is_file():
            return []
        lines = self.records.read_text(encoding="utf-8").split("\n")
        return [json.loads(line) for line in lines[:-1]]  # the last one is empty, or not yet complete

    def end(self) -> str:
        """How the process ended, for the files that are not complete."""
        code = self.process.poll()
        if self.stopped:
            return "stopped: out of time"
        if code is None:
            return "running"
        last = self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-1:]
        return f"exit code {code}: {' '.join(last)}"


def outcomes(names: Sequence[str], records: list[dict[str, Any]], end: str) -> dict[str, dict[str, Any]]:
    """File -> counts by outcome, names of what failed, seconds of its tests, and how it ended. end: of a file
    that is not complete.
    """
    tests: dict[str, str] = {}
    missing: Counter[str] = Counter()
    seconds: Counter[str] = Counter()
    collected = False
    for record in records:
        if "collected" in record:
            collected = True
            missing.update(_file(test) for test in record["collected"])
            continue
        name, outcome = record["id"], record["outcome"]
        seconds[_file(name)] += record["seconds"]
        if outcome is not None:
            if name not in tests:
                missing[_file(name)] -= 1
            if tests.get(name) not in ("failed", "error"):
                tests[name] = outcome
    found = {}
    for file in names:
        own = {test: outcome for test, outcome in tests.items() if _file(test) == file}
        found[file] = {
            "counts": Counter(own.values()),
            "failures": [test for test, outcome in own.items() if outcome in ("failed", "error")][:20],
            "end": "complete" if collected and missing[file] <= 0 else end,
            "seconds": round(seconds[file], 1),
        }
    return found


def _file(test: str) -> str:
    """The name of the file of a test."""
    return Path(test.partition("::")[0]).name


def split(files: list[Path], jobs: int, distributed: bool) -> list[list[Path]]:
    """The files of each session: all in one that spreads its tests itself, or dealt out to several; those of
    ALONE by themselves.
    """
    common = [path for path in files if path.name not in ALONE]
    parts = [common] if distributed else [common[index::jobs] for index in range(jobs)]
    return [part for part in [*parts, *([path] for path in files if path.name in ALONE)] if part]


def start(files: list[Path], expression: str | None, workers: int, folder: Path) -> Session:
    """Starts pytest. expression: as for pytest -k. workers: processes that run tests; 0 for pytest's own."""
    log, records = folder / f"{files[0].stem}.log", folder / f"{files[0].stem}.jsonl"
    options = (
        "-p bench.correctness --tb=short -p no:cacheprovider -o addopts= --continue-on-collection-errors"
    )
    command = python("pytest", *options.split(), *(["-k", expression] if expression else []), *files)
    if workers:
        command += ["-n", str(workers), "--dist", "load", "--max-worker-restart", "100"]
    environment = {**os.environ, "SMOLLM2_OUTCOMES": str(records), "OMP_NUM_THREADS": "1"}
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=stream,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    return Session(files, log, records, process)


def stop(sessions: list[Session]) -> None:
    """Asks for an end as Ctrl-C does, so that pytest still reports; kills what does not listen, workers
    too.
    """
    alive = [session for session in sessions if session.process.poll() is None]
    for session in alive:
        session.stopped = True
        session.process.send_signal(signal.SIGINT)
    deadline = time.monotonic() + GRACE
    for session in sessions:
        with suppress(subprocess.TimeoutExpired):
            session.process.wait(max(0.1, deadline - time.monotonic()))
        with suppress(ProcessLookupError):
            os.killpg(session.process.pid, signal.SIGKILL)  # each leads a group of its own
        session.process.wait()


def save(part: Part, sessions: list[Session]) -> None:
    """Everything that is known so far."""
    files: dict[str, Any] = {}
    messages: dict[str, str] = {}
    worst: dict[tuple[str, str], float] = {}
    for session in sessions:
        records = session.read()
        files |= outcomes([path.name for path in session.files], records, session.end())
        for record in records:
            if "message" in record and len(messages) < MESSAGES:
                messages.setdefault(record["id"], record["message"])
        for op, dtype, value in (row for record in records for row in record.get("worst", [])):
            worst[op, dtype] = max(value, worst.get((op, dtype), 0.0))
    empty = (name for name, outcome in files.items() if not outcome["counts"])
    waiting = [name for name in empty if files[name]["end"] != "complete"]
    rows = [{"op": op, "dtype": dtype, "worst": value} for (op, dtype), value in sorted(worst.items())]
    part.save(files=files, not_started=waiting, numerics=rows, messages=messages)


def run_sessions(part: Part, sessions: list[Session]) -> None:
    """Waits for them until the part's time is over, and saves what they report every second."""
    size, shown = 0, time.monotonic()
    try:
        while part.left() > 0 and any(session.process.poll() is None for session in sessions):
            time.sleep(0.2)
            now = sum(session.records.stat().st_size for session in sessions if session.records.is_file())
            if now != size and time.monotonic() - shown > 1:
                size, shown = now, time.monotonic()
                save(part, sessions)
    finally:
        stop(sessions)
        save(part, sessions)


def main(argv: Sequence[str]) -> int:
    arguments = parser("correctness", "Runs the kernels' tests, spread over processes.")
    add, worst = arguments.add_argument, "write the worst error of each operation and dtype there"
    add("--numerics", type=Path, metavar="FILE", help=worst)
    add("--tests", metavar="EXPRESSION", help="only tests that match, as pytest -k")
    processes = "processes (default: on a GPU two fewer than processors, at most 12)"
    add("--jobs", type=int, metavar="N", help=processes)
    options = arguments.parse_args(argv)
    part = Part("tests", options)
    expression = options.tests or (TINY_TESTS if part.tiny else None)
    files: list[Path] = []
    for pattern in (TINY_FILE,) if part.tiny else PATTERNS:  # of each the largest first
        files += sorted((ROOT / "tests").glob(pattern), key=lambda path: -path.stat().st_size)
    if importlib.util.find_spec("pytest") is None or not files:
        reason = "pytest is not installed" if files else "no kernel tests in this checkout"
        print(f"skipped: {reason}")
        part.save(skipped=reason)
        return part.finish()
    cuda, processors = part.device.type == "cuda", os.cpu_count() or 2
    jobs = max(1, options.jobs or (min(12, processors - 2) if cuda else min(8, processors // 2)))
    # one worker too can be replaced
    distributed = importlib.util.find_spec("xdist") is not None and (cuda or jobs > 1)
    with tempfile.TemporaryDirectory(prefix="kernel-tests-") as folder:
        sessions = []
        for group in split(files, jobs, distributed):
            workers = 0 if not distributed else 1 if group[0].name in ALONE else jobs
            sessions.append(start(group, expression, workers, Path(folder)))
        run_sessions(part, sessions)
        for session in sessions:
            print(session.log.read_text(encoding="utf-8", errors="replace"), flush=True)
    if part.data["numerics"] and options.numerics is not None:
        write_json(options.numerics, part.data["numerics"])
    totals: Counter[str] = sum((outcome["counts"] for outcome in part.data["files"].values()), Counter())
    print(f"{len(files) - len(part.data['not_started'])} of {len(files)} files ran: {dict(totals)}")
    return part.finish()


if __name__ == "__main__":
    # what runs is stopped, and what is finished stays
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(run_command(main))
