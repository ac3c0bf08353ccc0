"""A Triton cache filled without a GPU: what is in it is found, what has changed since is not, and looking
leaves no trace.

Each test runs in processes where Triton is not interpreted.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")
from kernels.certify.targets import target_for  # noqa: E402

needs_compiler = pytest.mark.skipif(
    not any(shutil.which(name) for name in ("gcc", "clang")),
    reason="Triton's own C library has to be compiled, and there is no C compiler",
)
# In a module, because the processes that compile import it.
STEPS = """
import json, sys
from pathlib import Path
import torch
from kernels.certify import fill as cache_fill
from kernels.backend import load_triton
from kernels.certify.recorder import standing_in, tensor
from kernels.certify.targets import target_for

def record(arch):
    recorder = cache_fill.Specialisations(target_for(arch))
    with standing_in(recorder):
        ops = load_triton()
        ops.swiglu(tensor(4, 1536, dtype=torch.bfloat16))
        ops.rms_norm(tensor(4, 576, dtype=torch.bfloat16), tensor(576, dtype=torch.bfloat16), 1e-5)
    return recorder

if __name__ == "__main__":
    arch, folder, *steps = sys.argv[1:]
    found = record(arch).found
    for step in steps:
        print(json.dumps(getattr(cache_fill, step)(found, target_for(arch), Path(folder), 1)))
"""


def run(root: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Python with that folder's kernels and without Triton's interpreter."""
    environment = {
        name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"
    } | variables
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=root,
        env=environment | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
    )


def counts(root: Path, *arguments: str) -> list[dict[str, int]]:
    """What each step counted."""
    (root / "steps.py").write_text(STEPS, encoding="utf-8")
    done = run(root, "steps.py", *arguments)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture
def copy(tmp_path: Path, project_root: Path) -> Path:
    """A folder with a copy of the package."""
    root = tmp_path / "project"
    shutil.copytree(project_root / "kernels", root / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    return root


@needs_compiler
def test_what_is_filled_is_found_until_the_source_changes(copy: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    before, filled, again, after = counts(copy, "sm_90", str(cache), "verify", "fill", "fill", "verify")
    assert before == {"missing": 3}  # two kernels, and the C library
    assert filled == {"compiled": 3} and again == after == {"there already": 3}
    assert counts(copy, "sm_80", str(cache), "verify") == [{"there already": 1, "missing": 2}], (
        "another architecture"
    )

    path = copy / "kernels" / "swiglu.py"
    path.write_text(
        path.read_text(encoding="utf-8").replace("@triton.jit", "# one line more\n@triton.jit", 1),
        encoding="utf-8",
    )
    assert counts(copy, "sm_90", str(cache), "verify") == [{"there already": 2, "missing": 1}], (
        "a kernel's line is part of its key"
    )


@needs_compiler
def test_what_is_damaged_is_not_believed_and_made_again(copy: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    counts(copy, "sm_90", str(cache), "fill")
    first, second = sorted(cache.glob("*/*.cubin"))
    second.unlink()
    for path in (first, *cache.glob("*/cuda_utils*.so")):
        path.write_bytes(path.read_bytes()[:2000])
    found, made, again = counts(copy, "sm_90", str(cache), "verify", "fill", "verify")
    assert found == {"missing": 3} and made == {"compiled": 3} and again == {"there already": 3}


@needs_compiler
def test_a_machine_without_the_command_file_finds_the_libraries_too(copy: Path, tmp_path: Path) -> None:
    """Python asks that command of what kind its own executable is, and Triton's names of libraries depend on
    the answer.
    """
    cache = tmp_path / "cache"
    counts(copy, "sm_90", str(cache), "fill")
    (copy / "steps.py").write_text(
        "import platform\nplatform.architecture = lambda *_, **__: ('64bit', '')\n" + STEPS, encoding="utf-8"
    )
    done = run(copy, "steps.py", "sm_90", str(cache), "verify")
    assert done.stdout == '{"there already": 3}\n', done.stderr


@needs_compiler
def test_a_launch_finds_what_was_filled(copy: Path, tmp_path: Path) -> None:
    """Triton itself, told to use that cache, compiles nothing: with a compiler that is not allowed to run."""
    cache = tmp_path / "cache"
    counts(copy, "sm_90", str(cache), "fill")
    script = """
import steps, triton
from triton import knobs
from triton.compiler import ASTSource
from kernels.certify import fill as cache_fill

def refuse(*_, **__):
    raise AssertionError("the compiler ran")

ASTSource.make_ir = refuse
recorder = steps.record("sm_90")
hits = []
knobs.compilation.listener = lambda **known: hits.append(known["cache_hit"])
cache_fill.driver.set_active(recorder)
for item in recorder.found:
    kernel = getattr(steps.cache_fill.import_module(item.module), item.kernel).preload(item.data)
    assert kernel.asm["cubin"][:4] == b"\\x7fELF"
print(hits)
"""
    done = run(copy, "-c", script, TRITON_CACHE_DIR=str(cache))
    assert done.stdout == "[True, True]\n", done.stderr


@needs_compiler
def test_a_cache_elsewhere_says_where_it_was_filled(copy: Path, tmp_path: Path) -> None:
    counts(copy, "sm_90", str(tmp_path / "cache"), "fill")
    shutil.move(tmp_path / "cache", tmp_path / "moved")
    assert counts(copy, "sm_90", str(tmp_path / "moved"), "verify") == [{"missing": 2, "there already": 1}]
    script = "import sys; from pathlib import Path; from kernels.certify.fill import moved_from; print(moved_from(Path(sys.argv[1])))"
    assert run(copy, "-c", script, str(tmp_path / "moved")).stdout.strip() == str(tmp_path / "cache")
    (tmp_path / "cache").symlink_to(tmp_path / "moved")
    assert run(copy, "-c", script, str(tmp_path / "moved")).stdout.strip() == "None"


def test_amd_kernels_are_filled_without_their_launchers(copy: Path, tmp_path: Path) -> None:
    assert counts(copy, "gfx942", str(tmp_path / "cache"), "fill", "verify") == [
        {"compiled": 2},
        {"there already": 2},
    ]


def test_looking_leaves_no_trace(project_root: Path, tmp_path: Path) -> None:
    """The command, from the record of training and generation to its exit code."""
    done = run(project_root, "-m", "kernels.certify", "--verify", str(tmp_path), "--arch", "sm_86")
    assert done.returncode == 1, done.stderr
    assert done.stdout.startswith("sm_86, Triton ") and " 0 there already, " in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_the_model_that_train_run_takes_by_itself_is_among_those_recorded(project_root: Path) -> None:
    from bench.gpu_launches import MODELS

    text = (project_root / "train" / "configs" / "quickstart.yaml").read_text(encoding="utf-8")
    for name, value in MODELS["quickstart"].items():
        assert f"\n{name}: {value}\n" in text
    assert "\nmodel: 135M\n" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--fill", "{}", "--arch", "sm_75"], "expected one of sm_80, sm_90"),
        (["--fill", "{}", "--arch", "hopper"], "expected one of sm_80, sm_90"),
        (["--fill", "{}", "--jobs", "0"], "--jobs: expected at least 1"),
        (["--fill", "{}", "--from", "train"], "invalid choice: 'train'"),
        (["--fill", "{}", "--verify", "{}"], "not allowed with argument"),
        (["--fill", "{}", "--check"], "not allowed with argument"),
        (["--fill", "{}", "--op", "rope"], "--op: not with the other arguments given"),
        (["--check", "--from", "tests"], "--from: not with the other arguments given"),
        (["--fill", ""], "expected a folder, got nothing"),
        (["--verify", "{}"], "expected a folder, got "),
    ],
)
def test_wrong_arguments_are_refused(
    project_root: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    done = run(
        project_root,
        "-m",
        "kernels.certify",
        *(argument.format(tmp_path / "cache") for argument in arguments),
    )
    assert done.returncode == 2
    assert message in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("name", "arch", "lines"),
    [("sm_90", 90, "sm_90"), ("sm_86", 86, "sm_80"), ("sm_89", 89, "sm_80"), ("sm_103", 103, "sm_100")],
)
def test_other_capabilities_have_the_launches_of_an_older_one(name: str, arch: int, lines: str) -> None:
    target: Any = target_for(name)
    assert (target.gpu.backend, target.gpu.arch, target.name) == ("cuda", arch, lines)
