"""pytest-benchmark suite of the optimizer step: `pytest bench/bench_train.py`.

A step is forward, backward, clipping and AdamW, of all variants from the same weights and on the same tokens;
the losses of the first steps must agree. On a CPU the variants are those of bench/step_peers.py, transformers
among them, at three sizes that are quick; --full adds 2 x 512 tokens of the 135M model, where a step takes
seconds, and the compiled variants, each of which compiles for a minute. On a GPU they are those of
bench/train_step.py and the peers of bench/peers/choice.py at 8 x 512 and 32 x 512.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import launches, roof, step_peers, train_step, work
from bench.peak_memory import peak_memory
from bench.peers import choice
from bench.record import TINY_NOTE, one_line, provenance
from bench.step import COMPARED_STEPS
from bench.suite import digest
from bench.timing import synchronize
from smollm2.config import SmolLM2Config

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROUNDS = 5  # after the first step, which does not count; without --full a CPU takes two


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
        changes = {} if self.layers is None else {"num_hidden_layers": self.layers}
        return SmolLM2Config.preset(self.preset, **changes)

    def ids(self, tiny: bool) -> Tensor:
        """Random tokens [B, T]."""
        shape, seed = (1, 16) if tiny else (self.batch, self.length), torch.Generator().manual_seed(0)
        return torch.randint(self.config(tiny).vocab_size, shape, generator=seed).to(DEVICE)


CPU_SIZES = {
    "tiny, 8 x 128": Size(8, 128, "tiny"), "135M width, 2 layers, 1 x 128": Size(1, 128, layers=2),
    "135M, 1 x 128": Size(1, 128), "135M, 2 x 512": Size(2, 512, large=True),
}  # fmt: skip
GPU_SIZES = {"135M, 8 x 512": Size(8, 512), "135M, 32 x 512": Size(32, 512)}
SIZES = GPU_SIZES if DEVICE.type == "cuda" else CPU_SIZES
MAIN = ("ours", "transformers")  # what is compared of the whole 135M model without --full


def variants(dtype: str) -> list[str]:
    """All that can be compared, what the others are compared with first."""
    if DEVICE.type == "cuda":
        names = [*train_step.VARIANTS, *choice.VARIANTS]
        return sorted(names, key=lambda name: name != "torch")
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
CASES = [(name, dtype, variant) for name in SIZES for dtype in DTYPES for variant in variants(dtype)]
Step = Callable[[], Tensor]


def build(variant: str, config: SmolLM2Config, dtype: str, ids: Tensor, compiler: str) -> Step:
    """The step of a variant as a call that returns the loss. Raises Unavailable, with the version and the
    reason, for a peer that cannot be measured here.
    """
    if ids.device.type == "cpu":
        return step_peers.build(variant, config, step_peers.DTYPES[dtype], ids, compiler)
    step = train_step.build_step(variant, config, ids, compiler)
    return lambda: step(ids)


class Steps:
    """What became of the variants: their first losses, by size and dtype, and why others have none."""

    def __init__(self, tiny: bool, full: bool = False) -> None:
        self.tiny, self.full, self.origin = tiny, full, provenance(DEVICE)
        self.rows: dict[str, dict[str, Any]] = {}
        self.base: dict[tuple[str, str], list[float]] = {}
        self.floor = cache(self._floor)

    def status(self) -> dict[str, dict[str, Any]]:
        """What became of each library: see bench/peers/status.py."""
        return choice.step_status(self.rows)

    def far(self, size: str, dtype: str, variant: str, losses: list[float]) -> str:
        """Why a variant that computes another loss has no time; the first variant's losses are the truth."""
        base = self.base.setdefault((size, dtype), losses)
        distance = max(abs(a - b) for a, b in zip(losses, base, strict=True))
        near = distance <= step_peers.LOSS_TOLERANCE[dtype] or variant == "ours+doc_start"  # another loss
        return "" if near else f"first losses are {distance:.1e} nats from the first variant's"

    def _floor(self, size: str, dtype: str) -> tuple[str, float]:
        """What no step is faster than, and its seconds on this machine."""
        config, ids = SIZES[size].config(self.tiny), SIZES[size].ids(self.tiny)
        if DEVICE.type == "cpu":
            milliseconds = step_peers.matmul_floor(config, step_peers.DTYPES[dtype], ids.numel())
            what = "the step's matrix products alone, each at the rate it reaches by itself"
            return what, milliseconds / 1e3
        bandwidth = roof.bandwidths(DEVICE, self.tiny)["copy"]
        rate = roof.matmul_rate(torch.bfloat16, DEVICE, self.tiny)
        what = "every operation at the speed of a copy or of a large product"
        return what, work.step_floor(config, ids.shape[0], ids.shape[1], 2, bandwidth, rate)

    def facts(self, size: str, dtype: str, seconds: float) -> dict[str, Any]:
        config, ids = SIZES[size].config(self.tiny), SIZES[size].ids(self.tiny)
        (batch, length), (what, floor) = ids.shape, self.floor(size, dtype)
        flops, peak = work.flops_per_token(config, length) * ids.numel(), work.peak_flops(DEVICE)
        parts = work.step(config, batch, length, step_peers.DTYPES[dtype].itemsize)
        facts = {
            **self.origin, "threads": torch.get_num_threads(), "batch": batch, "length": length,
            "parameters": config.num_parameters(), "tokens_per_second": round(ids.numel() / seconds, 1),
            "flops": round(flops),
            "bytes": sum(cost.forward.bytes + cost.backward.bytes for cost in parts.values()),
            "tflops": round(flops / seconds / 1e12, 5),
            "mfu": round(flops / seconds / peak, 4) if peak else None,
            "mfu_convention": work.MFU_CONVENTION, "floor": what, "floor_ms": round(floor * 1e3, 2),
            "percent_of_roof": round(100 * floor / seconds, 1),
        }  # fmt: skip
        return facts | ({"note": TINY_NOTE} if self.tiny else {})


def beside(variant: str, step: Step) -> dict[str, Any]:
    """Launches and peak memory, but of a step in another process: what that reports has the weights in it."""
    if variant.startswith("litgpt"):
        return {}
    found: dict[str, Any] = {}
    if DEVICE.type == "cuda" or (find_spec("triton") and not variant.endswith("+compile")):
        found["launches"] = launches.count(step, DEVICE).total()
    peak_memory(step, DEVICE)
    return found | {"peak_memory_bytes": peak_memory(step, DEVICE)}  # the second counts


@pytest.fixture(scope="module")
def steps(tiny: bool, full: bool, statuses: list[Callable[[], dict[str, Any]]]) -> Steps:
    found = Steps(tiny, full)
    statuses.append(found.status)
    return found


@pytest.mark.parametrize("size, dtype, variant", CASES)
def test_step(timed: Any, benchmark: Any, steps: Steps, size: str, dtype: str, variant: str) -> None:
    row = steps.rows.setdefault(f"{variant} {size} {dtype}", {})
    if reason := left_out(SIZES[size], variant, steps.full, steps.tiny):
        row["failed"] = reason
        pytest.skip(reason)
    config, ids = SIZES[size].config(steps.tiny), SIZES[size].ids(steps.tiny)
    losses: list[float] = []
    try:
        step = build(variant, config, dtype, ids, "aot_eager" if steps.tiny else "inductor")
        losses.append(float(step()))
    except Exception as failure:  # noqa: BLE001 - one variant's failure is a result, and the others still run
        row["failed"] = one_line(failure)
        pytest.skip(row["failed"])

    def call() -> None:
        loss = step()
        synchronize(DEVICE)
        losses.append(float(loss))

    rounds = ROUNDS if DEVICE.type == "cuda" or steps.full else COMPARED_STEPS - 1
    facts = {"size": size, "phase": "step", "dtype": dtype, "variant": variant}
    seconds = timed(call, f"step {dtype}, {size}", rounds, **facts)
    first = losses[:COMPARED_STEPS]
    far = steps.far(size, dtype, variant, first)
    assert not far, far
    benchmark.extra_info.update(
        **steps.facts(size, dtype, statistics.median(seconds)), losses=first,
        output_hash=digest([torch.tensor(first)]), **beside(variant, step),
    )  # fmt: skip
    if DEVICE.type == "cuda" or steps.full:  # whose memory the next one needs
        gc.collect()
    if "compile" in variant:
        torch.compiler.reset()
