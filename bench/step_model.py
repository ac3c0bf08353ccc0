"""`python -m bench.step_model TRACE`: one optimizer step, launch by launch: what the model of it predicted, and what a GPU took.

The prediction is for the 135M model at 32 x 512 in bf16 on an H100: bytes at 3.0 TB/s, products at 450 to 610 TFLOP/s, and nothing that was
measured. A trace (`bench.train_step --variant triton --traces DIR`) is held against it. Every kernel
of the trace belongs to one line, found from its own name or, for the products of torch's library, from the kernel of ours before it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from smollm2.cli import LoadError, Parser, run_command

LAYERS = 30


@dataclass(frozen=True)
class Line:
    """A part of the step: how often it happens, and the microseconds that were predicted for each time."""

    times: int
    us: float


MODEL = {
    "add_rms_norm forward": Line(2 * LAYERS + 1, 29.0), "qkv": Line(LAYERS, 34.0), "rope forward": Line(LAYERS, 20.0),
    "attention forward": Line(LAYERS, 41.0), "o": Line(LAYERS, 22.0), "gate_up": Line(LAYERS, 98.0), "swiglu forward": Line(LAYERS, 55.0),
    "down": Line(LAYERS, 52.0), "casts of weights": Line(LAYERS, 19.0),
    "head: products": Line(1, 5100.0), "head: softmax gradient, scaling": Line(1, 1400.0),
    "down dW": Line(LAYERS, 58.0), "down dX": Line(LAYERS, 53.0), "gate_up dW": Line(LAYERS, 103.0), "gate_up dX": Line(LAYERS, 97.0),
    "o dW": Line(LAYERS, 27.0), "o dX": Line(LAYERS, 22.0), "qkv dW": Line(LAYERS, 40.0), "qkv dX": Line(LAYERS, 34.0),
    "swiglu backward": Line(LAYERS, 91.0), "rms_norm dx": Line(2 * LAYERS + 1, 31.0), "rms_norm dw": Line(2 * LAYERS + 1, 4.4),
    "attention dq": Line(LAYERS, 51.0), "attention dk, dv": Line(LAYERS, 76.0), "rope backward": Line(LAYERS, 25.0),
    "casts of gradients": Line(LAYERS, 19.0), "embedding": Line(1, 350.0), "clip, AdamW": Line(1, 2000.0),
}  # fmt: skip
GROUPS = {
    "products of the body": ("qkv", "o", "gate_up", "down", *(f"{name} d{of}" for name in ("down", "gate_up", "o", "qkv") for of in "WX")),
    "norm, rope, swiglu": (
        "add_rms_norm forward", "rope forward", "swiglu forward", "swiglu backward", "rms_norm dx", "rms_norm dw", "rope backward",
    ),
    "attention": ("attention forward", "attention dq", "attention dk, dv"),
    "head": ("head: products", "head: softmax gradient, scaling"),
    "casts": ("casts of weights", "casts of gradients"),
    "the rest": ("embedding", "clip, AdamW", "other"),
}  # fmt: skip
OWN = {
    "_rms_norm_fwd_kernel": "add_rms_norm forward", "_attention_fwd_kernel": "attention forward", "_swiglu_fwd_kernel": "swiglu forward",
    "_swiglu_bwd_kernel": "swiglu backward", "_rms_norm_bwd_dx_kernel": "rms_norm dx", "_rms_norm_bwd_dw_kernel": "rms_norm dw",
    "_attention_bwd_dq_kernel": "attention dq", "_attention_bwd_dkv_kernel": "attention dk, dv",
    "_softmax_gradient_kernel": "head: softmax gradient, scaling",
}  # fmt: skip
PRODUCTS = ("nvjet", "gemm", "cutlass", "xmma")
EMBEDDING = ("gather", "cub", "segment", "compute_grad_weight", "sum_and_scatter", "arange")


def lines(kernels: Iterable[tuple[str, float]]) -> Iterator[tuple[str, float]]:
    """(name, microseconds) of the kernels of a step with backend triton, in order -> (line of MODEL or "other", microseconds)."""
    backward = False
    norms, products, after, last = 0, 0, "", "other"
    for name, us in kernels:
        if name in OWN or name == "_rope_kernel":
            last = OWN.get(name, f"rope {'backward' if backward else 'forward'}")
            backward = backward or name == "_softmax_gradient_kernel"
            norms += name in ("_rms_norm_fwd_kernel", "_rms_norm_bwd_dw_kernel")
            after, products = last, 0
        elif "splitKreduce" in name:
            pass  # the end of the product before it
        elif any(part in name for part in PRODUCTS):
            last, products = _product(after, norms, products), products + 1
        elif any(part in name for part in EMBEDDING):
            last = "embedding"
        elif "multi_tensor_apply" in name or "lpnorm" in name:
            last = "clip, AdamW"
        elif "copy_kernel" in name:
            last = "casts of gradients" if backward else "casts of weights"
        else:
            last = "head: softmax gradient, scaling" if after == "head: softmax gradient, scaling" else "other"
        yield last, us


def _product(after: str, norms: int, products: int) -> str:
    """Which product follows the kernel `after`, the `norms`-th of its kind; of two in a backward pass the first is the weight's."""
    of = "dX" if products else "dW"
    if after == "add_rms_norm forward":
        return "head: products" if norms == 2 * LAYERS + 1 else "qkv" if norms % 2 else "gate_up"
    if after == "rms_norm dw":  # counted on from the forward pass: the final norm comes first
        return f"{'o' if norms % 2 else 'down'} {of}"
    forward = {"attention forward": "o", "swiglu forward": "down"}
    backward = {"swiglu backward": f"gate_up {of}", "rope backward": f"qkv {of}"}
    return {**forward, **backward}.get(after, "head: products")


def table(kernels: Sequence[tuple[str, float]]) -> str:
    """Markdown: predicted and measured milliseconds of a step, by group and by line."""
    spent: dict[str, list[float]] = defaultdict(list)
    for line, us in lines(kernels):
        spent[line].append(us)
    rows = ["| | times | predicted us | measured us | predicted ms | measured ms |", "|---|---|---|---|---|---|"]
    expected = {name: line.times * line.us / 1e3 for name, line in MODEL.items()}
    for group, names in GROUPS.items():
        ours, theirs = (sum(column) for column in zip(*((expected.get(name, 0.0), sum(spent[name]) / 1e3) for name in names), strict=True))
        rows.append(f"| **{group}** | | | | **{ours:.2f}** | **{theirs:.2f}** |")
        for name in names:
            times, us = (MODEL[name].times, MODEL[name].us) if name in MODEL else (1, 0.0)
            each = sum(spent[name]) / times
            rows.append(f"| {name} | {times} | {us:.4g} | {each:.4g} | {expected.get(name, 0.0):.2f} | {sum(spent[name]) / 1e3:.2f} |")
    total = sum(us for _, us in kernels) / 1e3
    rows.append(f"| **a step** | {len(kernels)} launches | | | **{sum(expected.values()):.2f}** | **{total:.2f}** |")
    return "\n".join(rows)


def read(path: Path) -> list[tuple[str, float]]:
    """(name, microseconds) of the kernels in a trace file, in order. Raises LoadError."""
    try:
        trace = json.loads(path.read_text(encoding="utf-8"))
        kernels = [(str(trace["names"][number]), float(us)) for number, _, us in trace["kernels"]]
        if not kernels or not all(us >= 0 for _, us in kernels):
            raise ValueError("expected kernels and what they took")
        return kernels
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise LoadError(f"{path}: not a trace of bench.train_step --traces ({type(error).__name__}: {error})") from None


def main(argv: Sequence[str]) -> int:
    parser: argparse.ArgumentParser = Parser(
        prog="python -m bench.step_model", description="Holds a trace of a step against the model of it."
    )
    parser.add_argument("trace", type=Path, metavar="TRACE", help="trace-triton.json of bench.train_step --traces DIR")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    print(table(read(parser.parse_args(argv).trace)))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
