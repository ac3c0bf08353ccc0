"""Fills Triton's cache for a GPU that need not be present (`python -m kernels.certify --fill DIR`), and says
how much of it would be used (`--verify DIR`).

    recorder = Specialisations(target)            # records what is launched while it stands in for the driver
    with standing_in(recorder): ...
    fill(recorder.found, target, folder, jobs)    # compiles all of it in several processes
    verify(recorder.found, target, folder, jobs)  # how much of it Triton would find there; compiles nothing

Triton finds a kernel by a key of everything that its machine code depends on: the installed Triton (the
wheel, which differs for each CPython and processor, and the version of ptxas), the text of the kernel and of
what it calls with the line at which it begins, types and compile-time constants, which arguments are 1 or
multiples of 16, warps and stages, the compute capability, and a few environment variables such as
TRITON_DEBUG. PyTorch and the folder of this project are not part of it. The cache also holds libraries in C,
found by their text and by what Python says about the platform: one for all kernels, and with Triton 3.6 a
launcher for each kind of signature. A cache must stay where it was filled, because its index holds absolute
paths. What is not found is compiled when it is needed: a stale cache costs only time.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import re
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from ctypes import CDLL, RTLD_GLOBAL
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton import knobs
from triton.runtime import build
from triton.runtime.cache import FileCacheManager
from triton.runtime.driver import driver

import kernels
from kernels.certify.recorder import StandIn
from kernels.certify.targets import Target, target_for

SOURCES = ("model", "tests", "bench")
ROOT = Path(__file__).resolve().parent.parent.parent
BINARIES = (".cubin", ".hsaco")
# What a visit of a kernel ends with.
NEW, THERE, MISSING, LAUNCHER = "compiled", "there already", "missing", "without their launcher"
KNOWN = (THERE, MISSING, LAUNCHER)  # the possible ends of one that is only looked up


class Specialisation(NamedTuple):
    """One compilation: a kernel by its name, and Triton's own description of how it is specialised (JSON)."""

    module: str
    kernel: str
    data: str


LIBRARY = Specialisation("triton.backends.nvidia.driver", "CudaUtils", "")  # in C, shared by all kernels


@dataclass
class Specialisations(StandIn):
    """Records the specialisations of this package's kernels, each once."""

    found: dict[Specialisation, None] = field(default_factory=dict)

    def hook(self, *, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        function, data = fn.jit_function, compile["specialization_data"]
        if function.module.startswith(f"{kernels.__name__}."):
            self.found[Specialisation(function.module, function.__name__, data)] = None
        return True


def present_gpu() -> str:
    """The architecture of the NVIDIA GPU of this machine, or sm_90."""
    if torch.version.hip or not torch.cuda.is_available():
        return "sm_90"
    return "sm_{}{}".format(*torch.cuda.get_device_capability())


def launched_by(source: str, target: str) -> list[Specialisation]:
    """What one of SOURCES launches on a target, recorded in a process of its own (bench/gpu_launches.py).
    Raises RuntimeError if that fails.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "launches.json"
        command = [sys.executable, *(["-O"] if source == "tests" else []), "-m", "bench.gpu_launches", source]
        command += ["--arch", target, "--out", str(file)]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        if done.returncode or not file.exists():
            said = " ".join((done.stdout + done.stderr).split())[-400:]
            raise RuntimeError(f"recording the launches of {source} failed: {said}")
        return [Specialisation(*row) for row in json.loads(file.read_text())]


class Missing(Exception):
    """Triton asked for something that the cache does not hold."""


class Found(Exception):
    """Triton asked for a library that the cache holds."""


def is_whole(path: Path) -> bool:
    """Whether a file of the cache is usable: valid JSON, or machine code that reaches to the end of its ELF
    section table.
    """
    try:
        content = path.read_bytes()
        if path.suffix == ".json":
            return isinstance(json.loads(content), dict)
        if path.suffix not in (*BINARIES, ".so"):
            return True
        (table,) = struct.unpack_from("<Q", content, 0x28)
        size, count = struct.unpack_from("<HH", content, 0x3A)
    except (OSError, ValueError, struct.error):
        return False
    return content.startswith(b"\x7fELF") and table + size * count <= len(content)


class CheckedCache(FileCacheManager):
    """Triton's cache, in which a kernel or library counts as missing, and is made again, if a file of it is
    lost or truncated.
    """

    def get_group(self, filename: str) -> dict[str, str] | None:
        try:
            group = super().get_group(filename)
        except ValueError:  # Triton 3.6, if the index is not JSON
            return None
        files = [Path(path) for path in (group or {}).values()]
        return group if any(file.suffix in BINARIES for file in files) and all(map(is_whole, files)) else None

    def get_file(self, filename: str) -> str | None:
        """The path of a library. Loading a truncated one would end the process."""
        path = super().get_file(filename)
        return path if path is not None and is_whole(Path(path)) else None


class ReadOnlyCache(CheckedCache):
    """A cache that is only looked up: makes no folder, and neither builds nor loads a library."""

    def __init__(self, key: str, override: bool = False, dump: bool = False) -> None:
        self.key, self.lock_path, self.cache_dir = key, None, os.path.join(knobs.cache.dir, key)

    def get_file(self, filename: str) -> str | None:
        """Raises Found or Missing, so that the caller neither loads nor builds the library."""
        raise Found if super().get_file(filename) is not None else Missing

    def get_group(self, filename: str) -> dict[str, str]:
        """Raises Missing before anything is compiled."""
        if not (group := super().get_group(filename)):
            raise Missing
        return group

    def put(self, data: Any, filename: str, binary: bool = True) -> str:
        """Raises Missing: something was compiled, so it was not there."""
        raise Missing


class _Driver(StandIn):
    """The stand-in in a process that compiles. Launchers ask it for the functions of Triton's C library."""

    utils: Any = None


_built: list[str] = []  # the libraries that this process has built


def _prepare(folder: Path, target: Target, libcuda: Path | None) -> None:
    """Sets this process up to compile for the target into the folder; without libcuda, only to look up."""
    if sys.platform == "linux":
        CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: die with the parent
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # ends without a traceback
    stand_in = _Driver(target)
    driver.set_active(stand_in)
    knobs.cache.dir, knobs.cache.manager_class = str(folder), CheckedCache
    knobs.nvidia.libcuda_path = str(folder if libcuda is None else libcuda.parent)
    if libcuda is None:
        knobs.cache.manager_class = ReadOnlyCache
        return
    knobs.compilation.store_binary_only = True  # only the binary is launched
    if target.nvidia:
        CDLL(str(libcuda), RTLD_GLOBAL)  # libraries linked against libcuda find the loaded one
        original = build._build

        def counted(name: str, *arguments: Any) -> str:
            _built.append(name)
            return original(name, *arguments)

        build._build = counted


@contextmanager
def _linkage(name: str) -> Iterator[None]:
    """Triton then names libraries as where Python says that its linkage is `name`: "ELF", or "" where the
    command `file`, which Python asks, is missing.
    """
    before = build.platform_key
    parts = platform.machine(), platform.system(), platform.architecture()[0], name
    build.platform_key = lambda: ",".join(parts)
    try:
        yield
    finally:
        build.platform_key = before


def _visit(item: Specialisation) -> str:
    """Compiles one specialisation with its launcher, or looks both up -> NEW, THERE, MISSING, LAUNCHER, or
    the error of the compiler.
    """
    from triton.backends.nvidia import driver as nvidia

    reads = knobs.cache.manager_class is ReadOnlyCache
    nvidia_gpu = driver.active.get_current_target().backend == "cuda"
    hits: list[bool] = []
    knobs.compilation.listener = lambda **known: hits.append(known["cache_hit"])
    _built.clear()
    try:
        if item != LIBRARY:
            compiled = getattr(import_module(item.module), item.kernel).preload(item.data)
        for linkage in () if not nvidia_gpu else (platform.architecture()[1],) if reads else ("", "ELF"):
            with _linkage(linkage):
                if item == LIBRARY:
                    driver.active.utils = nvidia.CudaUtils()
                elif hasattr(nvidia, "make_launcher"):  # Triton 3.6
                    nvidia.CudaLauncher(compiled.src, compiled.metadata)
    except Found:
        return THERE
    except Missing:
        return LAUNCHER if hits and item != LIBRARY else MISSING
    except Exception as error:  # any error of the compiler
        return f"{item.kernel}: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return THERE if all(hits) and not _built else NEW


def _run(
    found: Iterable[Specialisation], target: Target, jobs: int, prepare: Callable[[], None]
) -> Counter[str]:
    """Visits all of them, and the library that they share, in several processes; counts the ends."""
    items = [*([LIBRARY] if target.nvidia else []), *sorted(found)]
    ends: Counter[str] = Counter()
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), initializer=prepare) as pool:
        for number, end in enumerate(pool.map(_visit, items, chunksize=4), 1):
            ends[end] += 1
            if number % 100 == 0:
                print(f"  {number} of {len(items)}", file=sys.stderr, flush=True)
    return ends


def _stub_libcuda(folder: Path) -> Path:
    """A library with the names of libcuda that Triton's C code uses: it can be linked without a driver.
    Raises RuntimeError if there is no C compiler, or it fails.
    """
    from triton.backends.nvidia import driver as nvidia

    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise RuntimeError(
            "filling a cache needs a C compiler, as Triton does: install gcc or clang, or name one in CC"
        )
    here = Path(nvidia.__file__)
    names = set(re.findall(r"\bcu[A-Z]\w*", here.read_text() + here.with_name("driver.c").read_text()))
    source, library = folder / "stub.c", folder / "libcuda.so.1"
    source.write_text(f"int {', '.join(sorted(names))};\n")
    command = [compiler, "-shared", "-Wl,-soname,libcuda.so.1", "-o", str(library), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = " ".join(done.stderr.split())[:200] or f"exit code {done.returncode}"
        raise RuntimeError(f"the C compiler {compiler} fails: {said}")
    return library


def fill(found: Iterable[Specialisation], target: Target, folder: Path, jobs: int) -> Counter[str]:
    """Compiles what the folder does not hold yet -> how many were NEW, THERE, or failed, by their message.
    Raises RuntimeError without a C compiler.
    """
    with tempfile.TemporaryDirectory() as stub:
        libcuda = _stub_libcuda(Path(stub))
        folder.mkdir(parents=True, exist_ok=True)
        return _run(found, target, jobs, partial(_prepare, folder.resolve(), target, libcuda))


def verify(found: Iterable[Specialisation], target: Target, folder: Path, jobs: int) -> Counter[str]:
    """Compiles nothing -> how many of these Triton would find in the folder on this machine, and how many
    not, by the ends in KNOWN.
    """
    return _run(found, target, jobs, partial(_prepare, folder.resolve(), target, None))


def moved_from(folder: Path) -> Path | None:
    """The folder where the cache was filled, if it lies elsewhere now: Triton looks for its files there."""
    for index in folder.glob("*/__grp__*.json"):
        with suppress(ValueError):
            for path in json.loads(index.read_text()).get("child_paths", {}).values():
                filled = Path(path).parent.parent
                return None if filled.resolve() == folder.resolve() else filled
    return None


def report(fill_it: bool, folder: Path, arch: str, sources: Iterable[str], jobs: int) -> int:
    """`--fill` and `--verify`: prints what was done or found -> 0, or 1 if something failed or is missing.
    Raises RuntimeError, OSError and ValueError if it cannot begin.
    """
    if not folder.is_dir() and (folder.exists() or not fill_it):
        raise ValueError(f"expected a folder, got {folder}")
    began, target = time.monotonic(), target_for(arch)
    found: dict[Specialisation, None] = {}
    for source in sources:
        found |= dict.fromkeys(launched_by(source, arch))
        print(f"{source}: {len(found)} specialisations for {arch} so far", file=sys.stderr, flush=True)
    ends = (fill if fill_it else verify)(found, target, folder, jobs)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    failures = {end: count for end, count in ends.items() if end not in (NEW, *KNOWN)}
    known = ", ".join(
        f"{ends[end]} {end}" for end in ((NEW, THERE) if fill_it else KNOWN) if ends[end] or end != LAUNCHER
    )
    what = "kernels" + " and the C library of all" * target.nvidia
    versions = f"Triton {triton.__version__}, CPython {platform.python_version()}"
    print(f"{arch}, {versions}, {what}: {known}, {sum(failures.values())} failed")
    print(f"{folder.resolve()}: {size / 1e6:.1f} MB, {time.monotonic() - began:.0f} s")
    for failure, count in failures.items():
        print(f"  {count} x {failure}")
    if not fill_it:
        if moved := moved_from(folder):
            remedy = "put it there, or fill it where it lies"
            print(f"it was filled as {moved}, and Triton looks for its files there: {remedy}")
        return int(bool(failures or ends[MISSING] or ends[LAUNCHER] or moved))
    if not target.nvidia:
        print("the C libraries are left to the machine that has the GPU: they are built against its ROCm")
    if not failures:
        variable = f"TRITON_CACHE_DIR={shlex.quote(str(folder.resolve()))}"
        print(f"to use it: {variable} python -m train.run smollm2_135m.yaml backend=triton")
    return int(bool(failures))
