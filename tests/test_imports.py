"""Who may import whom (the layering that keeps each part replaceable), and that optional packages stay
optional.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import signal
import subprocess
import sys
import textwrap
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from kernels import waiting

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("kernels", "smollm2", "train", "bench")
OPTIONAL = ("transformers", "datasets", "triton", "omegaconf", "gguf", "matplotlib", "gradio")


@dataclass(frozen=True)
class Import:
    """One imported module: its full dotted name and the function that imports it ("" at module level)."""

    module: str
    function: str

    @property
    def root(self) -> str:
        return self.module.split(".")[0]


def source_files(*packages: str) -> list[Path]:
    return sorted(path for package in packages for path in (ROOT / package).rglob("*.py"))


def is_module(name: str) -> bool:
    path = ROOT / name.replace(".", "/")
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


def imports_of(path: Path) -> Iterator[Import]:
    """Every import of a file, relative ones resolved, `from package import submodule` named as the submodule.

    Those inside functions and under `if TYPE_CHECKING:` count too: a circle that never runs is still read as
    one.
    """
    package = list(path.relative_to(ROOT).parts[:-1])

    def visit(node: ast.AST, function: str) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from (Import(alias.name, function) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                base = package[: len(package) - child.level + 1] if child.level else []
                module = ".".join([*base, *([child.module] if child.module else [])])
                for alias in child.names:
                    submodule = f"{module}.{alias.name}"
                    yield Import(submodule if is_module(submodule) else module, function)
            elif isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
                yield from visit(child, function or child.name)
            else:
                yield from visit(child, function)

    yield from visit(ast.parse(path.read_text(encoding="utf-8")), "")


def circles() -> list[list[str]]:
    """The modules of this project that import each other, directly or by way of others: strongly connected
    components, sorted.
    """
    names = {}
    for path in source_files(*PACKAGES):
        parts = path.relative_to(ROOT).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    arrows = {
        name: {one.module for one in imports_of(path)} & names.keys() - {name} for name, path in names.items()
    }

    def reached(start: str) -> set[str]:
        seen, waiting = set(), [start]
        while waiting:
            new = arrows[waiting.pop()] - seen
            seen |= new
            waiting += new
        return seen

    ahead = {name: reached(name) for name in names}
    found = {tuple(sorted(other for other in ahead[name] if name in ahead[other])) for name in names}
    return sorted(list(circle) for circle in found if circle)


def outside(found: Iterator[Import], allowed: set[str]) -> list[str]:
    """Imports that are neither of the standard library nor allowed (a name allows itself and what is below
    it).
    """
    return sorted(
        {
            found_import.module
            for found_import in found
            if found_import.root not in sys.stdlib_module_names
            and not any(
                found_import.module == name or found_import.module.startswith(name + ".") for name in allowed
            )
        }
    )


def imported_name(requirement: str) -> str:
    """The module that a requirement of pyproject.toml installs."""
    name = re.split(r"[ ;<>=!~\[]", requirement)[0].lower().replace("-", "_")
    return {"pyyaml": "yaml", "llama_cpp_python": "llama_cpp"}.get(name, name)


def run_python(code: str, *, timeout: float = 120, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs code in a fresh interpreter at the project root."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, timeout=timeout,
    )  # fmt: skip


# What each room may import besides the standard library. A name allows itself and what is below it.
KERNEL = {
    "torch",
    "triton",
    "kernels.types",
    "kernels.checks",
    "kernels.launch_config",
    "kernels.layout",
    "kernels.products",
    "kernels.tracing",
}
KERNELS = {
    "__init__": {"torch", "kernels.types", "kernels.backend", "kernels.reference", "kernels.waiting"},
    "waiting": set(),
    "types": {"torch"},
    "tracing": {"torch"},
    "launch_config": {"torch", "triton"},
    "checks": {"torch", "kernels.types"},
    "products": {"torch"},
    "reference": {"torch", "kernels.types", "kernels.checks"},
    "backend": {"torch", "kernels.types", "kernels.reference", "kernels.eager"},
    "eager": {
        "torch",
        "kernels.types",
        "kernels.checks",
        "kernels.reference",
        "kernels.products",
        "kernels.eager",
    },
    "certify": {"torch", "triton", "kernels"},
    # Its second launch is the split kernel: the same one, not a copy that could drift from it.
    **dict.fromkeys(("decode_attention", "decode_head", "decode_step"), KERNEL | {"kernels.decode_product"}),
    "decode_layer": KERNEL | {"kernels.decode_attention", "kernels.decode_product"},
    # Its phases are their launches: the same functions.
    "decode_layers": KERNEL | {"kernels.decode_attention", "kernels.decode_layer", "kernels.decode_product"},
    # A run on a CPU imports it, and with it no triton: it reaches the kernels inside its functions.
    "fused_adamw": {"torch", "kernels.adamw"},
}
# Of smollm2, from the bottom to the top: a room imports those before it.
SMOLLM2 = (
    "errors", "streams", "file_lock", "json_file", "config_fields", "config", "working_copies", "lora",
    "projections", "layers", "sampling", "model", "patch", "pretrained", "engine", "generation", "serving",
    "cli", "commands",
)  # fmt: skip
# The public names, the oracle, and what no backend replaces.
PUBLIC = {"kernels", "kernels.reference", "kernels.eager", "kernels.products", "kernels.types"}
COMMANDS = {
    "generate", "chat", "session", "serve", "demo", "evaluate", "harness", "perplexity", "quantize", "doctor",
    "export", "cache", "compile", "__main__",
}  # fmt: skip


def room(module: str) -> str:
    """The room of a module: its file or folder below the package."""
    name = module.split(".")[1] if "." in module else "__init__"
    return "commands" if module.startswith("smollm2.") and name in COMMANDS else name


@pytest.mark.parametrize("path", source_files(*PACKAGES), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_imports_only_what_its_layer_may(path):
    found = list(imports_of(path))
    package, name = (
        path.relative_to(ROOT).parts[0],
        room(".".join(path.relative_to(ROOT).with_suffix("").parts)),
    )
    if package == "kernels":
        if name == "backend":  # load_triton is the one door to the kernels: nothing else may need triton
            found = [one for one in found if one.function != "load_triton" or one.root != "kernels"]
        if name == "fused_adamw":
            assert all(one.function for one in found if one.module == "kernels.adamw")
        assert outside(iter(found), KERNELS.get(name, KERNEL)) == []
    elif package == "smollm2":
        assert {one.module for one in found if one.root in ("train", "bench", "tests")} == set()
        inner = {
            one.module
            for one in found
            if one.root == "kernels" and ".".join(one.module.split(".")[:2]) not in PUBLIC
        }
        assert inner == set(), "smollm2 uses the public names of kernels"
        if name != "__init__":
            above = SMOLLM2[SMOLLM2.index(name) + 1 :]
            assert {
                one.module for one in found if one.root == "smollm2" and room(one.module) in above
            } == set()
        eager = {one.module for one in found if not one.function and one.root in OPTIONAL}
        assert eager == set(), "optional packages are imported inside the function that needs them"
    else:
        allowed = {"train": {"train"}, "bench": {"bench", "train"}}[package]
        assert {one.root for one in found if one.root in ("train", "bench", "tests")} <= allowed


def test_no_file_imports_what_imports_it():
    assert circles() == []


def test_every_third_party_import_is_a_declared_dependency():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = {imported_name(line) for line in project["dependencies"]}
    declared |= {imported_name(line) for extra in project["optional-dependencies"].values() for line in extra}
    for path in source_files(*PACKAGES):
        # litgpt's environment is its own: bench/litgpt_peer.py installs there what the worker imports.
        own = {"litgpt"} if path.name == "litgpt_worker.py" else set()
        assert outside(imports_of(path), declared | {*PACKAGES, "smollm2_command"} | own) == [], path


def test_no_file_tests_or_imports_the_tests():
    assert not (ROOT / "tests" / "__init__.py").exists(), (
        "tests/ must not be a package: transformers probes a package named kernels"
    )
    for path in source_files(*PACKAGES):
        assert all(one.root != "tests" for one in imports_of(path)), path


def test_import_smollm2_imports_no_optional_package():
    done = run_python(f"""
        import sys
        import smollm2
        print(*[name for name in {OPTIONAL!r} if name in sys.modules])
    """)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


def test_import_kernels_does_not_import_triton():
    done = run_python("import sys, kernels; print('triton' in sys.modules, kernels.__version__)")
    assert done.returncode == 0, done.stderr
    imported, version = done.stdout.split()
    assert imported == "False"
    assert version.startswith("0.1."), (
        "transformers takes a newer `kernels` for the Hugging Face package of that name"
    )


def test_without_triton_a_model_trains_and_generates():
    done = run_python("""
        import sys

        class NoTriton:
            def find_spec(self, name, path=None, target=None):
                if name == "triton" or name.startswith("triton."):
                    raise ModuleNotFoundError(f"No module named {name!r} (blocked by the test)", name=name)

        sys.meta_path.insert(0, NoTriton())
        import torch
        import kernels, smollm2, train.run
        from smollm2 import SmolLM2Config, SmolLM2ForCausalLM, generate

        torch.manual_seed(0)
        model = SmolLM2ForCausalLM(SmolLM2Config.preset("tiny"), backend="auto")
        ids = torch.randint(512, (2, 16))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        losses = []
        for _ in range(4):
            loss = model(ids, labels=ids).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0], losses
        assert generate(model, ids[:1], max_new_tokens=4).shape[1] <= 20
        assert "triton" not in sys.modules
        print(model.backend.name)
    """)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["torch"]


def test_transformers_llama_imports_from_the_project_root():
    # At the root, `import kernels` finds this project's package; transformers must not take it for its own
    # dependency.
    if importlib.util.find_spec("transformers") is None:
        pytest.skip("transformers is not installed")
    done = run_python(
        "from transformers import LlamaConfig, LlamaForCausalLM; print(LlamaForCausalLM.__name__)"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["LlamaForCausalLM"]


def fake_distribution(folder: Path, version: str) -> None:
    info = folder / f"kernels-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: kernels\nVersion: {version}\n", encoding="utf-8"
    )


@pytest.mark.parametrize("version", ["0.2.0", "0.18.2"])
def test_the_hugging_face_package_of_the_same_name_is_detected(tmp_path, version):
    fake_distribution(tmp_path, version)
    done = run_python(
        "import sys, os, kernels; sys.path.append(os.environ['FAKE']); print(kernels.check_name_clash())",
        FAKE=str(tmp_path),
    )
    assert done.returncode == 0, done.stderr
    assert version in done.stdout and "pip uninstall kernels" in done.stdout and done.stdout.count("\n") == 1


def test_the_doctor_names_the_clash_when_transformers_cannot_be_imported(tmp_path):
    transformers = pytest.importorskip(
        "transformers.utils.import_utils", reason="transformers is not installed"
    )
    version = getattr(transformers, "KERNELS_MIN_VERSION", None)
    if version is None:
        pytest.skip("this transformers does not name the versions of kernels that it takes")
    fake_distribution(tmp_path, version)
    done = run_python(
        """
        import os, sys
        sys.path.append(os.environ["FAKE"])
        from smollm2 import SmolLM2Config, SmolLM2ForCausalLM, doctor
        finding = doctor.check_transformers(SmolLM2ForCausalLM(SmolLM2Config.preset("tiny")))
        print(finding.passed, finding.figure)
        """,
        FAKE=str(tmp_path),
    )
    assert done.returncode == 0, done.stderr
    assert (
        done.stdout.startswith("False ")
        and f"'kernels' {version}" in done.stdout
        and "pip uninstall kernels" in done.stdout
    )


def test_no_name_clash_in_this_environment():
    import kernels

    assert kernels.check_name_clash() is None


def file_tree() -> dict[str, str]:
    """path -> comment, from the tree of docs/FILES.md (two spaces of indentation per folder)."""
    text = (ROOT / "docs" / "FILES.md").read_text(encoding="utf-8")
    block = re.search(r"^```\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    assert block, "docs/FILES.md has a tree"
    tree: dict[str, str] = {}
    folders: list[str] = []
    for line in block[1].splitlines():
        found = re.fullmatch(r"( *)(\S+)(?: {2,}(.*))?", line)
        assert found, line
        indent, name, comment = found.groups()
        del folders[len(indent) // 2 :]
        tree["".join(folders) + name] = comment or ""
        if name.endswith("/"):
            folders.append(name)
    return tree


def test_the_file_tree_is_the_repository():
    tree = file_tree()
    absent = [name for name in tree if not (ROOT / name).exists()]
    assert absent == [], "docs/FILES.md names files that do not exist"
    kept = {str(path.relative_to(ROOT)) for path in source_files(*PACKAGES)}
    kept |= {str(path.relative_to(ROOT)) for path in (ROOT / "train" / "configs").glob("*.yaml")}
    assert sorted(kept - set(tree)) == [], "files that docs/FILES.md does not name"
    assert [name for name, comment in tree.items() if not comment] == [], "every file has its comment"


@pytest.mark.parametrize("theirs", [
    {}, {"OMP_WAIT_POLICY": "ACTIVE"}, {"GOMP_SPINCOUNT": "7"}, {"KMP_BLOCKTIME": "0"},
])  # fmt: skip
def test_idle_threads_spin_briefly_whatever_ran_before_unless_the_user_says_otherwise(theirs, monkeypatch):
    monkeypatch.setattr(os, "getloadavg", lambda: (99.0, 99.0, 99.0))
    environment = dict(theirs)
    waiting.choose_waiting(environment)
    assert environment == (theirs or waiting.SPIN)


@pytest.mark.parametrize("package", ["kernels", "smollm2", "train", "bench"])
def test_how_threads_wait_is_chosen_before_torch_is_imported(package):
    done = run_python(f"""
        import os, sys
        for name in {waiting.VARIABLES!r}:
            os.environ.pop(name, None)

        class Torch:
            def find_spec(self, name, path=None, target=None):
                if name == "torch":
                    print(*sorted(os.environ.keys() & set({waiting.VARIABLES!r})))
                    raise SystemExit

        sys.meta_path.insert(0, Torch())
        import {package}
    """)
    assert done.stdout.strip() == "GOMP_SPINCOUNT KMP_BLOCKTIME", done.stderr


@pytest.mark.parametrize("package", ["smollm2", "train", "bench"])
def test_a_program_of_others_keeps_its_ctrl_c(tmp_path, package):
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "__init__.py").write_text(f"import {package}")
    work = "import os, signal\ntry:\n    os.kill(os.getpid(), signal.SIGINT)\nexcept KeyboardInterrupt:\n"
    (tmp_path / "theirs" / "work.py").write_text(f"import signal\n{work}    print('kept')")
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    found = subprocess.run(
        [sys.executable, "-m", "theirs.work"], capture_output=True, text=True, cwd=tmp_path, timeout=120,
        env={**os.environ, "PYTHONPATH": path}, preexec_fn=python_handles_ctrl_c,
    )  # fmt: skip
    assert found.stdout == "kept\n", found.stderr


def python_handles_ctrl_c() -> None:
    """The child of a background shell would ignore it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
