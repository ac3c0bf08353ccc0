"""pytest-benchmark suite of the optimizer step: `pytest bench/bench_train.py`, compared between runs with `pytest-benchmark compare`.

The variants of bench/step_peers.py on the CPU, one after the other; for ratios, which want them in turns, run that module itself.
"""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch

from bench import step_peers
from bench.part import provenance
from smollm2.config import SmolLM2Config

CONFIG = SmolLM2Config.preset("135M")
IDS = torch.randint(CONFIG.vocab_size, (2, 512), generator=torch.Generator().manual_seed(0))
PROVENANCE = provenance(IDS.device)
CASES = [(dtype, variant) for dtype in step_peers.DTYPES for variant in step_peers.chosen(dtype, (), compiled=True)]


@pytest.mark.parametrize("dtype, variant", CASES)
def test_step(benchmark: Any, dtype: str, variant: str) -> None:
    if variant.startswith("transformers"):
        pytest.importorskip("transformers", reason="the comparison needs transformers")
    step = step_peers.build(variant, CONFIG, step_peers.DTYPES[dtype], IDS)
    losses = [float(step()) for _ in range(step_peers.COMPARED_STEPS)]
    assert losses[-1] < losses[0]  # the same tokens each time
    benchmark.group = f"step {dtype}"
    benchmark.pedantic(step, rounds=5)
    benchmark.extra_info.update(PROVENANCE, losses=losses, tokens_per_second=round(IDS.numel() / benchmark.stats.stats.median, 1))
    del step
    gc.collect()
    torch.compiler.reset()
