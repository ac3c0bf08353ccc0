"""`python -m bench.tuning`: candidates for the lines of kernels/launch_config.py, timed at the shapes of the
135M model.

For every operation of the table: the launch that the table has for this device, then others, each in the
operation's place within the whole forward or backward pass that it is part of, with the outputs and gradients
held to those of the table's launch. What is measured here is written into the table by hand, with its reason:
nothing is tuned at run time.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch

import kernels
from bench import timing
from bench.case import ERROR_BOUND, Case, Shapes, Variant, error
from bench.kernels import FULL, OURS, SET_BYTES
from bench.ops import cases
from bench.record import Part, one_line, parser
from bench.weight_ops import optimizer_step
from kernels import select_backend
from kernels.launch_config import LaunchConfig, launch_config
from smollm2.cli import run_command

MODULES = (
    "adamw", "attention", "decode_attention", "decode_head", "decode_layer", "decode_step", "embedding",
    "launch_config", "linear_cross_entropy", "rms_norm", "rope", "swiglu",
)  # fmt: skip
SWIGLU = ((1, 512, 1), (2, 512, 2), (1, 512, 2), (2, 512, 4), (8, 512, 8))
NORM = ((1, 0, 1), (4, 0, 1), (4, 0, 2), (4, 0, 4), (8, 0, 4))
ROPE = ((8, 1, 1), (4, 5, 1), (16, 5, 2), (16, 1, 2), (32, 5, 4))
# the interpreter takes a quarter of a minute for some of the others
TINY = ("attention_fwd", "swiglu", "rms_norm_bwd", "mlp_fwd")
SETS = 24  # of inputs at most, so that each is cold when its turn comes again
# Operation of the table -> (the case of bench/ops.py that it is timed in, its phase, candidates). Attention's
# include the lines that the table had before it was measured. A line that the table has now is timed once.
_LINES: dict[str, tuple[str, str, tuple[tuple[Any, ...], ...]]] = {
    "attention_bwd_dkv": (
        "attention", "backward",
        ((64, 64, 4, 1, True), (64, 64, 4, 2, True), (64, 64, 4, 3, True), (64, 64, 4, 1, False),
         (64, 64, 4, 2, False), (32, 64, 4, 2, True)),
    ),
    "attention_bwd_dq": (
        "attention", "backward",
        ((64, 64, 4, 2, True), (64, 64, 4, 3, True), (64, 64, 4, 1, True), (128, 64, 8, 2, True),
         (128, 64, 8, 3, True)),
    ),
    "attention_fwd": (
        "attention", "forward",
        ((64, 64, 4, 3, True), (64, 64, 4, 2, True), (64, 64, 4, 4, True), (128, 64, 8, 2, True),
         (128, 64, 8, 3, True)),
    ),
    "linear_cross_entropy": (
        "linear_cross_entropy", "forward+backward",
        ((1, 4096, 8), (1, 8192, 8), (1, 16384, 16), (1, 16384, 32), (1, 4096, 16)),
    ),
    "mlp_fwd": ("mlp", "forward", ((128, 128, 8, 4), (128, 128, 8, 2), (128, 64, 8, 4), (128, 64, 4, 4))),
    "mlp_bwd": ("mlp", "backward", ((128, 128, 8, 3), (128, 64, 4, 4), (64, 256, 8, 3))),
    "embedding_fwd": ("tied_embedding", "forward", ((1, 1024, 4), (1, 256, 1), (1, 512, 2))),
    "embedding_bwd": ("tied_embedding", "backward", ((4, 1024, 4), (16, 1024, 8), (8, 256, 1), (8, 1024, 8))),
    "adamw": ("adamw", "forward", ((8, 512, 4), (32, 512, 4), (8, 1024, 8))),
    "adamw_squares": ("adamw", "forward", ((0, 1024, 4), (0, 4096, 4), (0, 2048, 8))),
    "adamw_norm": ("adamw", "forward", ((0, 8192, 16),)),
    "swiglu": ("swiglu", "forward", SWIGLU),
    "swiglu backward": ("swiglu", "backward", SWIGLU),
    "rms_norm_fwd": ("rms_norm", "forward", NORM),
    "rms_norm_fwd with residual": ("add_rms_norm", "forward", NORM),
    "rms_norm_bwd": ("add_rms_norm", "backward", ((1, 0, 1), (4, 0, 2), (4, 0, 4), (8, 0, 4))),
    "rms_norm_dw": ("add_rms_norm", "backward", ((1024, 8, 8), (512, 4, 8))),
    "rope": ("rope_qkv", "forward", ROPE),
    "rope backward": ("rope_qkv", "backward", ROPE),
    "decode_attention": (
        "decode_attention", "forward",
        ((16, 32, 4, 2), (16, 128, 4, 2), (16, 64, 4, 3), (16, 64, 2, 2), (16, 128, 8, 2)),
    ),
    "decode_layer_attention": ("decode_layer", "forward", ((16, 64, 4, 2), (16, 128, 4, 2), (16, 64, 8, 3))),
    "decode_inputs": ("decode_inputs", "forward", ((1, 0, 1), (1, 0, 4))),
    "next_token": ("next_token", "forward", ((1, 2048, 8), (1, 4096, 16), (1, 8192, 32))),
    "decode_qkv": ("decode_layer", "forward", ((8, 1, 8), (16, 1, 2), (8, 2, 4))),
    "decode_gate_up": ("decode_layer", "forward", ((5, 1, 4), (9, 2, 2), (5, 2, 4), (5, 2, 8))),
    "decode_o": ("decode_layer", "forward", ((8, 1, 4), (8, 2, 8))),
    "decode_down": ("decode_layer", "forward", ((16, 1, 4), (4, 1, 16), (8, 2, 8))),
    "decode_head": (
        "decode_head", "forward",
        ((3, 128, 4, 4), (1, 128, 4, 8), (2, 128, 8, 5), (3, 64, 4, 5), (2, 64, 4, 6), (1, 256, 8, 5)),
    ),
}  # fmt: skip
CANDIDATES = {
    op: (case, phase, tuple(LaunchConfig(*line) for line in lines))
    for op, (case, phase, lines) in _LINES.items()
}


@contextmanager
def forced(op: str, launch: LaunchConfig | None) -> Iterator[list[LaunchConfig]]:
    """The kernels launch `op` with `launch`; None: as the table says. Yields a list that receives what the
    table says.
    """
    found: list[LaunchConfig] = []

    def chosen(name: str, dtype: torch.dtype, device: torch.device, size: int) -> LaunchConfig:
        line = launch_config(name, dtype, device, size)
        if name != op:
            return line
        found[:] = [line]
        return launch or line

    modules = [import_module(f"{kernels.__name__}.{name}") for name in MODULES]
    for module in modules:
        module.launch_config = chosen  # type: ignore[attr-defined]
    try:
        yield found
    finally:
        for module in modules:
            module.launch_config = launch_config  # type: ignore[attr-defined]


def measure(
    case: Case, op: str, phase: str, candidates: Sequence[LaunchConfig], shapes: Shapes, tiny: bool
) -> list[dict[str, Any]]:
    """One row per launch, the table's first. All are timed in turns."""
    rows: list[dict[str, Any]] = []
    replays, truth = {}, None
    most = SET_BYTES / (1 + len(candidates)) / (case.cost.forward + case.cost.backward).bytes
    sets = 1 if tiny or case.joint else max(1, min(SETS, int(most)))
    form = f"{OURS} fused" if op.startswith("mlp") else OURS  # whichever form the table has for this device
    for launch in (None, *candidates):
        if launch is not None and list(launch) == rows[0].get("launch"):
            continue
        with forced(op, launch) as table:
            row: dict[str, Any] = {"op": op, "phase": phase}
            rows.append(row)
            try:
                variant = Variant(case, form, sets)
                results = variant.results()
                row |= {"launch": list(launch or table[0]), "of_table": launch is None}
                truth = results if truth is None else truth
                row["distance"] = error(results, truth)
                if not row["distance"] <= ERROR_BOUND[shapes.dtype]:
                    row["failed"] = f"wrong: {row['distance']:.1e} from the table's launch"
                    continue
                replays[len(rows) - 1] = timing.replayable(variant.phases()[phase], shapes.device)
            except Exception as failure:  # noqa: BLE001 - a launch that does not compile is a result
                row |= {"launch": list(launch) if launch else None, "failed": one_line(failure)}
    samples = timing.alternate(replays, shapes.device, sets, 1 if tiny else 20)
    for index, sample in samples.items():
        rows[index] |= {"us": round(sample.us, 2), "spread": round(sample.spread, 3)}
    return rows


def show(row: dict[str, Any]) -> str:
    """One line of the table."""
    result = row.get("failed") or f"{row['us']:10.1f} us  {100 * row['spread']:.1f} %"
    mark = "table " if row.get("of_table") else "      "
    return f"{row['op']:22}{row['phase']:18}{row['launch']!s:28}{mark}{result}"


def main(argv: Sequence[str]) -> int:
    arguments = parser("tuning", "Times candidates for the launch table.")
    only = "only this one; may be repeated"
    arguments.add_argument("--op", action="append", choices=tuple(CANDIDATES), help=only)
    options = arguments.parse_args(argv)
    part = Part("tuning", options)
    dtype = torch.float32 if part.device.type == "cpu" else torch.bfloat16
    shapes = Shapes(part.model("135M"), *((1, 8) if part.tiny else FULL), dtype, part.device)
    backend = select_backend("triton", part.device)
    found = {case.op: case for case in (*cases(shapes, backend, "eager"), optimizer_step(shapes))}
    part.save(rows=[], batch=shapes.batch, length=shapes.length, dtype=str(dtype).removeprefix("torch."))
    for op in options.op or (TINY if part.tiny else CANDIDATES):
        case, phase, candidates = CANDIDATES[op]
        if part.left() < 0:
            part.save(left_out=[*part.data.get("left_out", []), op])
            continue
        launches = candidates[:1] if part.tiny else candidates
        rows = measure(found[case], op.partition(" ")[0], phase, launches, shapes, part.tiny)
        print(*map(show, rows), sep="\n", flush=True)
        part.save(rows=[*part.data["rows"], *rows])
        gc.collect()
    return part.finish()


if __name__ == "__main__":
    sys.exit(run_command(main))
