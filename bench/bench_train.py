"""pytest-benchmark suite of the optimizer step: `pytest bench/bench_train.py`, compared between runs with `pytest-benchmark compare`.

A step is forward, backward, clipping and AdamW, of all variants from the same weights and on the same tokens, in turns; the losses of the
first steps must agree. On a CPU the variants are those of bench/step_peers.py, transformers among them, at sizes that are quick: two layers
of the 135M model, compiled too, and the whole model eager. On a GPU they are those of bench/train_step.py at 32 x 512.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import launches, step_peers, train_step, work
from bench.part import one_line, provenance
from bench.peak_memory import peak_memory
from bench.timing import synchronize
from smollm2.config import SmolLM2Config

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROUNDS = 5 if DEVICE.type == "cuda" else 3
MFU_CONVENTION = "6 per weight and token, causal attention counted half, dense bf16 peak of the vendor; none on a CPU"


@dataclass(frozen=True)
class Size:
    """A model and a batch, and whether the compiled variants are worth their compilation."""

    batch: int
    length: int
    compiled: bool
    layers: int | None = None  # of the 135M model; None: all

    def config(self, tiny: bool) -> SmolLM2Config:
        if tiny:
            return SmolLM2Config.preset("tiny", num_hidden_layers=1)
        return SmolLM2Config.preset("135M", **({} if self.layers is None else {"num_hidden_layers": self.layers}))

    def ids(self, tiny: bool) -> Tensor:
        """Random tokens [B, T]."""
        shape = (1, 16) if tiny else (self.batch, self.length)
        return torch.randint(self.config(tiny).vocab_size, shape, generator=torch.Generator().manual_seed(0)).to(DEVICE)


CPU_SIZES = {"135M width, 2 layers, 1 x 128": Size(1, 128, True, 2), "135M, 1 x 128": Size(1, 128, False)}
GPU_SIZES = {"135M, 8 x 512": Size(8, 512, True), "135M, 32 x 512": Size(32, 512, True)}
SIZES = GPU_SIZES if DEVICE.type == "cuda" else CPU_SIZES


def variants(size: Size, dtype: str) -> list[str]:
    """What is compared at that size: of the whole model on a CPU, where a step takes seconds, the main two. All: bench/step_peers.py."""
    if DEVICE.type == "cuda":
        return list(train_step.VARIANTS)
    names = () if size.layers is not None else ("ours", "transformers")
    return [name for name in step_peers.chosen(dtype, names, size.compiled) if not name.startswith("transformers bf16")]


DTYPES = ("bf16",) if DEVICE.type == "cuda" else tuple(step_peers.DTYPES)
CASES = [(name, dtype, variant) for name, size in SIZES.items() for dtype in DTYPES for variant in variants(size, dtype)]
Step = Callable[[], Tensor]


def build(variant: str, config: SmolLM2Config, dtype: str, ids: Tensor, compiler: str) -> Step:
    """The step of a variant as a call that returns the loss."""
    if ids.device.type == "cpu":
        return step_peers.build(variant, config, step_peers.DTYPES[dtype], ids, compiler)
    backend, _, extra = variant.partition("+")
    model = train_step.build(config, backend, ids.device)
    step = train_step.TrainingStep(model, torch.compile(model, backend=compiler) if extra == "compile" else None)
    call: Callable[[Tensor], Tensor] = train_step.CapturedStep(step, ids) if extra == "graph" else step
    return lambda: call(ids)


class Measurements:
    """The steps of all variants of a size and dtype, measured in turns when first asked for."""

    def __init__(self, tiny: bool) -> None:
        self._tiny = tiny
        self._provenance = provenance(DEVICE)
        self._found: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}

    def of(self, size: str, dtype: str, variant: str) -> dict[str, Any]:
        """{"seconds": [...], facts ...}, or {"failed": why}."""
        if (size, dtype) not in self._found:
            self._found[size, dtype] = self._measure(SIZES[size], dtype)
            gc.collect()
            torch.compiler.reset()
        return self._found[size, dtype][variant]

    def _measure(self, size: Size, dtype: str) -> dict[str, dict[str, Any]]:
        config, ids = size.config(self._tiny), size.ids(self._tiny)
        found: dict[str, dict[str, Any]] = {}
        steps: dict[str, Step] = {}
        for name in variants(size, dtype):
            try:
                steps[name] = build(name, config, dtype, ids, "aot_eager" if self._tiny else "inductor")
                found[name] = {"losses": [float(steps[name]()) for _ in range(step_peers.COMPARED_STEPS)]}
            except Exception as failure:  # noqa: BLE001 - one variant's failure is a result, and the others still run
                steps.pop(name, None)
                found[name] = {"failed": one_line(failure)}
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        for _ in range(1 if self._tiny else ROUNDS):
            for name, step in steps.items():
                began = time.perf_counter()
                float(step())
                synchronize(DEVICE)
                seconds[name].append(time.perf_counter() - began)
        floor = None if DEVICE.type == "cuda" else step_peers.matmul_floor(config, step_peers.DTYPES[dtype], ids.numel()) / 1e3
        for name, step in steps.items():
            found[name] |= {"seconds": seconds[name], **self._facts(config, ids, statistics.median(seconds[name]), floor)}
            found[name]["peak_memory_bytes"] = peak_memory(step, DEVICE)
            if DEVICE.type == "cuda" and not name.endswith("+graph"):
                found[name]["launches"] = sum(launches.count(step, DEVICE).values())
        return found

    def _facts(self, config: SmolLM2Config, ids: Tensor, seconds: float, floor: float | None) -> dict[str, Any]:
        tokens, flops, peak = ids.numel(), work.flops_per_token(config, ids.shape[1]) * ids.numel(), work.peak_flops(DEVICE)
        parts = work.step(config, ids.shape[0], ids.shape[1], 2)
        facts = {
            **self._provenance, "threads": torch.get_num_threads(), "batch": ids.shape[0], "length": ids.shape[1],
            "parameters": config.num_parameters(), "tokens_per_second": round(tokens / seconds, 1), "flops": round(flops),
            "bytes": sum(cost.forward.bytes + cost.backward.bytes for cost in parts.values()), "tflops": round(flops / seconds / 1e12, 5),
            "mfu": round(flops / seconds / peak, 4) if peak else None, "mfu_convention": MFU_CONVENTION,
        }  # fmt: skip
        if floor is not None:
            facts |= {"floor_ms": round(floor * 1e3, 2), "floor": "the step's matrix products alone, each at the rate it reaches by itself"}
            facts["percent_of_roof"] = round(100 * floor / seconds, 1)
        return facts | ({"note": step_peers.TINY_NOTE} if self._tiny else {})


@pytest.fixture(scope="module")
def measurements(tiny: bool) -> Measurements:
    return Measurements(tiny)


@pytest.mark.parametrize("size, dtype, variant", CASES)
def test_step(replay: Any, measurements: Measurements, size: str, dtype: str, variant: str) -> None:
    found = measurements.of(size, dtype, variant)
    if "failed" in found:
        pytest.skip(found["failed"])
    base = measurements.of(size, dtype, "torch" if DEVICE.type == "cuda" else "ours")["losses"]
    if variant != "ours+doc_start":  # which has other losses, on purpose
        distance = max(abs(a - b) for a, b in zip(found["losses"], base, strict=True))
        assert distance <= step_peers.LOSS_TOLERANCE[dtype], "a variant that computes another loss has no time"
    replay(group=f"step {dtype}, {size}", size=size, phase="step", dtype=dtype, variant=variant, **found)
