"""`python -m train.plot RUN`: draws RUN/training_metrics.png from RUN/metrics.jsonl.

Two panels over the steps: the loss in nats per token on a log axis, with the held-out loss; and the number of different documents
seen, which tells a run on fresh text from one that repeats its corpus.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from smollm2.cli import LoadError, run_command
from train.metrics import METRICS_FILE, read_metrics

PICTURE = "training_metrics.png"
SMOOTHING_WINDOW = 1 / 20  # of the logged points


def draw(run: Path) -> Path:
    """Draws the metrics of a run folder and returns the picture's path. Raises LoadError when there is nothing to draw."""
    lines = read_metrics(run)
    train = [line for line in lines if isinstance(line.get("loss"), float)]
    if not train:
        raise LoadError(f"{run / METRICS_FILE}: expected lines with a loss, found none; name the folder of a run that has trained")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise LoadError("drawing needs the package matplotlib; install it with: pip install 'smollm2-kernels[train]'") from None

    figure = Figure(figsize=(13, 5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)  # draws without a display
    left, right = figure.subplots(1, 2)
    _draw_loss(left, train, [line for line in lines if isinstance(line.get("held_out_loss"), float)])
    _draw_unique(right, train)
    for panel in (left, right):
        panel.set_xlabel("step")
        panel.set_xlim(left=0)
        panel.grid(True, which="both", alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{run.resolve().name}: {train[-1]['step']:,} steps, {train[-1]['tokens']:,} tokens, {train[-1]['epochs']:.2f} epochs")
    path = run / PICTURE
    temporary = path.with_name(f".{PICTURE}.tmp")
    figure.savefig(temporary, format="png")
    temporary.replace(path)
    return path


def _draw_loss(panel: Any, train: list[dict[str, Any]], held_out: list[dict[str, Any]]) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

    steps, losses = [line["step"] for line in train], [line["loss"] for line in train]
    panel.plot(steps, losses, color="tab:blue", alpha=0.3, linewidth=1)
    panel.plot(steps, _smoothed(losses), color="tab:blue", linewidth=2, label=f"training, {losses[-1]:.2f} at the end")
    if held_out:
        steps, values = [line["step"] for line in held_out], [line["held_out_loss"] for line in held_out]
        panel.plot(steps, values, "o-", color="tab:red", markersize=5, linewidth=1, label=f"held out, {values[-1]:.2f} at the end")
    entropy = next((line["unigram_entropy"] for line in held_out if "unigram_entropy" in line), None)
    if entropy is not None:
        panel.axhline(entropy, color="gray", linestyle="--", linewidth=1, label=f"unigram entropy, {entropy:.2f}")
    panel.set_yscale("log")
    # A loss spans less than a decade: the decades' own ticks would leave the axis without a single number.
    panel.yaxis.set_major_locator(MaxNLocator(nbins=8, steps=[1, 2, 5, 10]))
    panel.yaxis.set_minor_locator(NullLocator())
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    panel.set_ylabel("loss, nats per token (log scale)")
    panel.set_title("Loss")
    panel.legend()


def _draw_unique(panel: Any, train: list[dict[str, Any]]) -> None:
    from matplotlib.ticker import StrMethodFormatter

    steps, counts = [line["step"] for line in train], [line["unique_examples"] for line in train]
    panel.plot(steps, counts, "o", color="tab:green", markersize=4)
    panel.set_ylim(bottom=0)
    panel.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    panel.set_ylabel("different documents")
    panel.set_title(f"Unique examples seen: {counts[-1]:,}")


def _smoothed(values: list[float]) -> list[float]:
    """Mean over a centred window of a twentieth of the points."""
    half = max(1, round(len(values) * SMOOTHING_WINDOW / 2))
    windows = (values[max(0, index - half) : index + half + 1] for index in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m train.plot", description="Draws training_metrics.png from a run's metrics.jsonl.")
    parser.add_argument("run", type=Path, help="folder of a run, as runs/quickstart")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    print(draw(parser.parse_args(argv).run))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
