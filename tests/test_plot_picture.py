"""The picture of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from smollm2.cli import run_command
from train.plot import PICTURE, _smoothed, draw_runs, main


def write_metrics(
    run: Path, steps: int, held_out: bool, resumed: int = 0, entropy: float = 6.2, rates: bool = True
) -> None:
    run.mkdir(exist_ok=True)
    lines: list[dict[str, object]] = []
    for step in range(1, steps + 1):
        line = {
            "step": step,
            "loss": 3 + 5 / step,
            "tokens": step * 512,
            "epochs": step / 100,
            "unique_examples": step * 3,
        }
        lines.append({**line, "tokens_per_second": 5000.0 + step} if rates and step > 2 else line)
        if held_out and step % 10 == 0:
            lines.append({"step": step, "held_out_loss": 3.2 + 5 / step, "unigram_entropy": entropy})
        if step == resumed:
            lines.append({"step": step, "resumed": True})
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def panels(picture: Path) -> list[np.ndarray]:
    """The three panels [height, width, RGBA], cut at the vertical axes: the columns that are black over most
    of their height.
    """
    image = imread(picture)
    height, width, _ = image.shape
    assert width > 3 * height > 1500
    dark = (image[:, :, :3].max(-1) < 0.3).mean(0) > 0.6
    axes = [column for column in np.flatnonzero(dark) if not dark[column - 1]]
    assert len(axes) == 3
    return [image[:, start:end] for start, end in zip(axes, [*axes[1:], width], strict=True)]


def has(panel: np.ndarray, colour: str) -> bool:
    """Whether a panel shows a saturated colour: red, green, blue or purple (tab:purple: blue over red over
    green).
    """
    red, green, blue = (panel[:, :, channel] for channel in range(3))
    found = {
        "red": (red > green + 0.3) & (red > blue + 0.3),
        "green": (green > red + 0.2) & (green > blue + 0.2),
        "blue": (blue > red + 0.4) & (blue > green + 0.1),
        "purple": (blue > green + 0.2) & (red > green + 0.1) & (blue > red + 0.05),
    }[colour]
    return bool(found.any())


@pytest.mark.parametrize(("steps", "held_out"), [(60, True), (60, False), (1, False)])
def test_three_panels_are_drawn(tmp_path, steps, held_out, capsys):
    write_metrics(tmp_path, steps, held_out)
    assert run_command(main, [str(tmp_path)]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / PICTURE)
    loss, unique, throughput = panels(tmp_path / PICTURE)
    assert [has(panel, "green") for panel in (loss, unique, throughput)] == [False, True, False]
    assert [has(panel, "blue") for panel in (loss, unique, throughput)] == [True, False, False]
    assert [has(panel, "purple") for panel in (loss, unique, throughput)] == [False, False, steps > 2]
    assert has(loss, "red") == held_out


def test_several_runs_are_drawn_over_each_other(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, steps in (("first", 60), ("second", 40), ("third", 50)):
        write_metrics(tmp_path / name, steps, held_out=True)
    assert run_command(main, ["first", "second", "third"]) == 0
    assert capsys.readouterr().out.strip() == PICTURE and not (tmp_path / "first" / PICTURE).exists()
    for panel in panels(tmp_path / PICTURE):
        assert has(panel, "blue") and has(panel, "green")  # the first and the third run, in every panel
    assert run_command(main, ["first", "second", "--output", "both.png"]) == 0
    assert (tmp_path / "both.png").stat().st_size > 10_000


def texts_of(runs: list[Path], monkeypatch: pytest.MonkeyPatch, output: Path) -> dict[str, list[str]]:
    """Legend, titles, other texts and the number of vertical and horizontal lines of the loss panel, as they
    are drawn.
    """
    seen: dict[str, list[str]] = {}

    def keep(figure: Figure, *args: Any, **kwargs: Any) -> None:
        loss = figure.axes[0]
        seen["legend"] = [text.get_text() for text in loss.get_legend().get_texts()]
        seen["titles"] = [figure.get_suptitle(), *(panel.get_title() for panel in figure.axes)]
        seen["marks"] = [text.get_text() for text in loss.texts]
        seen["dotted"] = [
            str(line.get_xdata()[0])
            for panel in figure.axes
            for line in panel.lines
            if line.get_linestyle() == ":"
        ]
        output.touch()
        output.with_name(f".{output.name}.tmp").touch()

    monkeypatch.setattr(Figure, "savefig", keep)
    draw_runs(runs, output)
    return seen


def test_a_resume_is_marked_in_every_panel_and_named_once(tmp_path, monkeypatch):
    write_metrics(tmp_path / "run", 60, held_out=True, resumed=50)
    seen = texts_of([tmp_path / "run"], monkeypatch, tmp_path / "x.png")
    assert seen["marks"] == ["resumed"] and seen["dotted"] == ["50"] * 3
    assert seen["titles"][0] == "run: 60 steps, 30,720 tokens, 0.60 epochs"
    assert seen["titles"][1:] == ["Loss", "Unique examples seen: 180", "Throughput: 5,032 tokens/s (median)"]
    assert seen["legend"] == [
        "training, 3.08 at the end",
        "held out, 3.28 at the end",
        "unigram entropy, 6.20",
    ]


@pytest.mark.parametrize(("second", "shown"), [(6.2, True), (5.9, False)])
def test_unigram_entropies_are_drawn_when_they_are_equal(tmp_path, second, shown, monkeypatch):
    write_metrics(tmp_path / "a", 20, held_out=True)
    write_metrics(tmp_path / "b", 20, held_out=True, entropy=second)
    legend = texts_of([tmp_path / "a", tmp_path / "b"], monkeypatch, tmp_path / "x.png")["legend"]
    assert any("unigram entropy" in text for text in legend) == shown
    assert [text.split(":")[0] for text in legend[:2]] == ["a", "b"] and all(
        "held out" in text for text in legend[:2]
    )


def test_runs_of_one_name_are_told_apart_and_long_names_are_cut(tmp_path, monkeypatch):
    runs = [tmp_path / "x" / "run", tmp_path / "y" / "run", tmp_path / ("long" * 30)]
    for run in runs:
        run.mkdir(parents=True)
        write_metrics(run, 5, held_out=False)
    first, second, third = texts_of(runs, monkeypatch, tmp_path / "x.png")["legend"]
    assert first.startswith("x/run: ") and second.startswith("y/run: ")
    assert "…" in third and len(third) < 60


def test_a_steep_beginning_is_not_smoothed_away():
    values = [10 / (1 + index) for index in range(1000)]
    assert _smoothed(values)[:4] == values[:4]
    assert _smoothed([1.0, 2.0, 3.0]) == [1.0, 2.0, 3.0]
    flat = _smoothed([3.0 + (-1) ** index for index in range(1000)])
    assert max(abs(value - 3.0) for value in flat[200:900]) < 0.05


def test_a_folder_without_metrics_is_one_line(tmp_path, capsys):
    assert run_command(main, [str(tmp_path)]) == 1
    captured = capsys.readouterr()
    assert (
        captured.err.count("\n") == 1
        and "metrics.jsonl: expected lines with a loss, found none" in captured.err
    )
    assert list(tmp_path.iterdir()) == []


def test_a_missing_run_is_one_line(tmp_path, capsys):
    write_metrics(tmp_path / "run", 5, held_out=False)
    assert run_command(main, [str(tmp_path / "run"), str(tmp_path / "nothing")]) == 1
    captured = capsys.readouterr()
    assert (
        captured.err.count("\n") == 1
        and "nothing: expected the folder of a run, found nothing" in captured.err
    )


def test_an_output_that_cannot_be_written_is_one_line(tmp_path, capsys):
    write_metrics(tmp_path / "run", 5, held_out=False)
    assert run_command(main, [str(tmp_path / "run"), "--output", str(tmp_path)]) == 2
    assert run_command(main, [str(tmp_path / "run"), "--output", str(tmp_path / "no" / "x.png")]) == 1
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 2 and "--output: expected the name of a picture" in captured.err
    assert "x.png: the picture cannot be written" in captured.err
