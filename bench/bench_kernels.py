"""pytest-benchmark suite of the operations: `pytest bench/bench_kernels.py`, compared between runs with
`pytest-benchmark compare`.

Every operation, forward and backward, by every implementation that bench/ops.py knows, in turns. On a GPU: 32
x 512 tokens of the 135M model in bf16, one CUDA graph replay with a cold L2 a round. On a CPU torch and
torch.compile are measured in fp32, on 64 tokens (--full: 2 x 512), and Triton's interpreter is not; a small
tensor stays in the cache, and so the roof there is a copy of as many bytes as the operation moves, over and
over. `test_loss_memory` has the memory of the loss by number of tokens, which is exact and needs no clock.
"""

from __future__ import annotations

import gc
import hashlib
import os
import statistics
import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest
import torch
import torch._functorch.config
from torch import Tensor

from bench import launches, roofline, timing, work
from bench.case import Case, Shapes
from bench.kernels import ERROR_BOUND, FULL, OURS, Variant, error, kernel_status
from bench.ops import cases
from bench.part import one_line, provenance
from bench.peak_memory import peak_memory
from bench.step_peers import TINY_NOTE
from bench.weight_ops import CHUNKS
from kernels import TORCH, select_backend
from smollm2.config import SmolLM2Config
from smollm2.errors import UsageError

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"
if not ON_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are imported
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
CPU_ROWS, CPU_FULL_ROWS = (1, 64), (2, 512)
SETS = 4 if ON_GPU else 1  # calls in one replay, each on tensors of its own
SECONDS = 0.2  # of a variant and phase on a CPU; at least 3 rounds, at most 30
LOSS_TOKENS = (4096, 16384, 65536) if ON_GPU else (1024, 2048, 4096)
LARGE_LOSS = 4096  # tokens from which on a CPU measures only with --full
NOT_HERE = "Triton's interpreter has no speed; python -m bench.kernels --device cpu --tiny runs it, python -m bench.gpu measures a GPU"
COMPILED = ("compile", "flex", "flex decode")  # by torch.compile
LOSS_VARIANTS = (OURS, *(f"{OURS} {chunk}" for chunk in CHUNKS), "reference", "all logits", "liger")
NAMES = {"bfloat16": "bf16", "float32": "fp32"}
torch._functorch.config.donated_buffer = False  # a compiled backward pass may otherwise run only once


def shapes(tiny: bool, batch: int, length: int, dtype: torch.dtype) -> Shapes:
    config = SmolLM2Config.preset("tiny", num_hidden_layers=1) if tiny else SmolLM2Config.preset("135M")
    return Shapes(config, batch, length, dtype, DEVICE)


def phases_of(case: Case) -> tuple[str, ...]:
    if case.cost.backward == work.Work():
        return ("forward",)
    return ("forward", "forward+backward" if case.joint else "backward")


# What there is to test; the inputs and the kernels are made when the first test wants them.
CASES = [
    (case.op, phase, variant)
    for case in cases(shapes(True, 1, 8, DTYPE), TORCH, "eager")
    for phase in phases_of(case)
    for variant in case.variants
]


class Measurements:
    """The times of all variants of an operation, measured in turns when first asked for."""

    def __init__(self, tiny: bool, full: bool = False) -> None:
        self.shapes = shapes(
            tiny, *((1, 8) if tiny else FULL if ON_GPU else CPU_FULL_ROWS if full else CPU_ROWS), DTYPE
        )
        self._tiny = tiny
        compiler = "aot_eager" if tiny else "inductor"
        self.cases = {
            case.op: case
            for case in cases(self.shapes, select_backend("triton" if ON_GPU else "torch", DEVICE), compiler)
        }
        self.facts = {
            **provenance(DEVICE), "model": "tiny" if tiny else "135M",
            "dtype": NAMES[str(DTYPE).removeprefix("torch.")], "batch": self.shapes.batch,
            "length": self.shapes.length, "threads": torch.get_num_threads(),
        }  # fmt: skip
        self._rate = roofline.matmul_rate(DTYPE, DEVICE, tiny)
        self._bandwidth = roofline.copy_bandwidth(DEVICE, tiny) if ON_GPU else None
        self._found: dict[str, dict[tuple[str, str], dict[str, Any]]] = {}

    def of(self, op: str, phase: str, variant: str) -> dict[str, Any]:
        """{"seconds": [...], facts ...}, or {"failed": why}."""
        if op not in self._found:
            self._found[op] = self._measure(self.cases[op])
            gc.collect()
            torch.compiler.reset()
        return self._found[op][phase, variant]

    def status(self) -> dict[str, dict[str, Any]]:
        """What became of each library, over the operations measured so far: see bench/peers/status.py."""
        return kernel_status(
            [
                {"variant": variant, **row}
                for found in self._found.values()
                for (_, variant), row in found.items()
            ]
        )

    def _measure(self, case: Case) -> dict[tuple[str, str], dict[str, Any]]:
        truth = Variant(case, "reference", 1).results(
            torch.float64 if DTYPE == torch.float32 else torch.float32
        )
        found: dict[tuple[str, str], dict[str, Any]] = {}
        ready: dict[str, tuple[Variant, dict[str, Any]]] = {}
        for name in case.variants:
            if name.startswith(OURS) and not ON_GPU:
                found |= {(phase, name): {"failed": NOT_HERE} for phase in phases_of(case)}
                continue
            try:
                variant = Variant(case, name, SETS)
                results = variant.results()
            except (ModuleNotFoundError, UsageError) as reason:
                found |= {
                    (phase, name): {"failed": " ".join(str(reason).split())} for phase in phases_of(case)
                }
                continue
            except Exception as failure:  # noqa: BLE001 - other people's kernels fail in their own ways; the rest is measured
                found |= {(phase, name): {"failed": one_line(failure)} for phase in phases_of(case)}
                continue
            facts: dict[str, Any] = {"output_hash": digest(results)}
            if name not in case.unchecked:
                facts["error"] = error(results, truth)
            if facts.get("error", 0.0) > ERROR_BOUND[DTYPE]:
                found |= {
                    (phase, name): {"failed": f"wrong: relative error {facts['error']:.1e}"}
                    for phase in phases_of(case)
                }
                continue
            ready[name] = variant, facts
        for phase in phases_of(case):
            replays = {
                name: timing.replayable(variant.phases()[phase], DEVICE)
                for name, (variant, _) in ready.items()
            }
            times = in_turns(replays, self._tiny)
            del replays
            todo = {"forward": case.cost.forward, "backward": case.cost.backward}.get(
                phase, case.cost.forward + case.cost.backward
            )
            bandwidth = self._bandwidth or cached_copy_bandwidth(todo.bytes)
            for name, seconds in times.items():
                variant, facts = ready[name]
                call = variant.call if phase == "forward" else variant.through_autograd
                entry = {
                    "seconds": seconds,
                    **facts,
                    **rates(todo, statistics.median(seconds), bandwidth, self._rate),
                }
                tokens = self.shapes.tokens if case.tokens is None else case.tokens
                entry["tokens_per_second"] = round(tokens / statistics.median(seconds))
                entry["peak_memory_bytes"] = peak_memory(call, DEVICE)
                # on a CPU a counting mode would switch the compiler off
                if ON_GPU or (name not in COMPILED and find_spec("triton")):
                    entry["launches"] = sum(launches.count(call, DEVICE).values())
                if self._tiny:
                    entry["note"] = TINY_NOTE
                found[phase, name] = entry
        return found


def rates(todo: work.Work, seconds: float, bandwidth: float, rate: float) -> dict[str, Any]:
    """What one call does, how fast, and how far from a copy or a matrix product of this machine."""
    return {
        "bytes": todo.bytes, "flops": todo.flops, "us": round(seconds * 1e6, 2),
        "gb_per_s": roofline.digits(todo.bytes / seconds / 1e9),
        "tflops": roofline.digits(todo.flops / seconds / 1e12),
        "percent_of_roof": round(100 * todo.floor(bandwidth, rate) / seconds, 1),
        "roof": {"copy_gb_per_s": roofline.digits(bandwidth / 1e9), "matmul_tflops": roofline.digits(rate / 1e12)},
    }  # fmt: skip


def in_turns(replays: dict[str, Callable[[], object]], tiny: bool) -> dict[str, list[float]]:
    """Seconds per call of each variant, in turns."""
    flush = timing.flush_buffer(DEVICE)

    def once(replay: Callable[[], object]) -> float:
        return (
            (timing.event_time(replay, flush) if flush is not None else timing._wall_time(replay))
            * 1e-6
            / SETS
        )

    for replay in replays.values():
        once(replay)  # warms up, and the next call says how many rounds there is time for
    slowest = max((once(replay) for replay in replays.values()), default=1.0)
    rounds = 2 if tiny else 30 if ON_GPU else max(3, min(30, int(SECONDS / slowest)))
    seconds: dict[str, list[float]] = {name: [] for name in replays}
    for _ in range(rounds):
        for name, replay in replays.items():
            seconds[name].append(once(replay))
    return seconds


def cached_copy_bandwidth(size: int) -> float:
    """Bytes per second, read plus written, of a copy that moves `size` bytes in all, over and over: the
    fastest of many, as a roof is.
    """
    source = torch.ones(max(size // 2, 1), dtype=torch.int8)
    target = torch.empty_like(source)
    times: list[float] = []
    deadline = time.perf_counter() + 0.05
    while len(times) < 10 or time.perf_counter() < deadline:
        began = time.perf_counter()
        target.copy_(source)
        times.append(time.perf_counter() - began)
    return size / min(times)


def digest(results: list[Tensor]) -> str:
    """The first 12 hex digits of the sha256 of outputs and gradients, in fp32."""
    found = hashlib.sha256()
    for tensor in results:
        found.update(tensor.float().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()[:12]


@pytest.fixture(scope="module")
def measurements(tiny: bool, full: bool, statuses: list[Callable[[], dict[str, Any]]]) -> Measurements:
    found = Measurements(tiny, full)
    statuses.append(found.status)
    return found


@pytest.mark.parametrize("op, phase, variant", CASES)
def test_operation(replay: Any, measurements: Measurements, op: str, phase: str, variant: str) -> None:
    found = measurements.of(op, phase, variant)
    if "failed" in found:
        pytest.skip(found["failed"])
    facts = measurements.facts
    replay(
        group=f"{op} {phase}, {facts['batch']} x {facts['length']}",
        op=op,
        phase=phase,
        variant=variant,
        **facts,
        **found,
    )


@pytest.mark.parametrize("variant", LOSS_VARIANTS)
@pytest.mark.parametrize("tokens", LOSS_TOKENS)
def test_loss_memory(
    replay: Any, measurements: Measurements, tiny: bool, full: bool, tokens: int, variant: str
) -> None:
    """One call forward and backward in bf16. The memory is the figure: the time has a profiler in it."""
    if variant.startswith(OURS) and not ON_GPU:
        pytest.skip("Triton's interpreter has no bf16 product")
    if tokens >= LARGE_LOSS and not (ON_GPU or full or tiny):
        pytest.skip("a large case; add --full")
    sized = shapes(tiny, 1, tokens // 64 if tiny else tokens, torch.bfloat16)
    backend = select_backend("triton" if ON_GPU else "torch", DEVICE)
    case = next(case for case in cases(sized, backend, "eager") if case.op == "linear_cross_entropy")
    try:
        call = Variant(case, variant, 1).through_autograd
    except (ModuleNotFoundError, UsageError) as reason:
        pytest.skip(str(reason))
    began = time.perf_counter()
    peak = peak_memory(call, DEVICE)  # which waits for the device
    seconds = time.perf_counter() - began
    # bytes of all logits in bf16, which a chunked loss does not hold
    logits = 2 * sized.tokens * sized.config.vocab_size
    facts = {**measurements.facts, "dtype": "bf16", "length": sized.length}
    replay(
        [seconds], f"loss memory, {tokens} tokens", op="loss memory", phase="forward+backward",
        variant=variant, tokens=tokens, peak_memory_bytes=peak, logits_bytes=logits, **facts,
    )  # fmt: skip
