"""`python -m bench.step_peers`: one optimizer step on a CPU beside transformers' Llama and litgpt, eager and
compiled, in fp32 and bf16.

A step is forward, backward, clipping to a global norm of 1 and fused AdamW, on 2 x 512 tokens of the 135M
model. All variants start from the same fp32 weights and see the same tokens, so the losses of the first steps
must agree: nobody wins by computing less. They are measured in turns, so that a drift of the machine meets
all alike; figures are medians, and only their ratios mean something on a machine that others use too.

    ours                fp32 parameters; in bf16 every activation, the residual stream included, is bf16
    ours+doc_start      the same with document boundaries, as training uses it: no peer computes that
    transformers        fp32 parameters; in bf16 under torch.autocast, the usual recipe
    patched             the same with our operations for CPUs in it, by smollm2.patch
    transformers bf16   parameters, gradients and optimizer state in bf16: less memory traffic, and worse
                        numerics
    litgpt              its model, in a process that sleeps until it is asked for a step
                        (bench/peers/litgpt.py); bf16 by autocast
    liger               Liger-Kernel on transformers needs a GPU: named, with its version, and measured by
                        bench.train_step
    ...+compile         the same under torch.compile
"""

from __future__ import annotations

import gc
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bench import work
from bench.peers import choice, status
from bench.peers.transformers import autocast_forward, transformers_llama
from bench.record import TINY_NOTE, Part, one_line, parser, wait_policy
from bench.step import COMPARED_STEPS, TrainingStep, loss_distances, training_model
from bench.timing import in_turns, seconds
from kernels.products import faster_in_fp32
from smollm2.cli import run_command
from smollm2.config import SmolLM2Config
from smollm2.errors import UsageError
from smollm2.model import SmolLM2ForCausalLM

VARIANTS = (
    "ours", "transformers", "patched", "transformers bf16", "ours+doc_start", "ours+compile",
    "transformers+compile", "transformers bf16+compile",
)  # fmt: skip
ELSEWHERE = ("litgpt", "liger", "litgpt+compile")  # peers that do not run in this process, or not on a CPU
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CPU = torch.device("cpu")
# nats over the first steps; Adam's first updates have the sign of a gradient, however small
LOSS_TOLERANCE = {"fp32": 2e-3, "bf16": 0.1}
EAGER_BAR, COMPILED_BAR = 1.3, 1.0  # what the main peer's time over ours is to reach

Step = Callable[[], Tensor]


def ours(config: SmolLM2Config, dtype: torch.dtype) -> SmolLM2ForCausalLM:
    """The model with backend torch, fp32 parameters, in training mode."""
    return training_model(config, "torch", CPU, dtype)


def theirs(config: SmolLM2Config) -> nn.Module:
    """transformers' Llama with the weights of `ours`, fp32. Raises NotInstalled, a UsageError, where
    transformers is not installed.
    """
    llama: nn.Module = transformers_llama(config, ours(config, torch.float32).state_dict())
    return llama


def documents(ids: Tensor) -> Tensor:
    """doc_start [B, T] int32 of three documents in each row."""
    length = ids.shape[1]
    start = torch.zeros(ids.shape, dtype=torch.int32)
    for begin in (length // 5, length // 2):
        start[:, begin:] = begin
    return start


def build(
    variant: str, config: SmolLM2Config, dtype: torch.dtype, ids: Tensor, compiler: str = "inductor"
) -> Step:
    """The step of a variant of VARIANTS or ELSEWHERE as a call that returns the loss. compiler: the backend
    of torch.compile.

    Raises UsageError, with the version and the reason, for a peer that cannot be measured here.
    """
    kind, _, extra = variant.partition("+")
    compiled = extra == "compile"
    if kind == "ours":
        model = ours(config, dtype)
        step = TrainingStep(
            model, torch.compile(model, backend=compiler, fullgraph=True) if compiled else model
        )
        doc_start = documents(ids) if extra == "doc_start" else None
        return lambda: step(ids, doc_start)
    if kind == "transformers bf16":
        llama: Any = theirs(config).to(torch.bfloat16)  # what TrainingStep needs of a model, it has
        called = torch.compile(llama, backend=compiler) if compiled else llama
        in_bf16 = TrainingStep(llama, autocast_forward(called, ids.device, autocast=False))
        return lambda: in_bf16(ids)
    weights = ours(config, torch.float32).state_dict()
    peer = choice.peer_step(variant, config, weights, ids, dtype == torch.bfloat16, compiler)
    return lambda: peer(ids)


def chosen(dtype: str, names: Sequence[str], compiled: bool, among: Sequence[str] = VARIANTS) -> list[str]:
    """The variants of that dtype, in the order of `among`. names: only these; none means all."""
    fits = [name for name in among if dtype == "bf16" or not name.startswith("transformers bf16")]
    asked = [name for name in fits if not names or name in names]
    return [name for name in asked if compiled or not name.endswith("+compile")]


def build_all(
    names: Sequence[str], config: SmolLM2Config, dtype: torch.dtype, ids: Tensor, compiler: str
) -> tuple[dict[str, Step], dict[str, str]]:
    """`build` for each, and why the others cannot be had."""
    steps: dict[str, Step] = {}
    failed: dict[str, str] = {}
    for name in names:
        try:
            steps[name] = build(name, config, dtype, ids, compiler)
        except Exception as failure:  # noqa: BLE001 - a result like any other
            failed[name] = one_line(failure)
    return steps, failed


def measure(steps: dict[str, Step], rounds: int, left: Callable[[], float]) -> dict[str, dict[str, Any]]:
    """Losses of the first steps, then `rounds` timed steps of each in turns, fewer when no time is left.

    left: seconds until nothing new should begin. A variant that raises has its error as a result, and is not
    timed.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, step in steps.items():
        began = time.perf_counter()
        try:
            losses = [float(step()) for _ in range(COMPARED_STEPS)]
            found[name] = {"losses": losses, "first_steps_seconds": round(time.perf_counter() - began, 2)}
        except Exception as failure:  # noqa: BLE001 - a result like any other
            found[name] = {"failed": one_line(failure)}
    running = {name: step for name, step in steps.items() if "failed" not in found[name]}
    times, failed = in_turns(running, rounds, lambda step: 1e3 * seconds(step, CPU), left)
    for name, milliseconds in times.items():
        if name in failed:
            found[name] = {"failed": failed[name]}
            continue
        found[name] |= {
            "step_ms": round(statistics.median(milliseconds), 1), "fastest_ms": round(min(milliseconds), 1),
            "rounds": len(milliseconds),
        }  # fmt: skip
    return found


def ratios(found: dict[str, dict[str, Any]]) -> dict[str, float]:
    """How many times as fast ours is: against each peer eager, and ours at its best against each peer
    compiled.
    """
    times = {name: row["step_ms"] for name, row in found.items() if "step_ms" in row}
    best = min((times[name] for name in ("ours", "ours+compile") if name in times), default=None)
    result = {}
    for name, milliseconds in times.items():
        mine = best if name.endswith("+compile") else times.get("ours")
        if not name.startswith("ours") and mine is not None:
            result[name] = round(milliseconds / mine, 3)
    return result


def distances(found: dict[str, dict[str, Any]]) -> dict[str, float]:
    """`loss_distances` from `ours`; without document boundaries, which change the loss.

    Parameters in bf16 lose most of an update of 3e-4 to rounding, so that peer is on another path after its
    first step: of its losses only the first, which no update has touched, is compared.
    """
    rows = {
        name: {"losses": row["losses"][: 1 if name.startswith("transformers bf16") else None]}
        for name, row in found.items()
        if "losses" in row and name != "ours+doc_start"
    }
    return loss_distances(rows, "ours")


def matmul_floor(config: SmolLM2Config, dtype: torch.dtype, tokens: int) -> float:
    """Milliseconds that the matrix products of a step take alone: three per weight matrix, each at the rate
    it reaches by itself, in fp32 where that is faster.
    """
    if faster_in_fp32(torch.empty(0, dtype=dtype), tokens):
        dtype = torch.float32
    sizes = [(columns, rows, config.num_hidden_layers) for rows, columns in work.projections(config).values()]
    total = 0.0
    for rows, columns, count in [*sizes, (config.vocab_size, config.hidden_size, 1)]:
        shapes = (tokens, columns), (rows, columns), (tokens, rows)
        x, weight, dy = (torch.randn(shape).to(dtype) for shape in shapes)
        y, dx, dw = torch.empty_like(dy), torch.empty_like(x), torch.empty_like(weight)
        for a, b, out in ((x, weight.t(), y), (dy, weight, dx), (dy.t(), x, dw)):
            product = partial(torch.mm, a, b, out=out)
            total += count * min([seconds(product, CPU) for _ in range(4)][1:])
    return round(total * 1e3, 1)


def show(dtype: str, name: str, row: dict[str, Any], ratio: float | None) -> str:
    """One line of the table."""
    if "failed" in row:
        return f"{dtype:6}{name:28}{row['failed']}"
    faster = f"  ours is {ratio:.2f} x as fast" if ratio is not None else ""
    return f"{dtype:6}{name:28}{row['step_ms']:10.1f} ms{faster}"


def main(argv: Sequence[str]) -> int:
    description = "Times one optimizer step on a CPU beside transformers' Llama and litgpt."
    arguments, names = parser("step_peers", description), (*VARIANTS, *ELSEWHERE)
    add = arguments.add_argument
    add("--dtype", action="append", choices=tuple(DTYPES), help="only this one; may be repeated")
    add("--variant", action="append", choices=names, help="only this one; may be repeated")
    minutes = "leave the compiled variants out: each takes a minute or more"
    add("--no-compile", action="store_true", help=minutes)
    add("--rounds", type=int, default=7, metavar="N", help="timed steps of each variant (default 7)")
    options = arguments.parse_args(argv)
    if options.device == "cuda":
        elsewhere = "these peers are compared on a CPU; python -m bench.train_step measures a GPU"
        raise UsageError(f"--device cuda: {elsewhere}")
    if options.rounds < 1:
        raise UsageError(f"--rounds: expected at least 1, got {options.rounds}")
    options.device = "cpu"
    part = Part("step_peers", options, cpu=True, note=TINY_NOTE)
    config = part.model("135M")
    ids = part.ids(config, *((1, 16) if part.tiny else (2, 512)))
    threads = torch.get_num_threads()
    part.save(batch=ids.shape[0], length=ids.shape[1], threads=threads, wait_policy=wait_policy())
    known = part.origin["versions"].items()
    versions = ", ".join(f"{name} {of}" for name, of in known if name in ("python", "torch", "transformers"))
    size = f"{ids.shape[0]} x {ids.shape[1]} tokens, {threads} threads, {wait_policy()}"
    print(f"{size}, {versions}, {part.origin['device']}", flush=True)
    results: dict[str, Any] = {}
    far = False
    for dtype in options.dtype or DTYPES:
        chosen_here = chosen(dtype, options.variant or (), not options.no_compile, names)
        compiler = "aot_eager" if part.tiny else "inductor"
        steps, failed = build_all(chosen_here, config, DTYPES[dtype], ids, compiler)
        measured = measure(steps, 1 if part.tiny else options.rounds, part.left)
        found = {name: measured.get(name) or {"failed": failed[name]} for name in chosen_here}
        faster, apart = ratios(found), distances(found)
        floor = matmul_floor(config, DTYPES[dtype], ids.numel())
        results[dtype] = {
            "variants": found, "ours_is_faster": faster, "loss_distance": apart, "matmul_floor_ms": floor,
        }  # fmt: skip
        part.save(results=results)
        for name, row in found.items():
            print(show(dtype, name, row, faster.get(name)), flush=True)
        print(f"{dtype:6}{'matrix products alone':28}{floor:10.1f} ms", flush=True)
        for name, distance in apart.items():
            if not distance <= LOSS_TOLERANCE[dtype]:
                far = True
                print(f"{dtype:6}{name}: first losses are {distance:.1e} nats from those of ours: TOO FAR")
        for name, bar in (("transformers", EAGER_BAR), ("transformers+compile", COMPILED_BAR)):
            if name in faster and not part.tiny:
                reached = "" if faster[name] >= bar else ": NOT REACHED"
                print(f"{dtype:6}against {name}: {faster[name]:.2f} x, wanted {bar} x{reached}", flush=True)
        del steps
        gc.collect()
        torch.compiler.reset()
    rows = {f"{name} {dtype}": row for dtype in results for name, row in results[dtype]["variants"].items()}
    part.save(peers=choice.step_status(rows))
    print(*status.not_measured(part.data["peers"]), sep="\n", flush=True)
    part.finish()
    return 1 if far else 0


if __name__ == "__main__":
    sys.exit(run_command(main))
