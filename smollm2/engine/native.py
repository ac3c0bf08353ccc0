"""The library of decode_step.cpp for this processor: found, loaded or built.

    decode_step.cpp  -> C++ compiler -> decode_step-<instructions>-<hash>.library

An installation makes it where it finds a C++ compiler; elsewhere `python -m smollm2.compile` does, into the
cache. One library serves every model, dtype and number of threads.

A library runs as the user. One from the cache is loaded only if nobody else can have written it, and if it
has the sha256 that lies beside it, in the form of sha256sum: a damaged one ends the process.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from smollm2.engine.library import compile_library, compiler, library_name
from smollm2.errors import LoadError, UsageError
from smollm2.pretrained.cache import NoHome, cache_folder, sweep, unfinished
from smollm2.pretrained.files import write_files
from smollm2.pretrained.trust import check_owners

logger = logging.getLogger(__name__)


def capability() -> str:
    """The instruction set that torch uses here: AVX512, AVX2, or DEFAULT for all others."""
    known = str(torch.backends.cpu.get_cpu_capability())
    return known if known in ("AVX512", "AVX2") else "DEFAULT"


def _installed() -> Path:
    return Path(__file__).with_name(library_name(capability()))


def _in_cache() -> Path:
    """Raises LoadError where there is no home folder."""
    return cache_folder() / "compiled" / library_name(capability())


def find_library() -> Path | None:
    """The library for this processor, if there is one: in the cache, or in the installation. If that in the
    cache may not be used, a warning says why.
    """
    try:
        path = _in_cache()
        sweep(path.parent, "tmp*")
        if os.path.lexists(path):
            _read(path)
            return path
    except NoHome:
        pass
    except LoadError as error:
        logger.warning("%s; not used until then", error)
    return _installed() if _installed().is_file() else None


def load_library(path: Path) -> ctypes.CDLL:
    """Loads a library, once. Raises LoadError for one that may not be used, and that cannot be loaded."""
    content = path.read_bytes() if path == _installed() else _read(path)
    try:
        return _loaded(content)
    except OSError as error:
        reason = str(error).strip().partition("\n")[0]
        raise LoadError(f"{path}: cannot be loaded ({reason}); --compile rebuilds it") from error


@functools.cache
def _loaded(content: bytes) -> ctypes.CDLL:
    # A copy that is private: what was verified is what is loaded.
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "decode_step.so"
        copy.write_bytes(content)
        return ctypes.CDLL(str(copy))


def _read(path: Path) -> bytes:
    """The content of a library. Raises LoadError where others may have written it, or it is damaged."""
    try:
        check_owners(path, cache_folder())
        if not (path.is_file() and _digest_file(path).is_file()):  # a pipe would be waited for
            raise ValueError("the library or its .sha256 is missing")
        content = path.read_bytes()
        if _digest_file(path).read_text(encoding="utf-8") != _digest_line(path, content):
            raise ValueError("it has another sha256 than was written beside it")
    except (OSError, ValueError) as error:
        raise LoadError(f"{path}: damaged or incomplete library ({error}); --compile rebuilds it") from None
    return content


def _digest_file(library: Path) -> Path:
    return library.with_suffix(".sha256")


def _digest_line(library: Path, content: bytes) -> str:
    return f"{hashlib.sha256(content).hexdigest()}  {library.name}\n"


def build_library() -> Path:
    """Compiles the step for this processor into the cache, says so on stderr, and returns its path.

    Raises UsageError without a C++ compiler and for what it complains of, and LoadError where the cache
    cannot be written or others may write to it.
    """
    path = _in_cache()
    began = time.perf_counter()
    try:
        compiler()
        with unfinished(path.parent) as folder:
            check_owners(path.parent, cache_folder())
            print(f"compiling the decode step into {path} (ten seconds, once)", file=sys.stderr, flush=True)
            _build(path, folder)
    except FileNotFoundError as error:
        hint = "install one, or name it in the variable CXX"
        raise UsageError(f"compile: {error}; {hint}") from None
    except subprocess.CalledProcessError as error:
        raise UsageError(f"compile: {error.cmd[0]}: {_first_error(error.stderr)}") from None
    except OSError as error:
        hint = "SMOLLM2_CACHE names another folder"
        raise LoadError(f"{path}: cannot be written ({error.strerror or error}); {hint}") from error
    print(f"compiled in {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
    return path


def _build(path: Path, folder: Path) -> None:
    """Compiles in `folder` and moves the library, with its digest, to `path` when both are on the disk."""
    compile_library(capability(), folder / "made")
    content, whole = (folder / "made").read_bytes(), folder / "whole"
    digest = _digest_line(path, content)
    write_files(
        whole,
        {
            _digest_file(path).name: lambda file: file.write_text(digest, encoding="utf-8"),
            path.name: lambda file: file.write_bytes(content),
        },
    )
    for file in (_digest_file(path), path):  # a library without its digest would be called damaged
        (whole / file.name).chmod(0o600)  # whatever the umask lets others do
        (whole / file.name).replace(file)


def _first_error(said: str) -> str:
    lines = said.strip().splitlines() or [""]
    return next((line for line in lines if "error" in line), lines[0])
