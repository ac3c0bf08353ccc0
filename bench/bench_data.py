"""pytest-benchmark suite of the data pipeline: `pytest bench/bench_data.py`.

Documents to packed batches of 32 x 512 tokens, by `python -m train.data_speed` in a process of its own, which
goes through every way in each round: the rate of each is in extra_info.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from bench.record import provenance, speed_of_data

TOKENS = 32 * 512  # of a batch


def test_pipeline(timed: Any, benchmark: Any, tiny: bool, full: bool, tmp_path: Path) -> None:
    found: list[dict[str, Any]] = []
    timed(
        lambda: found.append(speed_of_data(tmp_path, "--repeats", 1, "--mebibytes", 1 if tiny else 2)),
        "data, batches of 32 x 512", rounds=1 if tiny else 5 if full else 2,
        **provenance(torch.device("cpu")), phase="data", variant="every way",
    )  # fmt: skip
    assert len({one["corpus"] for one in found}) == 1, "the corpus changed while it was measured"
    rates = {
        name: max(one["tokens_per_second"][name] for one in found) for name in found[0]["tokens_per_second"]
    }
    benchmark.extra_info.update(
        tokens_per_second=round(max(rates.values())), rates=rates, bytes=TOKENS * 2,
        corpus=found[0]["corpus"],
        tokenizer=found[0]["tokenizer"],
    )  # fmt: skip
