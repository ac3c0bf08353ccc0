"""What the kernel pages use to look into a kernel: what a program computes, what is launched on a GPU, what
the compiler made of it, and what happens when a line of it is wrong.
"""

from __future__ import annotations

import json
import linecache
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any, NamedTuple
from unittest import mock

import numerics
import numpy as np
import torch
from interpreter import install
from planted_faults import plant
from triton.runtime.interpreter import InterpretedFunction, interpreter_builder

from bench.step_record import recording
from kernels import launch_config

ROOT = Path(__file__).resolve().parent.parent.parent
TRITON = "3.7.1"  # whose figures of the certificate are shown

install()  # sums are the same on every processor
torch.set_num_threads(1)


def text(value: Any) -> str:
    """A value of a kernel, or any array, to three decimals."""
    value = getattr(value, "value", value)  # of a compile-time constant
    if isinstance(value, str):
        return value
    data = value.handle.data if hasattr(value, "handle") else value
    array = np.asarray(data)
    if array.size == 1:
        array = array.reshape(())
    if array.dtype.kind == "f":
        array = array.round(3)
    return np.array2string(array + 0, precision=3, suppress_small=True, max_line_width=96)  # no -0


@contextmanager
def watching(function: str, *names: str, programs: int = 99) -> Iterator[None]:
    """Prints these local variables of a kernel, or of a function that it calls, whenever they get a value.

    The interpreter runs a kernel as Python, one program after the other, so Python's own tracing sees all of
    it. names: "m", or one entry of it, "m[0]". programs: how many of them are shown.
    """
    seen: dict[str, Any] = {}
    shown: list[tuple[int, ...]] = []

    def note(frame: FrameType, event: str, _: Any) -> Any:
        for name in names:
            variable, _, entry = name.partition("[")
            value = frame.f_locals.get(variable)
            if value is not None and value is not seen.get(name):
                seen[name] = value
                lines = text(value.handle.data[int(entry[:-1])] if entry else value).splitlines()
                print(f"  {name:<8} = " + ("\n" + " " * 13).join(lines))
        return note

    def enter(frame: FrameType, event: str, _: Any) -> Any:
        if frame.f_code.co_name != function:
            return None
        place = tuple(interpreter_builder.grid_idx)
        if place not in shown:
            if len(shown) == programs:
                return None
            shown.append(place)
            while len(place) > 1 and place[-1] == 0:
                place = place[:-1]
            print(f"program {', '.join(map(str, place))}")
        seen.clear()
        return note

    before = sys.gettrace()
    sys.settrace(enter)
    try:
        yield
    finally:
        sys.settrace(before)


@contextmanager
def blocks(op: str, rows: int, columns: int) -> Iterator[None]:
    """In this context the launch table has these sizes, block_m and block_n, for an operation."""
    line = launch_config.Row(1 << 20, launch_config.LaunchConfig(rows, columns, num_warps=4))
    with mock.patch.dict(launch_config.TABLE, {op: (line,)}):
        launch_config.launch_config.cache_clear()
        yield
    launch_config.launch_config.cache_clear()


class Launch(NamedTuple):
    """A launch on an H100: constants are the kernel's own, bytes are those of its tensors, each once."""

    kernel: str
    grid: tuple[int, ...]
    warps: int
    constants: dict[str, Any]
    bytes: float


def launches(call: Callable[[], object]) -> list[Launch]:
    """What a call launches on an H100, recorded from the launch itself; nothing is computed. The call makes
    its tensors on CUDA.
    """
    found: list[tuple[Any, dict[str, Any]]] = []
    with recording() as notes:
        note = InterpretedFunction.run

        def run(kernel: Any, *args: Any, **options: Any) -> None:
            notes.clear()
            note(kernel, *args, **options)
            given = dict(zip(kernel.arg_names, args, strict=False)) | options
            found.append((kernel, given | {"bytes": notes[-1].bytes}))

        with mock.patch.object(InterpretedFunction, "run", run):
            call()
    return [
        Launch(
            kernel.fn.__name__, options["grid"], options["num_warps"],
            {name: value for name, value in options.items() if name.isupper()}, options["bytes"],
        )
        for kernel, options in found
    ]  # fmt: skip


def table(header: Iterable[object], *rows: Iterable[object]) -> None:
    """Prints a table in Markdown; all columns but the first are aligned to the right."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    lines = [f"| {' | '.join(row)} |" for row in cells]
    print("\n".join([lines[0], "|---|" + "---:|" * (len(cells[0]) - 1), *lines[1:]]))


def show_launches(found: Iterable[Launch], *constants: str) -> None:
    """A table of launches, with these constants."""
    rows = [
        (
            f"`{one.kernel}`", " x ".join(f"{size:,}" for size in one.grid), one.warps,
            *(one.constants.get(name, "") for name in constants), f"{one.bytes / 1e6:,.1f}",
        )
        for one in found
    ]  # fmt: skip
    table(("kernel", "programs", "warps", *(f"`{name}`" for name in constants), "MB"), *rows)


def show_registers(case: str, *kernels: str) -> None:
    """A table of the registers of a thread in bf16, by kernel and target, from kernels/certificate.json."""
    rows = json.loads((ROOT / "kernels" / "certificate.json").read_text(encoding="utf-8"))["rows"]
    found = {
        (row["kernel"], row["target"]): row["figures"][TRITON]
        for row in rows
        if case in row["cases"] and row["dtype"] == "bfloat16"
    }
    targets = list(dict.fromkeys(target for _, target in found))
    table(
        ("registers of a thread", *targets, "occupancy on sm_90"),
        *(
            (
                f"`{kernel}`",
                *(found[kernel, target]["registers"] for target in targets),
                "{occupancy:.0%}, by {limited_by}".format(**found[kernel, "sm_90"]),
            )
            for kernel in kernels
        ),
    )
    spilled = sum(one["spill_bytes"] for (name, _), one in found.items() if name in kernels)
    print(f"\nSpilled to memory, on all of these targets together: {spilled} bytes.")


@contextmanager
def planted(module: ModuleType, old: str, new: str) -> Iterator[None]:
    """In this context the kernels of a module have `new` in the place of `old`."""
    path = Path(str(module.__file__))
    functions = [one.fn for one in vars(module).values() if isinstance(one, InterpretedFunction)]
    functions = [one for one in functions if one.__module__ == module.__name__]
    whole = path.read_text(encoding="utf-8")
    if old not in whole:
        raise ValueError(f"{path.name}: expected the line {old!r}")
    codes = [one.__code__ for one in functions]
    plant(str(path.relative_to(ROOT)), lambda source: source.replace(old, new), functions)
    InterpretedFunction.rewritten_fn.clear()
    try:
        yield
    finally:
        for function, code in zip(functions, codes, strict=True):
            function.__code__ = code
        linecache.cache.pop(str(path), None)
        InterpretedFunction.rewritten_fn.clear()


def held_to_the_contract(op: str, ours: torch.Tensor, base: torch.Tensor, truth: torch.Tensor) -> None:
    """Prints whether a result keeps the numerics contract of this project (tests/numerics.py).

    truth: the reference in float64; base: the reference in the dtype of `ours`.
    """
    error = (ours.double() - truth).abs().max().item()
    try:
        numerics.check(op, "result", ours, base, truth)
    except AssertionError:
        budget = 2 * (base.double() - truth).abs().max().item() + numerics.ATOL[ours.dtype]
        missing = int((~ours.isfinite()).sum())
        over = f"an error of {error:.3g} over a budget of {budget:.0e}"
        print(f"{op}: REFUSED, {f'{missing} values are not finite' if missing else over}")
    else:
        print(f"{op}: passed")


@contextmanager
def poisoned() -> Iterator[None]:
    """In this context torch.empty gives NaN, so that what a kernel does not write shows."""

    def full(shape: tuple[int, ...], **options: Any) -> torch.Tensor:
        return torch.full(shape, torch.nan, **options)

    with mock.patch.object(torch, "empty", full):
        yield
