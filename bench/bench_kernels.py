"""pytest-benchmark suite of the operations: `pytest bench/bench_kernels.py`.

Every operation, forward and backward, by every implementation that bench/ops.py knows. On a GPU: 32 x 512
tokens of the 135M model in bf16, one CUDA graph replay with a cold L2 a round. On a CPU torch and
torch.compile are measured in fp32, on 64 tokens (--full: 2 x 512), and Triton's interpreter is not; a small
tensor stays in the cache, and so the roof there is a copy of as many bytes as the operation moves, over and
over. `test_loss_memory` has the memory of the loss by number of tokens, which is exact and needs no clock.
"""

from __future__ import annotations

import gc
import os
import statistics
import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest
import torch
import torch._functorch.config

from bench import launches, roof, timing, work
from bench.case import Case, Shapes, Variant, checked, exact_results
from bench.kernels import COMPILED, FULL, OURS, kernel_status
from bench.ops import cases
from bench.peak_memory import peak_memory
from bench.record import TINY_NOTE, digits, one_line, provenance
from bench.suite import digest
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
NOT_HERE = (
    "Triton's interpreter has no speed; python -m bench.kernels --device cpu --tiny runs it, "
    "python -m bench.gpu measures a GPU"
)
LOSS_VARIANTS = (OURS, *(f"{OURS} {chunk}" for chunk in CHUNKS), "reference", "all logits", "liger")
torch._functorch.config.donated_buffer = False  # a compiled backward pass may otherwise run only once


def shapes(tiny: bool, batch: int, length: int, dtype: torch.dtype) -> Shapes:
    config = SmolLM2Config.preset("tiny", num_hidden_layers=1) if tiny else SmolLM2Config.preset("135M")
    return Shapes(config, batch, length, dtype, DEVICE)


def phases_of(case: Case) -> tuple[str, ...]:
    backward = () if case.cost.backward == work.Work() else ("backward",)
    return ("forward", "forward+backward") if case.joint else ("forward", *backward)


# What there is to test, all phases of a variant together. A test makes its inputs and kernels when it runs.
CASES = [
    (case.op, variant, phase)
    for case in cases(shapes(True, 1, 8, DTYPE), TORCH, "eager")
    for variant in case.variants
    for phase in phases_of(case)
]


class Operations:
    """All cases at one size, the variant that is being measured, and what became of each."""

    def __init__(self, tiny: bool, full: bool = False) -> None:
        rows = (1, 8) if tiny else FULL if ON_GPU else CPU_FULL_ROWS if full else CPU_ROWS
        self.shapes, self.tiny = shapes(tiny, *rows, DTYPE), tiny
        backend = select_backend("triton" if ON_GPU else "torch", DEVICE)
        made = cases(self.shapes, backend, "aot_eager" if tiny else "inductor")
        self.cases = {case.op: case for case in made}
        self.facts = {
            **provenance(DEVICE), "model": "tiny" if tiny else "135M", "dtype": "bf16" if ON_GPU else "fp32",
            "batch": self.shapes.batch, "length": self.shapes.length, "threads": torch.get_num_threads(),
        }  # fmt: skip
        self._rate = roof.matmul_rate(DTYPE, DEVICE, tiny)
        self._bandwidth = roof.bandwidths(DEVICE, tiny)["copy"] if ON_GPU else None
        self._truth: tuple[str, list[torch.Tensor] | None] | None = None
        self._ready: tuple[str, str, Variant | None, dict[str, Any]] | None = None
        self.rows: list[dict[str, Any]] = []

    def ready(self, op: str, name: str) -> tuple[Variant | None, dict[str, Any]]:
        """A variant that computes the right thing, and its facts; or none, and {"failed": why}."""
        if self._ready is None or self._ready[:2] != (op, name):
            before, self._ready = self._ready, None
            if ON_GPU or not self.tiny:
                gc.collect()
            if before is not None and before[1] in COMPILED:
                torch.compiler.reset()
            try:
                self._ready = (op, name, *self._made(self.cases[op], name))
            except Exception as failure:  # noqa: BLE001 - a result like any other
                self._ready = op, name, None, {"failed": one_line(failure)}
            self.rows.append({"variant": name, **self._ready[3]})
        return self._ready[2:]

    def _made(self, case: Case, name: str) -> tuple[Variant, dict[str, Any]]:
        if name.startswith(OURS) and not ON_GPU:
            raise UsageError(NOT_HERE)
        if self._truth is None or self._truth[0] != case.op:
            self._truth = case.op, exact_results(case, DTYPE)
        variant, results, distance = checked(case, name, SETS, self._truth[1], DTYPE)
        known = {} if distance is None else {"error": distance}
        return variant, {"output_hash": digest(results), **known}

    def more(self, op: str, name: str, phase: str, variant: Variant, seconds: float) -> dict[str, Any]:
        """What a call of the operation does, how fast, and what it holds and launches."""
        case, call = self.cases[op], variant.call if phase == "forward" else variant.through_autograd
        todo = case.cost.phase(phase)
        tokens = self.shapes.tokens if case.tokens is None else case.tokens
        found = {
            **rates(todo, seconds, self._bandwidth or cached_copy_bandwidth(todo.bytes), self._rate),
            "tokens_per_second": round(tokens / seconds), "peak_memory_bytes": peak_memory(call, DEVICE),
        }  # fmt: skip
        # on a CPU counting switches the compiler off
        if ON_GPU or (name not in COMPILED and find_spec("triton")):
            found["launches"] = launches.count(call, DEVICE).total()
        return found | ({"note": TINY_NOTE} if self.tiny else {})

    def rounds(self, call: Callable[[], object]) -> int:
        """As many as there is time for."""
        if self.tiny or ON_GPU:
            return 2 if self.tiny else 30
        return max(3, min(30, int(SECONDS / timing.seconds(call, DEVICE))))

    def status(self) -> dict[str, dict[str, Any]]:
        """What became of each library, over the operations measured so far: see bench/peers/status.py."""
        return kernel_status(self.rows)


def rates(todo: work.Work, seconds: float, bandwidth: float, rate: float) -> dict[str, Any]:
    """What one call does, how fast, and how far from a copy or a matrix product of this machine."""
    return {
        "bytes": todo.bytes, "flops": todo.flops, "us": round(seconds * 1e6, 2),
        "gb_per_s": digits(todo.bytes / seconds / 1e9), "tflops": digits(todo.flops / seconds / 1e12),
        "percent_of_roof": round(100 * todo.floor(bandwidth, rate) / seconds, 1),
        "roof": {"copy_gb_per_s": digits(bandwidth / 1e9), "matmul_tflops": digits(rate / 1e12)},
    }  # fmt: skip


def cached_copy_bandwidth(size: int) -> float:
    """Bytes per second, read plus written, of a copy that moves `size` bytes in all, over and over: the
    fastest of many, as a roof is.
    """
    source = torch.ones(max(size // 2, 1), dtype=torch.int8)
    target = torch.empty_like(source)
    times: list[float] = []
    deadline = time.perf_counter() + 0.05
    while len(times) < 10 or time.perf_counter() < deadline:
        times.append(timing.seconds(lambda: target.copy_(source), torch.device("cpu")))
    return size / min(times)


@pytest.fixture(scope="module")
def operations(tiny: bool, full: bool, statuses: list[Callable[[], dict[str, Any]]]) -> Operations:
    found = Operations(tiny, full)
    statuses.append(found.status)
    return found


@pytest.mark.parametrize("op, variant, phase", CASES)
def test_operation(
    timed: Any, benchmark: Any, operations: Operations, op: str, variant: str, phase: str
) -> None:
    ready, facts = operations.ready(op, variant)
    if ready is None:
        pytest.skip(facts["failed"])
    replay, flush = timing.replayable(ready.phases()[phase], DEVICE), timing.flush_buffer(DEVICE)

    def call() -> None:
        replay()
        timing.synchronize(DEVICE)

    where = operations.facts
    group, rounds = f"{op} {phase}, {where['batch']} x {where['length']}", operations.rounds(call)
    before = None if flush is None else flush.sum
    seconds = timed(call, group, rounds, setup=before, op=op, phase=phase, variant=variant, **where)
    typical = statistics.median(seconds) / SETS
    benchmark.extra_info.update(**facts, **operations.more(op, variant, phase, ready, typical))


@pytest.mark.parametrize("variant", LOSS_VARIANTS)
@pytest.mark.parametrize("tokens", LOSS_TOKENS)
def test_loss_memory(
    timed: Any, benchmark: Any, operations: Operations, tiny: bool, full: bool, tokens: int, variant: str
) -> None:
    """One call forward and backward in bf16. The memory is the figure: the time has a profiler in it."""
    if variant.startswith(OURS) and not ON_GPU:
        pytest.skip("Triton's interpreter, as shipped, has no bf16 product")
    if tokens >= LARGE_LOSS and not (ON_GPU or full or tiny):
        pytest.skip("a large case; add --full")
    sized = shapes(tiny, 1, tokens // 64 if tiny else tokens, torch.bfloat16)
    backend = select_backend("triton" if ON_GPU else "torch", DEVICE)
    case = next(case for case in cases(sized, backend, "eager") if case.op == "linear_cross_entropy")
    try:
        call = Variant(case, variant, 1).through_autograd
    except Exception as reason:  # noqa: BLE001 - as above
        pytest.skip(one_line(reason))
    peaks: list[int] = []
    # bytes of all logits in bf16, which a chunked loss does not hold
    logits = 2 * sized.tokens * sized.config.vocab_size
    facts = {**operations.facts, "dtype": "bf16", "length": sized.length, "logits_bytes": logits}
    timed(
        lambda: peaks.append(peak_memory(call, DEVICE)), f"loss memory, {tokens} tokens", rounds=1,
        op="loss memory", phase="forward+backward", variant=variant, tokens=tokens, **facts,
    )  # fmt: skip
    benchmark.extra_info["peak_memory_bytes"] = peaks[0]
