"""The command `smollm2`: `smollm2 chat` is `python -m smollm2.chat`; train, finetune and bench lie in folders
of their own.

It lies beside the package and not in it: importing the package imports torch, which takes a second, and
`smollm2 --help` needs neither.
"""

from __future__ import annotations

import ast
import difflib
import os
import re
import runpy
import shlex
import signal
import sys
import textwrap
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

DISTRIBUTION = "smollm2-kernels"
ROOT = Path(__file__).resolve().parent
# In a wheel train and bench lie in the package (setup.py), in a checkout beside it.
INSIDE = (ROOT / "smollm2" / "train").is_dir()
# command -> what it does; each is the module of smollm2 with that name, but for finetune and the folders
GROUPS = {
    "Talk to a model": {
        "chat": "chat in the terminal, or answer one message from stdin",
        "generate": "continue a text, or a file of prompts",
        "serve": "serve a model with an OpenAI-compatible API and a web page",
        "demo": "serve a page by gradio to the public",
    },
    "Train one": {
        "train": "train from scratch, or further on your texts; `smollm2 train NAME`: {names}",
        "finetune": "fine-tune a released model on conversations",
        "export": "write a GGUF file or a folder for transformers, or upload to the hub",
    },
    "Check and measure": {
        "doctor": "check an installation and a checkpoint",
        "perplexity": "measure how well a model predicts a text, and what 8 or 4 bits cost",
        "evaluate": "score a model on tasks of lm_eval: arc_easy, piqa, ...",
        "bench": "run a benchmark; `smollm2 bench` lists them",
        "compile": "compile the CPU's decode step, once",
        "cache": "list or clear what is cached",
    },
}
FOLDERS = ("train", "bench")
COMMANDS = [name for group in GROUPS.values() for name in group]

# What each command's extra of pyproject.toml holds. Hints name the packages themselves: no index has this
# distribution, and whoever registered its name there would be installed in its place.
EXTRAS = {
    "serve": ("fastapi", "pydantic>=2.8", "starlette", "uvicorn"),
    "evaluate": ("lm_eval>=0.4.13",),
    "demo": ("gradio>=6",),
    "train": ("omegaconf", "pyyaml", "datasets", "pyarrow", "matplotlib"),
}

# How the user started the command that runs, as "smollm2 chat": its own --help says so (smollm2/cli.py).
called = ""


def main(program: str = "smollm2") -> int:
    """Runs the command that sys.argv names. Returns the exit code, or raises SystemExit with it."""
    global called
    # Ctrl-C during the imports ends a command without a traceback; then run_command takes over.
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help", "help"):
        return _say(help_text())
    if name in ("-V", "--version"):
        return _say(f"smollm2 {_version()}")
    if name not in COMMANDS:
        return _refuse(name, COMMANDS, f"{program} --help")
    module = _module("train", name) if name == "finetune" else f"smollm2.{name}"
    if name in FOLDERS:
        found = runnable(name)
        if arguments and arguments[0].replace("-", "_") in found:
            chosen = arguments.pop(0).replace("-", "_")
            name, module = f"{name} {chosen}", _module(name, chosen)
        elif name == "train":  # its arguments are files and key=value: nothing else is a bare word
            module = _module("train", "run")
        elif not arguments or arguments[0] in ("-h", "--help"):
            return _say(bench_text(found))
        else:
            return _refuse(arguments[0], list(found), f"{program} bench", "measurement")
    called = f"{program} {name}"
    sys.argv[1:] = arguments
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except ModuleNotFoundError as error:
        missing = (error.name or "").split(".")[0]
        if missing in ("", "smollm2", "kernels", *FOLDERS):
            raise
        first = name.split()[0]
        hint = how_to_install("train" if first == "finetune" else first)
        print(f"error: {called} needs {missing}; {hint}", file=sys.stderr)
        return 1
    return 0


def how_to_install(command: str) -> str:
    """The hint where a package is missing that a command needs."""
    if command not in EXTRAS:
        return "install it with: pip install '.[test]', in a checkout of this project"
    return f"install it with: pip install {' '.join(map(shlex.quote, EXTRAS[command]))}"


def help_text() -> str:
    """Every command, in groups."""
    lines = ["usage: smollm2 COMMAND [ARGUMENT ...]", ""]
    others = ", ".join(name for name in runnable("train") if name not in ("run", "finetune"))
    for title, commands in GROUPS.items():
        lines.append(f"{title}:")
        for name, meaning in commands.items():
            lines.append(f"  {name:<12}{meaning.format(names=others)}")
        lines.append("")
    return "\n".join(
        [*lines, "smollm2 COMMAND --help says more; smollm2 --version says which version this is."]
    )


def bench_text(found: dict[str, str]) -> str:
    """Every measurement with the first sentence about it."""
    width = 2 + max(map(len, found))
    lines = [
        f"  {name:<{width}}{textwrap.shorten(text, 94, placeholder=' ...')}" for name, text in found.items()
    ]
    return "\n".join(["usage: smollm2 bench NAME [ARGUMENT ...]", "", *lines])


def runnable(folder: str) -> dict[str, str]:
    """The modules of train or bench that are commands -> what each says of itself; none is imported."""
    found = {}
    for path in sorted((ROOT / "smollm2" / folder if INSIDE else ROOT / folder).glob("*.py")):
        source = path.read_text(encoding="utf-8")
        if "sys.exit(run_command(main))" in source:
            text = " ".join((ast.get_docstring(ast.parse(source)) or "").split("\n\n")[0].split())
            found[path.stem] = re.sub(r"^(The command )?`python -m [^`]*`:? ", "", text)
    return found


def _module(folder: str, name: str) -> str:
    return f"{'smollm2.' if INSIDE else ''}{folder}.{name}"


def _version() -> str:
    try:
        return version(DISTRIBUTION)
    except PackageNotFoundError:  # a checkout that was not installed
        return "(not installed)"


def _say(text: str) -> int:
    try:
        print(text, flush=True)
    except OSError as error:  # a full disk, or a reader that went away (`| head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for what Python flushes at exit
        return 128 + signal.SIGPIPE if isinstance(error, BrokenPipeError) else 1
    return 0


def _refuse(name: str, known: Sequence[str], where: str, kind: str = "command") -> int:
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    print(f"error: unknown {kind} {name!r}; {hint}`{where}` lists them", file=sys.stderr)
    return 2
