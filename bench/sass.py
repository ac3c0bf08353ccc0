"""What a warp does in a kernel compiled for an NVIDIA GPU: its instructions, counted and timed one by one.

The machine code (SASS) comes from nvdisasm, which is part of Triton's wheel. It is walked from the first
instruction to the last. A loop is walked as often as its source says (bench/trip_counts.py); all other
branches count as not taken, so that of two alternatives both are counted. What TMA and wgmma do in the
background is not timed.

One warp's time: an instruction is issued once its operands are there, and not before the one in front of it
has had its turn. Latencies in cycles: Luo et al. 2024, "Benchmarking and dissecting the Nvidia Hopper GPU
architecture", arXiv 2402.13499, and Jia et al. 2018, arXiv 1804.06826, whose figures for arithmetic still
hold. A load's first execution is taken to come from memory, every later one from the L2 cache.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import triton

from bench.trip_counts import Line, Source, Trips

NVDISASM = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
MEMORY, L2 = 480, 263  # cycles from a load to its data
# Opcode -> cycles until its result can be used, and cycles until a scheduler can issue the next of its kind.
LATENCY = {
    "SHFL": (23, 2), "MUFU": (18, 4), "LDS": (29, 2), "LDSM": (29, 2), "STS": (1, 2), "BAR": (25, 1),
    "HMMA": (33, 4), "LDC": (38, 1), "ULDC": (38, 1), "S2R": (20, 1), "S2UR": (20, 1), "F2F": (14, 4),
    "LDG": (L2, 1), "LDGSTS": (L2, 1), "ATOMG": (L2, 1), "REDUX": (23, 4), "R2UR": (12, 1),
}  # fmt: skip
ARITHMETIC, UNIFORM = (4, 1), (8, 1)
LOADS = ("LDG", "LDGSTS")
STORES = ("STG", "STS", "ST", "RED", "LDGSTS", "BAR", "EXIT", "BRA", "NOP", "DEPBAR", "LDGDEPBAR")
WIDTH = {"128": 16, "64": 8, "U16": 2, "U8": 1, "S8": 1, "S16": 2}  # bytes of an access; 4 without a mark


@dataclass
class Instruction:
    """One of a kernel, in the order of their addresses."""

    text: str
    line: Line
    back_to: int | None = None  # where the loop begins that it ends
    opcode: str = ""
    bytes: int = 0  # of a warp in global memory
    reads: list[str] = field(default_factory=list)
    writes: list[str] = field(default_factory=list)


@dataclass
class Loop:
    """Instructions first .. last, with the loops within them."""

    first: int
    last: int
    times: int = 1
    inner: list[Loop] = field(default_factory=list)


@dataclass(frozen=True)
class WarpWork:
    """What one warp does in a launch."""

    instructions: int
    issue: int  # cycles of a scheduler
    cycles: int  # of the warp alone; after the wait for the kernel before, if there is one
    loaded: int  # bytes from global memory
    stored: int
    first_loaded: int  # of these, requested before the first is needed


def disassembled(cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(NVDISASM), "-c", "-g", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _registers(operand: str, many: int) -> list[str]:
    """The names of the registers in an operand, and of those that follow in a wide one."""
    found = []
    for kind, number, wide in re.findall(r"\b(UR|UP|R|P)(\d+)((?:\.reuse)?\.64)?", operand):
        count = max(many if kind in ("R", "UR") else 1, 2 if wide else 1)
        found += [f"{kind}{int(number) + step}" for step in range(count)]
    return found


def _decode(one: Instruction) -> None:
    """Opcode, bytes and registers from the text."""
    guard, name, rest = re.fullmatch(r"(?:@(!?U?P\w+) )?([A-Z][\w.]*) ?(.*)", one.text, re.S).groups()  # type: ignore[union-attr]
    parts = name.split(".")
    one.opcode = parts[0]
    operands = [operand.strip() for operand in rest.split(",")] if rest else []
    wide = next((WIDTH[part] for part in parts if part in WIDTH), 4)
    if one.opcode in ("LDG", "STG", "LDGSTS"):
        one.bytes = 32 * wide
    matrix = one.opcode.endswith("MMA")
    results = 0
    if operands and one.opcode not in STORES:  # the first; then the carries of a sum, a comparison's second
        most = 2 if re.match("U?P", operands[0]) else 3
        results = 1
        while results < min(most, len(operands)) and re.fullmatch(r"U?P(\d|T)", operands[results]):
            results += 1
    many = (
        4 if matrix or "4" in parts else 2 if "WIDE" in parts or one.opcode == "CS2R" else max(1, wide // 4)
    )
    one.writes = [name for operand in operands[:results] for name in _registers(operand, many)]
    for place, operand in enumerate(operands[results:]):
        stored = max(1, wide // 4) if one.opcode in ("STG", "STS") else 1
        one.reads += _registers(operand, (4, 2, 4)[place] if matrix and place < 3 else stored)
    one.reads += [guard.lstrip("!")] if guard else []


def parsed(text: str) -> list[Instruction]:
    """nvdisasm's text -> the instructions of the kernel."""
    found: list[Instruction] = []
    labels: dict[str, int] = {}
    line: Line = ("", 0)
    for row in text.splitlines():
        if mark := re.match(r'\s*//## File "(.*?)", line (\d+)', row):
            line = (mark[1], int(mark[2]))
        elif label := re.match(r"(\.L_x_\d+):", row):
            labels[label[1]] = len(found)
        elif code := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", row):
            found.append(Instruction(code[1], line))
    for place, one in enumerate(found):
        _decode(one)
        target = re.search(r"`\((\.L_x_\d+)\)", one.text) if one.opcode == "BRA" else None
        if target and labels[target[1]] < place:
            one.back_to = labels[target[1]]
    return found


def loops(code: Sequence[Instruction], trips: Trips) -> list[Loop]:
    """The outermost loops in order, each to be walked as often as its source runs."""
    spans: dict[int, int] = {}
    for place, one in enumerate(code):
        if one.back_to is not None:
            spans[one.back_to] = place
    outer: list[Loop] = []
    for first, last in sorted(spans.items(), key=lambda span: (span[0], -span[1])):
        level = outer
        while level and first <= level[-1].last:
            level = level[-1].inner
        level.append(Loop(first, last))
    _count(code, outer, trips)
    return outer


def _count(
    code: Sequence[Instruction], level: Sequence[Loop], trips: Trips, parent: Source | None = None
) -> None:
    """Sets how often the loops of a level run for each iteration of the loop around them."""
    by_source: dict[Source | None, list[Loop]] = {}
    known = [source for source, outside in trips if outside == parent]
    for loop in level:
        inside = {place for inner in loop.inner for place in range(inner.first, inner.last + 1)}
        own = [code[place].line for place in range(loop.first, loop.last + 1) if place not in inside]
        covered = {
            ((file, begin), last): sum(_same(name, file) and begin <= line <= last[1] for name, line in own)
            for (file, begin), last in known
        }
        # of those with as many lines the innermost, which begins last
        source = max(covered, key=lambda one: (covered[one], one[0][1]), default=None)
        source = source if source and covered[source] else None
        by_source.setdefault(source, []).append(loop)
        _count(code, loop.inner, trips, source)
    for source, parts in by_source.items():
        # an unrolled loop and what is left over: as many iterations at once as it has more loads
        rest = round(trips[source, parent]) if source else 1
        loads = {
            loop.first: sum(one.opcode in LOADS for one in code[loop.first : loop.last + 1]) for loop in parts
        }
        least = max(1, min(loads.values()))
        for loop in sorted(parts, key=lambda one: -loads[one.first]):
            at_once = max(1, round(loads[loop.first] / least)) if len(parts) > 1 else 1
            loop.times, rest = divmod(rest, at_once)


def _same(name: str, file: str) -> bool:
    """Whether two paths name one file, in whatever checkout."""
    return Path(name).parts[-2:] == Path(file).parts[-2:]


def _walk(first: int, last: int, inner: Sequence[Loop]) -> Iterator[int]:
    place = first
    for loop in inner:
        yield from range(place, loop.first)
        for _ in range(loop.times):
            yield from _walk(loop.first, loop.last, loop.inner)
        place = loop.last + 1
    yield from range(place, last + 1)


def warp_work(code: Sequence[Instruction], outer: Sequence[Loop]) -> WarpWork:
    """Walks the kernel with one warp."""
    ready: dict[str, int] = {}
    copies: list[int] = []  # when each group of asynchronous copies has arrived
    now = start_of_work = issued = instructions = loaded = stored = first_loaded = arriving = 0
    first_use: int | None = None
    seen = set[int]()
    for place in _walk(0, len(code) - 1, outer):
        one = code[place]
        if one.opcode == "NOP":
            continue
        latency, cost = LATENCY.get(one.opcode, UNIFORM if one.opcode.startswith("U") else ARITHMETIC)
        if one.opcode in LOADS and place not in seen:
            latency = MEMORY
        seen.add(place)
        start = max([now, *(ready.get(name, 0) for name in one.reads)])
        if one.opcode == "DEPBAR" and (left := re.search(r"SB\d, 0x([0-9a-f]+)", one.text)):
            waited = copies[: len(copies) - int(left[1], 16)]
            start = max([start, *waited])
        elif one.opcode == "LDGDEPBAR":
            copies.append(arriving)
        elif one.opcode == "LDGSTS":
            arriving = start + latency
        elif one.opcode == "BAR":
            start += latency
        elif one.opcode == "ACQBULK":
            start = start_of_work = max([start, *ready.values()])
        if one.opcode in LOADS:
            loaded += one.bytes
            if first_use is None or start < first_use:
                first_loaded += one.bytes
                first_use = first_use or start + latency
        elif one.opcode == "STG":
            stored += one.bytes
        for name in one.writes:
            ready[name] = start + latency
        now = start + cost
        issued += cost
        instructions += 1
    return WarpWork(instructions, issued, now - start_of_work, loaded, stored, first_loaded)


def registers(code: Sequence[Instruction]) -> int:
    """How many a thread has."""
    return 1 + max((int(name[1:]) for one in code for name in one.writes if name.startswith("R")), default=0)
