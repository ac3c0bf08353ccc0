"""The library of the compiled decode step (decode_step.cpp): its name, and how it is made.

No imports beyond the standard library: setup.py runs this too, where there is no torch.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
from pathlib import Path

SOURCE = Path(__file__).with_name("decode_step.cpp")
COMPILERS = ("g++", "clang++", "c++")
# Instruction sets, named as torch names them, and what the compiler is told; for others it is told nothing.
FLAGS = {"AVX512": ["-march=x86-64-v4"], "AVX2": ["-march=x86-64-v3"]}
COMMON = ["-std=c++20", "-O3", "-shared", "-fPIC", "-pthread"]


def library_name(capability: str) -> str:
    """The file that holds the present source, compiled for an instruction set."""
    flags = " ".join([*COMMON, *FLAGS.get(capability, [])])
    digest = hashlib.sha256(SOURCE.read_bytes() + flags.encode()).hexdigest()[:12]
    return f"decode_step-{capability.lower()}-{digest}.library"  # not .so, which Python takes for a module


def capabilities() -> list[str]:
    """The instruction sets that an installation is made for."""
    return list(FLAGS) if platform.machine().lower() in ("x86_64", "amd64") else ["DEFAULT"]


def compiler() -> list[str]:
    """$CXX, or the first C++ compiler on the path. Raises FileNotFoundError."""
    named = shlex.split(os.environ.get("CXX", ""))
    for command in [named] if named else [[name] for name in COMPILERS]:
        if shutil.which(command[0]):
            return command
    raise FileNotFoundError(f"needs a C++ compiler, {named[0] if named else COMPILERS[0]!r} was not found")


def compile_library(capability: str, path: Path) -> None:
    """Compiles the step into the file `path`. Takes some ten seconds.

    Raises OSError, and subprocess.CalledProcessError with what the compiler said in its `stderr`.
    """
    flags = [*COMMON, *FLAGS.get(capability, [])]
    command = [*compiler(), *flags, str(SOURCE), "-o", str(path)]
    subprocess.run(command, check=True, capture_output=True, text=True)
