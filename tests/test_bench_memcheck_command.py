"""`python -m bench.memcheck`: what it makes of a tool's output, with a script in the tool's place."""

from __future__ import annotations

import argparse
import sys
import textwrap

import pytest

from bench import memcheck
from bench.record import Part, read_json

# Runs no operation, but says that it does. The environment says which one finds an error, crashes, hangs, or
# has a race.
TOOL = """\
    #!{python}
    import os, sys, time
    with open({calls!r}, "a") as stream:
        ops = [word.removeprefix("--op=") for word in sys.argv if word.startswith("--op=")]
        print(*ops, sep=",", file=stream)
    assert ("--report-api-errors" in sys.argv) == ("memcheck" in sys.argv)
    code = 0
    for op in [word.removeprefix("--op=") for word in sys.argv if word.startswith("--op=")]:
        print("running", op, flush=True)
        if op == os.environ.get("BAD"):
            print("========= Invalid __global__ write of size 2 bytes", flush=True)
            sys.exit(99)
        if op == os.environ.get("CRASHES"):
            os._exit(1)
        if op == os.environ.get("HANGS"):
            time.sleep(600)
        if op == os.environ.get("QUIET"):
            print("========= Error: Race reported", flush=True)
            code = 99
        print("finished", op, flush=True)
    if "SILENT" not in os.environ:
        print("========= ERROR SUMMARY: 0 errors", flush=True)
    sys.exit(code)
"""
NAMES = ["a", "b", "c", "d", "e", "f", "g"]  # in groups a d g, b e, c f


@pytest.fixture
def check(tmp_path, monkeypatch):
    """The check of the operations `NAMES` with that in the environment: (saved results, operations of each
    process).
    """
    calls, tool = tmp_path / "calls", tmp_path / "tool"
    tool.write_text(textwrap.dedent(TOOL).format(python=sys.executable, calls=str(calls)), encoding="utf-8")
    tool.chmod(0o755)
    monkeypatch.setattr(sys, "executable", "/bin/true")  # the run that compiles

    def run(kind: str = "memcheck", seconds: float = 3600, **environment: str) -> tuple[dict, list[str]]:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        part = Part(
            kind, argparse.Namespace(device="cpu", tiny=True, json=tmp_path / "results.json", seconds=seconds)
        )
        found = memcheck.check(str(tool), kind, NAMES, part, tmp_path)
        assert read_json(tmp_path / "results.json")[kind]["results"] == found and set(found) == set(NAMES)
        return found, sorted(calls.read_text().split())

    return run


def results(found: dict) -> dict[str, str]:
    return {op: result["result"] for op, result in found.items()}


def test_clean_operations_share_processes(check):
    found, calls = check()
    assert set(results(found).values()) == {"clean"} and calls == ["a,d,g", "b,e", "c,f"]


def test_an_error_is_named_and_the_rest_runs_afterwards(check, capsys):
    found, calls = check(BAD="d")
    assert results(found) == dict.fromkeys(NAMES, "clean") | {"d": "errors"}
    assert found["d"]["report"] == ["running d", "========= Invalid __global__ write of size 2 bytes"]
    assert calls == ["a,d,g", "b,e", "c,f", "g"] and "d: errors" in capsys.readouterr().out


def test_an_operation_that_fails_has_no_result(check):
    found, calls = check(CRASHES="b")
    assert results(found) == dict.fromkeys(NAMES, "clean") | {"b": "no result: exit code 1"} and "e" in calls


def test_a_fault_that_stops_nothing_is_looked_for_one_by_one(check):
    found, calls = check(QUIET="a")
    assert results(found) == dict.fromkeys(NAMES, "clean") | {"a": "errors"}
    assert calls == ["a", "a,d,g", "b,e", "c,f", "d", "g"] and memcheck.ONE_OF not in found["a"]["report"][0]


def test_races_are_looked_for_in_a_process_each(check):
    found, calls = check("racecheck", QUIET="c", BAD="f")
    assert results(found) == dict.fromkeys(NAMES, "clean") | {"c": "errors", "f": "errors"} and calls == NAMES


def test_a_process_that_hangs_loses_what_it_has_not_finished(check, monkeypatch):
    monkeypatch.setattr(Part, "left", lambda part: 1.0 - ({*"abcef"} <= part.data.get("results", {}).keys()))
    found, _ = check(HANGS="d")
    assert results(found) == dict.fromkeys(NAMES, "clean") | {
        "d": "no result: out of time",
        "g": "no result: out of time",
    }


def test_a_process_that_the_tool_did_not_watch_has_no_result(check):
    found, _ = check(SILENT="yes")
    assert set(results(found).values()) == {"no result: the tool printed no summary"}


def test_a_tool_that_does_not_start_names_all_of_its_group():
    found = memcheck.judge("memcheck", ["a", "b"], ["compiled", "========= Error: Device not supported"], 1)
    assert results(found) == dict.fromkeys("ab", "no result: exit code 1")
    assert "Device not supported" in found["a"]["report"][-1]


def test_the_races_are_looked_for_in_operations_that_exist():
    from kernels import TORCH

    assert set(memcheck.RACES) <= set(memcheck.operations(TORCH, memcheck.torch.device("cpu")))
