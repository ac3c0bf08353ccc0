"""pytest-benchmark suite of the data pipeline: `pytest bench/bench_data.py`, compared between runs with
`pytest-benchmark compare`.

Documents to packed batches of 32 x 512, from text with 0, 1 and 2 workers, and from the token cache. The
measuring is that of `python -m train.data_speed`, which is run once a round in a process of its own and goes
through all variants each time: so they alternate, and starting the workers is part of it. A time is that of
one batch.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.part import ROOT, provenance

VARIANTS = ("text, workers=0", "text, workers=1", "text, workers=2", "cache, workers=0", "cache, workers=1")
TOKENS = 32 * 512  # of a batch
ROUNDS, FULL_ROUNDS = 2, 5
MEBIBYTES = 2  # of text


@pytest.fixture(scope="module")
def rounds(tiny: bool, full: bool, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What every round wrote."""
    path = tmp_path_factory.mktemp("data") / "speed.json"
    found = []
    for _ in range(1 if tiny else FULL_ROUNDS if full else ROUNDS):
        command = [
            sys.executable,
            "-m",
            "train.data_speed",
            "--repeats",
            "1",
            "--mebibytes",
            "1" if tiny else str(MEBIBYTES),
        ]
        done = subprocess.run(
            [*command, "--json", str(path)], cwd=ROOT, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, done.stderr
        found.append(json.loads(path.read_text(encoding="utf-8")))
    return found


@pytest.mark.parametrize("variant", VARIANTS)
def test_pipeline(replay: Any, rounds: list[dict[str, Any]], variant: str) -> None:
    rates = [one["tokens_per_second"][variant] for one in rounds]
    assert len({one["corpus"] for one in rounds}) == 1, "the corpus changed while it was measured"
    replay(
        [TOKENS / rate for rate in rates], "data, one batch of 32 x 512", **provenance(torch.device("cpu")),
        phase="data", variant=variant, tokens_per_second=round(sorted(rates)[len(rates) // 2]),
        bytes=TOKENS * 2, corpus=rounds[0]["corpus"], tokenizer=rounds[0]["tokenizer"],
        platform=platform.system(),
    )  # fmt: skip


def test_the_suite_has_every_variant(rounds: list[dict[str, Any]]) -> None:
    assert set(rounds[0]["tokens_per_second"]) == set(VARIANTS), (
        f"{Path('train/data_speed.py')} measures something else now"
    )
