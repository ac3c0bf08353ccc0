"""The wheel: all of it under the one name smollm2, beside a stranger's `kernels`, working from any folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MOVED = ("kernels", "train", "bench")
MINUTES = 60


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    pytest.importorskip("setuptools", minversion="77", reason="the build backend is not installed")
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for package in ("smollm2", *MOVED, "tests"):
        shutil.copytree(ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
    stale = source / "build" / "lib" / "smollm2" / "gone.py"  # of an earlier build
    stale.parent.mkdir(parents=True)
    stale.touch()
    build = "import sys, setuptools.build_meta as backend; print(backend.build_wheel(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", build, str(folder)],
        cwd=source,
        capture_output=True,
        text=True,
        timeout=20 * MINUTES,
    )
    assert done.returncode == 0, done.stderr
    return folder / done.stdout.split()[-1]


@pytest.fixture(scope="module")
def site(wheel):
    """A folder of packages with the wheel and a stranger's package `kernels` in it."""
    folder = wheel.parent / "site"
    zipfile.ZipFile(wheel).extractall(folder)
    (folder / "kernels").mkdir()
    (folder / "kernels" / "__init__.py").write_text("STRANGER = True\n", encoding="utf-8")
    return folder


def run(site: Path, *arguments: str) -> str:
    """What `python arguments` prints, from a folder that holds nothing of ours."""
    elsewhere = site.parent / "elsewhere"
    elsewhere.mkdir(exist_ok=True)
    done = subprocess.run(
        [sys.executable, *arguments], cwd=elsewhere, env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True, text=True, timeout=30 * MINUTES,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def stranger(site: Path) -> Path:
    """A folder with the stranger's package alone."""
    folder = site.parent / "stranger"
    if not folder.exists():
        shutil.copytree(site / "kernels", folder / "kernels")
    return folder


def test_everything_lies_under_one_name_and_nothing_is_missing(wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert {name.split("/")[0] for name in names} == {"smollm2"}
    kept = (".py", ".yaml", ".typed")
    expected = {
        path for package in ("smollm2", *MOVED) for path in (ROOT / package).rglob("*") if path.suffix in kept
    }
    expected |= {ROOT / "kernels" / "certificate.json", ROOT / "kernels" / "CERTIFICATE.md"}
    expected |= {ROOT / "bench" / "expected.json"}
    relative = {str(path.relative_to(ROOT)) for path in expected}
    assert names == {name if name.startswith("smollm2/") else f"smollm2/{name}" for name in relative}


def test_all_of_it_imports_beside_a_strangers_kernels_each_module_once(site):
    out = run(site, "-c", textwrap.dedent("""
        import importlib, pkgutil, sys
        import kernels
        assert kernels.STRANGER

        import smollm2.generate
        import smollm2
        assert callable(smollm2.generate), "the function, though the command was imported first"
        from transformers import LlamaForCausalLM

        # They run elsewhere: in litgpt's environment, in pytest, as a command.
        own = ("litgpt_worker", "conftest", "__main__")
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


def test_its_commands_train_and_name_themselves(site):
    out = run(
        site, "-m", "smollm2.train.run", "tiny.yaml", "steps=3", "device=cpu", "workers=1", "output_dir=run"
    )
    assert "python -m smollm2.generate --model run" in out
    assert (site.parent / "elsewhere" / "run" / "metrics.jsonl").exists()


def test_its_check_finds_its_figures_and_its_certificate(site):
    ratio = "cached over uncached generation"
    assert f"{ratio}  " in run(site, "-m", "smollm2.bench.check", "--tiny", "--only", ratio)
    script = "from smollm2.kernels.certify.__main__ import load; print(len(load()['rows']))"
    assert int(run(site, "-c", script)) > 100


def checkout(site: Path, *command: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(stranger(site))}
    return subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=30 * MINUTES
    )


@pytest.mark.parametrize(
    "imports", ["smollm2.generate, kernels", "kernels, smollm2.generate", "smollm2, smollm2.generate"]
)
def test_a_checkout_keeps_its_names_beside_a_strangers_kernels(site, imports):
    script = f"import {imports}; import kernels; assert callable(smollm2.generate) and kernels.TORCH"
    done = checkout(site, sys.executable, "-c", script)
    assert done.returncode == 0, done.stderr


def test_a_checkouts_commands_and_bare_pytest_run_beside_a_strangers_kernels(site):
    done = checkout(site, sys.executable, "-m", "train.run", "tiny.yaml", "backend=triton", "--dry-run")
    assert done.returncode == 0, done.stderr
    bare = "import sys; sys.path.remove(''); import pytest; sys.exit(pytest.console_main())"
    done = checkout(
        site, sys.executable, "-c", bare, "--collect-only", "-q", "tests/test_backend_selection.py"
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_strangers_kernels_found_first_is_said_with_the_remedy(site):
    script = f"import sys; sys.path.append({str(ROOT)!r}); import smollm2"
    done = checkout(site, sys.executable, "-c", script, cwd=site.parent)
    assert done.returncode == 1
    assert "start from its root" in done.stderr.splitlines()[-1] and "pip uninstall kernels" in done.stderr
