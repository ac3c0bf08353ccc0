"""How a picture of results is drawn, whatever it shows: its colours, its caption, its bars and its legend."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from itertools import cycle
from typing import Any

from bench.figures import Figure, grouped
from smollm2.errors import LoadError

WIDTH, DPI = 8.0, 150  # inches; shown at 100 pixels an inch
CAPTION = 130  # characters of a line of the caption
FAMILIES = {
    "transformers": "tab:orange", "llama.cpp": "tab:green", "liger": "tab:purple", "litgpt": "tab:red",
    "flash": "tab:brown", "cudnn": "yellowgreen", "flex": "palevioletred", "compile": "silver",
}  # fmt: skip
OURS, PLAIN = "tab:blue", "tab:gray"
OWN = ("eager", "compiled", "captured", "ours", "patched", "triton")  # how the variants of this project begin
LABELS = {
    "reference": "torch", "compile": "torch.compile", "math": "torch math", "flash": "torch flash",
    "cudnn": "torch cuDNN", "flex": "FlexAttention",
}  # fmt: skip
LIMIT = "limit of the memory"
CUT = 6.0  # a bar of an operation that is longer than this times the shortest is cut
WIDE = 50.0
MARKERS = "osD^vP*X<>"
PALETTE = (
    "tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown", "tab:pink", "tab:olive",
    "tab:cyan", "black", "navy", "goldenrod", "darkgreen", "maroon", "indigo", "gray",
)  # fmt: skip


def colour(variant: str) -> str:
    """Of a family: this project, or whose it is."""
    family = next((name for name in FAMILIES if variant.startswith(name)), None)
    return OURS if variant.startswith(OWN) else FAMILIES[family] if family else PLAIN


def caption(figures: Iterable[Figure]) -> str:
    """Where the figures come from: device, dtypes, torch, dates, commits."""
    facts = [figure.facts for figure in figures]

    def each(values: Iterable[Any]) -> str:
        return ", ".join(dict.fromkeys(str(value) for value in values if value))

    dates = sorted({fact["date"][:10] for fact in facts if fact.get("date")})
    commits = each(
        fact.get("commit", "")[:7] + (" with changes" if "with changes" in fact.get("commit", "") else "")
        for fact in facts
    )
    parts = [
        each(fact.get("device") for fact in facts), each(fact.get("dtype") for fact in facts),
        each(f"torch {fact['versions']['torch']}" for fact in facts if "torch" in fact.get("versions", {})),
        dates[0] + (f" to {dates[-1]}" if len(dates) > 1 else "") if dates else "",
        f"commit {commits}" if commits else "",
    ]  # fmt: skip
    note = each(fact.get("note") for fact in facts)
    lines = textwrap.wrap("  ·  ".join(part for part in parts if part), CAPTION)
    return "\n".join([f"NOTE: {note}", *lines] if note else lines)


def canvas(height: float, title: str, figures: Sequence[Figure]) -> Any:
    """An empty figure with its title and its caption."""
    try:
        from matplotlib import rcParams
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure as Picture
    except ModuleNotFoundError:
        hint = "install it with: pip install matplotlib"
        raise LoadError(f"drawing needs the package matplotlib; {hint}") from None
    # the same file from the same figures
    rcParams.update({"font.size": 9, "axes.titlesize": 9.5, "svg.hashsalt": "smollm2"})
    picture = Picture(figsize=(WIDTH, height), dpi=DPI, layout="constrained", facecolor="white")
    FigureCanvasAgg(picture)  # draws without a display
    picture.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    picture.supxlabel(caption(figures), x=0.01, ha="left", fontsize=7.5, color="dimgray")
    return picture


def plain_axes(axes: Any, grid: str = "both") -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, axis=grid, alpha=0.25)
    axes.set_axisbelow(True)


def note(axes: Any, text: str, at: tuple[float, float], shift: tuple[float, float], **style: Any) -> None:
    """Text at a point, shifted by points of a font."""
    axes.annotate(text, at, shift, textcoords="offset points", **style)


def bars(
    axes: Any, title: str, figures: list[Figure], names: list[str], scale: float = 1.0, cut: float = 0.0
) -> None:
    """Horizontal bars in the order of `names`, each with its number, its limit as a line and its columns to
    the right.

    cut: no bar is longer than this times the shortest; one that would be is broken near its end.
    """
    if not figures:
        axes.set_visible(False)
        return
    by_name = {figure.variant: figure for figure in figures}
    longest = cut * min(figure.value for figure in figures) if cut else float("inf")
    widest = scale * min(max(max(figure.value, figure.limit or 0.0) for figure in figures), longest)
    for place, name in enumerate(names):
        figure = by_name.get(name)
        if figure is None:
            continue
        value, limit = scale * figure.value, scale * (figure.limit or 0.0)
        end = min(value, widest)
        axes.barh(place, end, height=0.72, color=colour(name))
        if end < value:
            broken = {"va": "center", "ha": "center", "fontsize": 11, "fontweight": "bold"}
            axes.text(0.93 * widest, place, "//", color="white", **broken)
        beside = not limit or limit > 1.5 * value or value > 0.98 * limit
        number = f"{value:,.0f}" if value >= 100 else f"{value:.1f}"
        if beside:  # else the number would lie on the line
            axes.text(end + 0.012 * widest, place, number, va="center", fontsize=8)
        else:
            axes.text(end - 0.012 * widest, place, number, va="center", ha="right", fontsize=8, color="white")
        if limit:
            axes.plot([limit] * 2, [place - 0.45, place + 0.45], color="black", linewidth=1.6)
        columns = figure.facts.get("columns", {})
        if figure.kind == "operation":
            columns = {"of limit": f"{limit / value:.0%}"}
        right = {"ha": "right", "fontsize": 8}
        for index, (heading, text) in enumerate(columns.items(), 1):
            at_row = axes.get_yaxis_transform()
            note(axes, text, (1, place), (38 * index, 0), xycoords=at_row, va="center", **right)
            if figure is figures[0]:
                above = {"xycoords": "axes fraction", "color": "dimgray"}
                note(axes, heading, (1, 1), (38 * index, 4), **above, **right)
    axes.set_title(title, loc="left")
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlim(0, (1.2 if cut else 1.14) * widest)
    axes.set_yticks(range(len(names)), [LABELS.get(name, name) for name in names])
    axes.tick_params(axis="y", length=0)
    if widest > 10_000:
        axes.xaxis.set_major_formatter(lambda value, _: f"{value / 1000:,.0f}k" if value else "0")
    plain_axes(axes, "x")


def legend_of_families(picture: Any, figures: Sequence[Figure], limit: str) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    names = {OURS: "this project", PLAIN: "torch"}
    names |= {value: LABELS.get(name, name) for name, value in FAMILIES.items()}
    used = dict.fromkeys(colour(figure.variant) for figure in figures)
    handles: list[Any] = [Patch(color=one, label=names[one]) for one in used]
    if any(figure.limit for figure in figures):
        handles.append(Line2D([], [], color="black", linewidth=1.6, label=limit))
    picture.legend(
        handles=handles, loc="outside upper right", ncols=len(handles), fontsize=7.5, frameon=False,
        handlelength=1.0, handletextpad=0.4, columnspacing=0.9,
    )  # fmt: skip


def scatter(axes: Any, panel: str, figures: list[Figure]) -> None:
    """The panel's figures: measured time against the least time. A point on the lowest line is at the roof.

    figures: of all panels, which share the marks of the variants.
    """
    from matplotlib.lines import Line2D

    shapes = dict(zip(grouped(figures, lambda figure: figure.variant), cycle(MARKERS), strict=False))
    here = [figure for figure in figures if figure.facts["panel"] == panel]
    shades = dict(zip(grouped(here, lambda figure: figure.facts["op"]), cycle(PALETTE), strict=False))
    least = [1e3 * (figure.limit or 0.0) for figure in here]
    backward = [figure.facts["phase"].endswith("backward") for figure in here]
    for figure, x, hollow in zip(here, least, backward, strict=True):
        shade = shades[figure.facts["op"]]
        axes.loglog(
            x, 1e3 * figure.value, linestyle="none", marker=shapes[figure.variant], markersize=6.5,
            markeredgecolor=shade, markerfacecolor="white" if hollow else shade,
        )  # fmt: skip
    ends = [min(least) / 1.6, max(least) * 1.6]
    for factor, style in ((1, "-"), (2, "--"), (10, ":")):
        axes.plot(ends, [factor * end for end in ends], style, color="black", linewidth=1, zorder=1)
        label = "the roof" if factor == 1 else f"{factor} x"
        note(axes, label, (ends[1], factor * ends[1]), (3, 0), fontsize=8, va="center")
    axes.set_xlabel("least time, ms")
    axes.set_ylabel("measured time, ms")
    axes.set_title(panel + (" (hollow: backward)" if any(backward) else ""), loc="left")
    marks = [(name, shade, "s") for name, shade in shades.items()]
    marks += [(name, "dimgray", shapes[name]) for name in grouped(here, lambda figure: figure.variant)]
    handles = [Line2D([], [], color=c, marker=m, linestyle="none", label=name) for name, c, m in marks]
    axes.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.09, 1.03), fontsize=8, frameon=False)
    plain_axes(axes)
