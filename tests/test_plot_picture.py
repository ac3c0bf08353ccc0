"""The picture of a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from matplotlib.image import imread

from smollm2.cli import run_command
from train.plot import PICTURE, main


def write_metrics(run: Path, steps: int, held_out: bool) -> None:
    lines: list[dict[str, object]] = []
    for step in range(1, steps + 1):
        lines.append({"step": step, "loss": 3 + 5 / step, "tokens": step * 512, "epochs": step / 100, "unique_examples": step * 3})
        if held_out and step % 10 == 0:
            lines.append({"step": step, "held_out_loss": 3.2 + 5 / step, "unigram_entropy": 6.2})
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


@pytest.mark.parametrize(("steps", "held_out"), [(60, True), (60, False), (1, False)])
def test_two_panels_are_drawn(tmp_path: Path, steps: int, held_out: bool, capsys: pytest.CaptureFixture[str]) -> None:
    write_metrics(tmp_path, steps, held_out)
    assert run_command(main, [str(tmp_path)]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / PICTURE)
    image = imread(tmp_path / PICTURE)
    height, width, _ = image.shape
    assert width > 2 * height > 1000
    green = (image[:, :, 1] > image[:, :, 0] + 0.2) & (image[:, :, 1] > image[:, :, 2] + 0.2)
    red = (image[:, :, 0] > image[:, :, 1] + 0.3) & (image[:, :, 0] > image[:, :, 2] + 0.3)
    blue = (image[:, :, 2] > image[:, :, 0] + 0.1) & (image[:, :, 2] > image[:, :, 1] + 0.1)
    half = width // 2
    assert green[:, half:].any() and not green[:, :half].any()
    assert blue[:, :half].any() and not blue[:, half:].any()
    assert red[:, :half].any() == held_out


def test_a_folder_without_metrics_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(main, [str(tmp_path)]) == 1
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and "metrics.jsonl: expected lines with a loss, found none" in captured.err
    assert list(tmp_path.iterdir()) == []
