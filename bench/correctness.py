"""`python -m bench.correctness`: the kernels' tests on this device, one process per test file, several at a time.

A process per file, because an illegal memory access ends a process's use of the GPU for good: a file that crashes or hangs loses its own
tests only. On a GPU the same files run in float32, float16 and bfloat16. Needs pytest.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.part import ROOT, Part, parser, write_json
from smollm2.cli import run_command

PATTERNS = ("test_kernel_*.py", "test_backend_*.py", "test_model_*.py")
TINY_FILE, TINY_TESTS = "test_kernel_swiglu.py", "test_packed_is_separate or test_large_gates"
GRACE = 10.0  # seconds to write a report after being asked to stop
OUTCOME = re.compile(r"^(\S+::.+?) (PASSED|FAILED|ERROR|SKIPPED|XFAIL)\b")


@dataclass
class Session:
    """One test file while its process runs."""

    file: Path
    log: Path
    numerics: Path
    process: subprocess.Popen[bytes]
    began: float
    stopped: bool = False

    def outcome(self) -> dict[str, Any]:
        """Counts by outcome and the names of what failed, read from pytest's verbose log."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        found = [match for line in lines if (match := OUTCOME.match(line))]
        code = self.process.returncode
        ended = code in (0, 1, 5)  # all passed, some failed, none collected
        return {
            "counts": Counter(match[2].lower() for match in found),
            "failures": [match[1] for match in found if match[2] in ("FAILED", "ERROR")][:20],
            "end": "stopped: out of time" if self.stopped else "complete" if ended else f"exit code {code}: {' '.join(lines[-1:])}",
            "seconds": round(time.monotonic() - self.began, 1),
        }

    def worst(self) -> dict[tuple[str, str], float]:
        """(operation, dtype) -> worst error over its budget, as tests/numerics.py reports it."""
        if not self.numerics.is_file():
            return {}
        return {(row["op"], row["dtype"]): row["worst"] for row in json.loads(self.numerics.read_text(encoding="utf-8"))}


def start(file: Path, expression: str | None, folder: Path) -> Session:
    """Starts pytest on one file. expression: as for pytest -k."""
    log, numerics = folder / f"{file.stem}.log", folder / f"{file.stem}.json"
    command = [sys.executable, "-m", "pytest", "-v", "--tb=short", "-p", "no:cacheprovider", "-o", "addopts=", str(file)]
    if expression:
        command += ["-k", expression]
    environment = {**os.environ, "SMOLLM2_NUMERICS": str(numerics)}
    with log.open("wb") as stream:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=stream, stderr=subprocess.STDOUT)
    return Session(file, log, numerics, process, time.monotonic())


def stop(sessions: list[Session]) -> None:
    """Asks for an end as Ctrl-C does, so that pytest still reports; kills what does not listen."""
    alive = [session for session in sessions if session.process.poll() is None]
    for session in alive:
        session.stopped = True
        session.process.send_signal(signal.SIGINT)
    deadline = time.monotonic() + GRACE
    for session in alive:
        try:
            session.process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            session.process.kill()
            session.process.wait()


def run_files(part: Part, files: list[Path], expression: str | None, jobs: int, folder: Path) -> list[Session]:
    """Runs the files, several at a time, until the part's time is over; saves the outcome of each as it ends."""
    waiting, running, done = list(files), list[Session](), list[Session]()
    results: dict[str, Any] = {}
    try:
        while running or (waiting and part.left() > 0):
            while waiting and len(running) < jobs and part.left() > 0:
                running.append(start(waiting.pop(0), expression, folder))
            if part.left() <= 0:
                stop(running)
            for session in [session for session in running if session.process.poll() is not None]:
                running.remove(session)
                done.append(session)
                results[session.file.name] = session.outcome()
                print(session.log.read_text(encoding="utf-8", errors="replace"), flush=True)
                part.save(files=results, not_started=[path.name for path in waiting])
            time.sleep(0.1)
    finally:
        stop(running)
    return done


def main(argv: Sequence[str]) -> int:
    arguments = parser("correctness", "Runs the kernels' tests, one process per file.")
    arguments.add_argument("--numerics", type=Path, metavar="FILE", help="write the worst error of each operation and dtype there")
    arguments.add_argument("--tests", metavar="EXPRESSION", help="only tests that match, as pytest -k")
    arguments.add_argument("--jobs", type=int, default=max(1, min(8, (os.cpu_count() or 2) // 2)), metavar="N", help="files at a time")
    options = arguments.parse_args(argv)
    part = Part("tests", options)
    patterns, expression = ((TINY_FILE,), options.tests or TINY_TESTS) if part.tiny else (PATTERNS, options.tests)
    files = sorted({path for pattern in patterns for path in (ROOT / "tests").glob(pattern)})
    if importlib.util.find_spec("pytest") is None or not files:
        reason = "pytest is not installed" if files else "no kernel tests in this checkout"
        print(f"skipped: {reason}")
        part.save(skipped=reason)
        return part.finish()
    worst: dict[tuple[str, str], float] = {}
    with tempfile.TemporaryDirectory(prefix="kernel-tests-") as folder:
        for session in run_files(part, files, expression, options.jobs, Path(folder)):
            for key, value in session.worst().items():
                worst[key] = max(value, worst.get(key, 0.0))
    rows = [{"op": op, "dtype": dtype, "worst": value} for (op, dtype), value in sorted(worst.items())]
    part.save(numerics=rows)
    if rows and options.numerics is not None:
        write_json(options.numerics, rows)
    totals: Counter[str] = sum((outcome["counts"] for outcome in part.data.get("files", {}).values()), Counter())
    print(f"{len(part.data.get('files', {}))} of {len(files)} files ran: {dict(totals)}")
    return part.finish()


if __name__ == "__main__":
    sys.exit(run_command(main))
