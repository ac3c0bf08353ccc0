"""The wheel: all but its command under the one name smollm2, beside a stranger's `kernels`, in any folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import textwrap
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

from smollm2.engine.library import capabilities, library_name

ROOT = Path(__file__).resolve().parent.parent
MOVED = ("kernels", "train", "bench")


def python(*arguments: str, cwd: Path = ROOT, path: Sequence[Path] = ()) -> subprocess.CompletedProcess[str]:
    """`python arguments` in that folder, with nothing but `path` added to what can be imported."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))}
    options = dict(capture_output=True, text=True, timeout=1800)
    return subprocess.run([sys.executable, *arguments], cwd=cwd, env=environment, **options)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    pytest.importorskip("setuptools", minversion="77", reason="the build backend is not installed")
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "setup.py", "smollm2_command.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for package in ("smollm2", *MOVED, "tests"):
        shutil.copytree(ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
    stale = source / "build" / "lib" / "smollm2" / "gone.py"  # of an earlier build
    stale.parent.mkdir(parents=True)
    stale.touch()
    build = "import sys, setuptools.build_meta as backend; print(backend.build_wheel(sys.argv[1]))"
    done = python("-c", build, str(folder), cwd=source)
    assert done.returncode == 0, done.stderr
    return folder / done.stdout.split()[-1]


@pytest.fixture(scope="module")
def stranger(tmp_path_factory):
    """A folder with a stranger's package `kernels` in it."""
    folder = tmp_path_factory.mktemp("stranger")
    (folder / "kernels").mkdir()
    (folder / "kernels" / "__init__.py").write_text("STRANGER = True\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def installed(wheel, stranger):
    """What `python arguments` prints beside the wheel and the stranger, in a folder with nothing of ours."""
    site, elsewhere = wheel.parent / "site", wheel.parent / "elsewhere"
    zipfile.ZipFile(wheel).extractall(site)
    elsewhere.mkdir()

    def run(*arguments: str) -> str:
        done = python(*arguments, cwd=elsewhere, path=(site, stranger))
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


def test_everything_lies_under_one_name_and_nothing_is_missing(wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert {name.split("/")[0] for name in names} == {"smollm2", "smollm2_command.py"}
    names.remove("smollm2_command.py")
    files = [path for package in ("smollm2", *MOVED) for path in (ROOT / package).rglob("*")]
    expected = {str(path.relative_to(ROOT)) for path in files if path.suffix in (".py", ".yaml", ".typed")}
    expected |= {"kernels/certificate.json", "kernels/CERTIFICATE.md", "bench/expected.json"}
    expected |= {"smollm2/engine/decode_step.cpp", "smollm2/serving/page.html"}
    if shutil.which("g++"):  # the decode step is compiled, for every processor of this kind
        assert f"-py3-none-{sysconfig.get_platform().replace('-', '_')}" in wheel.stem
        expected |= {f"smollm2/engine/{library_name(name)}" for name in capabilities()}
    assert names == {name if name.startswith("smollm2/") else f"smollm2/{name}" for name in expected}


def test_all_of_it_imports_beside_a_strangers_kernels_each_module_once(installed):
    out = installed("-c", textwrap.dedent("""
        import importlib.util, pkgutil, sys
        import kernels
        assert kernels.STRANGER

        import smollm2.generate
        import smollm2
        assert callable(smollm2.generate), "the function, though the command was imported first"
        from transformers import LlamaForCausalLM

        # They run elsewhere: in litgpt's environment, in pytest, as a command.
        own = ("litgpt_worker", "conftest", "__main__")
        if importlib.util.find_spec("lm_eval") is None:  # harness is a subclass of its model
            own += ("harness",)
        suites = "smollm2.bench.bench_"
        names = [one.name for one in pkgutil.walk_packages(smollm2.__path__, "smollm2.")]
        for name in names:
            if name.rpartition(".")[2] not in own and not name.startswith(suites):
                importlib.import_module(name)
        roots = {name.split(".")[0] for name in sys.modules if name != "kernels"}
        assert roots.isdisjoint({"kernels", "train", "bench"}), "no module twice"
        assert callable(smollm2.generate)

        import torch
        model = smollm2.SmolLM2ForCausalLM(smollm2.SmolLM2Config.preset("tiny"), backend="auto")
        ids = smollm2.generate(model, torch.tensor([[1, 2, 3]]), max_new_tokens=2, eos_token_id=[])
        print(len(names), ids.shape)
    """))  # fmt: skip
    assert out.split(maxsplit=1)[1] == "torch.Size([1, 5])\n"
    assert int(out.split()[0]) > 100


def test_its_commands_train_check_and_name_themselves(installed, wheel):
    keys = "steps=3", "device=cpu", "workers=1", "output_dir=run"
    assert "python -m smollm2.generate --model run" in installed(
        "-m", "smollm2.train.run", "tiny.yaml", *keys
    )
    assert (wheel.parent / "elsewhere" / "run" / "metrics.jsonl").exists()
    ratio = "cached over uncached generation"
    assert f"{ratio}  " in installed("-m", "smollm2.bench.check", "--tiny", "--only", ratio)
    # It needs the compiler, which the interpreter of these tests replaces.
    script = """if True:
        import os, runpy, sys
        os.environ.pop("TRITON_INTERPRET", None)
        sys.argv[1:] = ["--check"]
        runpy.run_module("smollm2.kernels.certify", run_name="__main__")
    """
    assert "up to date" in installed("-c", script)


@pytest.mark.parametrize("imports", ["smollm2.generate, kernels", "kernels, smollm2.generate"])
def test_a_checkout_keeps_its_names_beside_a_strangers_kernels(stranger, imports):
    script = f"import {imports}; import kernels; assert callable(smollm2.generate) and kernels.TORCH"
    done = python("-c", script, path=[stranger])
    assert done.returncode == 0, done.stderr


def test_a_checkouts_commands_and_bare_pytest_run_beside_a_strangers_kernels(stranger):
    done = python("-m", "train.run", "tiny.yaml", "backend=triton", "--dry-run", path=[stranger])
    assert done.returncode == 0, done.stderr
    bare = "import sys; sys.path.remove(''); import pytest; sys.exit(pytest.console_main())"
    done = python("-c", bare, "--collect-only", "-q", "tests/test_backend_selection.py", path=[stranger])
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_strangers_kernels_found_first_is_said_with_the_remedy(stranger):
    done = python("-c", f"import sys; sys.path.append({str(ROOT)!r}); import smollm2", cwd=stranger)
    assert done.returncode == 1
    assert "start from its root" in done.stderr.splitlines()[-1] and "pip uninstall kernels" in done.stderr
