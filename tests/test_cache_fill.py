"""A Triton cache filled without a GPU: what it holds is found, what has changed since is not, and looking
leaves no trace. Compiling and looking run in processes where Triton is not interpreted.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("triton")
from kernels.certify import __main__ as certify  # noqa: E402
from kernels.certify import fill as cache_fill  # noqa: E402
from kernels.certify.fill import moved_from  # noqa: E402
from kernels.certify.targets import target_for  # noqa: E402

needs_compiler = pytest.mark.skipif(
    not any(shutil.which(name) for name in ("gcc", "clang")),
    reason="Triton's own C library has to be compiled, and there is no C compiler",
)
# Reads steps from its standard input, so that torch is imported once for all of them. It is a module, because
# spawned processes import it; forked ones do the same four seconds faster.
STEPS = """
import json, multiprocessing, platform, sys
from pathlib import Path
from types import SimpleNamespace
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
    context, architecture = multiprocessing.get_context, platform.architecture
    for line in sys.stdin:
        step, arch, folder, method, linkage = json.loads(line)
        multiprocessing.get_context = lambda _: context(method)
        platform.architecture = architecture if linkage is None else lambda *_, **__: ("64bit", linkage)
        done = getattr(cache_fill, step)(record(arch).found, target_for(arch), Path(folder), 1)
        print(json.dumps(done), flush=True)
"""


def python(root: Path, *arguments: str, **variables: str) -> dict[str, Any]:
    """Arguments of subprocess: Python with that folder's kernels and without Triton's interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(root), **variables}
    return {"args": [sys.executable, *arguments], "cwd": root, "env": environment, "text": True}


Steps = Callable[..., dict[str, int]]


def copied(project_root: Path, root: Path) -> Path:
    """The new folder `root`, with a copy of the package and STEPS."""
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(project_root / "kernels", root / "kernels", ignore=ignored)
    (root / "steps.py").write_text(STEPS, encoding="utf-8")
    return root


@contextmanager
def running(root: Path) -> Iterator[Steps]:
    """A process with that folder's kernels that fills caches and looks them up."""
    errors = root / "errors"
    with (
        errors.open("w") as log,
        subprocess.Popen(
            **python(root, "steps.py"), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log
        ) as process,
    ):

        def ask(
            step: str, cache: Path, arch: str = "sm_90", method: str = "fork", linkage: str | None = None
        ) -> dict[str, int]:
            """The counts that the function `step` of cache_fill returns."""
            print(json.dumps([step, arch, str(cache), method, linkage]), file=process.stdin, flush=True)
            answer = process.stdout.readline()
            assert answer, errors.read_text()
            return json.loads(answer)

        yield ask


@pytest.fixture(scope="module")
def root(project_root, tmp_path_factory):
    return copied(project_root, tmp_path_factory.mktemp("steps") / "project")


@pytest.fixture(scope="module")
def steps(root):
    with running(root) as found:
        yield found


@pytest.fixture(scope="module")
def cache(steps, tmp_path_factory):
    """A cache filled for sm_90; a test that changes it restores it."""
    cache = tmp_path_factory.mktemp("filled") / "cache"
    assert steps("verify", cache) == {"missing": 3}  # two kernels, and the C library
    assert steps("fill", cache, method="spawn") == {"compiled": 3}
    return cache


@needs_compiler
def test_what_is_filled_is_found_until_the_source_changes(steps, cache, tmp_path, project_root):
    assert steps("fill", cache) == steps("verify", cache, method="spawn") == {"there already": 3}
    assert steps("verify", cache, "sm_80") == {"there already": 1, "missing": 2}, "another architecture"
    other = copied(project_root, tmp_path / "other")
    path = other / "kernels" / "swiglu.py"
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace("@triton.jit", "# one line more\n@triton.jit", 1), encoding="utf-8")
    with running(other) as changed:
        found = changed("verify", cache)
    assert found == {"there already": 2, "missing": 1}, "a kernel's line is part of its key"


@needs_compiler
def test_what_is_damaged_is_not_believed_and_made_again(steps, cache):
    first, second = sorted(cache.glob("*/*.cubin"))
    second.unlink()
    for path in (first, *cache.glob("*/cuda_utils*.so")):
        path.write_bytes(path.read_bytes()[:2000])
    assert steps("verify", cache) == {"missing": 3}
    assert steps("fill", cache) == {"compiled": 3}
    assert steps("verify", cache) == {"there already": 3}


@needs_compiler
def test_a_machine_without_the_command_file_finds_the_libraries_too(steps, cache):
    """Python asks that command for the kind of its executable; Triton's names of libraries depend on it."""
    for linkage in ("", "ELF"):
        assert steps("verify", cache, linkage=linkage) == {"there already": 3}


@needs_compiler
def test_a_launch_finds_what_was_filled(root, cache):
    """Triton itself, told to use that cache, compiles nothing: here its compiler raises."""
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
    done = subprocess.run(**python(root, "-c", script, TRITON_CACHE_DIR=str(cache)), capture_output=True)
    assert done.stdout == "[True, True]\n", done.stderr


@needs_compiler
def test_a_cache_elsewhere_says_where_it_was_filled(steps, cache, tmp_path):
    assert moved_from(cache) is None
    moved = shutil.move(cache, tmp_path / "moved")
    try:
        assert steps("verify", moved) == {"missing": 2, "there already": 1}
        assert moved_from(moved) == cache
        cache.symlink_to(moved)
        assert moved_from(moved) is None
    finally:
        cache.unlink(missing_ok=True)
        shutil.move(moved, cache)


@needs_compiler
def test_amd_kernels_are_filled_without_their_launchers(steps, tmp_path):
    assert steps("fill", tmp_path, "gfx942") == {"compiled": 2}
    assert steps("verify", tmp_path, "gfx942") == {"there already": 2}


def test_the_order_of_first_use_does_not_change_a_kernels_key(project_root):
    """Triton notes what a function reads of its module only once it has hashed that function: a tl.constexpr
    of a module, read by a function that kernels call, is in a kernel's key only if another called it before.
    """
    script = """
import pkgutil, sys
from importlib import import_module
import kernels
from triton.runtime.jit import JITFunction
modules = [import_module(f"kernels.{part.name}") for part in pkgutil.iter_modules(kernels.__path__)]
found = {f"{it.module}.{it.__name__}": it for part in modules for it in vars(part).values()
         if isinstance(it, JITFunction)}
names = sorted(found, reverse=sys.argv[1] == "last")
print(sorted((name, found[name].cache_key) for name in names))
"""
    first, last = (
        subprocess.run(**python(project_root, "-c", script, end), capture_output=True)
        for end in ("first", "last")
    )
    assert "_decode_layers_kernel" in first.stdout, first.stderr
    assert first.stdout == last.stdout


def test_looking_leaves_no_trace(root, tmp_path):
    """The command, from what was recorded to its exit code. Recording: tests/test_gpu_rehearsal.py."""
    script = """
import sys, steps
from kernels.certify import __main__ as certify
steps.cache_fill.launched_by = lambda source, arch: [*steps.record(arch).found]
sys.exit(certify.main(sys.argv[1:]))
"""
    command = python(root, "-c", script, "--verify", str(tmp_path), "--arch", "sm_86")
    done = subprocess.run(**command, capture_output=True)
    assert done.returncode == 1, done.stderr
    assert done.stdout.startswith("sm_86, Triton ")
    assert " 0 there already, 3 missing, 0 failed\n" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_the_model_that_train_run_takes_by_itself_is_among_those_recorded(project_root):
    from bench.gpu_launches import MODELS

    text = (project_root / "train" / "configs" / "quickstart.yaml").read_text(encoding="utf-8")
    for name, value in MODELS["quickstart"].items():
        assert f"\n{name}: {value}\n" in text
    assert "\nmodel: 135M\n" in text


def test_what_a_recording_leaves_out_is_there(project_root):
    from bench.gpu_launches import LARGE, NoComparisons

    tests = "".join(path.read_text() for path in (project_root / "tests").glob("test_kernel_*.py"))
    assert all(f"def {name}(" in tests for name in LARGE)
    items = [SimpleNamespace(name=name) for name in ("test_a", f"{LARGE[1]}[65536]", "test_many")]
    NoComparisons().pytest_collection_modifyitems(items)
    assert [item.name for item in items] == ["test_a", "test_many"]


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
def test_wrong_arguments_are_refused(tmp_path, arguments, message, monkeypatch, capsys):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(cache_fill, "launched_by", lambda *_: pytest.fail("something was recorded"))
    given = [argument.format(tmp_path / "cache") for argument in arguments]
    with pytest.raises(SystemExit) as end:
        sys.exit(certify.main(given))
    assert end.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("name", "arch", "lines"),
    [("sm_90", 90, "sm_90"), ("sm_86", 86, "sm_80"), ("sm_89", 89, "sm_80"), ("sm_103", 103, "sm_100")],
)
def test_other_capabilities_have_the_launches_of_an_older_one(name, arch, lines):
    target: Any = target_for(name)
    assert (target.gpu.backend, target.gpu.arch, target.name) == ("cuda", arch, lines)
