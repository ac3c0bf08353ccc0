"""pytest-benchmark suite of the optimizer step: `pytest bench/bench_train.py`, compared between runs with
`pytest-benchmark compare`.

A step is forward, backward, clipping and AdamW, of all variants from the same weights and on the same tokens, in turns; the losses of the
first steps must agree. On a CPU the variants are those of bench/step_peers.py, transformers among them, at three sizes that are quick;
--full adds 2 x 512 tokens of the 135M model, where a step takes seconds, and the compiled variants, each of which compiles for a minute.
On a GPU they are those of bench/train_step.py and the peers of bench/peers/choice.py at 8 x 512 and 32 x 512.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import launches, roofline, step_peers, train_step, work
from bench.bench_kernels import digest
from bench.part import one_line, provenance
from bench.peak_memory import peak_memory
from bench.peers import choice
from bench.peers.status import Unavailable
from bench.step import CapturedStep, TrainingStep
from bench.timing import synchronize
from smollm2.config import SmolLM2Config

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROUNDS = 5  # after the first step of each, which does not count; without --full a CPU takes two
MFU_CONVENTION = (
    "6 per weight and token, causal attention counted half, dense bf16 peak of the vendor; none on a CPU"
)


@dataclass(frozen=True)
class Size:
    """A model and a batch. large: on a CPU measured only with --full."""

    batch: int
    length: int
    preset: str = "135M"
    layers: int | None = None  # None: all that the preset has
    large: bool = False

    def config(self, tiny: bool) -> SmolLM2Config:
        if tiny:
            return SmolLM2Config.preset("tiny", num_hidden_layers=1)
        return SmolLM2Config.preset(
            self.preset, **({} if self.layers is None else {"num_hidden_layers": self.layers})
        )

    def ids(self, tiny: bool) -> Tensor:
        """Random tokens [B, T]."""
        shape = (1, 16) if tiny else (self.batch, self.length)
        return torch.randint(
            self.config(tiny).vocab_size, shape, generator=torch.Generator().manual_seed(0)
        ).to(DEVICE)


CPU_SIZES = {
    "tiny, 8 x 128": Size(8, 128, "tiny"), "135M width, 2 layers, 1 x 128": Size(1, 128, layers=2),
    "135M, 1 x 128": Size(1, 128), "135M, 2 x 512": Size(2, 512, large=True),
}  # fmt: skip
GPU_SIZES = {"135M, 8 x 512": Size(8, 512), "135M, 32 x 512": Size(32, 512)}
SIZES = GPU_SIZES if DEVICE.type == "cuda" else CPU_SIZES
MAIN = ("ours", "transformers")  # what is compared of the whole 135M model without --full


def variants(size: Size, dtype: str) -> list[str]:
    """All that can be compared at that size."""
    if DEVICE.type == "cuda":
        return [*train_step.VARIANTS, *choice.VARIANTS]
    return [name for name in step_peers.chosen(dtype, (), True) if not name.startswith("transformers bf16")]


def left_out(size: Size, variant: str, full: bool, tiny: bool) -> str:
    """Why a CPU does not measure it now; empty where it does."""
    if tiny:
        return "" if size is next(iter(SIZES.values())) else "at toy size all sizes are the first"
    if full or DEVICE.type == "cuda":
        return ""
    if variant.endswith("+compile"):
        return "compiles for a minute; add --full"
    whole = size.preset == "135M" and size.layers is None
    return "a large case; add --full" if size.large or (whole and variant not in MAIN) else ""


DTYPES = ("bf16",) if DEVICE.type == "cuda" else tuple(step_peers.DTYPES)
CASES = [
    (name, dtype, variant)
    for name, size in SIZES.items()
    for dtype in DTYPES
    for variant in variants(size, dtype)
]
Step = Callable[[], Tensor]


def build(variant: str, config: SmolLM2Config, dtype: str, ids: Tensor, compiler: str) -> Step:
    """The step of a variant as a call that returns the loss."""
    if ids.device.type == "cpu":
        return step_peers.build(variant, config, step_peers.DTYPES[dtype], ids, compiler)
    return gpu_step(variant, config, ids, compiler)


def gpu_step(variant: str, config: SmolLM2Config, ids: Tensor, compiler: str) -> Step:
    """The same of a GPU's variants. Raises Unavailable, with the version and the reason, for a peer that
    cannot be measured here.
    """
    if variant in choice.VARIANTS:
        weights = train_step.build(config, "torch", ids.device).state_dict()
        peer = choice.peer_step(variant, config, weights, ids, True, compiler)
        return lambda: peer(ids)
    backend, _, extra = variant.partition("+")
    model = train_step.build(config, backend, ids.device)
    step = TrainingStep(model, torch.compile(model, backend=compiler) if extra == "compile" else None)
    call: Callable[[Tensor], Tensor] = CapturedStep(step, ids) if extra == "graph" else step
    return lambda: call(ids)


class Measurements:
    """The steps of all variants of a size and dtype, measured in turns when first asked for."""

    def __init__(self, tiny: bool, full: bool = False) -> None:
        self._tiny, self._full = tiny, full
        self._provenance = provenance(DEVICE)
        self._found: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}

    def of(self, size: str, dtype: str, variant: str) -> dict[str, Any]:
        """{"seconds": [...], facts ...}, or {"failed": why}."""
        if (size, dtype) not in self._found:
            self._found[size, dtype] = self._measure(SIZES[size], dtype)
            gc.collect()
            torch.compiler.reset()
        return self._found[size, dtype][variant]

    def status(self) -> dict[str, dict[str, Any]]:
        """What became of each library, over the sizes measured so far: see bench/peers/status.py."""
        return choice.step_status(
            {
                f"{name} {size} {dtype}": row
                for (size, dtype), found in self._found.items()
                for name, row in found.items()
            }
        )

    def _measure(self, size: Size, dtype: str) -> dict[str, dict[str, Any]]:
        config, ids = size.config(self._tiny), size.ids(self._tiny)
        found: dict[str, dict[str, Any]] = {}
        steps: dict[str, Step] = {}
        for name in variants(size, dtype):
            if reason := left_out(size, name, self._full, self._tiny):
                found[name] = {"failed": reason}
                continue
            try:
                steps[name] = build(name, config, dtype, ids, "aot_eager" if self._tiny else "inductor")
                found[name] = {"losses": [float(steps[name]())]}
            except Unavailable as reason:
                steps.pop(name, None)
                found[name] = {"failed": str(reason)}
            except Exception as failure:  # noqa: BLE001 - one variant's failure is a result, and the others still run
                steps.pop(name, None)
                found[name] = {"failed": one_line(failure)}
        if not steps:
            return found
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        for _ in range(ROUNDS if DEVICE.type == "cuda" or self._full else step_peers.COMPARED_STEPS - 1):
            for name, step in list(steps.items()):
                synchronize(DEVICE)
                began = time.perf_counter()
                try:
                    loss = step()
                except Exception as failure:  # noqa: BLE001 - as above: memory may run out, and a process of its own can end at any time
                    del steps[name]
                    found[name] = {"failed": one_line(failure)}
                    continue
                synchronize(DEVICE)
                seconds[name].append(time.perf_counter() - began)
                if len(found[name]["losses"]) < step_peers.COMPARED_STEPS:
                    found[name]["losses"].append(float(loss))
        floor = self._floor(config, dtype, ids)
        for name, step in steps.items():
            found[name] |= {
                "seconds": seconds[name],
                **self._facts(config, dtype, ids, statistics.median(seconds[name]), floor),
            }
            found[name]["output_hash"] = digest([torch.tensor(found[name]["losses"])])
            if name.startswith("litgpt"):
                # launches and memory of another process; the memory it reports has the weights in it, ours
                # has not
                continue
            counted = Counter[str]()
            if DEVICE.type == "cuda" or (find_spec("triton") and not name.endswith("+compile")):

                def count(step: Callable[[], object] = step, counted: Counter[str] = counted) -> None:
                    counted.update(launches.count(step, DEVICE))

                peak_memory(count, DEVICE)
                found[name]["launches"] = counted.total()
            else:
                peak_memory(step, DEVICE)
            found[name]["peak_memory_bytes"] = peak_memory(step, DEVICE)  # the second counts
        return found

    def _floor(self, config: SmolLM2Config, dtype: str, ids: Tensor) -> tuple[str, float]:
        """What no step is faster than, and its seconds on this machine."""
        if DEVICE.type == "cpu":
            floor = step_peers.matmul_floor(config, step_peers.DTYPES[dtype], ids.numel()) / 1e3
            return "the step's matrix products alone, each at the rate it reaches by itself", floor
        rates = (
            roofline.copy_bandwidth(DEVICE, self._tiny),
            roofline.matmul_rate(torch.bfloat16, DEVICE, self._tiny),
        )
        return "every operation at the speed of a copy or of a large product", work.step_floor(
            config, ids.shape[0], ids.shape[1], 2, *rates
        )

    def _facts(
        self, config: SmolLM2Config, dtype: str, ids: Tensor, seconds: float, floor: tuple[str, float]
    ) -> dict[str, Any]:
        tokens, flops, peak = (
            ids.numel(),
            work.flops_per_token(config, ids.shape[1]) * ids.numel(),
            work.peak_flops(DEVICE),
        )
        parts = work.step(config, ids.shape[0], ids.shape[1], step_peers.DTYPES[dtype].itemsize)
        facts = {
            **self._provenance, "threads": torch.get_num_threads(), "batch": ids.shape[0],
            "length": ids.shape[1], "parameters": config.num_parameters(),
            "tokens_per_second": round(tokens / seconds, 1), "flops": round(flops),
            "bytes": sum(cost.forward.bytes + cost.backward.bytes for cost in parts.values()),
            "tflops": round(flops / seconds / 1e12, 5),
            "mfu": round(flops / seconds / peak, 4) if peak else None, "mfu_convention": MFU_CONVENTION,
            "floor": floor[0], "floor_ms": round(floor[1] * 1e3, 2),
            "percent_of_roof": round(100 * floor[1] / seconds, 1),
        }  # fmt: skip
        return facts | ({"note": step_peers.TINY_NOTE} if self._tiny else {})


@pytest.fixture(scope="module")
def measurements(tiny: bool, full: bool, statuses: list[Callable[[], dict[str, Any]]]) -> Measurements:
    found = Measurements(tiny, full)
    statuses.append(found.status)
    return found


@pytest.mark.parametrize("size, dtype, variant", CASES)
def test_step(replay: Any, measurements: Measurements, size: str, dtype: str, variant: str) -> None:
    found = measurements.of(size, dtype, variant)
    if "failed" in found:
        pytest.skip(found["failed"])
    base = measurements.of(size, dtype, "torch" if DEVICE.type == "cuda" else "ours")["losses"]
    if variant != "ours+doc_start":  # which has other losses, on purpose
        distance = max(abs(a - b) for a, b in zip(found["losses"], base, strict=True))
        assert distance <= step_peers.LOSS_TOLERANCE[dtype], (
            "a variant that computes another loss has no time"
        )
    replay(group=f"step {dtype}, {size}", size=size, phase="step", dtype=dtype, variant=variant, **found)
