"""`python -m bench.ladder`: what each optimisation of a training step is worth, from plain eager PyTorch to
everything on.

    plain eager           separate projections, formulas as written down, full score matrix, all logits, AdamW
                          parameter by parameter
    packed projections    q, k, v as one product, gate and up as another
    fused add+norm ...    single operations of the best backend here (`--backend`), by the per-op switch: the
                          rows' backend strings
    fused optimizer       torch's AdamW in one launch
    optimizer + copies    AdamW of ours: it clips, and writes the 16-bit weights that the next forward pass
                          reads
    graph capture         the whole step as one CUDA graph
    compile of the rest   torch.compile around it all

One change a row: each has all that the rows above it have. A step is forward, backward, clipping to a global
norm of 1 and AdamW. All rows start from the same weights and see the same tokens, and their first losses must
agree: nobody wins by computing less. On a CPU they are timed in turns within one process, on one set of
weights; on a GPU, which is quiet and whose memory some of them fill, one after the other, each freed before
the next. Launches are kernels on a GPU, a captured graph being one; on a CPU, operations of torch that
compute something. Memory is the peak of a step above what exists between steps (parameters and optimizer
state). `--size 135M` on a CPU takes about five minutes on two cores and 7 GB; the compiled rung, minutes by
itself, only with --compile there.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from bench import launches, timing
from bench.ladder_rungs import RUNGS, Setup, build_model, setups
from bench.peak_memory import peak_memory
from bench.record import Part, one_line, parser
from bench.roof import DTYPES
from bench.step import COMPARED_STEPS, CapturedStep, TrainingStep, loss_distances, rates
from kernels import TORCH, select_backend
from smollm2.cli import run_command
from smollm2.config import SmolLM2Config
from smollm2.errors import UsageError
from smollm2.model import SmolLM2ForCausalLM

# Nats over the first steps, from those of the first row. Adam's first updates have the sign of a gradient,
# however small.
LOSS_TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 0.1}
BLOCK_SECONDS = 0.2  # a timed block holds as many steps as fit
ROUNDS, SLOW_ROUNDS = 7, 3  # timed blocks of each rung; the second where a step takes seconds
COMPILE_SECONDS = 60.0  # the compiled rung of a real model needs about that: with less left it does not begin


class Shared:
    """One set of weights and optimizer states that all rungs work on, for a CPU: ten sets of the 135M model
    are 16 GB.
    """

    def __init__(self, config: SmolLM2Config) -> None:
        torch.manual_seed(0)
        self._model = SmolLM2ForCausalLM(config, TORCH)
        self._first = [parameter.detach().clone() for parameter in self._model.parameters()]
        self._state: defaultdict[Tensor, Any] = defaultdict(dict)

    def lend(self, model: SmolLM2ForCausalLM) -> None:
        """Makes these the parameters of a model without any (device "meta")."""
        model.load_state_dict(self._model.state_dict(keep_vars=True), assign=True)

    @torch.no_grad()
    def begin(self, step: TrainingStep) -> None:
        """The first weights again, and an optimizer that has seen no step."""
        for parameter, first in zip(self._model.parameters(), self._first, strict=True):
            parameter.copy_(first)
        self._state.clear()
        step.optimizer.state = self._state


@dataclass(frozen=True)
class Size:
    """What all rungs have in common. compiler: the backend of torch.compile. shared: on a CPU."""

    config: SmolLM2Config
    dtype: torch.dtype  # of the activations
    ids: Tensor  # [B, T]
    compiler: str
    shared: Shared | None = None


def build(setup: Setup, size: Size) -> TrainingStep:
    """The step of a rung, from weights of its own, or from shared ones."""
    device = size.ids.device if size.shared is None else torch.device("meta")
    model = build_model(setup, size.config, size.dtype, device)
    if size.shared is not None:
        size.shared.lend(model)
    forward = torch.compile(model, backend=size.compiler, dynamic=False) if setup.compiled else model
    step = TrainingStep(model, forward, setup.own_optimizer, setup.fused_optimizer)
    if size.shared is not None:
        size.shared.begin(step)
    return step


@dataclass
class Running:
    """A rung that works: its step, and what it has been found to do."""

    step: TrainingStep
    call: Callable[[Tensor], Tensor]
    found: dict[str, Any]
    # A step takes longer than a block, and is timed phase by phase only: the waits between them are nothing
    # to it.
    slow: bool
    count: int = 1  # steps of the next block
    phases: list[dict[str, float]] = field(default_factory=list)

    def time(self, ids: Tensor) -> float:
        """Seconds of a step, from as many as fit into a block, and the phases of one."""
        device, seconds = ids.device, 0.0
        if not self.slow:
            seconds = timing.seconds(lambda: self.call(ids), device, self.count)
            if self.count == 1:
                self.count = max(1, int(BLOCK_SECONDS / seconds))
        if self.call is self.step:
            phases = self.step.phases(ids)
            self.phases.append({name: timing.seconds(phase, device) for name, phase in phases.items()})
        return seconds or sum(self.phases[-1].values())


def start(setup: Setup, size: Size) -> Running:
    """Builds a rung and takes its first steps."""
    began, ids = time.perf_counter(), size.ids
    step = build(setup, size)
    call: Callable[[Tensor], Tensor] = step
    losses: list[Tensor] = []
    if setup.captured:
        call = captured = CapturedStep(step, ids)
        losses += captured.first_losses
    while len(losses) < COMPARED_STEPS:
        last = timing.seconds(lambda: losses.append(call(ids)), ids.device)
    found: dict[str, Any] = {"backend": setup.backend.name, "losses": [float(loss) for loss in losses]}
    found["first_steps_seconds"] = round(time.perf_counter() - began, 2)
    return Running(step, call, found, not (setup.captured or setup.compiled) and last > 10 * BLOCK_SECONDS)


def measure(running: dict[str, Running], ids: Tensor, rounds: int, left: Callable[[], float]) -> None:
    """Times the rungs in turns; adds what that gives to `found`."""
    blocks, failed = timing.in_turns(running, rounds, lambda rung: rung.time(ids), left)
    for name, rung in running.items():
        if name in failed:
            rung.found["failed"] = failed[name]
            continue
        rung.found |= {**rates(blocks[name], ids.numel()), "rounds": len(blocks[name])}
        if rung.phases:
            rung.found["phases_ms"] = {
                phase: round(1e3 * statistics.median(one[phase] for one in rung.phases), 3)
                for phase in rung.phases[0]
            }


def count_launches(step: TrainingStep, ids: Tensor) -> dict[str, int]:
    """Phase -> launches of an uncaptured step."""
    return {name: launches.count(phase, ids.device).total() for name, phase in step.phases(ids).items()}


def examine(running: dict[str, Running], compiled: Sequence[str], ids: Tensor) -> None:
    """Peak memory and launches of a step, last and each on its own: what the profiler cannot do must not cost
    the times.
    """
    for name, rung in running.items():
        if rung.call is not rung.step:  # a graph keeps its memory between steps: it has no peak
            rung.found["launches"] = {"step": 1}
        elif "failed" not in rung.found:
            with failure_noted(rung.found, "peak_failed"):
                rung.step.begin()
                rung.found["peak_mb"] = round(peak_memory(partial(rung.step, ids), ids.device) / 1e6, 2)
            # On a CPU a counting mode would switch the compiler off.
            if find_spec("triton") and not (name in compiled and ids.device.type == "cpu"):
                with failure_noted(rung.found, "launches_failed"):
                    rung.found["launches"] = count_launches(rung.step, ids)


@contextmanager
def failure_noted(found: dict[str, Any], name: str) -> Iterator[None]:
    """One rung's failure is a result, and the others still run."""
    try:
        yield
    except Exception as failure:  # noqa: BLE001
        found[name] = one_line(failure)


def free(device: torch.device) -> None:
    """Gives back the memory of rungs that nobody holds any more, and leaves the stream of a capture that
    failed.
    """
    gc.collect()
    if device.type == "cuda":
        with suppress(RuntimeError):  # the GPU may be lost, as the rows will say
            torch.cuda.set_stream(torch.cuda.default_stream())
            torch.cuda.empty_cache()


HEADER = (
    f"{'':22}{'step ms':>10}{'tok/s':>12}{'x':>7}{'forward':>10}{'backward':>10}{'update':>9}{'peak MB':>10} "
    " launches f + b + u"
)


def show(name: str, row: dict[str, Any], base: float) -> str:
    """One line of the table. base: milliseconds of the lowest rung."""
    if "failed" in row:
        return f"{name:22}{row['failed']}"
    phases, counted = row.get("phases_ms", {}), row.get("launches", {})
    cells = "".join(
        f"{phases[phase]:{width}.2f}" if phases else " " * width
        for phase, width in (("forward", 10), ("backward", 10), ("update", 9))
    )
    memory = f"{row['peak_mb']:10,.1f}" if "peak_mb" in row else f"{'':10}"
    times = " + ".join(str(count) for count in counted.values())
    return (
        f"{name:22}{row['step_ms']:10.2f}{row['tokens_per_second']:12,.0f}{base / row['step_ms']:7.2f}"
        f"{cells}{memory}  {times}"
    )


def parse(argv: Sequence[str]) -> argparse.Namespace:
    arguments = parser("ladder", "What each optimisation of a training step is worth, one change a row.")
    add = arguments.add_argument
    add("--size", choices=("tiny", "135M"), help="model (default: 135M on a GPU, tiny on a CPU)")
    activations = "of the activations (default: bf16 on a GPU, fp32 on a CPU)"
    add("--dtype", choices=("fp32", "bf16"), help=activations)
    where = "where the fused operations come from, as for every command (default auto)"
    add("--backend", default="auto", help=where)
    add("--rung", action="append", choices=list(RUNGS), help="only this one; may be repeated")
    too = "the compiled rung too (default: yes, but for 135M on a CPU)"
    add("--compile", action=argparse.BooleanOptionalAction, help=too)
    blocks = f"timed blocks of each rung (default {ROUNDS}; for 135M on a CPU {SLOW_ROUNDS})"
    add("--rounds", type=int, metavar="N", help=blocks)
    alone = "on a CPU too, each rung by itself, freed before the next"
    add("--alone", action="store_true", help=alone)
    options = arguments.parse_args(argv)
    if options.rounds is not None and options.rounds < 1:
        raise UsageError(f"--rounds: expected at least 1, got {options.rounds}")
    return options


def main(argv: Sequence[str]) -> int:
    options = parse(argv)
    part = Part("ladder", options, cpu=True)
    cuda = part.device.type == "cuda"
    size = "tiny" if part.tiny else options.size or ("135M" if cuda else "tiny")
    config, large = part.model(size), size == "135M" and not cuda
    batch, length = (1, 8) if part.tiny else (32, 512) if cuda else (2, 256) if large else (8, 128)
    dtype = DTYPES[options.dtype or ("bf16" if cuda else "fp32")]
    short = str(dtype).removeprefix("torch.")
    here = "torch" if part.tiny and options.backend == "auto" else options.backend
    best = select_backend(here, part.device)
    ids = part.ids(config, batch, length)
    rounds = 1 if part.tiny else options.rounds or (SLOW_ROUNDS if large else ROUNDS)
    compiled = not large if options.compile is None else options.compile
    alone, compiler = cuda or options.alone, "aot_eager" if part.tiny else "inductor"
    common = Size(config, dtype, ids, compiler, None if cuda else Shared(config))
    part.save(
        model=size, batch=batch, length=length, dtype=short, backend=best.name,
        threads=torch.get_num_threads(),
    )  # fmt: skip
    tokens = f"{batch} x {length} tokens"
    print(f"{size} model, {tokens}, {short}, fused operations from {best.name}, {part.device}", flush=True)
    print(HEADER, flush=True)

    def obstacle(name: str, setup: Setup) -> str | None:
        if name == "graph capture" and not cuda:
            return "needs a GPU"
        if name == "optimizer + copies" and not setup.own_optimizer:
            return "needs Triton kernels"
        if setup.compiled and not compiled:
            return "left out: compiles for minutes; add --compile"
        enough = part.left() >= (COMPILE_SECONDS if setup.compiled and not part.tiny else 0)
        return None if enough else "no time was left"

    rows: dict[str, dict[str, Any]] = {}
    every = setups(best, cuda)
    chosen = {name: setup for name, setup in every.items() if not options.rung or name in options.rung}
    for names in [[name] for name in chosen] if alone else [list(chosen)]:  # what is in memory at one time
        running: dict[str, Running] = {}
        for name in names:
            if why := obstacle(name, chosen[name]):
                rows[name] = {"failed": why}
            else:
                row = rows.setdefault(name, {})
                with failure_noted(row, "failed"):
                    running[name] = start(chosen[name], common)
                    rows[name] = running[name].found
                if "failed" in row:
                    gc.collect()
            part.save(rungs=rows)
        measure(running, ids, rounds, part.left)
        part.save(rungs=rows)
        examine(running, [name for name, setup in chosen.items() if setup.compiled], ids)
        running.clear()
        apart = loss_distances(rows)
        part.save(rungs=rows, loss_distance=apart)
        base = next((row["step_ms"] for row in rows.values() if "step_ms" in row), 0.0)
        for name in names:
            print(show(name, rows[name], base), flush=True)
        if any(chosen[name].compiled for name in names):
            torch.compiler.reset()
        if alone:
            free(part.device)
    print(f"first losses are within {max(apart.values(), default=0.0):.1e} nats of the first row's")
    far = {name: distance for name, distance in apart.items() if not distance <= LOSS_TOLERANCE[dtype]}
    for name, distance in far.items():
        print(f"{name}: first losses are {distance:.1e} nats from the first row's: TOO FAR")
    part.finish()
    return 1 if far else 0


if __name__ == "__main__":
    sys.exit(run_command(main))
