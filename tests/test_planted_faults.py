"""The tests of the kernels can fail: every planted bug makes one fail, by an assertion, and without a bug
tests of the same files pass.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import planted_faults
import pytest
from planted_faults import CONTROL, FAULTS

NAMES = [fault.name for fault in FAULTS]


@pytest.fixture(scope="module")
def outcomes(request, project_root):
    """{name: [error or "", report] of each test} of the faults of this session, in the interpreter."""
    asked = [
        item.callspec.params["name"]
        for item in request.session.items
        if item.module is request.module and hasattr(item, "callspec")
    ]
    removed = ("PYTEST_ADDOPTS", "SMOLLM2_NUMERICS")
    environment = {name: value for name, value in os.environ.items() if name not in removed}
    environment |= {
        "PYTHONPATH": str(project_root), "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
    }  # fmt: skip
    command = [sys.executable, "tests/planted_faults.py", CONTROL, *asked]
    done = subprocess.run(command, cwd=project_root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_without_a_fault_the_tests_pass(outcomes):
    """One test of each file, whose functions were replaced by themselves."""
    assert [error for error, _ in outcomes[CONTROL] if error] == [], outcomes[CONTROL]


@pytest.mark.parametrize("name, tests", [(fault.name, fault.tests) for fault in FAULTS], ids=NAMES)
def test_the_fault_is_caught(name, tests, outcomes):
    (error, report), *others = outcomes[name]
    assert error == "AssertionError", f"not caught, or not by a wrong result: {name}\n{error}\n{report}"
    assert [other for other, _ in others] == [""] * (len(tests) - 1), others


def test_names_are_different_and_no_line_is_lost():
    assert len(set(NAMES)) == len(NAMES)
    text = Path(planted_faults.__file__).with_suffix(".txt").read_text(encoding="utf-8")
    changes = [part for fault in FAULTS for part in (fault.old, fault.new) if part]
    assert text.count("\n-") + text.count("\n+") == sum(1 + part.count("\n") for part in changes)
    headers = [line for line in text.splitlines() if line and line[0] not in "=+-"]
    assert len(headers) == sum(len(fault.tests) for fault in FAULTS)
