"""What the kernel pages draw: which part of a tensor a program owns, and where a kernel stands below the
roof.

Pictures are SVG with a white ground, so that they can be read on a dark page too.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent.parent
RESULTS = ROOT / "bench" / "results"
SHADES = ("#9ecae1", "#fdbe85", "#a1d99b", "#bcbddc", "#fcbba1", "#c7e9c0", "#d9d9d9", "#fdd0e6")
# Where the figures come from: folder, name, commit of the sources, file of the bandwidth.
DEVICES = (("h100", "H100", "6089c98", "#1f77b4"), ("h200", "H200", "c3a7038", "#d95f02"))

_drawn: dict[str, str] = {}


def drawn() -> Iterator[tuple[str, str]]:
    """(file, SVG) of what was drawn since the last call; nothing where another matplotlib draws otherwise."""
    found = dict(_drawn)
    _drawn.clear()
    import matplotlib

    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    if f"\nmatplotlib=={matplotlib.__version__}\n" in pins:
        yield from found.items()


def _picture(width: float, height: float) -> Any:
    from matplotlib import rcParams
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    rcParams.update({"font.size": 9, "svg.hashsalt": "smollm2", "hatch.linewidth": 0.6})
    picture = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasSVG(picture)
    return picture


def _keep(picture: Any, name: str, alt: str) -> None:
    """Keeps a picture for the builder, and prints the line of Markdown that shows it."""
    file = io.StringIO()
    picture.savefig(file, format="svg", metadata={"Date": None})
    # without digits that nobody sees and blanks at the ends of lines; scales are those of letters
    short = re.sub(
        r"scale\([^)]*\)|\d+\.\d{3,}",
        lambda found: found[0] if found[0][0] == "s" else f"{float(found[0]):.2f}",
        file.getvalue(),
    )
    _drawn[name] = re.sub(r" +\n", "\n", short)
    print(f"![{alt}]({name})")


class Box(NamedTuple):
    """A part of a tensor: column, row, width and height in elements."""

    x: float
    y: float
    width: float
    height: float
    label: str = ""
    program: int | None = None  # its colour; None: nobody's, hatched


def owners(
    name: str, alt: str, panels: Mapping[str, Sequence[Box]], x: str, y: str, size: tuple[float, float],
    ticks: tuple[Sequence[float], Sequence[float]] | None = None,
) -> None:  # fmt: skip
    """Draws who owns what, one panel beside the other; rows run down.

    ticks: the columns and the rows that are named.
    """
    from matplotlib.patches import Rectangle

    picture = _picture(*size)
    every = picture.subplots(1, len(panels), squeeze=False)[0]
    for axes, (title, boxes) in zip(every, panels.items(), strict=True):
        for box in boxes:
            free = box.program is None
            shade = "white" if box.program is None else SHADES[box.program % len(SHADES)]
            axes.add_patch(
                Rectangle(
                    (box.x, box.y), box.width, box.height, facecolor=shade, edgecolor="#444444",
                    linewidth=0.7, hatch="////" if free else None, clip_on=False,
                )
            )  # fmt: skip
            middle = box.x + box.width / 2, box.y + box.height / 2
            ground = {"facecolor": "white", "edgecolor": "none", "pad": 1.0} if free and box.label else None
            if box.label:
                axes.text(*middle, box.label, ha="center", va="center", fontsize=8, bbox=ground)
        axes.set_title(title, loc="left", fontsize=9.5)
        axes.set_xlim(0, max(box.x + box.width for box in boxes))
        axes.set_ylim(max(box.y + box.height for box in boxes), 0)
        if ticks:
            axes.set_xticks(ticks[0], [f"{tick:g}" for tick in ticks[0]])
            axes.set_yticks(ticks[1], [f"{tick:g}" for tick in ticks[1]])
        axes.set_xlabel(x)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
    every[0].set_ylabel(y)
    _keep(picture, name, alt)


def _measured(folder: str) -> tuple[float, float, list[dict[str, Any]]]:
    """Bytes per second, FLOP per second, and the rows of ours, as measured on a device."""
    kernels = json.loads((RESULTS / folder / "kernels.json").read_text(encoding="utf-8"))["kernels"]
    generation = json.loads((RESULTS / folder / "generation.json").read_text(encoding="utf-8"))["generation"]
    reads = kernels["roof"].get("read_gb_per_s") or generation["bandwidth"]["read_gb_per_s"]
    rows = [row for row in kernels["rows"] if row["variant"] == "triton" and "us" in row]
    return 1e9 * reads, 1e12 * kernels["roof"]["matmul_tflops"], rows


def roofline(page: str, operations: Mapping[str, float]) -> None:
    """Draws where the measurements of these operations stand below the roof, and prints their table.

    operations: "NAME PHASE" -> FLOP of a byte that has to be moved, or 0 for what bench/work.py counts.
    """
    from lab import table

    picture = _picture(7.2, 3.4)
    axes, rows, farthest = picture.subplots(), [], 3e3
    styles = dict(zip(operations, "osD^v", strict=False))
    measured = {folder: _measured(folder) for folder, *_ in DEVICES}
    for folder, device, commit, shade in DEVICES:
        bandwidth, rate, found = measured[folder]
        for row in found:
            operation = f"{row['op']} {row['phase']}"
            if operation not in operations:
                continue
            moved = 1e9 * row["gb_per_s"]
            intensity = operations[operation] or 1e12 * row["tflops"] / moved
            farthest = max(farthest, 3 * intensity)
            share = moved * intensity / min(rate, bandwidth * intensity)
            axes.loglog(
                intensity, moved * intensity / 1e12, styles[operation], color=shade, markersize=6,
                markeredgecolor="white", markeredgewidth=0.6,
            )  # fmt: skip
            rows.append(
                (
                    operation, device, commit, f"{row['us']:,.1f}", f"{row['gb_per_s']:,.0f}",
                    f"{intensity:,.0f}" if intensity > 99 else f"{intensity:.2g}", f"{share:.0%}",
                )
            )  # fmt: skip
    for folder, device, _, shade in DEVICES:
        bandwidth, rate, _ = measured[folder]
        ends = [0.1, rate / bandwidth, farthest]
        roof = f"{device}: {bandwidth / 1e9:,.0f} GB/s, {rate / 1e12:,.0f} TFLOP/s"
        heights = [min(rate, bandwidth * end) / 1e12 for end in ends]
        axes.loglog(ends, heights, color=shade, linewidth=1.2, zorder=1, label=roof)
    for operation, style in styles.items():
        axes.plot([], [], style, color="dimgray", label=operation)
    axes.set_xlabel("FLOP for each byte that must be moved")
    axes.set_ylabel("TFLOP/s")
    axes.minorticks_off()
    axes.grid(True, alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower right", fontsize=8, frameon=False)
    alt = f"Roofline of H100 and H200 with {len(rows)} measurements: the table below"
    _keep(picture, f"{page}-roof.svg", alt)
    print()
    table(("operation", "GPU", "commit", "us", "GB/s", "FLOP/byte", "of the roof"), *sorted(rows))
