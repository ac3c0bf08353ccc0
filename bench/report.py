"""`python -m bench.report DIR [--out DIR]`: pictures of the results in DIR, as PNG and SVG for a README of
800 pixels.

    generation.*     prefill and decode of every way to generate, beside the peers; a mark is the limit of the
                     memory: weights and cache read once per step, as fast as that run could read
    step.*           optimizer steps beside the peers; a mark is the limit of the processor: the matrix
                     products alone
    roofline.*       time of every operation against the least it could take on that machine: of bench.kernels
                     as bars beside the alternatives, of bench.roofline as points
    attention.*      TFLOP/s of attention by length of a row, beside the alternatives
    ladder.*         from plain eager to everything on, one change a row
    loss_memory.*    what the loss holds at one time, by number of tokens
    decode.*         decode tokens/s against batch and context, with the limit of the memory where all
                     variants have the same

Which files are read is said in bench/figures.py; another one is named and left out. Every picture says
device, dtype, date and commit. --markdown prints the figures as tables.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench.drawing import (
    CUT,
    FAMILIES,
    LIMIT,
    MARKERS,
    OURS,
    PALETTE,
    PLAIN,
    WIDE,
    bars,
    canvas,
    colour,
    legend_of_families,
    plain_axes,
    scatter,
)
from bench.figures import Figure, gather, markdown
from smollm2.cli import Parser, run_command


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
                    f"{figure.facts['launches']:,} "
                    f"{'launch' if figure.facts['launches'] == 1 else 'launches'}"
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
