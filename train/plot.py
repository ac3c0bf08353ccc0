"""`python -m train.plot RUN [RUN ...]`: draws training_metrics.png from the metrics.jsonl of one run, or of
several over each other.

Three panels over the steps: the loss in nats per token on a log axis, with the held-out loss; the number of
different documents seen, by which a run on fresh text differs from one that repeats its corpus; and tokens
per second. A dotted line marks where a run was resumed.
"""

from __future__ import annotations

import statistics
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from smollm2.cli import Parser, run_command
from smollm2.errors import LoadError, UsageError
from train.metrics import METRICS_FILE, read_metrics

PICTURE = "training_metrics.png"
SMOOTHING_WINDOW = 1 / 20  # of the logged points
FEW = 20  # logged points: fewer are drawn as points, since a line would hide how few there are
LONGEST_NAME = 40  # characters of a run's name in legends and titles


@dataclass(frozen=True)
class Series:
    """The lines of one run, by what they record."""

    name: str
    train: list[dict[str, Any]]  # with a loss
    held_out: list[dict[str, Any]]  # with a held-out loss
    resumed: list[int]  # steps from which the run was continued

    @property
    def entropy(self) -> float | None:
        return next((line["unigram_entropy"] for line in self.held_out if "unigram_entropy" in line), None)

    def points(self, name: str) -> tuple[list[int], list[float]]:
        """(steps, values) of one figure of the training lines."""
        found = [line for line in self.train if isinstance(line.get(name), (int, float))]
        return [line["step"] for line in found], [line[name] for line in found]


# One run: a colour for each thing. Several: a colour for each run.
SINGLE = {"train": "tab:blue", "held_out": "tab:red", "unique": "tab:green", "throughput": "tab:purple"}
TAB = "blue orange green red purple brown pink olive cyan"
PALETTE = (*(f"tab:{name}" for name in TAB.split()), "black")
Colours = Sequence[Mapping[str, str]]  # of each run


def read_run(run: Path) -> Series:
    """Raises LoadError when there is nothing to draw."""
    if not run.is_dir():
        raise LoadError(
            f"{run}: expected the folder of a run, found {'a file' if run.exists() else 'nothing'}; runs are "
            "output_dir=..."
        )
    lines = read_metrics(run)
    train = [line for line in lines if isinstance(line.get("loss"), float)]
    if not train:
        raise LoadError(
            f"{run / METRICS_FILE}: expected lines with a loss, found none; name the folder of a run that "
            "has trained"
        )
    held_out = [line for line in lines if isinstance(line.get("held_out_loss"), float)]
    resumed = sorted({line["step"] for line in lines if line.get("resumed")})
    return Series(run.resolve().name, train, held_out, resumed)


def draw(run: Path) -> Path:
    """As draw_runs, of one run, into its folder."""
    return draw_runs([run], run / PICTURE)


def draw_runs(runs: Sequence[Path], path: Path) -> Path:
    """Draws one run, or several over each other, to `path`, and returns it. Raises LoadError when one has
    nothing to draw.
    """
    found = [read_run(run) for run in runs]
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        hint = "install it with: pip install matplotlib"
        raise LoadError(f"drawing needs the package matplotlib; {hint}") from None

    series = [replace(one, name=name) for one, name in zip(found, _labels(runs), strict=True)]
    colours: Colours = [SINGLE]
    if len(series) > 1:
        colours = [dict.fromkeys(SINGLE, PALETTE[index % len(PALETTE)]) for index in range(len(series))]
    figure = Figure(figsize=(18, 5.4), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)  # draws without a display
    last = max(one.train[-1]["step"] for one in series)
    panels = figure.subplots(1, 3, width_ratios=(1.25, 1, 1))
    for panel, draw_panel in zip(panels, (_draw_loss, _draw_unique, _draw_throughput), strict=True):
        draw_panel(panel, series, colours)
        _mark_resumes(panel, series, colours, last, labelled=draw_panel is _draw_loss)
        panel.set_xlabel("step")
        panel.set_xlim(0, last * 1.02)
        panel.xaxis.set_major_locator(_whole_numbers())
        panel.xaxis.set_major_formatter(_thousands())
        panel.grid(True, which="both", alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    figure.suptitle(_title(series))
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        figure.savefig(temporary, format="png")
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise LoadError(
            f"{path}: the picture cannot be written ({error.strerror or error}); name another file with "
            "--output"
        ) from None
    return path


def _labels(runs: Sequence[Path]) -> list[str]:
    """The names of the folders: with the parent's where two are the same, and without the middle where they
    are long.
    """
    paths = [run.resolve() for run in runs]
    times = Counter(path.name for path in paths)
    names = [path.name if times[path.name] == 1 else f"{path.parent.name}/{path.name}" for path in paths]
    half = LONGEST_NAME // 2
    return [name if len(name) <= LONGEST_NAME else f"{name[: half - 1]}…{name[-half:]}" for name in names]


def _title(series: list[Series]) -> str:
    if len(series) > 1:
        return f"{len(series)} runs"
    last = series[0].train[-1]
    facts = [f"{last['step']:,} steps"]
    if "tokens" in last:
        facts.append(f"{last['tokens']:,} tokens")
    if "epochs" in last:
        facts.append(f"{last['epochs']:.2f} epochs")
    return f"{series[0].name}: {', '.join(facts)}"


# ---- panels ------------------------------------------------------------------------------------------------


def _draw_loss(panel: Any, series: list[Series], colours: Colours) -> None:
    """A thin line through every logged step, a thick one for their running mean, points for evaluations."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    several = len(series) > 1
    everything: list[float] = []
    for one, colour in zip(series, colours, strict=True):
        steps, losses = one.points("loss")
        smooth = _smoothed(losses)
        held_out = [line["held_out_loss"] for line in one.held_out]
        label = f"{one.name}: {smooth[-1]:.2f}" if several else f"training, {smooth[-1]:.2f} at the end"
        if several and held_out:
            label += f", held out {held_out[-1]:.2f}"
        panel.plot(steps, losses, color=colour["train"], alpha=0.15 if several else 0.3, linewidth=1)
        width, marker = 1.5 if several else 2, "." if len(losses) < FEW else None
        panel.plot(steps, smooth, color=colour["train"], linewidth=width, label=label, marker=marker)
        if held_out:
            panel.plot(
                [line["step"] for line in one.held_out], held_out, "o", color=colour["held_out"],
                markersize=6, zorder=3, markeredgecolor="white", markeredgewidth=0.7,
                linestyle="none" if several else "-", linewidth=1,
                label=None if several else f"held out, {held_out[-1]:.2f} at the end",
            )  # fmt: skip
        everything += losses + held_out
    entropies = {one.entropy for one in series}
    # runs on different text have no common line
    entropy = next(iter(entropies)) if len(entropies) == 1 else None
    if entropy is not None:
        panel.axhline(
            entropy, color="gray", linestyle="--", linewidth=1, label=f"unigram entropy, {entropy:.2f}"
        )
        everything.append(entropy)
    panel.set_yscale("log")
    positive = [value for value in everything if value > 0]
    # Within a decade, the ticks of a log axis may all lie outside of what is shown; over several decades,
    # even steps would crowd the top.
    wide = bool(positive) and max(positive) > 15 * min(positive)
    panel.yaxis.set_major_locator(
        LogLocator(subs=(1, 2, 5)) if wide else MaxNLocator(nbins=8, steps=[1, 2, 5, 10])
    )
    panel.yaxis.set_minor_locator(NullLocator())
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    panel.set_ylabel("loss, nats per token (log scale)")
    panel.set_title("Loss" + (" (dots: held out)" if several and any(one.held_out for one in series) else ""))
    panel.legend(loc="upper right", fontsize="small" if several else None)


def _draw_unique(panel: Any, series: list[Series], colours: Colours) -> None:
    counts: list[float] = []
    for one, colour in zip(series, colours, strict=True):
        steps, counts = one.points("unique_examples")
        panel.plot(steps, counts, "o", color=colour["unique"], markersize=4 if len(series) == 1 else 3)
    panel.set_ylim(bottom=0)
    panel.yaxis.set_major_locator(_whole_numbers())
    panel.yaxis.set_major_formatter(_thousands())
    panel.set_ylabel("different documents")
    panel.set_title(
        f"Unique examples seen: {counts[-1]:,}" if len(series) == 1 and counts else "Unique examples seen"
    )


def _draw_throughput(panel: Any, series: list[Series], colours: Colours) -> None:
    title, measured = "Throughput", False
    for one, colour in zip(series, colours, strict=True):
        steps, rates = one.points("tokens_per_second")
        if not rates:
            continue
        measured = True
        size = 8 if len(rates) < FEW else 3
        panel.plot(steps, rates, ".-", color=colour["throughput"], linewidth=0.8, markersize=size)
        if len(series) == 1:
            title = f"Throughput: {statistics.median(rates):,.0f} tokens/s"
            shares = one.points("mfu")[1]
            title += f", MFU {statistics.median(shares):.0%}" if shares else ""
    if not measured:  # the first steps are not counted
        where = dict(transform=panel.transAxes, ha="center", va="center")
        panel.text(0.5, 0.5, "too few steps to measure", color="gray", **where)
    panel.set_ylim(bottom=0, top=None if measured else 1)
    panel.yaxis.set_major_formatter(_thousands())
    panel.set_ylabel("tokens per second")
    panel.set_title(title + (" (median)" if ":" in title else ""))


def _mark_resumes(panel: Any, series: list[Series], colours: Colours, last: int, *, labelled: bool) -> None:
    """A dotted line at every step from which a run was resumed. The first of a run is labelled, on the side
    that has room.
    """
    for one, colour in zip(series, colours, strict=True):
        line_colour = colour["train"] if len(series) > 1 else "dimgray"
        for index, step in enumerate(one.resumed):
            panel.axvline(step, color=line_colour, linestyle=":", linewidth=1.2)
            if not labelled or index > 0:
                continue
            right = step < last / 2
            panel.annotate(
                "resumed", (step, 0.5), xycoords=("data", "axes fraction"), xytext=(3 if right else -3, 0),
                textcoords="offset points", rotation=90, ha="left" if right else "right", va="center",
                color=line_colour, fontsize="small", zorder=4,
                # it may lie on a curve
                bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 0.5},
            )  # fmt: skip


def _whole_numbers() -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(nbins=7, steps=[1, 2, 5, 10], integer=True)


def _thousands() -> Any:
    from matplotlib.ticker import StrMethodFormatter

    return StrMethodFormatter("{x:,.0f}")


def _smoothed(values: list[float]) -> list[float]:
    """The mean over a centred window of a twentieth of the points, which is narrower at the beginning, where
    the loss falls fast.
    """
    widest = round(len(values) * SMOOTHING_WINDOW / 2)
    halves = (min(widest, index // 4) for index in range(len(values)))
    windows = (values[index - half : index + half + 1] for index, half in enumerate(halves))
    return [sum(window) / len(window) for window in windows]


def main(argv: Sequence[str]) -> int:
    parser = Parser(
        prog="python -m train.plot",
        description="Draws training_metrics.png from the metrics of one run, or of several over each other.",
    )
    parser.add_argument("run", type=Path, nargs="+", help="folder of a run, as runs/quickstart")
    parser.add_argument(
        "--output",
        type=Path,
        help=f"the picture [RUN/{PICTURE}; of several runs {PICTURE} in the current folder]",
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    options = parser.parse_args(argv)
    runs: list[Path] = options.run
    output = options.output or (runs[0] / PICTURE if len(runs) == 1 else Path(PICTURE))
    if output.is_dir():
        raise UsageError(
            f"--output: expected the name of a picture, got the folder {output}; for example --output "
            f"{output / PICTURE}"
        )
    print(draw_runs(runs, output))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
