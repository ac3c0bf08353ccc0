"""`python -m bench.report DIR [--out DIR]`: pictures of the results in DIR, as PNG and SVG for a README of
800 pixels.

    generation.*     prefill and decode of every way to generate, beside the peers; a mark is the limit of the memory: weights
                     and cache read once per step, as fast as that run could read
    step.*           optimizer steps beside the peers; a mark is the limit of the processor: the matrix products alone
    roofline.*       time of every operation against the least it could take on that machine: of bench.kernels as bars
                     beside the alternatives, of bench.roofline as points
    attention.*      TFLOP/s of attention by length of a row, beside the alternatives
    ladder.*         from plain eager to everything on, one change a row
    loss_memory.*    what the loss holds at one time, by number of tokens
    decode.*         decode tokens/s against batch and context, with the limit of the memory where all variants have the same

Which files are read is said in bench/figures.py; another one is named and left out. Every picture says device,
dtype, date and commit. --markdown prints the figures as tables.
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from bench.figures import Figure, gather, markdown
from smollm2.cli import Parser, run_command
from smollm2.errors import LoadError

WIDTH, DPI = 8.0, 150  # inches; shown at 100 pixels an inch
CAPTION = 130  # characters of a line of the caption
FAMILIES = {
    "transformers": "tab:orange", "llama.cpp": "tab:green", "liger": "tab:purple", "litgpt": "tab:red",
    "flash": "tab:brown", "cudnn": "yellowgreen", "flex": "palevioletred", "compile": "silver",
}  # fmt: skip
OURS, PLAIN = "tab:blue", "tab:gray"
OWN = ("eager", "compiled", "captured", "ours", "triton")  # how the variants of this project begin
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
        raise LoadError(
            "drawing needs the package matplotlib; install it with: pip install 'smollm2-kernels[train]'"
        ) from None
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


def bars(
    axes: Any, title: str, figures: list[Figure], names: list[str], scale: float = 1.0, cut: float = 0.0
) -> None:
    """Horizontal bars in the order of `names`, each with its number, its limit as a line and its columns to
    the right; none is invisible.

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
            axes.text(
                0.93 * widest,
                place,
                "//",
                va="center",
                ha="center",
                fontsize=11,
                color="white",
                fontweight="bold",
            )
        beside = not limit or limit > 1.5 * value or value > 0.98 * limit
        number = f"{value:,.0f}" if value >= 100 else f"{value:.1f}"
        if beside:  # else the number would lie on the line
            axes.text(end + 0.012 * widest, place, number, va="center", fontsize=8)
        else:
            axes.text(end - 0.012 * widest, place, number, va="center", ha="right", fontsize=8, color="white")
        if limit:
            axes.plot([limit] * 2, [place - 0.45, place + 0.45], color="black", linewidth=1.6)
        columns = (
            {"of limit": f"{limit / value:.0%}"}
            if figure.kind == "operation"
            else figure.facts.get("columns", {})
        )
        style = {"textcoords": "offset points", "ha": "right", "fontsize": 8}
        for index, (heading, text) in enumerate(columns.items(), 1):
            axes.annotate(
                text, (1, place), (38 * index, 0), xycoords=axes.get_yaxis_transform(), va="center", **style
            )
            if figure is figures[0]:
                axes.annotate(
                    heading, (1, 1), (38 * index, 4), xycoords="axes fraction", color="dimgray", **style
                )
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

    names = {
        OURS: "this project",
        PLAIN: "torch",
        **{value: LABELS.get(name, name) for name, value in FAMILIES.items()},
    }
    used = dict.fromkeys(colour(figure.variant) for figure in figures)
    handles: list[Any] = [Patch(color=one, label=names[one]) for one in used]
    if any(figure.limit for figure in figures):
        handles.append(Line2D([], [], color="black", linewidth=1.6, label=limit))
    picture.legend(
        handles=handles, loc="outside upper right", ncols=len(handles), fontsize=7.5, frameon=False,
        handlelength=1.0, handletextpad=0.4, columnspacing=0.9,
    )  # fmt: skip


def draw_generation(figures: list[Figure]) -> Any:
    """Rows are cases, columns prefill and decode; of cases without a prefill there is only decode.*."""
    cases = {figure.case for figure in figures if figure.kind == "prefill"}
    chosen = [figure for figure in figures if figure.kind in ("prefill", "decode") and figure.case in cases]
    if not chosen:
        return None
    kinds = [kind for kind in ("prefill", "decode") if any(figure.kind == kind for figure in chosen)]
    order = sorted(cases, key=lambda case: [int(word) for word in case.replace(",", "").split()[1::2]])
    rows = [
        (case, list(dict.fromkeys(figure.variant for figure in chosen if figure.case == case)))
        for case in order
    ]
    heights = [len(names) + 1.2 for _, names in rows]
    title = "Generation: tokens per second" if len(kinds) > 1 else "Prefill: tokens per second"
    picture = canvas(1.2 + 0.21 * sum(heights), title, chosen)
    grid = picture.subplots(len(rows), len(kinds), squeeze=False, height_ratios=heights)
    for (case, names), panels in zip(rows, grid, strict=True):
        for kind, axes in zip(kinds, panels, strict=True):
            bars(
                axes,
                f"{kind}, {case}",
                [figure for figure in chosen if (figure.kind, figure.case) == (kind, case)],
                names,
            )
            axes.tick_params(labelleft=kind == kinds[0])
    legend_of_families(picture, chosen, limit_label(chosen))
    return picture


def limit_label(figures: Sequence[Figure]) -> str:
    """The limit of the memory, and its rate where all have the same."""
    rates = {figure.facts["at"] for figure in figures if "at" in figure.facts}
    return f"{LIMIT}, {rates.pop()}" if len(rates) == 1 else LIMIT


def draw_step(figures: list[Figure]) -> Any:
    """One panel per size and dtype."""
    chosen = [figure for figure in figures if figure.kind == "step"]
    cases = list(dict.fromkeys(figure.case for figure in chosen))
    groups = [[figure for figure in chosen if figure.case == case] for case in cases]
    heights = [len(group) + 1.6 for group in groups]
    picture = canvas(1.1 + 0.23 * sum(heights), "Optimizer step: tokens per second", chosen)
    panels = picture.subplots(len(groups), 1, squeeze=False, height_ratios=heights)[:, 0]
    for case, group, axes in zip(cases, groups, panels, strict=True):
        bars(axes, case, group, [figure.variant for figure in group])
    legend_of_families(picture, chosen, "limit of the processor")
    return picture


def draw_roofline(figures: list[Figure]) -> Any:
    """Measured time against the least time. Operations alone as bars, a row each; else a panel of points per
    source.
    """
    chosen = [figure for figure in figures if figure.kind == "operation" and figure.limit]
    panels = list(dict.fromkeys(figure.facts["panel"] for figure in chosen))
    alone = [panel for panel in panels if panel.startswith("operations alone")]
    rows: dict[str, list[Figure]] = {}
    for figure in chosen:
        if figure.facts["panel"] in alone:
            where = (
                figure.facts["panel"].removeprefix("operations alone").replace(" tokens", "")
                if len(alone) > 1
                else ""
            )
            rows.setdefault(f"{figure.facts['op']} {{}}{where}", []).append(figure)
    panels = [panel for panel in panels if panel not in alone]
    names = {row: list(dict.fromkeys(figure.variant for figure in group)) for row, group in rows.items()}
    heights = [3.9] * len(panels) + [0.21 * (len(of_row) + 1.6) for of_row in names.values()]
    size = f"{chosen[0].facts.get('batch')} x {chosen[0].facts.get('length')} tokens"
    title = (
        "Time against the least that this machine allows" if panels else f"Operations of {size}: microseconds"
    )
    picture = canvas(0.9 + sum(heights), title, chosen)
    grid = picture.add_gridspec(len(heights), 2 if rows else 1, height_ratios=heights)
    points = [figure for figure in chosen if figure.facts["panel"] in panels]
    for place, panel in enumerate(panels):
        scatter(picture.add_subplot(grid[place, :]), panel, points)
    for place, (row, group) in enumerate(rows.items(), len(panels)):
        for column in range(2):
            here = [figure for figure in group if (figure.facts["phase"] == "forward") == (column == 0)]
            axes = picture.add_subplot(grid[place, column])
            bars(axes, row.format(here[0].facts["phase"] if here else ""), here, names[row], 1e6, CUT)
            axes.tick_params(labelleft=column == 0)
    if rows:
        roofs = dict.fromkeys(figure.facts["at"] for figure in chosen if "at" in figure.facts)
        label = " ".join(["least time", *(f"at {roof}" for roof in roofs)])
        legend_of_families(picture, [figure for figure in chosen if colour(figure.variant) == OURS], label)
    return picture


def scatter(axes: Any, panel: str, figures: list[Figure]) -> None:
    """Measured time against the least time: a point on the lowest line is at the roof. Of figures those of
    the panel.
    """
    from matplotlib.lines import Line2D

    shapes = dict(zip(dict.fromkeys(figure.variant for figure in figures), cycle(MARKERS), strict=False))
    here = [figure for figure in figures if figure.facts["panel"] == panel]
    operations = list(dict.fromkeys(figure.facts["op"] for figure in here))
    shades = {name: PALETTE[index % len(PALETTE)] for index, name in enumerate(operations)}
    for figure in here:
        shade = shades[figure.facts["op"]]
        axes.loglog(
            1e3 * (figure.limit or 0.0), 1e3 * figure.value, linestyle="none", marker=shapes[figure.variant],
            markersize=6.5, markeredgecolor=shade,
            markerfacecolor="white" if figure.facts["phase"].endswith("backward") else shade,
        )  # fmt: skip
    low, high = (bound(1e3 * (figure.limit or 0.0) for figure in here) for bound in (min, max))
    ends = [low / 1.6, high * 1.6]
    for factor, style in ((1, "-"), (2, "--"), (10, ":")):
        axes.plot(ends, [factor * end for end in ends], style, color="black", linewidth=1, zorder=1)
        label = "the roof" if factor == 1 else f"{factor} x"
        axes.annotate(
            label,
            (ends[1], factor * ends[1]),
            xytext=(3, 0),
            textcoords="offset points",
            fontsize=8,
            va="center",
        )
    axes.set_xlabel("least time, ms")
    axes.set_ylabel("measured time, ms")
    backward = any(figure.facts["phase"].endswith("backward") for figure in here)
    axes.set_title(panel + (" (hollow: backward)" if backward else ""), loc="left")
    handles = [
        Line2D([], [], color=shades[name], marker="s", linestyle="none", label=name) for name in operations
    ]
    used = dict.fromkeys(figure.variant for figure in here)
    handles += [
        Line2D([], [], color="dimgray", marker=shapes[name], linestyle="none", label=name) for name in used
    ]
    axes.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.09, 1.03), fontsize=8, frameon=False)
    plain_axes(axes)


def draw_attention(figures: list[Figure]) -> Any:
    """Rows with one document and with several, columns forward and backward; a group of bars per length of a
    row.
    """
    chosen = [figure for figure in figures if figure.kind == "attention"]
    lengths = sorted({figure.facts["tokens"] for figure in chosen})
    used = dict.fromkeys(figure.variant for figure in chosen)
    every = [
        name
        for name in used
        if {figure.facts["tokens"] for figure in chosen if figure.variant == name} == {*lengths}
    ]
    chosen = [figure for figure in chosen if figure.variant in every]  # one length alone is in roofline.*
    first = chosen[0].facts
    kinds, phases = (
        list(dict.fromkeys(figure.facts[name] for figure in chosen)) for name in ("documents", "phase")
    )
    picture = canvas(0.9 + 2.3 * len(kinds), "Attention: TFLOP/s", chosen)
    grid = picture.subplots(len(kinds), len(phases), squeeze=False, sharey="row")
    for kind, panels in zip(kinds, grid, strict=True):
        for phase, axes in zip(phases, panels, strict=True):
            here = [
                figure
                for figure in chosen
                if (figure.facts["documents"], figure.facts["phase"]) == (kind, phase)
            ]
            names = [name for name in every if name in {figure.variant for figure in here}]
            for figure in here:
                place = lengths.index(figure.facts["tokens"]) + (
                    names.index(figure.variant) - (len(names) - 1) / 2
                ) * 0.92 / len(names)
                axes.bar(place, figure.value, width=0.86 / len(names), color=colour(figure.variant))
                axes.annotate(
                    f"{figure.value:.0f}", (place, figure.value), (0, 2), textcoords="offset points",
                    ha="center", fontsize=7.5,
                    fontweight="bold" if colour(figure.variant) == OURS else "normal",
                )  # fmt: skip
            axes.margins(y=0.1)
            axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
            axes.tick_params(axis="x", length=0)
            axes.set_title(f"{phase}, {kind}", loc="left")
            plain_axes(axes, "y")
            if kind == kinds[-1]:
                axes.set_xlabel(f"tokens a row, {first['batch'] * first['length']:,} in all")
    legend_of_families(picture, chosen, "")
    return picture


def draw_ladder(figures: list[Figure]) -> Any:
    """Tokens per second of every rung from the top down; memory and launches beside the bar where they were
    measured.
    """
    chosen = [figure for figure in figures if figure.kind == "rung"]
    cases = list(dict.fromkeys(figure.case for figure in chosen))
    groups = [[figure for figure in chosen if figure.case == case] for case in cases]
    picture = canvas(
        1.1 + 0.26 * (len(chosen) + 1.6 * len(groups)),
        "Ablation ladder: tokens per second of a training step",
        chosen,
    )
    panels = picture.subplots(
        len(groups), 1, squeeze=False, height_ratios=[len(group) + 1.2 for group in groups]
    )[:, 0]
    for case, group, axes in zip(cases, groups, panels, strict=True):
        first = group[0].value
        for place, figure in enumerate(group):
            axes.barh(place, figure.value, height=0.72, color=OURS if place else PLAIN)
            words = [f"{figure.value:,.0f}", f"{figure.value / first:.2f} x"]
            if figure.facts.get("peak_memory_bytes"):
                words.append(f"{figure.facts['peak_memory_bytes'] / 1e6:,.0f} MB")
            if figure.facts.get("launches"):
                words.append(
                    f"{figure.facts['launches']:,} {'launch' if figure.facts['launches'] == 1 else 'launches'}"
                )
            axes.text(figure.value, place, "  " + "   ".join(words), va="center", fontsize=8)
        axes.set_ylim(len(group) - 0.4, -0.6)
        axes.set_xlim(0, 1.6 * max(figure.value for figure in group))
        axes.set_yticks(range(len(group)), [figure.variant for figure in group])
        axes.tick_params(axis="y", length=0)
        axes.set_title(case, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
    return picture


def draw_loss_memory(figures: list[Figure]) -> Any:
    """Peak memory by number of tokens, with the logits alone."""
    chosen = sorted(
        (figure for figure in figures if figure.kind == "loss memory"),
        key=lambda figure: figure.facts["tokens"],
    )
    picture = canvas(3.6, "Loss and its gradients: peak memory beyond the inputs", chosen)
    axes = picture.subplots()
    names = {
        "reference": "this project, backend torch",
        "triton": "this project, backend triton",
        "all logits": "F.cross_entropy of all logits",
    }
    for name in dict.fromkeys(figure.variant for figure in chosen):
        points = [(figure.facts["tokens"], figure.value / 1e9) for figure in chosen if figure.variant == name]
        shade = OURS if name in ("reference", "triton") else FAMILIES.get(name, PLAIN)
        axes.plot(
            *zip(*points, strict=True),
            marker="o",
            label=names.get(name, name),
            color=shade,
            linestyle="--" if name == "triton" else "-",
        )
        axes.annotate(
            f"{points[-1][1]:.2f} GB",
            points[-1],
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
    logits = sorted({(figure.facts["tokens"], figure.facts["logits_bytes"] / 1e9) for figure in chosen})
    axes.plot(*zip(*logits, strict=True), ":", color="black", label="the logits alone, in bf16")
    axes.set_xlim(0, 1.12 * logits[-1][0])
    axes.set_ylim(bottom=0)
    axes.set_xticks([tokens for tokens, _ in logits])
    axes.set_xlabel("tokens")
    axes.set_ylabel("GB")
    axes.legend(loc="upper left", fontsize=8, frameon=False)
    plain_axes(axes)
    return picture


def joined(count: int) -> dict[str, str]:
    """A line joins more than two points: between two there is nothing that was measured."""
    return {} if count > 2 else {"linestyle": "none"}


def draw_decode(figures: list[Figure]) -> Any:
    """Against the batch at every context, against the context at the smallest batch; None where neither was
    varied.

    What differs by more than WIDE is drawn on a logarithmic axis, with the limit of the memory, and the
    fastest with its numbers.
    """
    from matplotlib.lines import Line2D

    chosen = [figure for figure in figures if figure.kind == "decode"]
    contexts, batches = (sorted({figure.facts[name] for figure in chosen}) for name in ("context", "batch"))
    drawn = []
    for along, fixed, value in [
        *(("batch", "context", value) for value in contexts),
        ("context", "batch", batches[0]),
    ]:
        here = [figure for figure in chosen if figure.facts[fixed] == value]
        if len({figure.facts[along] for figure in here}) > 1:
            drawn.append((along, value, here))
    if not drawn:
        return None
    drawn = drawn[:3]  # the fourth place is the legend's
    longest = max(len(contexts), len(batches))
    names = list(dict.fromkeys(figure.variant for figure in chosen))
    best = max(chosen, key=lambda figure: figure.value)
    lowest = min(figure.value for figure in chosen)
    wide, keys = best.value > WIDE * lowest, "keys" in best.facts
    styles: dict[str, dict[str, Any]] = {}
    for place, name in enumerate(names):
        styles[name] = {
            "color": PALETTE[place % len(PALETTE)],
            "marker": MARKERS[place % len(MARKERS)],
            "linewidth": 1.2,
            "markersize": 5,
        }
        if wide:
            before = sum(colour(other) == colour(name) for other in names[:place])
            styles[name] |= {"color": colour(name), "linestyle": ("-", "--", ":")[before % 3]}
    picture = canvas(
        4.4 if len(drawn) < 3 else 6.4, "Decode: tokens per second against batch and context", chosen
    )
    grid = picture.subplots(-(-len(drawn) // 2), min(2, len(drawn)), squeeze=False, sharey=wide).flat
    for axes, (along, value, here) in zip(grid, drawn, strict=False):
        ticks = sorted({figure.facts[along] for figure in here})
        for name in names:
            points = sorted((figure.facts[along], figure.value) for figure in here if figure.variant == name)
            if points:
                axes.plot(*zip(*points, strict=True), **styles[name] | joined(len(ticks)))
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.set_xticks([], minor=True)
        if wide:
            limits = {figure.facts[along]: figure.limit for figure in here if figure.limit}
            if limits and all(
                abs(figure.limit / limits[figure.facts[along]] - 1) < 0.05 for figure in here if figure.limit
            ):
                name = limit_label(here)
                styles[name] = {"color": "black", "linewidth": 1.6, "marker": "" if len(ticks) > 2 else "_"}
                axes.plot(*zip(*sorted(limits.items()), strict=True), **styles[name] | joined(len(ticks)))
            where = {
                "textcoords": "offset points",
                "ha": "center",
                "fontsize": 8,
                "color": colour(best.variant),
            }
            for figure in (figure for figure in here if figure.variant == best.variant):
                # above both lines
                near = figure.limit if figure.limit and figure.limit < 2.2 * figure.value else figure.value
                axes.annotate(f"{figure.value:,.0f}", (figure.facts[along], near), (-5, 4), **where)
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:,.0f}")
            axes.margins(x=0.1)
        axes.set_ylim(bottom=lowest / 1.8 if wide else 0)
        if axes.get_subplotspec().is_first_col():
            axes.set_ylabel("tokens/s")
        axes.set_xlabel("rows" if along == "batch" else "keys" if keys else "tokens of the prompt")
        title = f"{value:,} keys" if keys else f"prompt of {value} tokens"
        axes.set_title(title if along == "batch" else f"batch of {value}", loc="left")
        plain_axes(axes)
    handles = [
        Line2D([], [], **{**style, "linewidth": None, "markersize": None} | joined(longest), label=name)
        for name, style in styles.items()
    ]
    if len(drawn) == 3:
        grid[3].set_axis_off()
        grid[3].legend(handles=handles, loc="center", frameon=False, labelspacing=0.9)
    else:
        picture.legend(handles=handles, loc="outside right upper", fontsize=8, frameon=False)
    return picture


# name of the files -> (the kinds of figures that it needs, how it is drawn)
PICTURES: dict[str, tuple[tuple[str, ...], Callable[[list[Figure]], Any]]] = {
    "generation": (("prefill", "decode"), draw_generation), "step": (("step",), draw_step),
    "roofline": (("operation",), draw_roofline), "attention": (("attention",), draw_attention),
    "ladder": (("rung",), draw_ladder), "loss_memory": (("loss memory",), draw_loss_memory),
    "decode": (("decode",), draw_decode),
}  # fmt: skip


def draw(figures: list[Figure], folder: Path) -> tuple[list[Path], list[str]]:
    """(the files that were written, the names of pictures for which there is no figure)."""
    folder.mkdir(parents=True, exist_ok=True)
    written, absent = [], []
    for name, (kinds, make) in PICTURES.items():
        picture = make(figures) if any(figure.kind in kinds for figure in figures) else None
        if picture is None:
            absent.append(name)
            continue
        for kind, metadata in (("png", None), ("svg", {"Date": None})):
            path = folder / f"{name}.{kind}"
            picture.savefig(path, format=kind, metadata=metadata)
            written.append(path)
    return written, absent


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m bench.report", description="Draws the results of a folder.")
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder of JSON files, as bench/results")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the pictures (default: the same)")
    parser.add_argument(
        "--markdown", action="store_true", help="print tables of the figures, and draw nothing"
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def main(argv: Sequence[str]) -> int:
    options = build_parser().parse_args(argv)
    figures, left_out = gather(options.folder)
    for line in left_out:
        print(line, file=sys.stderr)
    if options.markdown:
        print(markdown(figures))
        return 0
    written, absent = draw(figures, options.out or options.folder)
    for path in written:
        print(path)
    for name in absent:
        print(f"{name}: not drawn, no figures for it", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
