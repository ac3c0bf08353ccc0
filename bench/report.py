"""`python -m bench.report DIR [--out DIR]`: pictures of the results in DIR, as PNG and SVG for a README of 800 pixels.

    generation.*     prefill and decode of every way to generate, beside the peers; a line is the limit of the memory: weights and
                     cache read once per step at the speed of a copy
    step.*           optimizer steps beside the peers; a line is the limit of the processor: the matrix products alone
    roofline.*       time of every operation against the least it could take on that machine
    ladder.*         from plain eager to everything on, one change a row
    loss_memory.*    what the loss holds at one time, by number of tokens
    decode.*         decode tokens/s against batch and context

Which files are read is said in bench/figures.py; another one is named and left out. Every picture says device, dtype, date and commit.
--markdown prints the figures as tables.
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from bench.figures import Figure, gather
from smollm2.cli import LoadError, Parser, run_command

WIDTH, DPI = 8.0, 150  # inches; shown at 100 pixels an inch
CAPTION = 130  # characters of a line of the caption
FAMILIES = {"transformers": "tab:orange", "llama.cpp": "tab:green", "liger": "tab:purple", "litgpt": "tab:red"}
OURS, PLAIN = "tab:blue", "tab:gray"
OWN = ("eager", "compiled", "captured", "ours", "triton")  # how the variants of this project begin
MARKERS = "osD^vP*X<>"
PALETTE = (
    "tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown", "tab:pink", "tab:olive", "tab:cyan", "black",
    "navy", "goldenrod", "darkgreen", "maroon", "indigo", "gray",
)  # fmt: skip


def colour(variant: str) -> str:
    """Of a family: this project, or whose it is."""
    family = next((name for name in FAMILIES if variant.startswith(name)), None)
    return FAMILIES[family] if family else OURS if variant.startswith(OWN) else PLAIN


def caption(figures: Iterable[Figure]) -> str:
    """Where the figures come from: device, dtypes, torch, dates, commits."""
    facts = [figure.facts for figure in figures]

    def each(values: Iterable[Any]) -> str:
        return ", ".join(dict.fromkeys(str(value) for value in values if value))

    dates = sorted({fact["date"][:10] for fact in facts if fact.get("date")})
    commits = each(fact.get("commit", "")[:7] + (" with changes" if "with changes" in fact.get("commit", "") else "") for fact in facts)
    parts = [
        each(fact.get("device") for fact in facts), each(fact.get("dtype") for fact in facts),
        each(f"torch {fact['versions']['torch']}" for fact in facts if "torch" in fact.get("versions", {})),
        dates[0] + (f" to {dates[-1]}" if len(dates) > 1 else "") if dates else "", f"commit {commits}" if commits else "",
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
        raise LoadError("drawing needs the package matplotlib; install it with: pip install 'smollm2-kernels[train]'") from None
    rcParams.update({"font.size": 9, "axes.titlesize": 9.5, "svg.hashsalt": "smollm2"})  # the same file from the same figures
    picture = Picture(figsize=(WIDTH, height), dpi=DPI, layout="constrained", facecolor="white")
    FigureCanvasAgg(picture)  # draws without a display
    picture.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    picture.supxlabel(caption(figures), x=0.01, ha="left", fontsize=7.5, color="dimgray")
    return picture


def plain_axes(axes: Any, grid: str = "both") -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, axis=grid, alpha=0.25)
    axes.set_axisbelow(True)


def bars(axes: Any, figures: list[Figure], names: list[str]) -> None:
    """Horizontal bars in the order of `names`, each with its number, and its limit as a line."""
    by_name = {figure.variant: figure for figure in figures}
    widest = max(max(figure.value, figure.limit or 0.0) for figure in figures)
    for place, name in enumerate(names):
        figure = by_name.get(name)
        if figure is None:
            continue
        axes.barh(place, figure.value, height=0.72, color=colour(name))
        beside = figure.limit is None or figure.limit > 1.5 * figure.value or figure.value > 0.98 * figure.limit
        number = f"{figure.value:,.0f}" if figure.value >= 100 else f"{figure.value:.1f}"
        if beside:  # else the number would lie on the line
            axes.text(figure.value + 0.012 * widest, place, number, va="center", fontsize=8)
        else:
            axes.text(figure.value - 0.012 * widest, place, number, va="center", ha="right", fontsize=8, color="white")
        if figure.limit:
            axes.plot([figure.limit] * 2, [place - 0.45, place + 0.45], color="black", linewidth=1.6)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlim(0, 1.14 * widest)
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(axis="y", length=0)
    plain_axes(axes, "x")


def legend_of_families(picture: Any, figures: Sequence[Figure], limit: str) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    names = {OURS: "this project", PLAIN: "torch", **{value: name for name, value in FAMILIES.items()}}
    used = dict.fromkeys(colour(figure.variant) for figure in figures)
    handles: list[Any] = [Patch(color=one, label=names[one]) for one in used]
    if any(figure.limit for figure in figures):
        handles.append(Line2D([], [], color="black", linewidth=1.6, label=limit))
    picture.legend(
        handles=handles, loc="outside upper right", ncols=len(handles), fontsize=7.5, frameon=False,
        handlelength=1.0, handletextpad=0.4, columnspacing=0.9,
    )  # fmt: skip


def draw_generation(figures: list[Figure]) -> Any:
    """Rows are cases, columns prefill and decode."""
    chosen = [figure for figure in figures if figure.kind in ("prefill", "decode")]
    cases = sorted({figure.case for figure in chosen}, key=lambda case: [int(word) for word in case.replace(",", "").split()[1::2]])
    rows = [(case, list(dict.fromkeys(figure.variant for figure in chosen if figure.case == case))) for case in cases]
    heights = [len(names) + 1.2 for _, names in rows]
    picture = canvas(1.2 + 0.21 * sum(heights), "Generation: tokens per second", chosen)
    grid = picture.subplots(len(rows), 2, squeeze=False, height_ratios=heights)
    for (case, names), panels in zip(rows, grid, strict=True):
        for kind, axes in zip(("prefill", "decode"), panels, strict=True):
            here = [figure for figure in chosen if (figure.kind, figure.case) == (kind, case)]
            if not here:
                axes.set_visible(False)
                continue
            bars(axes, here, names)
            axes.set_title(f"{kind}, {case}", loc="left")
            if kind == "decode":
                axes.tick_params(labelleft=False)
    legend_of_families(picture, chosen, "limit of the memory")
    return picture


def draw_step(figures: list[Figure]) -> Any:
    """One panel per size and dtype."""
    chosen = [figure for figure in figures if figure.kind == "step"]
    cases = list(dict.fromkeys(figure.case for figure in chosen))
    groups = [[figure for figure in chosen if figure.case == case] for case in cases]
    heights = [len(group) + 1.6 for group in groups]
    picture = canvas(1.1 + 0.23 * sum(heights), "Optimizer step: tokens per second", chosen)
    panels = picture.subplots(len(groups), 1, squeeze=False, height_ratios=heights)[:, 0]
    for case, group, axes in zip(cases, groups, panels, strict=True):
        bars(axes, group, [figure.variant for figure in group])
        axes.set_title(case, loc="left")
    legend_of_families(picture, chosen, "limit of the processor")
    return picture


def draw_roofline(figures: list[Figure]) -> Any:
    """Measured time against the least time: a point on the lowest line is at the roof. A panel per source."""
    from matplotlib.lines import Line2D

    chosen = [figure for figure in figures if figure.kind == "operation" and figure.limit]
    panels = list(dict.fromkeys(figure.facts["panel"] for figure in chosen))
    picture = canvas(0.9 + 3.9 * len(panels), "Time against the least that this machine allows", chosen)
    variants = list(dict.fromkeys(figure.variant for figure in chosen))
    shapes = {name: MARKERS[index % len(MARKERS)] for index, name in enumerate(variants)}
    for axes, panel in zip(picture.subplots(len(panels), 1, squeeze=False)[:, 0], panels, strict=True):
        here = [figure for figure in chosen if figure.facts["panel"] == panel]
        operations = list(dict.fromkeys(figure.facts["op"] for figure in here))
        shades = {name: PALETTE[index % len(PALETTE)] for index, name in enumerate(operations)}
        for figure in here:
            shade = shades[figure.facts["op"]]
            axes.loglog(
                1e3 * (figure.limit or 0.0), 1e3 * figure.value, linestyle="none", marker=shapes[figure.variant], markersize=6.5,
                markeredgecolor=shade, markerfacecolor="white" if figure.facts["phase"].endswith("backward") else shade,
            )  # fmt: skip
        low, high = (bound(1e3 * (figure.limit or 0.0) for figure in here) for bound in (min, max))
        ends = [low / 1.6, high * 1.6]
        for factor, style in ((1, "-"), (2, "--"), (10, ":")):
            axes.plot(ends, [factor * end for end in ends], style, color="black", linewidth=1, zorder=1)
            label = "the roof" if factor == 1 else f"{factor} x"
            axes.annotate(label, (ends[1], factor * ends[1]), xytext=(3, 0), textcoords="offset points", fontsize=8, va="center")
        axes.set_xlabel("least time, ms")
        axes.set_ylabel("measured time, ms")
        axes.set_title(f"{panel} (hollow: backward)", loc="left")
        handles = [Line2D([], [], color=shades[name], marker="s", linestyle="none", label=name) for name in operations]
        used = dict.fromkeys(figure.variant for figure in here)
        handles += [Line2D([], [], color="dimgray", marker=shapes[name], linestyle="none", label=name) for name in used]
        axes.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.09, 1.03), fontsize=8, frameon=False)
        plain_axes(axes)
    return picture


def draw_ladder(figures: list[Figure]) -> Any:
    """Tokens per second of every rung from the top down; memory and launches beside the bar where they were measured."""
    chosen = [figure for figure in figures if figure.kind == "rung"]
    cases = list(dict.fromkeys(figure.case for figure in chosen))
    groups = [[figure for figure in chosen if figure.case == case] for case in cases]
    picture = canvas(1.1 + 0.26 * (len(chosen) + 1.6 * len(groups)), "Ablation ladder: tokens per second of a training step", chosen)
    panels = picture.subplots(len(groups), 1, squeeze=False, height_ratios=[len(group) + 1.2 for group in groups])[:, 0]
    for case, group, axes in zip(cases, groups, panels, strict=True):
        first = group[0].value
        for place, figure in enumerate(group):
            axes.barh(place, figure.value, height=0.72, color=OURS if place else PLAIN)
            words = [f"{figure.value:,.0f}", f"{figure.value / first:.2f} x"]
            if figure.facts.get("peak_memory_bytes"):
                words.append(f"{figure.facts['peak_memory_bytes'] / 1e6:,.0f} MB")
            if figure.facts.get("launches"):
                words.append(f"{figure.facts['launches']:,} {'launch' if figure.facts['launches'] == 1 else 'launches'}")
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
    chosen = sorted((figure for figure in figures if figure.kind == "loss memory"), key=lambda figure: figure.facts["tokens"])
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
            *zip(*points, strict=True), marker="o", label=names.get(name, name), color=shade, linestyle="--" if name == "triton" else "-"
        )
        axes.annotate(f"{points[-1][1]:.2f} GB", points[-1], xytext=(6, 0), textcoords="offset points", va="center", fontsize=8)
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


def draw_decode(figures: list[Figure]) -> Any:
    """Against the batch at the shortest prompt, against the context at the smallest batch; None where neither was varied."""
    chosen = [figure for figure in figures if figure.kind == "decode"]
    shortest = min(figure.facts["context"] for figure in chosen)
    smallest = min(figure.facts["batch"] for figure in chosen)
    panels = {"batch": ("context", shortest, f"prompt of {shortest} tokens"), "context": ("batch", smallest, f"batch of {smallest}")}
    for along, (fixed, value, _) in [*panels.items()]:
        if len({figure.facts[along] for figure in chosen if figure.facts[fixed] == value}) < 2:
            del panels[along]
    if not panels:
        return None
    picture = canvas(4.4, "Decode: tokens per second against batch and context", chosen)
    names = list(dict.fromkeys(figure.variant for figure in chosen))
    for axes, (along, (fixed, value, title)) in zip(picture.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        here = [figure for figure in chosen if figure.facts[fixed] == value]
        for place, name in enumerate(names):
            points = sorted((figure.facts[along], figure.value) for figure in here if figure.variant == name)
            style = {"color": PALETTE[place % len(PALETTE)], "marker": MARKERS[place % len(MARKERS)], "linewidth": 1.2, "markersize": 5}
            if points:
                axes.plot(*zip(*points, strict=True), **style)
        ticks = sorted({figure.facts[along] for figure in here})
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.set_xticks([], minor=True)
        axes.set_ylim(bottom=0)
        if axes.get_subplotspec().is_first_col():
            axes.set_ylabel("tokens/s")
        axes.set_xlabel("rows" if along == "batch" else "tokens of the prompt")
        axes.set_title(title, loc="left")
        plain_axes(axes)
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=PALETTE[place % len(PALETTE)], marker=MARKERS[place % len(MARKERS)], label=name)
        for place, name in enumerate(names)
    ]
    picture.legend(handles=handles, loc="outside right upper", fontsize=8, frameon=False)
    return picture


# name of the files -> (the kinds of figures that it needs, how it is drawn)
PICTURES: dict[str, tuple[tuple[str, ...], Callable[[list[Figure]], Any]]] = {
    "generation": (("prefill", "decode"), draw_generation), "step": (("step",), draw_step), "roofline": (("operation",), draw_roofline),
    "ladder": (("rung",), draw_ladder), "loss_memory": (("loss memory",), draw_loss_memory), "decode": (("decode",), draw_decode),
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


def markdown(figures: list[Figure]) -> str:
    """Tables of generation and steps: a row per variant, a column per case."""
    parts = []
    for kind in ("prefill", "decode", "step"):
        chosen = [figure for figure in figures if figure.kind == kind]
        if not chosen:
            continue
        cases = list(dict.fromkeys(figure.case for figure in chosen))
        values = {(figure.variant, figure.case): f"{figure.value:,.{1 if figure.value < 1000 else 0}f}" for figure in chosen}
        limits = {(f.variant, f.case): f" ({100 * f.value / f.limit:.0f} %)" for f in chosen if f.limit}
        lines = [f"| {kind}, tokens/s (of the limit) | {' | '.join(cases)} |", "|---|" + "---:|" * len(cases)]
        for name in dict.fromkeys(figure.variant for figure in chosen):
            cells = [values.get((name, case), "") + limits.get((name, case), "") for case in cases]
            lines.append(f"| {name} | {' | '.join(cells)} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m bench.report", description="Draws the results of a folder.")
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder of JSON files, as bench/results")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the pictures (default: the same)")
    parser.add_argument("--markdown", action="store_true", help="print tables of the figures, and draw nothing")
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
