"""The figures that a run reports."""

from __future__ import annotations

import math
import mmap
import os
import re
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from smollm2 import SmolLM2Config
from smollm2.pretrained.tokenizer import train_tokenizer
from train import metrics
from train.checkpoint import Progress
from train.config import RunConfig
from train.data.state import DataState
from train.display import columns, duration
from train.metrics import (
    MetricsLog,
    Reporter,
    Throughput,
    bytes_per_token,
    flops_per_token,
    forget_after,
    memory,
    peak_flops,
    read_metrics,
    too_good,
    unigram_entropy,
)


def test_flops_of_the_135m_model_at_512_tokens():
    config = SmolLM2Config.preset("135M")
    assert flops_per_token(config, 0) == pytest.approx(806.9e6, rel=1e-4)
    assert flops_per_token(config, 512) == pytest.approx(860e6, rel=1e-4)


def test_an_unknown_device_has_no_peak():
    assert peak_flops(torch.device("cpu")) is None


def test_unigram_entropy():
    assert unigram_entropy(torch.arange(64)) == pytest.approx(math.log(64))
    assert unigram_entropy(torch.tensor([[3, 3], [3, 3]])) == 0.0
    assert unigram_entropy(torch.tensor([0, 0, 0, 5])) == pytest.approx(
        -0.75 * math.log(0.75) - 0.25 * math.log(0.25)
    )


def test_bytes_per_token_counts_text_and_not_special_tokens():
    tokenizer = train_tokenizer(["naïve text " * 20], 300)
    text = "naïve text, naïve"
    ids = tokenizer.encode(text)
    assert bytes_per_token(torch.tensor(ids), tokenizer) == pytest.approx(len(text.encode()) / len(ids))
    assert bytes_per_token(torch.tensor([*ids, tokenizer.eot_token_id]), tokenizer) == pytest.approx(
        len(text.encode()) / (len(ids) + 1)
    )


@pytest.mark.parametrize(
    ("loss", "tokens", "epochs", "held_out", "warns"),
    [
        (0.0009, 82_000_000, 0.01, None, True),  # the run that this project exists for
        (3.4, 82_000_000, 0.01, 3.5, False),  # a healthy one
        (4.3, 600_000, 0.9, 4.8, False),
        (0.4, 5_000_000, 9.0, 0.5, False),  # a tiny corpus, learned by heart, held-out documents like it
        (2.0, 5_000_000, 9.0, 4.5, True),
        (3.4, 82_000_000, 0.01, 4.6, True),
    ],
)
def test_a_loss_that_is_too_good_is_doubted(loss, tokens, epochs, held_out, warns):
    reason = too_good(loss, tokens, epochs, held_out)
    assert (reason is not None) == warns
    if reason is not None:
        assert f"{loss:.2f}" in reason


class Clock:
    """A clock that goes only when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr("time.perf_counter", clock)
    return clock


@pytest.fixture
def waits(monkeypatch):
    """Every wait for a device, which need not be there."""
    seen: list[torch.device] = []
    monkeypatch.setattr(torch.accelerator, "synchronize", seen.append)
    return seen


def test_throughput_leaves_out_the_first_steps_and_what_is_excluded(clock):
    meter = Throughput(torch.device("cpu"))
    for _ in range(2):
        clock.now += 50
        meter.add(1_000_000)
    assert meter.rate() is None
    clock.now += 1
    meter.add(1000)
    with meter.excluded():
        clock.now += 30
    clock.now += 1
    meter.add(1000)
    assert meter.rate() == pytest.approx(2000 / 2)
    assert meter.rate() is None


def test_throughput_waits_for_the_device_only_at_log_lines_and_exclusions(clock, waits):
    device = torch.device("cuda", 0)
    meter = Throughput(device)
    for _ in range(50):
        meter.add(1000)
        clock.now += 1
    assert waits == []
    # when the first steps ended on the device was not looked at: the measurement begins here
    assert meter.rate() is None
    assert waits == [device]
    for _ in range(10):
        meter.add(1000)
        clock.now += 0.5
    with meter.excluded():
        assert len(waits) == 2
        clock.now += 7
    assert len(waits) == 3
    assert meter.rate() == pytest.approx(10_000 / 5)
    assert len(waits) == 4


def test_an_exclusion_starts_the_clock_of_a_device_as_a_log_line_does(clock, waits):
    meter = Throughput(torch.device("cuda", 0))
    meter.add(1000)
    meter.add(1000)
    with meter.excluded():
        clock.now += 9
    meter.add(300)
    clock.now += 3
    assert meter.rate() == pytest.approx(100)


def test_memory_of_this_process():
    in_use, peak = memory(torch.device("cpu"))
    assert in_use is not None and peak is not None
    assert 0.05 < in_use <= peak < 1000  # GB: torch alone takes more than 50 MB
    # fresh pages: an allocator may hand out what the process has already
    with mmap.mmap(-1, 200_000_000) as block:
        block.write(b"\1" * len(block))
        grown, _ = memory(torch.device("cpu"))
    assert grown is not None and grown - in_use > 0.1


def test_memory_of_a_gpu_is_its_peak(monkeypatch):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 31_400_000_000)
    assert memory(torch.device("cuda", 0)) == (31.4, 31.4)


# ---- Reporter ----------------------------------------------------------------------------------------------


def open_reporter(
    folder: Path, *, steps: int = 600, step: int = 0, **options: Any
) -> tuple[Reporter, Progress]:
    config = RunConfig(model="tiny", steps=steps, sequence_length=64, warmup_steps=0)
    progress = Progress(DataState("text"), {}, "", "", step=step)
    return Reporter(
        folder, config, progress, SmolLM2Config.preset("tiny"), torch.device("cpu"), **options
    ), progress


def train_steps(
    reporter: Reporter, progress: Progress, clock: Clock, count: int, seconds: float = 0.1, wait: float = 0.0
) -> None:
    for _ in range(count):
        clock.now += seconds
        progress.step += 1
        progress.tokens += 1000
        reporter.advance(1000, wait)


def test_a_log_line_tells_everything_and_its_record_more(tmp_path, clock, monkeypatch, capsys):
    monkeypatch.setattr(metrics, "memory", lambda device: (1.23, 1.5))
    reporter, progress = open_reporter(tmp_path)
    train_steps(reporter, progress, clock, 1, seconds=20)  # the first step, which compiles
    reporter.log(6.5, 2.0, 1e-5)
    train_steps(reporter, progress, clock, 9, wait=0.002)
    progress.data.unique.add(range(3171))
    progress.data.documents, progress.skipped_steps = 3200, 1
    reporter.log(4.1234, 0.8149, 1.5e-3)
    reporter.close()
    first, second = capsys.readouterr().out.splitlines()
    assert first == "step   1/600  loss 6.500  lr 1.00e-05  |g| 2.00  wait 0 ms  1.2 GB  0 docs"
    assert second == (
        "step  10/600  loss 4.123  lr 1.50e-03  |g| 0.81  10,000 tok/s  wait 2 ms  1.2 GB  3,171 docs  1 "
        "skipped  ETA 0:59"
    )
    record = read_metrics(tmp_path)[1]
    rate, eta = record.pop("tokens_per_second"), record.pop("eta_seconds")
    assert rate == pytest.approx(10_000) and eta == pytest.approx(59.0)
    assert record == {
        "step": 10, "loss": 4.1234, "lr": 1.5e-3, "gradient_norm": 0.8149, "tokens": 10_000, "epochs": 0.0,
        "unique_examples": 3171, "unique_examples_exact": True, "documents": 3200, "invalid_documents": 0,
        "skipped_steps": 1, "wait_ms": 2.0, "memory_gb": 1.23, "memory_peak_gb": 1.5,
    }  # fmt: skip


@pytest.mark.parametrize("devices", [1, 4])
def test_mfu_is_relative_to_the_peak_of_all_devices(tmp_path, clock, monkeypatch, capsys, devices):
    flops = flops_per_token(SmolLM2Config.preset("tiny"), 64)
    monkeypatch.setattr(metrics, "peak_flops", lambda device: 20_000 * flops)
    reporter, progress = open_reporter(tmp_path, devices=devices)
    train_steps(reporter, progress, clock, 12)
    reporter.log(5.0, 1.0, 1e-3)
    reporter.close()
    assert read_metrics(tmp_path)[0]["mfu"] == pytest.approx(0.5 / devices)
    assert f"  10,000 tok/s  MFU {50 / devices:.1f}%  wait" in capsys.readouterr().out


def test_an_unmeasured_rate_gives_no_mfu(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics, "peak_flops", lambda device: 1e12)
    reporter, _ = open_reporter(tmp_path)
    reporter.log(5.0, 1.0, 1e-3)
    reporter.close()
    assert not {"mfu", "tokens_per_second", "eta_seconds", "wait_ms"} & set(read_metrics(tmp_path)[0])


def test_eta_of_a_resumed_run_counts_its_own_steps(tmp_path, clock):
    reporter, progress = open_reporter(tmp_path, steps=5050, step=5000)
    for _ in range(2):
        train_steps(reporter, progress, clock, 10, seconds=2)
        reporter.log(3.5, 1.0, 1e-3)
    reporter.close()
    assert read_metrics(tmp_path)[-1]["eta_seconds"] == pytest.approx(30 * 2)


def test_evaluations_notes_samples_and_lines(tmp_path, capsys):
    reporter, progress = open_reporter(tmp_path)
    reporter.note(resumed=True)
    progress.step = 100
    with reporter.excluded():
        reporter.evaluation(math.log(2) * 4, 6.2, 4.0)
        reporter.samples(["Once upon", "The"])
    reporter.note(failed_save="no space left on device")
    reporter.line("hello")
    reporter.close()
    assert reporter.held_out_loss == math.log(2) * 4
    resumed, evaluation, failed = read_metrics(tmp_path)
    assert resumed == {"step": 0, "resumed": True}
    assert evaluation["held_out_bits_per_byte"] == pytest.approx(1.0) and evaluation["unigram_entropy"] == 6.2
    assert failed == {"step": 100, "failed_save": "no space left on device"}
    out = capsys.readouterr().out
    assert "step 100: held-out loss 2.773, 1.00 bits per byte" in out and out.endswith("hello\n")
    assert (tmp_path / "samples.txt").read_text(
        encoding="utf-8"
    ) == "step 100 sample: Once upon\nstep 100 sample: The\n\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a device that is always full")
def test_a_full_disk_does_not_end_the_training(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    reporter, _ = open_reporter(tmp_path)
    for _ in range(3):
        reporter.log(5.0, 1.0, 1e-3)
    reporter.close()
    out = capsys.readouterr().out
    assert out.count("loss 5.000") == 3
    assert out.count("warning: metrics.jsonl cannot be written") == 1 and "No space left" in out


def on_a_terminal(width: int, monkeypatch: pytest.MonkeyPatch, show: Callable[[], None]) -> str:
    """What `show` writes to a stderr that is a terminal of that many columns."""
    fcntl, termios = pytest.importorskip("fcntl"), pytest.importorskip("termios")
    controller, terminal = os.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, width, 0, 0))
    with os.fdopen(terminal, "w", encoding="utf-8") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        show()
        stream.write("end")
    shown = b""
    while not shown.endswith(b"end"):  # a terminal hands over what it has so far
        shown += os.read(controller, 65536)
    os.close(controller)
    return shown.decode()


@pytest.mark.parametrize("width", [160, 80, 0])
def test_a_terminal_shows_a_bar_that_fits(tmp_path, clock, monkeypatch, capsys, width):
    def show() -> None:
        reporter, progress = open_reporter(tmp_path)
        train_steps(reporter, progress, clock, 10)
        reporter.log(4.1234, 0.8149, 1.5e-3)
        reporter.line("a line of its own")
        reporter.close()

    shown = on_a_terminal(width, monkeypatch, show)
    printed = capsys.readouterr().out
    assert "a line of its own" in printed
    if width == 0:  # a terminal that nobody sized: tqdm would show nothing
        assert "step  10/600  loss 4.123" in printed and shown == "end"
        return
    assert "10/600 |" in shown and "ETA " in shown and "loss 4.123  lr 1.50e-03" in shown
    assert ("10,000 tok/s  wait 0 ms" in shown) == (width == 160)
    assert all(
        len(line) <= width for line in re.sub(r"\x1b\[[A-Z]", "", shown).replace("\n", "\r").split("\r")
    )


def test_columns_leave_out_what_is_not_known_and_mark_what_is_not_exact():
    assert columns({"loss": math.inf, "mfu": None, "skipped_steps": 0}) == ["loss inf"]
    assert columns({"unique_examples": 12_000_000, "unique_examples_exact": False}) == ["~12,000,000 docs"]


@pytest.mark.parametrize(
    ("seconds", "text"), [(7.4, "0:07"), (59.9, "1:00"), (754, "12:34"), (12_345, "3:25:45")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text


# ---- metrics.jsonl -----------------------------------------------------------------------------------------


def test_metrics_are_json_lines_and_can_be_taken_back(tmp_path):
    log = MetricsLog(tmp_path)
    for step in (1, 2, 3):
        log.write(step, {"loss": math.nan if step == 2 else 1.0 / step, "mfu": None})
    log.close()
    with (tmp_path / "metrics.jsonl").open("a", encoding="utf-8") as stream:
        stream.write('3\n{"loss": 1.0}\n')  # nobody's lines
        stream.write('{"step": 4, "lo')  # the process died here
    assert read_metrics(tmp_path) == [
        {"step": 1, "loss": 1.0},
        {"step": 2, "loss": "nan"},
        {"step": 3, "loss": 1 / 3},
    ]
    forget_after(tmp_path, 2)
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2]
