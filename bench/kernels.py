"""`python -m bench.kernels`: every operation and the optimizer beside what one would use instead, and how far
from the roof.

For 32 x 512 tokens of the 135M model: median time by CUDA graph replay with a cold L2, bytes or operations
per second, percent of the roof, time of a plain call, and of a plain call through autograd forward and
backward. The roof is measured in the same run: the best bandwidth of a copy, of reading and of an update in
place, or the rate of a large matrix product. A variant is compared with the reference before it is timed, and
not timed if it is wrong. One that no graph can hold is timed by plain calls, its row says "captured": false.
A library that cannot be measured here is named with its version and the reason.

What torch.compile makes takes longer to compile than all else to measure, and comes in a second pass over all
operations ("pass": 2), so that the first one is whole when time runs out. Variants of one pass are timed in
turns. Ours is timed in both: rows of the second pass say as "triton_us" what it took in turns with them, and
"us" over "triton_us" is the ratio to trust.
Then kernel launches and bytes of one layer and one step.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
import torch._functorch.config

from bench import launches, roof, timing, work
from bench.case import Case, Shapes, Variant, checked, exact_results
from bench.long_attention import document_attention, long_attention
from bench.ops import MAKERS, PEER_OF, cases
from bench.peak_memory import peak_memory
from bench.peers import status
from bench.record import Part, digits, one_line, parser
from bench.roof import DTYPES
from bench.weight_ops import CHUNKS, optimizer_step
from kernels import Backend, select_backend
from smollm2.cli import run_command
from smollm2.config import SmolLM2Config
from smollm2.errors import UsageError
from smollm2.layers import SmolLM2Block, rotary_tables

FULL = (32, 512)  # rows and tokens a row of a training step
LENGTHS = (512, 2048, 8192)  # tokens a row, for attention
SET_BYTES = 20e9  # of all inputs, outputs and gradients that are held for one operation
OURS = "triton"
COMPILED = ("compile", "flex", "flex decode")  # by torch.compile: the second pass
# at toy size, where the first chunk holds all tokens: measured at full size only
ALIKE = {f"{OURS} {chunk}" for chunk in CHUNKS[1:]}
# What is measured first, because a training step spends most on it or there is a choice to make.
STEP = (
    "attention", "linear_cross_entropy", "mlp", "swiglu", "add_rms_norm", "adamw", "tied_embedding",
    "rope_qkv",
)  # fmt: skip


def measure(
    case: Case,
    shapes: Shapes,
    bandwidth: float,
    rate: float,
    tiny: bool,
    names: Collection[str] | None = None,
) -> list[dict[str, Any]]:
    """One row per phase and variant; a variant that fails or is wrong gets a row that says so. names: these
    variants only.
    """
    # Many sets, so that what lies between two replays costs little, and that a set is cold when its turn
    # comes again.
    whole = case.cost.forward + case.cost.backward
    most = SET_BYTES / len(case.variants) / max(1, whole.bytes)
    sets = 1 if tiny else max(1, min(24, round(4e-4 / case.cost.forward.floor(bandwidth, rate)), int(most)))
    truth = exact_results(case, shapes.dtype)
    ready: dict[str, Variant] = {}
    errors: dict[str, float | None] = {}
    rows: list[dict[str, Any]] = []
    for name in case.variants if names is None else [name for name in case.variants if name in names]:
        try:
            ready[name], _, errors[name] = checked(case, name, sets, truth, shapes.dtype)
        except Exception as failure:  # noqa: BLE001 - a result like any other
            rows.append({"op": case.op, "variant": name, "failed": one_line(failure)})
    del truth
    for phase in next(iter(ready.values())).phases() if ready else ():
        replays, captured = {}, {}
        for name, variant in ready.items():
            prepare = variant.phases()[phase]
            try:
                replays[name], captured[name] = timing.replayable_or_plain(prepare, shapes.device)
            except Exception as failure:  # noqa: BLE001 - as above
                rows.append({"op": case.op, "phase": phase, "variant": name, "failed": one_line(failure)})
        samples = timing.alternate(replays, shapes.device, calls=sets, rounds=1 if tiny else 30)
        del replays
        todo = case.cost.phase(phase)
        for name, sample in samples.items():
            call = ready[name].call if phase == "forward" else ready[name].through_autograd
            plain = timing.eager(call, shapes.device, *((0.001, 1) if tiny else (0.02, 5)))
            row = {
                "op": case.op, "phase": phase, "variant": name, "us": round(sample.us, 2),
                "spread": round(sample.spread, 3), "gb_per_s": round(todo.bytes / sample.us / 1e3, 1),
                "tflops": round(todo.flops / sample.us / 1e6, 3),
                "percent_of_roof": round(100 * todo.floor(bandwidth, rate) * 1e6 / sample.us, 1),
                "plain_us" if phase == "forward" else "autograd_us": round(plain.us, 1),
                "captured": captured[name], "error": errors[name],
            }  # fmt: skip
            if phase != "forward":
                row["peak_mb"] = round(peak_memory(call, shapes.device) / 1e6, 3)
            rows.append(row)
    return rows


def measure_compiled(
    case: Case, shapes: Shapes, bandwidth: float, rate: float, tiny: bool
) -> list[dict[str, Any]]:
    """The rows of what torch.compile makes, each with what ours took in turns with it."""
    rows = measure(case, shapes, bandwidth, rate, tiny, {OURS, *COMPILED})
    ours = {row["phase"]: row["us"] for row in rows if row["variant"] == OURS and "us" in row}
    for row in rows:
        if "us" in row and row["phase"] in ours:
            row["triton_us"] = ours[row["phase"]]
    return [row for row in rows if row["variant"] != OURS]


def every_case(shapes: Shapes, backend: Backend, compiler: str, tiny: bool) -> list[Case]:
    """All operations and the optimizer, attention also over longer rows and within documents; what a training
    step spends most on first.
    """
    found = {case.op: case for case in (*cases(shapes, backend, compiler), optimizer_step(shapes))}
    lengths = [length // 64 for length in LENGTHS[:2]] if tiny else LENGTHS
    longer = [long_attention(shapes, backend, compiler, length) for length in lengths[1:]]
    documents = [document_attention(shapes, backend, compiler, length) for length in lengths]
    first = [found.pop(op) for op in STEP]
    return [*first, *documents, *longer, *found.values()]


def kernel_status(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """`peer_status` of the rows: which library was timed in at least one of them, and why each other
    was not.
    """
    outcomes: dict[str, list[str]] = {peer: [] for peer in PEER_OF.values()}
    for row in rows:
        if row["variant"] in PEER_OF:
            outcomes[PEER_OF[row["variant"]]].append(row.get("failed", ""))
    return status.peer_status(outcomes)


def show(rows: list[dict[str, Any]]) -> str:
    """The rows of one operation as a table."""
    lines, graphs = [], any(row.get("captured") for row in rows)
    for row in rows:
        label = f"{row['op']:26}{row.get('phase', ''):17}{row['variant']:14}"
        if "failed" in row:
            lines.append(f"{label}{row['failed']}")
            continue
        plain = row.get("plain_us", row.get("autograd_us"))
        accuracy = "" if row["error"] is None else f"{row['error']:.1e}"
        beside = f"{row['triton_us']:10.1f}" if "triton_us" in row else ""
        peak = f"{row['peak_mb']:10,.1f}" if "peak_mb" in row else ""
        plainly = "  not captured" if graphs and not row["captured"] else ""
        lines.append(
            f"{label}{row['us']:10.1f}{100 * row['spread']:6.1f}%{row['gb_per_s']:9,.0f}{row['tflops']:9.1f}"
            f"{row['percent_of_roof']:8.1f}%{plain:11.1f}{peak:10}  {accuracy:7}{beside:10}{plainly}"
        )
    return "\n".join(line.rstrip() for line in lines)


HEADER = (
    f"{'operation':26}"
    f"{'phase':17}{'variant':14}{'us':>10}{'spread':>7}{'GB/s':>9}"
    f"{'TFLOP/s':>9}{'of roof':>9}{'eager us':>11}"
    f"{'peak MB':>10}  {'error':7}{'ours us':>10}\n"
    "eager us: a plain call; in rows of a backward pass a plain call through autograd, forward and backward\n"
    "peak MB: the most that this call through autograd holds at one time, beyond its inputs\n"
    "ours us: in turns with what torch.compile makes, in the second pass"
)


def layer_launches(shapes: Shapes, backend_name: str) -> dict[str, Any]:
    """Kernel launches of one block of the model in training, forward and backward: fp32 parameters, 16-bit
    activations.
    """
    backend = select_backend(backend_name, shapes.device)
    # the casts of the weights are launches too
    dtype = shapes.dtype if shapes.device.type == "cuda" else torch.float16
    size = (shapes.batch, shapes.length, shapes.config.hidden_size)
    with torch.device(shapes.device):
        block = SmolLM2Block(shapes.config, backend)
        for norm in (block.input_layernorm, block.post_attention_layernorm):
            norm.weight.data.fill_(1.0)
        x, residual, *upstream = (torch.randn(size).to(dtype).requires_grad_() for _ in range(4))
    cos, sin = (table[: shapes.length] for table in rotary_tables(shapes.config, shapes.device))
    outputs = block(x, residual, cos, sin)
    wanted = [x, residual, *block.parameters()]
    calls: dict[str, Callable[[], object]] = {
        "forward": lambda: block(x, residual, cos, sin),
        "backward": lambda: torch.autograd.grad(outputs, wanted, upstream, retain_graph=True),
    }
    found = {}
    for phase, call in calls.items():
        names = launches.count(call, shapes.device)
        ours = launches.triton_part(names)
        found[phase] = {"launches": names.total(), "triton": ours, "names": dict(names.most_common())}
    return found


def work_table(config: SmolLM2Config) -> dict[str, dict[str, list[int]]]:
    """Bytes and operations, forward and backward, of a layer's operations and of a step's parts, with 16-bit
    activations.
    """

    def plain(costs: dict[str, work.Cost]) -> dict[str, list[int]]:
        return {
            name: [cost.forward.bytes, cost.forward.flops, cost.backward.bytes, cost.backward.flops]
            for name, cost in costs.items()
        }

    return {"layer": plain(work.layer(config, *FULL, 2)), "step": plain(work.step(config, *FULL, 2))}


def show_work(table: dict[str, dict[str, list[int]]], unit: str) -> str:
    """The work of a layer or a step, in MB and GFLOP."""
    lines = [f"{unit + ': least work':28}{'forward MB':>12}{'GFLOP':>10}{'backward MB':>13}{'GFLOP':>10}"]
    entries = table[unit]
    total = [sum(column) for column in zip(*entries.values(), strict=True)]
    for name, numbers in [*entries.items(), ("total", total)]:
        cells = zip(numbers, (12, 10, 13, 10), (1e6, 1e9, 1e6, 1e9), strict=True)
        lines.append(f"  {name:26}" + "".join(f"{done / unit:{width},.1f}" for done, width, unit in cells))
    return "\n".join(lines)


def main(argv: Sequence[str]) -> int:
    arguments = parser("kernels", "Times every operation beside what one would use instead.")
    add = arguments.add_argument
    add("--op", action="append", choices=(*MAKERS, "adamw"), help="only this operation; may be repeated")
    default = "default: bf16, and fp32 on a CPU (Triton's interpreter, as shipped, has no bf16 product)"
    add("--dtype", choices=tuple(DTYPES), help=default)
    add("--model", default="135M", help="preset whose shapes are used")
    options = arguments.parse_args(argv)
    part = Part("kernels", options)
    if part.device.type == "cpu" and options.dtype == "bf16":
        raise UsageError("--dtype bf16: Triton's interpreter cannot multiply bfloat16; use fp32 or fp16")
    dtype = options.dtype or ("fp32" if part.device.type == "cpu" else "bf16")
    full = SmolLM2Config.preset(options.model)
    shapes = Shapes(part.model(options.model), *((1, 8) if part.tiny else FULL), DTYPES[dtype], part.device)
    torch._functorch.config.donated_buffer = False  # a compiled backward pass may otherwise run only once

    bandwidths = roof.bandwidths(part.device, part.tiny)
    rate = roof.matmul_rate(shapes.dtype, part.device, part.tiny)
    bandwidths["memory"] = bandwidth = max(bandwidths.values())
    speeds = {f"{name}_gb_per_s": digits(speed / 1e9) for name, speed in bandwidths.items()}
    part.save(
        model=options.model, dtype=dtype, batch=shapes.batch, length=shapes.length,
        roof={**speeds, "matmul_tflops": digits(rate / 1e12)}, rows=[],
    )  # fmt: skip
    reached = f"roof {bandwidth / 1e9:,.0f} GB/s, {rate / 1e12:,.1f} TFLOP/s"
    print(f"{shapes.batch} x {shapes.length} tokens, {dtype}; {reached}")
    print(HEADER, flush=True)

    part.save(work=work_table(full))
    backend = select_backend("triton", part.device)
    made = every_case(shapes, backend, "aot_eager" if part.tiny else "inductor", part.tiny)
    chosen = [case for case in made if not options.op or case.op.partition(" ")[0] in options.op]
    compiled = [case for case in chosen if case.variants.keys() & {*COMPILED}]
    measured_later = {*COMPILED, *(ALIKE if part.tiny else ())}
    left_out = []
    for number, case in [*((1, case) for case in chosen), *((2, case) for case in compiled)]:
        if part.left() < 0:
            left_out.append(case.op if number == 1 else f"{case.op}, compiled")
            continue
        given = (case, shapes, bandwidth, rate, part.tiny)
        try:
            if number == 1:
                rows = measure(*given, case.variants.keys() - measured_later)
            else:
                rows = measure_compiled(*given)
        except Exception as failure:  # noqa: BLE001 - a result like any other
            rows = [{"op": case.op, "variant": "reference", "failed": one_line(failure)}]
        print(show(rows), flush=True)
        part.save(rows=[*part.data["rows"], *({**row, "pass": number} for row in rows)])
        gc.collect()
        torch.compiler.reset()
    if left_out:
        print(f"no time was left for {'; '.join(left_out)}")
        part.save(left_out=left_out)
    part.save(peers=kernel_status(part.data["rows"]))
    print(*status.not_measured(part.data["peers"]), sep="\n")

    print()
    counted_launches = {}
    for name in ("torch", "triton"):
        try:
            counted_launches[name] = layer_launches(shapes, name)
        except Exception as failure:  # noqa: BLE001 - what was timed stays
            print(f"launches of {name} not counted: {one_line(failure)}")
    part.save(launches=counted_launches)
    for name, phases in counted_launches.items():
        counted = ", ".join(
            f"{phase} {one['launches']} ({one['triton']} of ours)" for phase, one in phases.items()
        )
        print(f"launches per layer, {name}: {counted}")
    print(f"{options.model} at {FULL[0]} x {FULL[1]} tokens, 16-bit activations, from the shapes alone:")
    print(show_work(part.data["work"], "layer"), show_work(part.data["work"], "step"), sep="\n")
    if not part.tiny:
        floor = work.step_floor(full, *FULL, 2, bandwidth, rate)
        part.save(step_floor_ms=round(floor * 1e3, 3))
        print(f"floor of a step at this roof: {floor * 1e3:.2f} ms, {shapes.tokens / floor:,.0f} tok/s")
    return part.finish()


if __name__ == "__main__":
    sys.exit(run_command(main))
