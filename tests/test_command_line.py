"""The command `smollm2`: what it lists exists, it starts each by its own name, and help needs no torch."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import smollm2_command as command

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def run(monkeypatch, capfd):
    """Exit code, stdout and stderr of `smollm2` with these words."""

    def call(*words: str, program: str = "smollm2") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["smollm2", *words])
        before = signal.getsignal(signal.SIGINT)
        try:
            code = command.main(program)
        except SystemExit as leaving:
            code = int(leaving.code or 0)
        finally:
            signal.signal(signal.SIGINT, before)
            command.called = ""
        return code, *capfd.readouterr()

    return call


def test_help_and_version_import_nothing_but_the_standard_library():
    script = """if True:
        import sys, smollm2_command
        before = set(sys.modules)
        for words in (["--help"], [], ["--version"], ["bench"], ["chta"]):
            sys.argv[1:] = words
            print(smollm2_command.main(), file=sys.stderr)
        new = {name.split(".")[0] for name in set(sys.modules) - before}
        assert new <= sys.stdlib_module_names, new
    """
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    wrong = "error: unknown command 'chta'; did you mean 'chat'? `smollm2 --help` lists them"
    assert done.stderr.splitlines() == ["0", "0", "0", "0", wrong, "2"]


def test_every_command_that_is_listed_exists(run):
    _, out, _ = run("--help")
    for name in command.COMMANDS:
        assert f"\n  {name} " in out
        files = ROOT / "smollm2" / f"{name}.py", ROOT / "train" / f"{name}.py", ROOT / name / "__init__.py"
        assert any(path.is_file() for path in files)
    assert {"run", "plot", "verify_resume"} <= command.runnable("train").keys()
    assert {"startup", "generate", "memcheck"} <= command.runnable("bench").keys()


@pytest.mark.parametrize(
    ("words", "name", "others"),
    [
        (["generate"], "generate", "python -m smollm2.generate"),
        (["chat"], "chat", "python -m smollm2.chat"),
        (["train"], "train", "python -m train.run"),
        (["finetune"], "finetune", "python -m train.finetune"),
        (["train", "verify-resume"], "train verify_resume", "python -m train.verify_resume"),
        (["bench", "startup"], "bench startup", "python -m bench.startup"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
def test_a_command_calls_itself_what_the_user_called_it(run, words, name, others):
    code, out, _ = run(*words, "--help")
    assert code == 0 and out.startswith(f"usage: smollm2 {name} ") and f"{others} " not in out
    code, out, _ = run(*words, "--help", program="python -m smollm2")
    assert code == 0 and out.startswith(f"usage: python -m smollm2 {name} ")


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
def test_hints_of_training_name_the_command_that_was_started(run):
    code, _, err = run("train", "qqq=1")
    assert code == 2 and err.endswith("unknown key 'qqq'; smollm2 train --help lists them\n")
    code, _, err = run("train", "a.yaml", "b.yaml")
    assert code == 2 and err.endswith("for example: smollm2 train steps=60\n")


@pytest.mark.parametrize("start", ["smollm2.generate", "smollm2 generate"])
def test_python_m_starts_the_module_and_the_command_by_their_own_names(start):
    words = [sys.executable, "-m", *start.split(), "--help"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.stdout.startswith(f"usage: python -m {start} ") and done.returncode == 0, done.stderr


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
def test_arguments_and_exit_codes_are_those_of_the_command(run):
    code, _, error = run("generate", "--temperature", "x", "hi")
    assert code == 2 and "--temperature: invalid float value: 'x'" in error
    code, _, error = run("train", "steps=many")
    assert code == 2 and "steps" in error


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["nothing-like-it"], "error: unknown command 'nothing-like-it'; `smollm2 --help` lists them\n"),
        (
            ["bench", "startpu"],
            "error: unknown measurement 'startpu'; did you mean 'startup'? `smollm2 bench` lists",
        ),
    ],
)
def test_a_name_that_is_unknown_is_one_line_with_the_nearest(run, words, error):
    code, out, found = run(*words)
    assert (code, out) == (2, "") and found.startswith(error) and found.count("\n") == 1


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("train", "omegaconf pyyaml datasets pyarrow matplotlib"),
        ("finetune", "omegaconf pyyaml datasets pyarrow matplotlib"),
        ("serve", "fastapi 'pydantic>=2.8' starlette uvicorn"),
        ("bench", "'.[test]', in a checkout of this project"),
        ("chat", "'.[test]', in a checkout of this project"),
    ],
)
def test_a_package_that_is_missing_is_named_with_what_installs_it(run, monkeypatch, word, hint):
    def missing(*_: object, **__: object) -> None:
        raise ModuleNotFoundError("No module named 'nowhere'", name="nowhere.below")

    monkeypatch.setattr("runpy.run_module", missing)
    code, _, error = run(word, *(["startup"] if word == "bench" else []))
    assert code == 1 and error.count("\n") == 1
    assert error.endswith(f"needs nowhere; install it with: pip install {hint}\n")


def test_hints_install_what_the_extras_hold_and_never_this_distribution_from_an_index():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for name, packages in command.EXTRAS.items():
        assert list(packages) == project["optional-dependencies"][name]
    for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "smollm2").rglob("*.py")):
        assert f"{command.DISTRIBUTION}[" not in path.read_text(encoding="utf-8"), path


def test_a_module_of_this_project_that_is_missing_is_a_fault(run, monkeypatch):
    def missing(*_: object, **__: object) -> None:
        raise ModuleNotFoundError("No module named 'smollm2.lost'", name="smollm2.lost")

    monkeypatch.setattr("runpy.run_module", missing)
    with pytest.raises(ModuleNotFoundError, match="lost"):
        run("generate")


@pytest.mark.parametrize(("kind", "code"), [("left", 141), ("closed", 1)])
def test_help_that_nobody_can_read_ends_with_a_code(kind, code):
    script = "import sys, smollm2_command; sys.exit(smollm2_command.main())"
    reader, writer = os.pipe()
    os.close(reader)
    out = writer if kind == "left" else os.open(os.devnull, os.O_RDONLY)
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, stdout=out, stderr=subprocess.PIPE, text=True, timeout=120
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (code, "")


def test_the_console_script_is_the_command():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["project"]["scripts"] == {"smollm2": "smollm2_command:main"}
    assert project["tool"]["setuptools"]["py-modules"] == ["smollm2_command"]
