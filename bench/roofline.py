"""`python -m bench.roofline`: what this machine can do, how far a training step and a decoded token are from
it, and what loses most.

    roof     bandwidth of a copy, of reading, of an update in place; the rate of a large matrix product per
             dtype, by torch's library
    floor    bytes and operations of every operation (bench/work.py) at that roof: what no implementation can
             go below
    parts    every operation measured alone (bench/probes.py), per backend: torch, and triton where it runs
             natively
    whole    the step and the token themselves. What the parts do not explain is "between": the host,
             launches, and what has no row

Bandwidth counts bytes read and bytes written, over buffers far larger than the caches. The roof of a step is
the best of the three (a CPU reads what a copy is about to overwrite, which the count leaves out); that of a
token is reading, which is all that it does with memory. The product is of random numbers, because zeros run
faster than data.
The floor supposes that inputs come from memory: a CPU's last-level cache may hold what the operation before
has written.
"""

from __future__ import annotations

import math
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from bench import timing, work
from bench.case import Case, Shapes
from bench.probes import measure_all, step_cases, token_cases
from bench.record import Part, digits, one_line, parser, rounded
from bench.roof import DTYPES, bandwidths, matmul_rate
from bench.step import CapturedStep, TrainingStep, training_model
from kernels import Backend, select_backend
from smollm2.cli import resolve_dtype, run_command
from smollm2.engine.eager import Engine
from smollm2.engine.native import find_library
from smollm2.engine.select import select_engine
from smollm2.errors import UsageError
from smollm2.model import SmolLM2ForCausalLM

SIZES = {"cuda": (32, 512), "cpu": (2, 512)}  # rows and tokens a row of a training step
LISTED = 10  # lines of "next to optimise"


def environment(device: torch.device) -> dict[str, Any]:
    """What the device says about itself."""
    if device.type != "cuda":
        return {"threads": torch.get_num_threads()}
    properties = torch.cuda.get_device_properties(device)
    found: dict[str, Any] = {
        "memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "capability": f"{properties.major}.{properties.minor}",
    }
    if shutil.which("nvidia-smi"):
        names = "driver_version,power.limit,clocks.max.sm,clocks.max.mem,temperature.gpu"
        command = ["nvidia-smi", f"--query-gpu={names}", "--format=csv,noheader"]
        answer = subprocess.run(command, capture_output=True, text=True, timeout=30)
        if answer.returncode == 0:
            values = [value.strip() for value in answer.stdout.splitlines()[0].split(",")]
            found |= dict(zip(names.split(","), values, strict=True))
    return found


# the whole


def whole_step(shapes: Shapes, backend: Backend, rounds: int, captured: bool = False) -> float:
    """Seconds of an optimizer step, as plain calls or as one CUDA graph."""
    step = TrainingStep(training_model(shapes.config, backend, shapes.device, shapes.dtype))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(shapes.config.vocab_size, (shapes.batch, shapes.length), generator=generator)
    ids = ids.to(shapes.device)
    call = CapturedStep(step, ids) if captured else step
    return timing.median_seconds(lambda: call(ids), shapes.device, rounds)


@torch.inference_mode()
def whole_token(
    shapes: Shapes,
    keys: int,
    backend: Backend,
    rounds: int,
    captured: bool = False,
    compiled: bool = False,
) -> float:
    """Seconds of a decode step over `keys` keys: operation by operation, as a CUDA graph, or by the compiled
    step. Raises UsageError when there is none.
    """
    with torch.inference_mode(False), torch.device(shapes.device):
        model = SmolLM2ForCausalLM(shapes.config, backend).to(shapes.dtype).eval()
    engine = Engine(model)
    if compiled:
        if find_library() is None:
            raise UsageError("there is no compiled step; python -m smollm2.compile makes it")
        engine = select_engine(model)
    cache = engine.allocate(shapes.batch, keys)
    tokens = torch.zeros(shapes.batch, 1, dtype=torch.int64, device=shapes.device)

    def step() -> object:
        cache.lengths.fill_(keys - 1)
        cache.longest = keys - 1
        return engine.decode(tokens, cache)

    call = timing.replayable(lambda: step, shapes.device) if captured else step
    return timing.median_seconds(call, shapes.device, rounds)


# what it comes to


def show_parts(title: str, parts: dict[str, dict[str, float]], whole: dict[str, float]) -> str:
    """The table of a step or a token: milliseconds, and percent of the floor reached."""
    backends = list(dict.fromkeys(name for row in parts.values() for name in row if name != "floor"))
    names = "".join(f"{name + ' ms':>14}{'of floor':>10}" for name in backends)
    lines = [f"\n{title}", f"  {'':16}{'floor ms':>11}{names}"]
    total = {name: sum(row.get(name, math.nan) for row in parts.values()) for name in ("floor", *backends)}
    for name, row in [*parts.items(), ("sum of parts", total)]:
        cells = "".join(
            f"{row[b]:14.3f}{100 * row['floor'] / row[b]:9.1f}%" if b in row else f"{'-':>14}{'':10}"
            for b in backends
        )
        lines.append(f"  {name:16}{row['floor']:11.3f}{cells}")
    for name, seconds in whole.items():
        reached = 100 * total["floor"] / 1e3 / seconds
        lines.append(f"  whole, {name}: {1e3 * seconds:.3f} ms, {reached:.1f} % of the floor")
    return "\n".join(lines)


def show_losses(title: str, rows: list[dict[str, Any]]) -> str:
    """The list "next to optimise"."""
    lines = [f"  next to optimise, {title}: milliseconds above the floor"]
    for rank, row in enumerate(rows[:LISTED], 1):
        what = f"{row['operation']} {row['phase']}".strip()
        split = f"({row['ms']:.3f} of which {row['floor_ms']:.3f} must be)"
        lines.append(f"  {rank:3}. {what:36}{row['loses_ms']:11.3f}   {split}")
    return "\n".join(lines)


def report(
    part: Part, unit: str, title: str, items: dict[str, work.Item], cases: dict[str, dict[str, Case]],
    roof: tuple[float, float], wholes: dict[str, Callable[[], float]],
) -> None:  # fmt: skip
    """Measures the parts and the whole of a step or a token, prints and saves them. wholes: name -> a call
    that gives its seconds.
    """
    measured, missing = measure_all(items, cases, part, roof)
    seconds = {}
    for name, whole in wholes.items():
        try:
            if part.left() < 0:
                raise UsageError("no time was left")
            seconds[name] = whole()
        except UsageError as reason:
            missing.append(f"whole, {name}: {reason}")
        except Exception as failure:  # noqa: BLE001 - a result like any other
            missing.append(f"whole, {name}: {one_line(failure)}")
    parts = work.by_part(items, measured, roof)
    print(show_parts(title, parts, seconds))
    for line in missing:
        print(f"  not measured: {line}")
    # Parts are timed without the host where there is a GPU, and so is the whole that they are compared with.
    lists = {
        name: work.losses(items, measured, name, seconds.get(f"{name}+graph", seconds.get(name)), roof)
        for name in cases
    }
    best = list(cases)[-1]  # what "auto" takes: the one to improve
    print(show_losses(f"{unit}, {best}", lists[best]), flush=True)
    part.save(**{unit: rounded({
        "parts_ms": parts, "floor_ms": sum(row["floor"] for row in parts.values()),
        "operations_ms": {name: {of: in_ms(row) for of, row in measured[name].items()} for name in items},
        "floors_ms": {name: in_ms(item.floors(*roof)) for name, item in items.items()},
        "whole_ms": in_ms(seconds), "next": lists, "not_measured": missing,
    })})  # fmt: skip


def in_ms(seconds: dict[str, float]) -> dict[str, float]:
    return {name: 1e3 * value for name, value in seconds.items()}


def main(argv: Sequence[str]) -> int:
    description = "The roof of this machine, and how far a training step and a decoded token are from it."
    arguments = parser("roofline", description)
    add = arguments.add_argument
    add("--model", default="135M", help="preset whose shapes are used")
    activations = "of the activations; default: bf16 where the device has it"
    add("--dtype", choices=("fp32", "bf16"), help=activations)
    seen = "keys that a decoded token sees (default 512)"
    add("--context", type=int, default=512, metavar="N", help=seen)
    add("--roof-only", action="store_true", help="bandwidth and matmul rate, nothing else")
    options = arguments.parse_args(argv)
    if options.context < 2:
        raise UsageError(f"--context: expected at least 2 keys, got {options.context}")
    part = Part("roofline", options, cpu=True)
    part.save(environment=environment(part.device))
    measured = bandwidths(part.device, part.tiny)
    part.save(**{f"{name}_gb_per_s": digits(bandwidth / 1e9) for name, bandwidth in measured.items()})
    rates = {}
    for name, dtype in DTYPES.items():
        rates[name] = digits(matmul_rate(dtype, part.device, part.tiny) / 1e12)
        part.save(matmul_tflops=rates)
    shown = ", ".join(f"{name} {rate:,.4g}" for name, rate in rates.items())
    moved = ", ".join(f"{name} {bandwidth / 1e9:,.4g}" for name, bandwidth in measured.items())
    print(f"{moved} GB/s; matmul {shown} TFLOP/s", flush=True)
    if options.roof_only:
        return part.finish()

    config = part.model(options.model)
    dtype = DTYPES[options.dtype] if options.dtype else resolve_dtype("auto", part.device)
    short = next(name for name, known in DTYPES.items() if known == dtype)
    batch, length = (1, 8) if part.tiny else SIZES[part.device.type]
    keys = min(options.context, 8 if part.tiny else config.max_position_embeddings)
    cuda = part.device.type == "cuda"
    backends = [select_backend("torch"), *([select_backend("triton", part.device)] if cuda else [])]
    roof = max(measured.values()), rates[short] * 1e12
    reading = measured["read"], rates[short] * 1e12
    rounds = 1 if part.tiny else 3
    shapes_of = "a tiny model" if part.tiny else options.model
    part.save(model=options.model, dtype=short, batch=batch, length=length, context=keys)

    shapes, row = (Shapes(config, *size, dtype, part.device) for size in ((batch, length), (1, 1)))
    steps: dict[str, Callable[[], float]] = {}
    tokens: dict[str, Callable[[], float]] = {}
    for backend in backends:
        step = partial(whole_step, shapes, backend, rounds)
        token = partial(whole_token, row, keys, backend, 10 * rounds)
        steps[backend.name], tokens[backend.name] = step, token
        if cuda:
            steps[f"{backend.name}+graph"] = partial(step, captured=True)
            tokens[f"{backend.name}+graph"] = partial(token, captured=True)
        else:
            tokens["compiled"] = partial(token, compiled=True)
    with torch.device(part.device):
        model = SmolLM2ForCausalLM(config, "torch").train()
    report(
        part, "step", f"a training step of {shapes_of}, {batch} x {length} tokens, {short}, fp32 parameters",
        work.step_items(config, batch, length, dtype.itemsize),
        {backend.name: step_cases(shapes, backend, model) for backend in backends}, roof, steps,
    )  # fmt: skip
    del model
    report(
        part, "token", f"a decoded token of {shapes_of}, batch 1, {keys} keys, {short}",
        work.token_items(config, 1, keys, dtype.itemsize),
        {backend.name: token_cases(row, keys, backend) for backend in backends}, reading, tokens,
    )  # fmt: skip
    return part.finish()


if __name__ == "__main__":
    sys.exit(run_command(main))
