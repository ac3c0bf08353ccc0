"""`python -m bench.correctness`: how it deals out the tests, and what it knows of them when a process dies or
time is over.
"""

from __future__ import annotations

import argparse
import importlib.util
import textwrap
import time
from pathlib import Path

import pytest

from bench import correctness
from bench.record import Part, read_json

CASES = """
    import os

    import pytest
    import torch


    @pytest.mark.parametrize("index", range(6))
    def test_passes(index):
        pass


    def test_fails():
        assert 1 + 1 == 3


    @pytest.fixture
    def broken():
        raise ValueError("no fixture")


    def test_error(broken):
        pass


    @pytest.mark.skip(reason="not here")
    def test_skipped():
        pass


    def test_loses_the_gpu(monkeypatch):
        def lost(*_):
            raise RuntimeError("an illegal memory access was encountered")

        torch.cuda.is_initialized = lambda: True
        torch.cuda.synchronize = lost


    def test_crashes():
        os._exit(9)


    @pytest.mark.parametrize("index", range(6))
    def test_passes_after(index):
        pass
"""


def run(folder: Path, seconds: float, workers: int, **files: str) -> dict:
    """The section that a run over those files (name -> source) leaves."""
    paths = []
    for name, text in files.items():
        paths.append(folder / f"test_{name}.py")
        paths[-1].write_text(textwrap.dedent(text), encoding="utf-8")
    options = argparse.Namespace(device="cpu", tiny=True, json=folder / "tests.json", seconds=seconds)
    part = Part("tests", options)
    correctness.run_sessions(part, [correctness.start(paths, None, workers, folder)])
    return read_json(folder / "tests.json")["tests"]


@pytest.mark.skipif(importlib.util.find_spec("xdist") is None, reason="pytest-xdist is not installed")
def test_a_worker_that_dies_loses_one_test(tmp_path):
    others = {"unreadable": "import no_such_package\n", "fine": "def test_fine():\n    pass\n"}
    section = run(tmp_path, 3600, 1, several=CASES, **others)
    several, unreadable, fine = (section["files"][f"test_{name}.py"] for name in ("several", *others))
    assert several["counts"] == {"passed": 12, "failed": 3, "error": 1, "skipped": 1}
    assert several["end"] == "complete"
    names = {test.partition("::")[2] for test in several["failures"]}
    assert names == {"test_fails", "test_error", "test_loses_the_gpu", "test_crashes"}
    assert fine == {"counts": {"passed": 1}, "failures": [], "end": "complete", "seconds": fine["seconds"]}
    assert unreadable["counts"] == {"error": 1} and unreadable["end"] == "complete"
    said = {test.partition("::")[2]: text for test, text in section["messages"].items()}
    assert "1 + 1" in said["test_fails"] and "no_such_package" in said[""]
    assert "illegal memory access" in said["test_loses_the_gpu"]


def test_worst_errors_come_with_the_tests_and_not_those_of_a_replaced_table(tmp_path):
    (tmp_path / "numerics.py").write_text("WORST = {}\n", encoding="utf-8")
    checked = """
        import numerics

        def test_checks():
            numerics.WORST["rope", "float32"] = 0.5

        def test_replaces(monkeypatch):
            monkeypatch.setattr(numerics, "WORST", {("op", "float32"): 1.5})
    """
    worst = {"op": "rope", "dtype": "float32", "worst": 0.5}
    assert run(tmp_path, 3600, 0, checked=checked)["numerics"] == [worst]


def test_without_xdist_a_lost_gpu_ends_the_process_and_its_file(tmp_path):
    section = run(tmp_path, 3600, 0, several=CASES)
    several = section["files"]["test_several.py"]
    assert several["counts"] == {"passed": 6, "failed": 2, "error": 1, "skipped": 1}
    assert several["end"].startswith(f"exit code {correctness.GPU_LOST}")


def test_what_is_finished_stays_when_time_is_over(tmp_path, monkeypatch):
    slow = "import time\n\ndef test_first():\n    pass\n\ndef test_hangs():\n    time.sleep(600)\n"
    began = time.monotonic()
    monkeypatch.setattr(Part, "left", lambda part: 1.0 - bool(counted(part, "test_slow.py")))
    section = run(tmp_path, 3600, 0, slow=slow, later="def test_later():\n    pass\n")
    assert time.monotonic() - began < 600
    slow, later = (section["files"][f"test_{name}.py"] for name in ("slow", "later"))
    assert slow["counts"] == {"passed": 1} and slow["end"] == later["end"] == "stopped: out of time"
    assert section["not_started"] == ["test_later.py"]


def test_a_file_is_complete_when_all_that_was_collected_has_an_outcome():
    a, b = "tests/a.py::one[x::y]", "tests/b.py::one"
    records = [
        {"collected": [a, "tests/a.py::two", b]},
        {"id": a, "outcome": None, "seconds": 0.5},
        {"id": a, "outcome": "passed", "seconds": 1.0, "worst": [["rope", "float32", 0.5]]},
        {"id": a, "outcome": "error", "seconds": 0.0},
        {"id": b, "outcome": "failed", "seconds": 0.0},
        {"id": b, "outcome": "passed", "seconds": 0.0},
    ]
    found = correctness.outcomes(["a.py", "b.py", "c.py"], records, "running")
    known = {"counts": {"error": 1}, "failures": [a], "end": "running", "seconds": 1.5}
    assert found["a.py"] == known
    assert found["b.py"]["counts"] == {"failed": 1} and found["b.py"]["end"] == "complete"
    assert found["c.py"]["end"] == "complete", "nothing of it was selected"
    assert correctness.outcomes(["a.py"], [], "exit code 4: ")["a.py"]["end"] == "exit code 4: "


def counted(part: Part, name: str) -> dict[str, int]:
    """What is known of the tests of a file so far."""
    counts: dict[str, int] = part.data.get("files", {}).get(name, {}).get("counts", {})
    return counts


def test_files_are_dealt_out_and_large_ones_run_alone():
    files = [Path(f"test_{name}.py") for name in ("kernel_a", "kernel_offsets", "kernel_b", "kernel_c")]
    a, offsets, b, c = files
    assert correctness.split(files, 12, distributed=True) == [[a, b, c], [offsets]]
    assert correctness.split(files, 2, distributed=False) == [[a, c], [b], [offsets]]
    assert correctness.split(files[:1], 4, distributed=False) == [[a]]


def test_every_file_with_tests_for_a_gpu_runs(project_root):
    folder = project_root / "tests"
    ran = {path for pattern in correctness.PATTERNS for path in folder.glob(pattern)}
    marks = ("@pytest.mark.gpu", "[pytest.mark.gpu")
    texts = {path: path.read_text() for path in folder.glob("test_*.py")}
    marked = {path for path, text in texts.items() if any(mark in text for mark in marks)}
    assert marked - {Path(__file__).resolve()} <= ran and {folder / name for name in correctness.ALONE} <= ran
