"""The certificate's own honesty: every bug on the list makes a test fail, by an assertion, and without a bug
those tests pass.
"""

import json
import os
import subprocess
import sys

import pytest
from planted_faults import CONTROL, FAULTS

NAMES = [fault.name for fault in FAULTS]


@pytest.fixture(scope="module")
def outcomes(request, project_root, tmp_path_factory):
    """{name: (exit code of pytest, its output)} of the faults that this session asks for, all run at once, in
    the interpreter.
    """
    asked = [
        item.callspec.params["name"]
        for item in request.session.items
        if item.module is request.module and hasattr(item, "callspec")
    ]
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
    }
    environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # loading them takes a second a fault
    for name in ("PYTHONPATH", "PYTEST_ADDOPTS", "SMOLLM2_NUMERICS"):
        environment.pop(name, None)
    done = subprocess.run(
        [sys.executable, "tests/planted_faults.py", str(project_root), str(tmp_path_factory.mktemp("faults")), CONTROL, *asked],
        cwd=project_root, env=environment, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_without_a_fault_the_tests_pass(outcomes):
    code, output = outcomes[CONTROL]
    assert code == pytest.ExitCode.OK, output


@pytest.mark.parametrize("name", NAMES)
def test_the_fault_is_caught(name, outcomes):
    code, output = outcomes[name]
    assert code == pytest.ExitCode.TESTS_FAILED, f"not caught: {name}\n{output}"
    assert "AssertionError" in output, f"failed for another reason than a wrong result: {name}\n{output}"
    passing = len(FAULTS[NAMES.index(name)].passing)
    assert output.startswith("F" + passing * "." + " "), output  # the first fails, the others pass


def test_names_are_different():
    assert len(set(NAMES)) == len(NAMES)
