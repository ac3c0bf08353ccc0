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
import dataclasses
import gc
import os
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from bench import launches
from bench.ladder_rungs import RUNGS, Setup, build_model, setups
from bench.peak_memory import peak_memory
from bench.record import Part, one_line, parser
from bench.roof import DTYPES
from bench.step import CapturedStep, TrainingStep
from bench.timing import synchronize
from kernels import TORCH, select_backend
from smollm2.cli import run_command
from smollm2.config import SmolLM2Config
from smollm2.errors import UsageError
from smollm2.model import SmolLM2ForCausalLM

COMPARED_STEPS = 3
# Nats over the first steps, from those of the first row. Adam's first updates have the sign of a gradient,
# however small.
LOSS_TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 0.1}
BLOCK_SECONDS = 0.2  # a timed block holds as many steps as fit
# batch, length
ROWS = {
    ("tiny", "cpu"): (8, 128),
    ("135M", "cpu"): (2, 256),
    ("tiny", "cuda"): (32, 512),
    ("135M", "cuda"): (32, 512),
}
ROUNDS, SLOW_ROUNDS = 7, 3  # timed blocks of each rung; the second where a step takes seconds
COMPILE_SECONDS = 60.0  # the compiled rung of a real model needs about that: with less left it does not begin


class PhasedStep(TrainingStep):
    """A TrainingStep whose phases can be called one by one."""

    def __init__(
        self, model: SmolLM2ForCausalLM, forward: Callable[..., Any], fused: bool, own: bool
    ) -> None:
        super().__init__(model, forward, own=own)
        if not fused:
            # One parameter after the other; the learning rate as a number, which that form would otherwise
            # read back from the device.
            groups = [
                {"params": group["params"], "weight_decay": group["weight_decay"]}
                for group in self.optimizer.param_groups
            ]
            self.optimizer = torch.optim.AdamW(
                groups, lr=float(self.lr), betas=(0.9, 0.95), foreach=False, fused=False
            )

    def forward(self, ids: Tensor) -> Tensor:
        loss: Tensor = self._forward(ids, ids, None).loss
        return loss


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
    def begin(self, step: PhasedStep) -> None:
        """The first weights again, and an optimizer that has seen no step."""
        for parameter, first in zip(self._model.parameters(), self._first, strict=True):
            parameter.copy_(first)
        self._state.clear()
        step.optimizer.state = self._state


def build(
    setup: Setup,
    config: SmolLM2Config,
    dtype: torch.dtype,
    device: torch.device,
    compiler: str,
    shared: Shared | None = None,
) -> PhasedStep:
    """The step of a rung, from weights of its own, or from shared ones. compiler: that of torch.compile."""
    model = build_model(setup, config, dtype, device if shared is None else torch.device("meta"))
    if shared is not None:
        shared.lend(model)
    forward = torch.compile(model, backend=compiler, dynamic=False) if setup.compiled else model
    step = PhasedStep(model, forward, setup.fused_optimizer, setup.own_optimizer)
    if shared is not None:
        shared.begin(step)
    return step


def count_launches(step: PhasedStep, ids: Tensor) -> dict[str, int]:
    """Phase -> launches of an uncaptured step."""
    kept: list[Tensor] = []
    step.begin()
    phases = {
        "forward": lambda: kept.append(step.forward(ids)),
        "backward": lambda: kept[0].backward(),
        "update": step.update,
    }
    return {name: sum(launches.count(phase, ids.device).values()) for name, phase in phases.items()}


def time_phases(step: PhasedStep, ids: Tensor) -> dict[str, float]:
    """Phase -> seconds of an uncaptured step, each with a wait at its end."""
    kept: list[Tensor] = []
    step.begin()
    found = {}
    phases = {
        "forward": lambda: kept.append(step.forward(ids)),
        "backward": lambda: kept[0].backward(),
        "update": step.update,
    }
    for name, phase in phases.items():
        synchronize(ids.device)
        began = time.perf_counter()
        phase()
        synchronize(ids.device)
        found[name] = time.perf_counter() - began
    return found


@dataclass
class Running:
    """A rung that works: its step, and what it has been found to do."""

    step: PhasedStep
    call: Callable[[Tensor], Tensor]
    found: dict[str, Any]
    # a step takes longer than a block, and is timed phase by phase only: the waits between them are nothing
    # to it
    slow: bool
    blocks: list[float] = dataclasses.field(default_factory=list)
    phases: list[dict[str, float]] = dataclasses.field(default_factory=list)


def start(
    setup: Setup,
    config: SmolLM2Config,
    dtype: torch.dtype,
    ids: Tensor,
    compiler: str,
    shared: Shared | None = None,
) -> Running:
    """Builds a rung and takes its first steps."""
    began = time.perf_counter()
    step = build(setup, config, dtype, ids.device, compiler, shared)
    call: Callable[[Tensor], Tensor] = step
    losses: list[Tensor] = []
    if setup.captured:
        call = captured = CapturedStep(step, ids)
        losses += captured.first_losses
    for _ in range(COMPARED_STEPS - len(losses)):
        synchronize(ids.device)
        last = time.perf_counter()
        losses.append(call(ids))
    found: dict[str, Any] = {"backend": setup.backend.name, "losses": [float(loss) for loss in losses]}
    ended = time.perf_counter()
    found["first_steps_seconds"] = round(ended - began, 2)
    return Running(
        step,
        call,
        found,
        slow=not setup.captured and not setup.compiled and ended - last > 10 * BLOCK_SECONDS,
    )


def measure(running: dict[str, Running], ids: Tensor, rounds: int, left: Callable[[], float]) -> None:
    """Blocks of whole steps, and one step phase by phase, of each rung in turns; adds what that gives to
    `found`.
    """
    for turn in range(rounds):
        if turn and left() < 0:
            break
        for rung in running.values():
            if "failed" not in rung.found:
                with failure_noted(rung.found, "failed"):
                    time_block(rung, ids)
    for rung in running.values():
        if "failed" in rung.found:
            continue
        seconds = statistics.median(rung.blocks)
        rung.found |= {
            "step_ms": round(1e3 * seconds, 3),
            "tokens_per_second": round(ids.numel() / seconds, 1),
            "rounds": len(rung.blocks),
        }
        rung.found["spread"] = round((max(rung.blocks) - min(rung.blocks)) / seconds, 3)
        if rung.phases:
            rung.found["phases_ms"] = {
                name: round(1e3 * statistics.median(one[name] for one in rung.phases), 3)
                for name in rung.phases[0]
            }


def time_block(rung: Running, ids: Tensor) -> None:
    """As many steps as fit into a block, and the phases of one."""
    if rung.slow:
        rung.phases.append(time_phases(rung.step, ids))
        rung.blocks.append(sum(rung.phases[-1].values()))
        return
    count = 1 if not rung.blocks else max(1, int(BLOCK_SECONDS / rung.blocks[0]))
    synchronize(ids.device)
    began = time.perf_counter()
    for _ in range(count):
        rung.call(ids)
    synchronize(ids.device)
    rung.blocks.append((time.perf_counter() - began) / count)
    if rung.call is rung.step:
        rung.phases.append(time_phases(rung.step, ids))


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
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        with suppress(RuntimeError):  # the GPU may be lost, as the rows will say
            torch.cuda.set_stream(torch.cuda.default_stream())
            torch.cuda.empty_cache()


def distances(found: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Rung -> largest distance of its first losses from those of the lowest rung that ran."""
    rows = {name: row["losses"] for name, row in found.items() if "losses" in row}
    base: list[float] = next(iter(rows.values()), [])
    return {name: max(abs(a - b) for a, b in zip(losses, base, strict=True)) for name, losses in rows.items()}


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
        f"{phases[phase]:{width}.2f}" if phases else f"{'':{width}}"
        for phase, width in (("forward", 10), ("backward", 10), ("update", 9))
    )
    memory = f"{row['peak_mb']:10,.1f}" if "peak_mb" in row else f"{'':10}"
    times = " + ".join(str(count) for count in counted.values())
    return (
        f"{name:22}{row['step_ms']:10.2f}"
        f"{row['tokens_per_second']:12,.0f}{base / row['step_ms']:7.2f}{cells}{memory}  {times}"
    )


def main(argv: Sequence[str]) -> int:
    arguments = parser("ladder", "What each optimisation of a training step is worth, one change a row.")
    arguments.add_argument(
        "--size", choices=("tiny", "135M"), help="model (default: 135M on a GPU, tiny on a CPU)"
    )
    arguments.add_argument(
        "--dtype", choices=("fp32", "bf16"), help="of the activations (default: bf16 on a GPU, fp32 on a CPU)"
    )
    arguments.add_argument(
        "--backend",
        default="auto",
        help="where the fused operations come from, as for every command (default auto)",
    )
    arguments.add_argument(
        "--rung",
        action="append",
        choices=[rung.name for rung in RUNGS],
        help="only this one; may be repeated",
    )
    arguments.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="the compiled rung too (default: yes, but for 135M on a CPU)",
    )
    arguments.add_argument(
        "--rounds",
        type=int,
        metavar="N",
        help=f"timed blocks of each rung (default {ROUNDS}; for 135M on a CPU {SLOW_ROUNDS})",
    )
    arguments.add_argument(
        "--alone", action="store_true", help="on a CPU too, each rung by itself, freed before the next"
    )
    options = arguments.parse_args(argv)
    if options.rounds is not None and options.rounds < 1:
        raise UsageError(f"--rounds: expected at least 1, got {options.rounds}")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler announces itself otherwise
    part = Part("ladder", options, cpu=True)
    cuda = part.device.type == "cuda"
    size = "tiny" if part.tiny else options.size or ("135M" if cuda else "tiny")
    config = part.model(size)
    batch, length = (1, 8) if part.tiny else ROWS[size, part.device.type]
    dtype = DTYPES[options.dtype or ("bf16" if cuda else "fp32")]
    best = select_backend(
        "torch" if part.tiny and options.backend == "auto" else options.backend, part.device
    )
    ids = part.ids(config, batch, length)
    short = str(dtype).removeprefix("torch.")
    large = size == "135M" and not cuda
    rounds = 1 if part.tiny else options.rounds or (SLOW_ROUNDS if large else ROUNDS)
    compiled = not large if options.compile is None else options.compile
    alone, shared = cuda or options.alone, None if cuda else Shared(config)
    part.save(
        model=size,
        batch=batch,
        length=length,
        dtype=short,
        backend=best.name,
        threads=torch.get_num_threads(),
    )
    print(
        f"{size} model, {batch} x {length} tokens, {short}, fused operations from {best.name}, {part.device}",
        flush=True,
    )

    print(HEADER, flush=True)
    rows: dict[str, dict[str, Any]] = {}
    chosen = {
        name: setup for name, setup in setups(best, cuda).items() if not options.rung or name in options.rung
    }
    for names in [[name] for name in chosen] if alone else [list(chosen)]:  # what is in memory at one time
        running: dict[str, Running] = {}
        for name in names:
            setup, row = chosen[name], rows.setdefault(name, {})
            if name == "graph capture" and not cuda:
                row["failed"] = "needs a GPU"
            elif name == "optimizer + copies" and not setup.own_optimizer:
                row["failed"] = "needs Triton kernels"
            elif setup.compiled and not compiled:
                row["failed"] = "left out: compiles for minutes; add --compile"
            elif part.left() < (COMPILE_SECONDS if setup.compiled and not part.tiny else 0):
                row["failed"] = "no time was left"
            else:
                with failure_noted(row, "failed"):
                    running[name] = start(
                        setup, config, dtype, ids, "aot_eager" if part.tiny else "inductor", shared
                    )
                    rows[name] = running[name].found
            gc.collect()
            part.save(rungs=rows)
        measure(running, ids, rounds, part.left)
        part.save(rungs=rows)
        examine(running, [name for name, setup in chosen.items() if setup.compiled], ids)
        running.clear()
        apart = distances(rows)
        part.save(rungs=rows, loss_distance=apart)
        base = next((row["step_ms"] for row in rows.values() if "step_ms" in row), 0.0)
        for name in names:
            print(show(name, rows[name], base), flush=True)
        if alone:
            free(part.device)
    far = {name: distance for name, distance in apart.items() if not distance <= LOSS_TOLERANCE[dtype]}
    print(f"first losses are within {max(apart.values(), default=0.0):.1e} nats of the first row's")
    for name, distance in far.items():
        print(f"{name}: first losses are {distance:.1e} nats from the first row's: TOO FAR")
    part.finish()
    return 1 if far else 0


if __name__ == "__main__":
    sys.exit(run_command(main))
