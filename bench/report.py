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
    serving.*        servers by the number of clients: tokens/s of all and of one, time to the first token
    decode.*         decode tokens/s against batch and context, with the limit of the memory where all
                     variants have the same

Which files are read is said in bench/figures.py; another one is named and left out. Every picture says
device, dtype, date and commit. --markdown prints the figures as tables.
"""

from __future__ import annotations

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
    note,
    plain_axes,
    scatter,
)
from bench.figures import Figure, gather, grouped, markdown
from bench.record import command_line
from smollm2.cli import run_command


def variants(figures: Sequence[Figure]) -> list[str]:
    """Their names, each once."""
    return list(grouped(figures, lambda figure: figure.variant))


def of_kind(figures: Sequence[Figure], *kinds: str) -> list[Figure]:
    return [figure for figure in figures if figure.kind in kinds]


def draw_generation(figures: list[Figure]) -> Any:
    """Rows are cases, columns prefill and decode; of cases without a prefill there is only decode.*."""
    cases = {figure.case for figure in of_kind(figures, "prefill")}
    chosen = [figure for figure in of_kind(figures, "prefill", "decode") if figure.case in cases]
    if not chosen:
        return None
    kinds = [kind for kind in ("prefill", "decode") if of_kind(chosen, kind)]
    order = sorted(cases, key=lambda case: [int(word) for word in case.replace(",", "").split()[1::2]])
    groups = grouped(chosen, lambda figure: figure.case)
    heights = [len(variants(groups[case])) + 1.2 for case in order]
    title = "Generation: tokens per second" if len(kinds) > 1 else "Prefill: tokens per second"
    picture = canvas(1.2 + 0.21 * sum(heights), title, chosen)
    grid = picture.subplots(len(order), len(kinds), squeeze=False, height_ratios=heights)
    for case, panels in zip(order, grid, strict=True):
        for kind, axes in zip(kinds, panels, strict=True):
            bars(axes, f"{kind}, {case}", of_kind(groups[case], kind), variants(groups[case]))
            axes.tick_params(labelleft=kind == kinds[0])
    legend_of_families(picture, chosen, limit_label(chosen))
    return picture


def limit_label(figures: Sequence[Figure]) -> str:
    """The limit of the memory, and its rate where all have the same."""
    rates = {figure.facts["at"] for figure in figures if "at" in figure.facts}
    return f"{LIMIT}, {rates.pop()}" if len(rates) == 1 else LIMIT


def stacked(
    chosen: list[Figure], title: str, row: float, gap: float, between: float
) -> tuple[Any, list[tuple[str, list[Figure], Any]]]:
    """A picture with a panel for each case, one below the other, and (case, its figures, axes) of each.

    row: inches of a bar. gap: how many bars the rest of a panel is as high as; between: the same in relation
    to the other panels.
    """
    groups = grouped(chosen, lambda figure: figure.case)
    picture = canvas(1.1 + row * (len(chosen) + gap * len(groups)), title, chosen)
    heights = [len(group) + between for group in groups.values()]
    panels = picture.subplots(len(groups), 1, squeeze=False, height_ratios=heights)[:, 0]
    return picture, [(case, groups[case], axes) for case, axes in zip(groups, panels, strict=True)]


def draw_step(figures: list[Figure]) -> Any:
    """One panel per size and dtype."""
    chosen = of_kind(figures, "step")
    picture, panels = stacked(chosen, "Optimizer step: tokens per second", 0.23, 1.6, 1.6)
    for case, group, axes in panels:
        bars(axes, case, group, variants(group))
    legend_of_families(picture, chosen, "limit of the processor")
    return picture


def draw_roofline(figures: list[Figure]) -> Any:
    """Measured time against the least time. Operations alone as bars, a row each; else a panel of points per
    source.
    """
    chosen = [figure for figure in of_kind(figures, "operation") if figure.limit]
    panels = grouped(chosen, lambda figure: str(figure.facts["panel"]))
    alone = [panel for panel in panels if panel.startswith("operations alone")]

    def row_title(figure: Figure) -> str:
        where = figure.facts["panel"].removeprefix("operations alone").replace(" tokens", "")
        return f"{figure.facts['op']} {{}}{where if len(alone) > 1 else ''}"

    rows = grouped([figure for figure in chosen if figure.facts["panel"] in alone], row_title)
    points = [figure for figure in chosen if figure.facts["panel"] not in alone]
    sources = [panel for panel in panels if panel not in alone]
    heights = [3.9] * len(sources) + [0.21 * (len(variants(group)) + 1.6) for group in rows.values()]
    size = f"{chosen[0].fact('batch')} x {chosen[0].fact('length')} tokens"
    title = (
        "Time against the least that this machine allows"
        if sources
        else f"Operations of {size}: microseconds"
    )
    picture = canvas(0.9 + sum(heights), title, chosen)
    grid = picture.add_gridspec(len(heights), 2 if rows else 1, height_ratios=heights)
    for place, panel in enumerate(sources):
        scatter(picture.add_subplot(grid[place, :]), panel, points)
    for place, (row, group) in enumerate(rows.items(), len(sources)):
        for column in range(2):
            here = [figure for figure in group if (figure.facts["phase"] == "forward") == (column == 0)]
            axes = picture.add_subplot(grid[place, column])
            bars(axes, row.format(here[0].facts["phase"] if here else ""), here, variants(group), 1e6, CUT)
            axes.tick_params(labelleft=column == 0)
    if rows:
        roofs = dict.fromkeys(figure.facts["at"] for figure in chosen if "at" in figure.facts)
        label = " ".join(["least time", *(f"at {roof}" for roof in roofs)])
        legend_of_families(picture, [figure for figure in chosen if colour(figure.variant) == OURS], label)
    return picture


def draw_attention(figures: list[Figure]) -> Any:
    """Rows with one document and with several, columns forward and backward; a group of bars per length of a
    row. A variant of one length only is in roofline.* alone.
    """
    chosen = of_kind(figures, "attention")
    lengths = sorted({figure.facts["tokens"] for figure in chosen})
    by_variant = grouped(chosen, lambda figure: figure.variant)
    every = [
        name for name in by_variant if {figure.facts["tokens"] for figure in by_variant[name]} == {*lengths}
    ]
    chosen = [figure for figure in chosen if figure.variant in every]
    cells = grouped(chosen, lambda figure: (figure.facts["documents"], figure.facts["phase"]))
    kinds, phases = (list(dict.fromkeys(key[axis] for key in cells)) for axis in range(2))
    picture = canvas(0.9 + 2.3 * len(kinds), "Attention: TFLOP/s", chosen)
    grid = picture.subplots(len(kinds), len(phases), squeeze=False, sharey="row")
    for kind, panels in zip(kinds, grid, strict=True):
        for phase, axes in zip(phases, panels, strict=True):
            here = cells.get((kind, phase), [])
            names = [name for name in every if name in variants(here)]
            for figure in here:
                shift = (names.index(figure.variant) - (len(names) - 1) / 2) * 0.92 / len(names)
                place, shade = lengths.index(figure.facts["tokens"]) + shift, colour(figure.variant)
                axes.bar(place, figure.value, width=0.86 / len(names), color=shade)
                weight = "bold" if shade == OURS else "normal"
                text, at = f"{figure.value:.0f}", (place, figure.value)
                note(axes, text, at, (0, 2), ha="center", fontsize=7.5, fontweight=weight)
            axes.margins(y=0.1)
            axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
            axes.tick_params(axis="x", length=0)
            axes.set_title(f"{phase}, {kind}", loc="left")
            plain_axes(axes, "y")
            if kind == kinds[-1]:
                size = chosen[0].facts["batch"] * chosen[0].facts["length"]
                axes.set_xlabel(f"tokens a row, {size:,} in all")
    legend_of_families(picture, chosen, "")
    return picture


def draw_ladder(figures: list[Figure]) -> Any:
    """Tokens per second of every rung from the top down; memory and launches beside the bar where they were
    measured.
    """
    title = "Ablation ladder: tokens per second of a training step"
    picture, panels = stacked(of_kind(figures, "rung"), title, 0.26, 1.6, 1.2)
    for case, group, axes in panels:
        for place, figure in enumerate(group):
            axes.barh(place, figure.value, height=0.72, color=OURS if place else PLAIN)
            words = [f"{figure.value:,.0f}", f"{figure.value / group[0].value:.2f} x"]
            if peak := figure.fact("peak_memory_bytes"):
                words.append(f"{peak / 1e6:,.0f} MB")
            if launches := figure.fact("launches"):
                words.append(f"{launches:,} {'launch' if launches == 1 else 'launches'}")
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
    chosen = sorted(of_kind(figures, "loss memory"), key=lambda figure: figure.facts["tokens"])
    picture = canvas(3.6, "Loss and its gradients: peak memory beyond the inputs", chosen)
    axes = picture.subplots()
    names = {
        "reference": "this project, backend torch",
        "triton": "this project, backend triton",
        "all logits": "F.cross_entropy of all logits",
    }
    for name, group in grouped(chosen, lambda figure: figure.variant).items():
        points = [(figure.facts["tokens"], figure.value / 1e9) for figure in group]
        shade = OURS if name in ("reference", "triton") else FAMILIES.get(name, PLAIN)
        line = "--" if name == "triton" else "-"
        axes.plot(
            *zip(*points, strict=True), marker="o", label=names.get(name, name), color=shade, linestyle=line
        )
        note(axes, f"{points[-1][1]:.2f} GB", points[-1], (6, 0), va="center", fontsize=8)
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


def decode_panels(chosen: list[Figure]) -> list[tuple[str, int, list[Figure]]]:
    """(what varies, the value of the other, its figures): the batch at every context, the context at the
    smallest batch. At most three: the fourth place is the legend's.
    """
    contexts, batches = (sorted({figure.facts[name] for figure in chosen}) for name in ("context", "batch"))
    found = []
    for along, fixed, value in [
        *(("batch", "context", n) for n in contexts),
        ("context", "batch", batches[0]),
    ]:
        here = [figure for figure in chosen if figure.facts[fixed] == value]
        if len({figure.facts[along] for figure in here}) > 1:
            found.append((along, value, here))
    return found[:3]


def decode_styles(names: list[str], wide: bool) -> dict[str, dict[str, Any]]:
    """How each variant is drawn: in a colour of its own, or on a wide scale in that of its family."""
    styles: dict[str, dict[str, Any]] = {}
    for place, name in enumerate(names):
        shade, marker = PALETTE[place % len(PALETTE)], MARKERS[place % len(MARKERS)]
        styles[name] = {"color": shade, "marker": marker, "linewidth": 1.2, "markersize": 5}
        if wide:
            before = sum(colour(other) == colour(name) for other in names[:place])
            styles[name] |= {"color": colour(name), "linestyle": ("-", "--", ":")[before % 3]}
    return styles


def draw_decode(figures: list[Figure]) -> Any:
    """Against the batch at every context, against the context at the smallest batch; None where neither was
    varied.

    What differs by more than WIDE is drawn on a logarithmic axis, with the limit of the memory, and the
    fastest with its numbers.
    """
    from matplotlib.lines import Line2D

    chosen = of_kind(figures, "decode")
    drawn = decode_panels(chosen)
    if not drawn:
        return None
    best = max(chosen, key=lambda figure: figure.value)
    lowest = min(figure.value for figure in chosen)
    wide, keys = best.value > WIDE * lowest, "keys" in best.facts
    styles = decode_styles(variants(chosen), wide)
    height = 4.4 if len(drawn) < 3 else 6.4
    picture = canvas(height, "Decode: tokens per second against batch and context", chosen)
    grid = picture.subplots(-(-len(drawn) // 2), min(2, len(drawn)), squeeze=False, sharey=wide).flat
    for axes, (along, value, here) in zip(grid, drawn, strict=False):
        ticks = sorted({figure.facts[along] for figure in here})
        for name in variants(chosen):
            points = sorted((figure.facts[along], figure.value) for figure in here if figure.variant == name)
            if points:
                axes.plot(*zip(*points, strict=True), **styles[name] | joined(len(ticks)))
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.set_xticks([], minor=True)
        if wide:
            limits = {figure.facts[along]: figure.limit for figure in here if figure.limit}
            same = (abs(one.limit / limits[one.facts[along]] - 1) < 0.05 for one in here if one.limit)
            if limits and all(same):
                name = limit_label(here)
                styles[name] = {"color": "black", "linewidth": 1.6, "marker": "" if len(ticks) > 2 else "_"}
                axes.plot(*zip(*sorted(limits.items()), strict=True), **styles[name] | joined(len(ticks)))
            for figure in (figure for figure in here if figure.variant == best.variant):
                # above both lines
                near = figure.limit if figure.limit and figure.limit < 2.2 * figure.value else figure.value
                at, shade = (figure.facts[along], near), colour(best.variant)
                note(axes, f"{figure.value:,.0f}", at, (-5, 4), ha="center", fontsize=8, color=shade)
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
    longest = max(len({figure.facts[name] for figure in chosen}) for name in ("context", "batch"))
    usual = {"linewidth": None, "markersize": None} | joined(longest)
    handles = [Line2D([], [], **{**style, **usual}, label=name) for name, style in styles.items()]
    if len(drawn) == 3:
        grid[3].set_axis_off()
        grid[3].legend(handles=handles, loc="center", frameon=False, labelspacing=0.9)
    else:
        picture.legend(handles=handles, loc="outside right upper", fontsize=8, frameon=False)
    return picture


# key of the facts -> title of its panel
SERVING = {
    "tokens_per_second": "tokens/s of all clients",
    "client_tokens_per_second": "tokens/s of one client, behind the first",
    "first_token_ms": "ms to the first token, median",
    "first_token_p95_ms": "ms to the first token, 95th percentile",
}  # fmt: skip


def draw_serving(figures: list[Figure]) -> Any:
    """A panel for each of SERVING, against the number of clients."""
    chosen = of_kind(figures, "serving")
    counts = sorted({figure.facts["clients"] for figure in chosen})
    styles = decode_styles(variants(chosen), wide=True)
    picture = canvas(6.2, "Serving, by clients", chosen)
    for axes, (key, title) in zip(picture.subplots(2, 2).flat, SERVING.items(), strict=True):
        for name, group in grouped(chosen, lambda figure: figure.variant).items():
            points = sorted((figure.facts["clients"], figure.facts[key]) for figure in group)
            axes.plot(*zip(*points, strict=True), **styles[name], label=name)
        axes.set_xscale("log", base=2)
        axes.set_xticks(counts, [str(count) for count in counts])
        axes.set_xticks([], minor=True)
        axes.set_ylim(bottom=0)
        axes.set_title(title, loc="left")
        axes.set_xlabel("clients")
        plain_axes(axes)
    handles, labels = axes.get_legend_handles_labels()
    picture.legend(handles, labels, loc="outside upper right", ncols=len(labels), fontsize=7.5, frameon=False)
    return picture


# name of the files -> (the kinds of figures that it needs, how it is drawn)
PICTURES: dict[str, tuple[tuple[str, ...], Callable[[list[Figure]], Any]]] = {
    "generation": (("prefill", "decode"), draw_generation), "step": (("step",), draw_step),
    "roofline": (("operation",), draw_roofline), "attention": (("attention",), draw_attention),
    "ladder": (("rung",), draw_ladder), "loss_memory": (("loss memory",), draw_loss_memory),
    "decode": (("decode",), draw_decode), "serving": (("serving",), draw_serving),
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


def main(argv: Sequence[str]) -> int:
    parser = command_line("report", "Draws the results of a folder.")
    add = parser.add_argument
    add("folder", type=Path, metavar="DIR", help="folder of JSON files, as bench/results/zen3")
    add("--out", type=Path, metavar="DIR", help="folder of the pictures (default: the same)")
    add("--markdown", action="store_true", help="print tables of the figures, and draw nothing")
    options = parser.parse_args(argv)
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
