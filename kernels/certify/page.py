"""CERTIFICATE.md: certificate.json as tables to read."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from kernels.certify.cases import LAYERS
from kernels.certify.gates import Row, differences, faults
from kernels.certify.targets import TARGETS


def _differences(rows: Sequence[Row]) -> list[str]:
    """For the rows of one kernel: the constants, or else the arguments, in which each row differs."""
    traits = [{**row["constants"], **dict.fromkeys(row["not_divisible"], "any")} for row in rows]
    names = dict.fromkeys(name for trait in traits for name in trait if name != "SCALE")  # follows HEAD_DIM
    varying = [name for name in names if len({json.dumps(trait.get(name)) for trait in traits}) > 1]

    def text(trait: dict[str, Any], wanted: Iterable[str]) -> str:
        return " ".join(
            f"{name}={trait[name]:g}"
            if isinstance(trait.get(name), float)
            else f"{name}={trait.get(name, '16n')}"
            for name in wanted
        )

    short = [text(trait, [name for name in varying if name.isupper()]) for trait in traits]
    arguments = [name for name in varying if not name.isupper()]
    return [
        f"{line} {text(trait, [name for name in arguments if name in trait])}".strip()
        if short.count(line) > 1
        else line
        for line, trait in zip(short, traits, strict=True)
    ]


def _line(cells: Iterable[object]) -> str:
    return f"| {' | '.join(str(cell) for cell in cells)} |"


GLANCE = (
    "target", "Triton", "rows", "registers", "rows that spill", "spill B", "shared B", "limit", "faults",
)  # fmt: skip
COLUMNS = (
    "kernel", "case", "what differs", "dtype", "warps x stages", "registers", "spill B", "shared B", "matrix",
    "16 B ld/st", "occupancy",
)  # fmt: skip


def _cells(row: Row, figures: dict[str, Any]) -> list[str]:
    """The columns of one version's figures."""
    if "error" in figures:
        return ["", figures["error"].replace("|", "/").replace("\n", " "), *[""] * 4]
    scalars = f" + {figures['scalar_spills']} scalars" if figures["scalar_spills"] else ""
    spill = f"{figures['spill_bytes']}{scalars}"
    matrix = " ".join(f"{kind} {count}" for kind, count in figures["matrix"].items())
    wide = f"{figures['wide_loads']}/{figures['wide_stores']}"
    occupancy = f"{figures['occupancy']:.0%} ({figures['limited_by']})"
    barriers = figures.get("early_barriers")
    early = f" ({barriers} early barriers)" if barriers else ""
    return [str(figures["registers"]), spill, f"{figures['shared']}{early}", matrix, wide, occupancy]


def target_table(rows: Sequence[Row]) -> list[str]:
    """A Markdown table of the rows of one target. Where versions of Triton differ, their figures follow each
    other.
    """
    lines = [_line(COLUMNS), _line(["---"] * len(COLUMNS))]
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["kernel"], row["dtype"]), []).append(row)
    for group in groups.values():
        for row, difference in zip(group, _differences(group), strict=True):
            case = row["cases"][0] + (f" (+{len(row['cases']) - 1})" if len(row["cases"]) > 1 else "")
            first = (row["kernel"].strip("_").removesuffix("_kernel"), case, difference, row["dtype"])
            versions = [_cells(row, figures) for figures in row["figures"].values()]
            cells = ["; ".join(dict.fromkeys(values)) for values in zip(*versions, strict=True)]
            warps = next((figures["warps"] for figures in row["figures"].values() if "warps" in figures), "")
            lines.append(_line((*first, f"{warps} x {row['options'].get('num_stages', '')}", *cells)))
    return lines


def summary(certificate: dict[str, Any]) -> list[str]:
    """The first part of the page: launches, targets at a glance, numerics."""
    counts, rows = certificate["launches"], certificate["rows"]
    text = "Triton kernels only; matrix products and copies of PyTorch come on top."
    lines = ["## Launches", "", f"{text} 135M model, {LAYERS} layers.", ""]
    lines += [_line(("", "forward", "backward", "which")), _line(["---"] * 4)]
    for part in counts:
        forward, backward = counts[part]["forward"], counts[part]["backward"]
        which = "; ".join(
            ", ".join(f"{op} {count}" for op, count in ops.items()) for ops in (forward, backward) if ops
        )
        lines.append(_line((part, sum(forward.values()), sum(backward.values()), which)))
    lines += ["", "## Targets", "", "Worst over the rows in bf16 and fp16.", ""]
    lines += [_line(GLANCE), _line(["---"] * len(GLANCE))]
    for name, target in TARGETS.items():
        mine = [row for row in rows if row["target"] == name]
        for version in certificate["triton"]:
            found = [(row, row["figures"][version]) for row in mine if version in row["figures"]]
            own = [{**row, "figures": {version: figures}} for row, figures in found]
            sixteen = [each for row, each in found if row["dtype"] != "float32" and "error" not in each]
            if sixteen:
                spilling = sum(figures["spill_bytes"] > 0 for figures in sixteen)
                registers, spill, shared = (
                    max(figures[which] for figures in sixteen)
                    for which in ("registers", "spill_bytes", "shared")
                )
                cells = name, version, len(own), registers, spilling, spill, shared
                lines.append(_line((*cells, target.shared_limit, len(faults(own)))))
    if differing := differences(rows):
        text = "More than a quarter more registers with one version of Triton than with another:"
        lines += ["", "## Versions", "", text, "", *(f"- {line}" for line in differing)]
    if entries := certificate["numerics"]:
        text = "Worst error as a part of its budget (tests/numerics.py); 1 would fail."
        lines += ["", "## Numerics", "", text, "", _line(("op", "dtype", "worst")), _line(["---"] * 3)]
        lines += [_line((entry["op"], entry["dtype"], f"{entry['worst']:.3f}")) for entry in entries]
    return lines


def page(certificate: dict[str, Any]) -> str:
    """CERTIFICATE.md, a function of certificate.json alone."""
    lines = [
        "# Certificate",
        "",
        f"Made by `python -m kernels.certify` with Triton {' and '.join(certificate['triton'])}; do not "
        "edit. Each row is a launch that the public functions make at the models' shapes, compiled for a GPU "
        "that need not be there. Registers and spills are a thread's, shared memory is a program's. "
        "16 B ld/st: global loads and stores of 16 bytes in the code. "
        "Early barriers: what a dependent launch loads before its wait goes through shared memory there. "
        "Occupancy: part of a multiprocessor's warps that can be resident, and what limits it. "
        "What differs: compile-time constants; of arguments, `1` and `any` (not a known multiple of 16). "
        "Where the versions of Triton differ in a figure, theirs stand one after the other.",
        "",
        *summary(certificate),
    ]
    for name in TARGETS:
        rows = [row for row in certificate["rows"] if row["target"] == name]
        lines += ["", f"## {name}", "", *target_table(rows)]
    return "\n".join(lines) + "\n"
