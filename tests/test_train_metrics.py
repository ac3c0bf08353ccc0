"""The figures that a run reports."""

from __future__ import annotations

import math
import time
from pathlib import Path

import pytest
import torch

from smollm2 import SmolLM2Config
from smollm2.tokenizer import train_tokenizer
from train.metrics import (
    MetricsLog,
    Throughput,
    bytes_per_token,
    flops_per_token,
    forget_after,
    peak_flops,
    read_metrics,
    too_good,
    unigram_entropy,
)


def test_flops_of_the_135m_model_at_512_tokens() -> None:
    config = SmolLM2Config.preset("135M")
    assert flops_per_token(config, 0) == pytest.approx(806.9e6, rel=1e-4)
    assert flops_per_token(config, 512) == pytest.approx(860e6, rel=1e-4)


def test_an_unknown_device_has_no_peak() -> None:
    assert peak_flops(torch.device("cpu")) is None


def test_unigram_entropy() -> None:
    assert unigram_entropy(torch.arange(64)) == pytest.approx(math.log(64))
    assert unigram_entropy(torch.tensor([[3, 3], [3, 3]])) == 0.0
    assert unigram_entropy(torch.tensor([0, 0, 0, 5])) == pytest.approx(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))


def test_bytes_per_token_counts_text_and_not_special_tokens() -> None:
    tokenizer = train_tokenizer(["naïve text " * 20], 300)
    text = "naïve text, naïve"
    ids = tokenizer.encode(text)
    assert bytes_per_token(torch.tensor(ids), tokenizer) == pytest.approx(len(text.encode()) / len(ids))
    assert bytes_per_token(torch.tensor([*ids, tokenizer.eot_token_id]), tokenizer) == pytest.approx(len(text.encode()) / (len(ids) + 1))


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
def test_a_loss_that_is_too_good_is_doubted(loss: float, tokens: int, epochs: float, held_out: float | None, warns: bool) -> None:
    reason = too_good(loss, tokens, epochs, held_out)
    assert (reason is not None) == warns
    if reason is not None:
        assert f"{loss:.2f}" in reason


def test_throughput_leaves_out_the_first_steps_and_what_is_excluded() -> None:
    meter = Throughput(torch.device("cpu"), ignored_steps=2)
    for _ in range(2):
        meter.add(1_000_000)
    assert meter.rate() is None
    meter.add(1000)
    with meter.excluded():
        time.sleep(0.3)
    time.sleep(0.05)
    rate = meter.rate()
    assert rate is not None and 1000 / 0.25 < rate <= 1000 / 0.05
    assert meter.rate() is None


def test_metrics_are_json_lines_and_can_be_taken_back(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, tensorboard=False)
    for step in (1, 2, 3):
        log.write(step, {"loss": math.nan if step == 2 else 1.0 / step, "mfu": None})
    log.close()
    with (tmp_path / "metrics.jsonl").open("a", encoding="utf-8") as stream:
        stream.write('{"step": 4, "lo')  # the process died here
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": "nan"}, {"step": 3, "loss": 1 / 3}]
    forget_after(tmp_path, 2)
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2]
