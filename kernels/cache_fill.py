"""Triton's cache, filled for a GPU that need not be there: `python -m kernels.certify --fill DIR`, and what it is worth: `--verify DIR`.

    recorder = Specialisations(target)            # records what is launched while it stands in for the GPU's driver
    with standing_in(recorder): ...
    fill(recorder.found, target, folder, jobs)    # compiles all of it in several processes
    verify(recorder.found, target, folder, jobs)  # how much of it Triton would find there; compiles nothing

A kernel is found by a key of all that its machine code depends on: the installed Triton (compiler and libtriton, whole, and the version of
ptxas), the text of the kernel and of what it calls with the line at which it begins, types and compile-time constants, which arguments are
1 or multiples of 16, warps and stages, the compute capability, and the few environment variables that Triton lets into it. PyTorch, the
machine, and where this project lies are no part of it. Triton 3.6 also compiles a launcher in C for each kind of signature, and every
Triton one library for all kernels: they are found by their text and belong to one CPython version. A cache stays where it was filled: its
index holds absolute paths. What is not found is compiled when it is needed; a stale cache costs time and cannot give a wrong kernel.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from ctypes import CDLL, RTLD_GLOBAL
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton import knobs
from triton.runtime.cache import FileCacheManager
from triton.runtime.driver import driver

from kernels.launches import StandIn
from kernels.targets import Target, target_for

SOURCES = ("model", "tests", "bench")
ROOT = Path(__file__).resolve().parent.parent
NEW, THERE, MISSING = "compiled", "there already", "missing"


class Specialisation(NamedTuple):
    """One compilation: a kernel by its name, and Triton's own description of how it is specialised (JSON)."""

    module: str
    kernel: str
    data: str


LIBRARY = Specialisation("triton.backends.nvidia.driver", "CudaUtils", "")  # what all kernels share, in C


@dataclass
class Specialisations(StandIn):
    """Records the specialisations of this package's kernels, each once."""

    found: dict[Specialisation, None] = field(default_factory=dict)

    def hook(self, *, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        function = fn.jit_function
        if function.module.startswith("kernels."):
            self.found[Specialisation(function.module, function.__name__, compile["specialization_data"])] = None
        return True


def present_gpu() -> str:
    """The architecture of the NVIDIA GPU of this machine, or sm_90."""
    if torch.version.hip or not torch.cuda.is_available():
        return "sm_90"
    return "sm_{}{}".format(*torch.cuda.get_device_capability())


def launched_by(source: str, target: str) -> list[Specialisation]:
    """What one of SOURCES launches on a target, recorded in a process of its own (bench/gpu_launches.py). Raises RuntimeError."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "launches.json"
        command = [sys.executable, *(["-O"] if source == "tests" else []), "-m", "bench.gpu_launches", source, "--arch", target]
        done = subprocess.run([*command, "--out", str(file)], cwd=ROOT, env=environment, capture_output=True, text=True)
        if done.returncode or not file.exists():
            raise RuntimeError(f"recording the launches of {source} failed: {' '.join((done.stdout + done.stderr).split())[-400:]}")
        return [Specialisation(*row) for row in json.loads(file.read_text())]


class Missing(Exception):
    """Triton asked the cache for what it does not hold."""


class Found(Exception):
    """Triton asked the cache for a library that it holds."""


class ReadOnlyCache(FileCacheManager):
    """A cache that is looked into: no folder is made, nothing is compiled into it, and no library of it is loaded."""

    def __init__(self, key: str, override: bool = False, dump: bool = False) -> None:
        self.key, self.lock_path, self.cache_dir = key, None, os.path.join(knobs.cache.dir, key)

    def get_file(self, filename: str) -> str | None:
        raise Found if self.has_file(filename) else Missing

    def put(self, data: Any, filename: str, binary: bool = True) -> str:
        raise Missing


class _Driver(StandIn):
    """The stand-in in a process that compiles: launchers ask a driver for the functions of Triton's C library."""

    utils: Any = None


def _prepare(folder: Path, target: Target, libcuda: Path | None) -> None:
    """Makes this process one that compiles for the target into the folder; without libcuda, one that only looks into it."""
    from triton.backends.nvidia import driver as nvidia

    stand_in = _Driver(target)
    driver.set_active(stand_in)
    knobs.cache.dir = str(folder)
    knobs.nvidia.libcuda_path = str(folder if libcuda is None else libcuda.parent)
    if libcuda is None:
        knobs.cache.manager_class = ReadOnlyCache
        return
    knobs.compilation.store_binary_only = True  # a tenth of the size; what is launched is the binary
    if target.nvidia:
        CDLL(str(libcuda), RTLD_GLOBAL)  # what is linked against libcuda finds one that is loaded
        stand_in.utils = nvidia.CudaUtils()


def _visit(item: Specialisation) -> str:
    """Compiles one specialisation with its launcher, or looks both up: one of NEW, THERE, MISSING, or what the compiler says."""
    from triton.backends.nvidia import driver as nvidia

    hits: list[bool] = []
    knobs.compilation.listener = lambda **known: hits.append(known["cache_hit"])
    try:
        if item == LIBRARY:
            nvidia.CudaUtils()
        compiled = getattr(import_module(item.module), item.kernel).preload(item.data)
        if hasattr(nvidia, "make_launcher") and driver.active.get_current_target().backend == "cuda":
            nvidia.CudaLauncher(compiled.src, compiled.metadata)
    except Found:
        return THERE
    except Missing:
        return MISSING
    except Exception as error:  # whatever the compiler raises
        return f"{item.kernel}: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return THERE if all(hits) else NEW


def _run(found: Iterable[Specialisation], jobs: int, prepare: Callable[[], None]) -> Counter[str]:
    """Visits all in several processes; counts what became of them."""
    items = sorted(found)
    ends: Counter[str] = Counter()
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), initializer=prepare) as pool:
        for number, end in enumerate(pool.map(_visit, items, chunksize=4), 1):
            ends[end] += 1
            if number % 100 == 0:
                print(f"  {number} of {len(items)}", file=sys.stderr, flush=True)
    return ends


def _stub_libcuda(folder: Path) -> Path:
    """A library with the names of libcuda that Triton's own C code asks for, so that this can be linked without a driver."""
    from triton.backends.nvidia import driver as nvidia

    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise RuntimeError("filling a cache needs a C compiler, as Triton does: install gcc or clang, or name one in CC")
    here = Path(nvidia.__file__)
    names = set(re.findall(r"\bcu[A-Z]\w*", here.read_text() + here.with_name("driver.c").read_text()))
    source, library = folder / "stub.c", folder / "libcuda.so.1"
    source.write_text(f"int {', '.join(sorted(names))};\n")
    subprocess.run([compiler, "-shared", "-Wl,-soname,libcuda.so.1", "-o", str(library), str(source)], check=True)
    return library


def fill(found: Iterable[Specialisation], target: Target, folder: Path, jobs: int) -> Counter[str]:
    """Compiles what the folder does not hold yet -> how many were NEW, THERE, or failed, by their message. Raises RuntimeError."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as stub:
        return _run(found, jobs, partial(_prepare, folder.resolve(), target, _stub_libcuda(Path(stub))))


def verify(found: Iterable[Specialisation], target: Target, folder: Path, jobs: int) -> Counter[str]:
    """Compiles nothing -> how many of these Triton would find in the folder (THERE), and how many not (MISSING)."""
    library = [LIBRARY] if target.nvidia else []
    return _run([*found, *library], jobs, partial(_prepare, folder.resolve(), target, None))


def moved_from(folder: Path) -> Path | None:
    """Where the cache was filled, if that is not where it lies now: Triton looks for its files there."""
    for index in folder.glob("*/__grp__*.json"):
        for path in json.loads(index.read_text()).get("child_paths", {}).values():
            filled = Path(path).parent.parent
            return None if filled == folder.resolve() else filled
    return None


def report(fill_it: bool, folder: Path, arch: str, sources: Iterable[str], jobs: int) -> int:
    """`--fill` and `--verify`: prints what was done or found. Returns 0, or 1 if something failed or is missing."""
    began, target = time.monotonic(), target_for(arch)
    found: dict[Specialisation, None] = {}
    for source in sources:
        found |= dict.fromkeys(launched_by(source, arch))
        print(f"{source}: {len(found)} specialisations for {arch} so far", file=sys.stderr, flush=True)
    ends = (fill if fill_it else verify)(found, target, folder, jobs)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    failures = {end: count for end, count in ends.items() if end not in (NEW, THERE, MISSING)}
    known = ", ".join(f"{ends[end]} {end}" for end in ((NEW, THERE) if fill_it else (THERE, MISSING)))
    print(f"{arch}, Triton {triton.__version__}, CPython {platform.python_version()}: {known}, {sum(failures.values())} failed")
    print(f"{folder.resolve()}: {size / 1e6:.1f} MB, {time.monotonic() - began:.0f} s")
    for failure, count in failures.items():
        print(f"  {count} x {failure}")
    if fill_it:
        if not target.nvidia:
            print("the launchers in C are left to the machine that has the GPU: they are built against its ROCm")
        print(f"to use it: TRITON_CACHE_DIR={folder.resolve()} python -m train.run ...")
    elif moved := moved_from(folder):
        print(f"it was filled as {moved}, and Triton looks for its files there: put it there, or fill it where it lies")
    return int(bool(failures or ends[MISSING] or (not fill_it and moved)))
