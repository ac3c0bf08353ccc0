"""What a kernel compiled for an absent GPU tells: registers, spills, instructions, occupancy.

On AMD, LLVM states in the assembly how many waves the registers allow. sm_100 has 512 columns of tensor
memory a multiprocessor (PTX ISA, tcgen05.alloc).
"""

from __future__ import annotations

import io
import multiprocessing
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from importlib import import_module
from typing import Any

import triton
from triton import knobs
from triton.compiler import ASTSource

import kernels
from kernels.certify.recorder import RecordedLaunch
from kernels.certify.targets import TARGETS, Target

MATRIX = {
    "wgmma": r"\bwgmma\.mma_async\b",
    "tcgen05": r"\btcgen05\.mma\b",
    "mma.sync": r"\bmma\.sync\b",
    "v_mfma": r"\bv_mfma_\w+",
    "v_wmma": r"\bv_wmma_\w+",
}
# PTX: 16 bytes or more in one access, from registers or as an asynchronous copy to shared memory.
VECTOR = r"[\w.:]*\.(?:v4\.[bfsu]32|v8\.[bfsu]32|v2\.[bfsu]64|v4\.[bfsu]64)\b"
WIDE_LOAD = rf"\bld\.global{VECTOR}|\bcp\.async\.c[ag]\.shared\.global[^,]*,[^,]*, (?:16|0x10)\b"
WIDE_STORE = rf"\bst\.global{VECTOR}"
AMD_WIDE_LOAD = r"\b(?:global|buffer|flat)_load_(?:dwordx4|b128)\b"
AMD_WIDE_STORE = r"\b(?:global|buffer|flat)_store_(?:dwordx4|b128)\b"


@dataclass(frozen=True)
class Figures:
    """What can be read from the compiled code."""

    registers: int  # a thread; AMD: vector registers, accumulation registers included
    spill_bytes: int  # a thread: NVIDIA spill stores + loads, AMD scratch memory
    scalar_spills: int  # AMD: scalar registers parked in lanes of vector registers; NVIDIA: 0
    shared: int  # bytes a program
    warps: int  # a program
    matrix: dict[str, int]  # matrix instructions by kind
    wide_loads: int  # global loads of 16 bytes a thread
    wide_stores: int
    occupancy: float  # part of a multiprocessor's warps that can be resident
    limited_by: str
    serialized: int = 0  # notes of ptxas that it serialized asynchronous matrix instructions
    early_barriers: int = 0  # `early_barriers`; left out of a row that has none


def _occupancy(target: Target, warps: int, shared: int, limits: dict[str, int]) -> tuple[float, str]:
    """limits: how many programs each further resource allows, besides warps and shared memory."""
    limits = {"warps": min(target.blocks, target.warps // warps), **limits}
    if shared:
        limits["shared memory"] = target.shared // (-(-shared // 128) * 128 + target.reserved)
    scarcest = min(limits, key=lambda name: limits[name])
    return round(limits[scarcest] * warps / target.warps, 3), scarcest


def nvidia_occupancy(
    target: Target, registers: int, warps: int, shared: int, tensor_columns: int = 0
) -> tuple[float, str]:
    """Warps get registers in units of 256; each of the four schedulers has 16,384 of them."""
    limits = {"registers": 16384 // (-(-max(registers, 1) * 32 // 256) * 256) * 4 // warps}
    if tensor_columns:
        limits["tensor memory"] = 512 // tensor_columns
    return _occupancy(target, warps, shared, limits)


def amd_occupancy(target: Target, waves: int, warps: int, shared: int) -> tuple[float, str]:
    """waves: LLVM's occupancy, the waves that the registers allow on each of the four SIMDs."""
    return _occupancy(target, warps, shared, {"registers": waves * 4 // warps})


def _number(pattern: str, text: str) -> int:
    """The largest number that the pattern finds: the assembly may contain a helper beside the kernel."""
    found = re.findall(pattern, text)
    if not found:
        raise RuntimeError(f"no match for {pattern!r} in the compiler's output; has its wording changed?")
    return max(int(number) for number in found)


def _count(pattern: str, text: str) -> int:
    return len(re.findall(pattern, text))


def early_barriers(text: str) -> int:
    """The barriers between the first global load of a dependent launch and its wait for the launch before; 0
    in other code. Loads in front of that wait should be under way while it lasts. One that is exchanged
    through shared memory there is waited for first, and so is each that follows in the same way.
    """
    early, wait, _ = text.partition("griddepcontrol.wait")
    first = re.search(r"\bld\.global\b|\bcp\.async\b", early)
    return _count(r"\bbar(?:rier|\.warp)?(?:\.cta)?\.sync\b", early[first.end() :]) if wait and first else 0


def measure(launch: RecordedLaunch) -> dict[str, Any]:
    """Compiles one launch, in a worker process -> its Figures as a dictionary, or {"error": ...}."""
    target = TARGETS[launch.target]
    function = getattr(import_module(f"{kernels.__name__}.{launch.op}"), launch.kernel)
    attributes = {(index,): value for index, value in launch.attributes.items()}
    source = ASTSource(fn=function, signature=launch.signature, constexprs=launch.constants, attrs=attributes)
    knobs.compilation.always_compile = True  # without ptxas there is no log of ptxas
    knobs.nvidia.dump_ptxas_log = True
    log = io.StringIO()
    try:
        with redirect_stdout(log):
            compiled = triton.compile(source, target=target.gpu, options=dict(launch.options))
    except Exception as error:  # any error of the compiler is the row's result, and fails the certificate
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        return {"error": f"{type(cause).__name__}: {str(cause).strip()[:200]}"}
    shared, warps = int(compiled.metadata.shared), int(compiled.metadata.num_warps)
    text = compiled.asm["ptx" if target.nvidia else "amdgcn"]
    notes = log.getvalue()
    if target.nvidia:
        registers, scalar_spills = _number(r"Used (\d+) registers", notes), 0
        spill = sum(_number(rf"(\d+) bytes spill {way}", notes) for way in ("stores", "loads"))
        tensor_columns = getattr(compiled.metadata, "tmem_size", 0) or 0
        occupancy, limited_by = nvidia_occupancy(target, registers, warps, shared, tensor_columns)
    else:
        registers = _number(r"\.vgpr_count: *(\d+)", text)
        scalar_spills = _number(r"\.sgpr_spill_count: *(\d+)", text)
        spill = _number(r"\.private_segment_fixed_size: *(\d+)", text)
        occupancy, limited_by = amd_occupancy(target, _number(r"; Occupancy: *(\d+)", text), warps, shared)
    kinds = Counter({kind: _count(pattern, text) for kind, pattern in MATRIX.items()})
    figures = Figures(
        registers=registers, spill_bytes=spill, scalar_spills=scalar_spills, shared=shared, warps=warps,
        matrix=dict(+kinds), wide_loads=_count(WIDE_LOAD if target.nvidia else AMD_WIDE_LOAD, text),
        wide_stores=_count(WIDE_STORE if target.nvidia else AMD_WIDE_STORE, text), occupancy=occupancy,
        limited_by=limited_by, serialized=_count("instructions are serialized", notes),
        early_barriers=early_barriers(text),
    )  # fmt: skip
    row = asdict(figures)
    if not figures.early_barriers:
        del row["early_barriers"]
    return row


def compile_rows(launches: Sequence[RecordedLaunch], jobs: int) -> list[dict[str, Any]]:
    """The figures of each launch, from several processes with a fresh cache folder: the compiler must run."""
    if not launches:
        return []
    results = []
    with tempfile.TemporaryDirectory() as folder:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(jobs, context, initializer=_use_cache, initargs=(folder,)) as pool:
            for number, figures in enumerate(pool.map(measure, launches), 1):
                results.append(figures)
                if number % 50 == 0:
                    print(f"  {number} of {len(launches)}", file=sys.stderr, flush=True)
    return results


def _use_cache(folder: str) -> None:
    knobs.cache.dir = folder
