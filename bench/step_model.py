"""`python -m bench.step_model [TRACE]`: one optimizer step of this code, launch by launch: what a GPU should
take for it, and what it took. With --decode a step of generation, predicted by bench/decode_model.py.

The step is that of the 135M model at 32 x 512 in bf16 on an H100, which has been measured once, at an earlier
commit. What this code would launch is recorded without a GPU (bench/step_record.py). A line of the step that
was measured then is predicted to take the time that it took, scaled by its FLOPs if it is a product, else by
its bytes; a line that is new, what its bytes take at three quarters of the memory's rate. A trace
(`bench.train_step --variant triton --traces DIR`) of this code is held against that. Every kernel of a trace
belongs to one line, found from its own name or, for the products of torch's library, from the kernel of ours
before it.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.record import write_json
from smollm2.cli import Parser, run_command
from smollm2.errors import LoadError

LAYERS = 30
RESULTS = Path(__file__).with_name("results") / "h100"
# the step that was measured, and its work
MEASURED, RECORDED = RESULTS / "trace-triton.json", RESULTS / "launches-triton.json"
# bytes/s: three quarters of the fastest read on that card, which is what rope and norm reached
MEMORY_RATE = 3.056e12 * 0.75
PRODUCT_RATE = 560e12  # FLOP/s of a product that has no line then: the mean of those that have


@dataclass
class Work:
    """What the launches of a line move and compute in a step."""

    launches: int = 0
    bytes: float = 0.0
    flops: float = 0.0


GROUPS = {
    "products of the body": ("qkv", "o", "gate_up", "down",
        *(f"{name} d{of}" for name in ("down", "gate_up", "o", "qkv") for of in "WX")),
    "norm, rope, swiglu": (
        "add_rms_norm forward", "rope forward", "swiglu forward", "swiglu backward", "rms_norm dx",
        "rms_norm dw", "rope backward",
    ),
    "attention": ("attention forward", "attention dq", "attention dk, dv"),
    "head": ("head: products", "head: softmax gradient, scaling"),
    "casts": ("casts of weights", "casts of gradients"),
    "the rest": ("embedding", "clip, AdamW", "other"),
}  # fmt: skip
OWN = {
    "_rms_norm_fwd_kernel": "add_rms_norm forward", "_attention_fwd_kernel": "attention forward",
    "_swiglu_fwd_kernel": "swiglu forward", "_swiglu_bwd_kernel": "swiglu backward",
    "_rms_norm_bwd_dx_kernel": "rms_norm dx", "_rms_norm_bwd_dw_kernel": "rms_norm dw",
    "_attention_bwd_dq_kernel": "attention dq", "_attention_bwd_dkv_kernel": "attention dk, dv",
    "_softmax_gradient_kernel": "head: softmax gradient, scaling",
}  # fmt: skip
# Parts of the names of kernels, of torch's operations where a step was recorded.
PRODUCTS = ("nvjet", "gemm", "cutlass", "xmma", "mm")
EMBEDDING = (
    "gather", "cub", "segment", "compute_grad_weight", "sum_and_scatter", "arange", "embedding", "sort",
)  # fmt: skip
UPDATE = (
    "multi_tensor_apply", "lpnorm", "fused_adamw", "foreach", "vector_norm", "adamw", "_sum_of_squares",
    "_norm_kernel", "_scalars",
)  # fmt: skip
CASTS = ("copy_kernel", "_to_copy")


def lines(names: Iterable[str]) -> Iterator[str]:
    """The kernels of a step with backend triton, in order -> the line of each, or "other"."""
    backward = False
    norms, products, after, last = 0, 0, "", "other"
    for name in names:
        if name in OWN or name == "_rope_kernel":
            last = OWN.get(name, f"rope {'backward' if backward else 'forward'}")
            backward = backward or name == "_softmax_gradient_kernel"
            norms += name in ("_rms_norm_fwd_kernel", "_rms_norm_bwd_dw_kernel")
            after, products = last, 0
        elif "splitKreduce" in name:
            pass  # the end of the product before it
        elif any(part in name for part in UPDATE):
            last = "clip, AdamW"
        elif any(part in name for part in EMBEDDING):
            last = "embedding"
        elif any(part in name for part in PRODUCTS):
            last, products = _product(after, norms, products), products + 1
        elif any(part in name for part in CASTS):
            last = "casts of gradients" if backward else "casts of weights"
        else:
            last = after if after == OWN["_softmax_gradient_kernel"] else "other"
        yield last


def _product(after: str, norms: int, products: int) -> str:
    """Which product follows the kernel `after`, the `norms`-th of its kind; of two in a backward pass the
    first is the weight's.
    """
    of = "dX" if products else "dW"
    if after == "add_rms_norm forward":
        return "head: products" if norms == 2 * LAYERS + 1 else "qkv" if norms % 2 else "gate_up"
    if after == "rms_norm dw":  # counted on from the forward pass: the final norm comes first
        return f"{'o' if norms % 2 else 'down'} {of}"
    forward = {"attention forward": "o", "swiglu forward": "down"}
    backward = {"swiglu backward": f"gate_up {of}", "rope backward": f"qkv {of}"}
    return {**forward, **backward}.get(after, "head: products")


def work(launches: Iterable[tuple[str, float, float]]) -> dict[str, Work]:
    """Launches (name, bytes, FLOPs) in order -> what each line of the step does."""
    found = defaultdict[str, Work](Work)
    listed = list(launches)
    for line, (_, moved, flops) in zip(lines(name for name, _, _ in listed), listed, strict=True):
        found[line].launches += 1
        found[line].bytes += moved
        found[line].flops += flops
    return dict(found)


def spent(kernels: Sequence[tuple[str, float]]) -> dict[str, float]:
    """Kernels (name, microseconds) of a trace -> milliseconds of each line."""
    found = defaultdict[str, float](float)
    for line, (_, us) in zip(lines(name for name, _ in kernels), kernels, strict=True):
        found[line] += us / 1e3
    return dict(found)


def predicted(now: dict[str, Work], then: dict[str, Work], took: dict[str, float]) -> dict[str, float]:
    """Milliseconds of each line of a step that does `now`, from one that did `then` and took `took`."""
    found = {}
    for line, work in now.items():
        before = then.get(line)
        if before and before.flops and work.flops:
            found[line] = took.get(line, 0.0) * work.flops / before.flops
        elif before and before.bytes:
            found[line] = took.get(line, 0.0) * work.bytes / before.bytes
        else:
            found[line] = 1e3 * max(work.bytes / MEMORY_RATE, work.flops / PRODUCT_RATE)
    return found


def table(
    now: dict[str, Work], then: dict[str, Work], took: dict[str, float], takes: dict[str, float] | None = None
) -> str:
    """Markdown: launches, bytes and FLOPs of a step then and now, by group and by line; milliseconds measured
    then, predicted now and, with `takes`, measured now.
    """
    times = [took, predicted(now, then, took), *([] if takes is None else [takes])]
    head = ["", "launches", "MB", "GFLOP", *("ms then", "ms predicted", "ms now")[: len(times)]]
    rows = [f"| {' | '.join(head)} |", "|---|" + "---:|" * (len(head) - 1)]

    def total(works: dict[str, Work], names: Sequence[str], unit: str, scale: float) -> str:
        return f"{sum(getattr(works[name], unit) for name in names if name in works) / scale:,.0f}"

    def row(title: str, names: Sequence[str], mark: str = "") -> str:
        units = (("launches", 1), ("bytes", 1e6), ("flops", 1e9))
        pairs = [(total(then, names, *unit), total(now, names, *unit)) for unit in units]
        cells = [old if old == new else f"{old} > {new}" for old, new in pairs]
        cells += [f"{sum(found.get(name, 0.0) for name in names):.2f}" for found in times]
        return "| " + " | ".join(f"{mark}{cell}{mark}" for cell in (title, *cells)) + " |"

    for group, names in GROUPS.items():
        rows.append(row(group, names, "**"))
        rows += [row(name, [name]) for name in names if any(name in found for found in (now, then, took))]
    return "\n".join([*rows, row("a step", [name for names in GROUPS.values() for name in names], "**")])


def record() -> dict[str, Work]:
    """What a step of this code does, on an H100 that need not be there."""
    import torch

    from bench.step import TrainingStep
    from bench.step_record import recording
    from bench.train_step import build
    from smollm2.config import SmolLM2Config

    with recording() as launches:
        device = torch.device("cuda")
        step = TrainingStep(build(SmolLM2Config.preset("135M"), "triton", device))
        ids = torch.zeros(32, 512, dtype=torch.int64, device=device)
        step(ids)  # the first one makes the optimizer's state
        launches.clear()
        step(ids)
        return work(launch[:3] for launch in launches)


def read(path: Path) -> list[tuple[str, float]]:
    """(name, microseconds) of the kernels in a trace file, in order. Raises LoadError."""
    try:
        trace = json.loads(path.read_text(encoding="utf-8"))
        kernels = [(str(trace["names"][number]), float(us)) for number, _, us in trace["kernels"]]
        if not kernels or not all(us >= 0 for _, us in kernels):
            raise ValueError("expected kernels and what they took")
        return kernels
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise LoadError(
            f"{path}: not a trace of bench.train_step --traces ({type(error).__name__}: {error})"
        ) from None


def main(argv: Sequence[str]) -> int:
    parser = Parser(
        prog="python -m bench.step_model",
        description="Predicts a step of this code, and holds a trace of it against the prediction.",
    )
    add, trace = parser.add_argument, "trace-triton.json of bench.train_step --traces DIR"
    add("trace", type=Path, nargs="?", metavar="TRACE", help=trace)
    add("--json", type=Path, metavar="FILE", help="write what each kind of launch does there")
    add("--decode", action="store_true", help="a captured decode step of the 135M model in bf16 instead")
    what = "with --decode: rows of a step (default 1 16 256)"
    add("--batch", type=int, nargs="+", default=[1, 16, 256], metavar="N", help=what)
    what = "with --decode: keys that it sees (default 1024)"
    add("--keys", type=int, nargs="+", default=[1024], metavar="N", help=what)
    add("--debug", action="store_true", help="show the traceback of an error")
    options = parser.parse_args(argv)
    if importlib.util.find_spec("triton") is None:
        raise LoadError(
            "the launches of a step are recorded with triton; install it with: pip install triton"
        )
    if options.decode:
        if os.environ.get("TRITON_INTERPRET") == "1":
            parser.error(
                "--decode needs the compiler, but TRITON_INTERPRET=1 replaces it: unset that variable"
            )
        if options.trace:
            parser.error(f"--decode: expected no TRACE, which is one of a training step, got {options.trace}")
        for name in ("batch", "keys"):
            if (least := min(getattr(options, name))) < 1:
                parser.error(f"--{name}: expected at least 1, got {least}")
        from bench.decode_model import report

        print(report(options.batch, options.keys, options.json))
        return 0
    from bench.step_record import host_times

    takes = spent(read(options.trace)) if options.trace else None
    now = record()
    then = {line: Work(*entry) for line, entry in json.loads(RECORDED.read_text(encoding="utf-8")).items()}
    if options.json:
        write_json(options.json, {line: dataclasses.astuple(entry) for line, entry in now.items()})
    print(table(now, then, spent(read(MEASURED)), takes))
    host = host_times()
    parts = ", ".join(f"{name} {ms:.1f}" for name, ms in host.items())
    spoken = "host, without a graph and Triton's launches left out"
    print(f"\n{spoken}: {sum(host.values()):.1f} ms of CPU time here ({parts})")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
