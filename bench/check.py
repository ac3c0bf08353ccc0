"""`python -m bench.check [--quick]`: do the ratios of bench/expected.json still hold on this CPU? Exit code 1
if one does not.

A time means nothing on another machine, and little on this one tomorrow; how many times as fast one way is as
another lasts. The two ways of a row are measured in turns within one process, and the ratio is that of the
fastest round of each: what else the machine does only ever adds. Where both compute the same, they are
compared before they are timed, so that nobody wins by computing less. Weights are random: speed does not
depend on them. What needs something that is not here (transformers, a compiled step) is named and not judged.
A bound is below every ratio that the file lists as measured, by a tenth or more. On two quiet cores --quick
takes one to two minutes.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import step_peers
from bench.generate_modes import EngineTurns, all_tokens
from bench.record import ROOT, Part, one_line, parser, python, read_json, speed_of_data
from bench.timing import in_turns, seconds
from kernels import waiting
from smollm2.cli import run_command
from smollm2.config import SmolLM2Config
from smollm2.engine.eager import Engine, prefill
from smollm2.engine.native import find_library
from smollm2.engine.select import select_engine
from smollm2.errors import LoadError, UsageError
from smollm2.model import SmolLM2ForCausalLM

EXPECTED = Path(__file__).with_name("expected.json")
BUDGET = 15.0  # seconds of a row after which two rounds are enough
TINY_NOTE = "tiny sizes: times mean nothing, speed is not judged"


@dataclass(frozen=True)
class Sizes:
    """How large everything is. layers: of the model in a training step; generation uses all that `preset`
    has.
    """

    preset: str
    layers: int
    batch: int
    length: int
    prompt: int
    new_tokens: int
    rounds: int
    mebibytes: int  # of text, for the data pipeline


FULL = Sizes("135M", 30, 2, 512, 128, 32, 7, 8)
QUICK = Sizes("135M", 6, 1, 256, 64, 8, 4, 1)
TINY = Sizes("tiny", 1, 1, 16, 4, 3, 1, 1)


@dataclass(frozen=True)
class Contest:
    """Two ways to do one thing. difference: empty if they give the same, else what they do not agree on."""

    ours: Callable[[], object]
    other: Callable[[], object]
    difference: str = ""
    times: int = 1  # how often `other` must be called to do what `ours` does once


class Contests:
    """Everything that can be compared, at one size. Models are built when first asked for."""

    def __init__(self, sizes: Sizes) -> None:
        self.sizes = sizes
        self.config = SmolLM2Config.preset(sizes.preset)
        self.makers: dict[str, Callable[[], Contest | float]] = {
            "fp32 step over transformers": lambda: self._step("fp32"),
            "bf16 step over transformers autocast": lambda: self._step("bf16"),
            "int8 over bf16 decode": self._int8,
            "compiled over eager decode": self._compiled,
            "cached over uncached generation": self._cached,
            "batch of 8 over 8 singles": self._batch,
            "token cache over text": self._data,
            "decode as threads wait over spinning": self._waiting,
        }

    @cached_property
    def _bf16(self) -> SmolLM2ForCausalLM:
        return self._model(torch.bfloat16)

    @cached_property
    def _fp32(self) -> SmolLM2ForCausalLM:
        return self._model(torch.float32)

    def _model(self, dtype: torch.dtype) -> SmolLM2ForCausalLM:
        torch.manual_seed(0)
        return SmolLM2ForCausalLM(self.config, "torch").to(dtype).eval()

    def _ids(self, batch: int, length: int) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.randint(self.config.vocab_size, (batch, length), generator=generator)

    def _step(self, dtype: str) -> Contest:
        config = self.config.replace(num_hidden_layers=self.sizes.layers)
        ids = self._ids(self.sizes.batch, self.sizes.length)
        ours, other = (
            step_peers.build(name, config, step_peers.DTYPES[dtype], ids) for name in ("ours", "transformers")
        )
        distance = abs(float(ours()) - float(other()))
        far = distance > step_peers.LOSS_TOLERANCE[dtype]
        return Contest(ours, other, f"first losses are {distance:.1e} nats apart" if far else "")

    def _decoding(self, engine: Engine, batch: int = 1) -> Callable[[], Tensor]:
        """Greedy decode steps after a prompt that was read once: a call gives their tokens [B, new]."""
        length, new_tokens = self.sizes.prompt, self.sizes.new_tokens
        turns = EngineTurns(engine, self._ids(batch, length), new_tokens)
        first = turns.prefill()

        def decode() -> Tensor:
            turns.rewind(length)
            return turns.decode(first, new_tokens)

        return decode

    def _int8(self) -> Contest:
        engine = select_engine(self._bf16, quantize="int8", compiled=False)
        return Contest(self._decoding(engine), self._decoding(Engine(self._bf16)))

    def _compiled(self) -> Contest:
        if find_library() is None:
            raise UsageError("no compiled step; python -m smollm2.compile makes it")
        return Contest(self._decoding(select_engine(self._bf16)), self._decoding(Engine(self._bf16)))

    def _cached(self) -> Contest:
        model, prompt = self._fp32, self._ids(1, self.sizes.prompt)
        engine = Engine(model)

        def cached() -> Tensor:
            new_tokens = self.sizes.new_tokens
            return torch.cat([prompt, all_tokens(EngineTurns(engine, prompt, new_tokens), new_tokens)], 1)

        @torch.inference_mode()
        def uncached() -> Tensor:
            ids = prompt
            for _ in range(self.sizes.new_tokens):
                cache = engine.allocate(1, ids.shape[1])
                logits = prefill(model, ids, torch.tensor([ids.shape[1]]), cache)
                ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
            return ids

        return Contest(cached, uncached, "" if torch.equal(cached(), uncached()) else "the tokens differ")

    def _batch(self) -> Contest:
        engine = Engine(self._fp32)
        together, alone = self._decoding(engine, 8), self._decoding(engine)
        same = torch.equal(together()[:1], alone())
        difference = "" if same else "the first row's tokens differ from those of its prompt alone"
        return Contest(together, alone, difference, times=8)

    def _data(self) -> float:
        """The pipeline is measured by its own command, in a process of its own."""
        with tempfile.TemporaryDirectory() as folder:
            size = ("--mebibytes", self.sizes.mebibytes, "--repeats", self.sizes.rounds)
            figures = speed_of_data(Path(folder), *size)["tokens_per_second"]
        return float(figures["cache, workers=0"] / figures["text, workers=0"])

    def _waiting(self) -> float:
        """Compiled decode steps of new processes, right after this one worked: in one idle threads wait as
        kernels/waiting.py chooses, in the other they spin for milliseconds, as libgomp would have them.
        """
        unset = {name: value for name, value in os.environ.items() if name not in waiting.VARIABLES}
        spinning = unset | {"GOMP_SPINCOUNT": "300000", "KMP_BLOCKTIME": "200"}
        size = "--tiny" if self.sizes == TINY else "--quick"
        times = []
        with tempfile.TemporaryDirectory() as folder:
            path, row = Path(folder) / "found.json", "compiled over eager decode"
            command = python("bench.check", size, "--only", row, "--json", path)
            for environment in (unset, spinning):
                subprocess.run(command, cwd=ROOT, env=environment, capture_output=True)
                found = read_json(path)["check"]["rows"][row]
                if "missing" in found:
                    raise UsageError(found["missing"])
                times.append(found["ours_ms"])
        return float(times[1] / times[0])


def busy(load: Path = Path("/proc/loadavg")) -> str:
    """A line about other programs that run now, empty where there are none, or Linux does not say: beside
    them a ratio can be anything. Programs are at work that do not pause for 10 ms in a row within 60.
    """
    quiet = 0
    for _ in range(30):
        try:
            running = int(load.read_text(encoding="ascii").split()[3].partition("/")[0])
        except (OSError, ValueError, IndexError):
            return ""
        # as many as there are processors that this program may not use do not count
        quiet = quiet + 1 if running - 1 <= (os.cpu_count() or 1) - len(os.sched_getaffinity(0)) else 0
        if quiet == 5:
            return ""
        time.sleep(0.002)
    return "NOTE: other programs run now: beside them ratios are unreliable"


def measure(contest: Contest, rounds: int) -> dict[str, Any]:
    """Both ways in turns, after one call of each that does not count. Raises what a call raises."""
    since, cpu = time.monotonic(), torch.device("cpu")

    def once(call: Callable[[], object]) -> float:
        return seconds(call, cpu)

    both = {"ours": contest.ours, "other": contest.other}
    times, failed = in_turns(both, rounds + 1, once, lambda: BUDGET - (time.monotonic() - since))
    if failed:
        raise RuntimeError(next(iter(failed.values())))
    ours, other = (min(times[name][1:] or times[name]) for name in both)
    return {
        "ratio": round(contest.times * other / ours, 3), "ours_ms": round(1e3 * ours, 3),
        "other_ms": round(1e3 * other, 3),
    }  # fmt: skip


def run(make: Callable[[], Contest | float], rounds: int) -> dict[str, Any]:
    """One row: its ratio, or why there is none."""
    try:
        contest = make()
        if not isinstance(contest, Contest):
            return {"ratio": round(contest, 3)}
        return measure(contest, rounds) | ({"difference": contest.difference} if contest.difference else {})
    except (UsageError, ImportError) as reason:
        return {"missing": one_line(reason)}
    except Exception as failure:  # noqa: BLE001 - one row's failure is a result, and the others still run
        return {"failed": one_line(failure)}


def read_expected(path: Path) -> dict[str, dict[str, Any]]:
    """Name -> its bounds and their reason. Raises LoadError for a file that is not of that form."""
    try:
        ratios = json.loads(path.read_text(encoding="utf-8"))["ratios"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        why = f"{type(error).__name__}: {error}"
        raise LoadError(f"{path}: expected a JSON object with 'ratios' ({why})") from None
    for name, bound in ratios.items():
        known, missing = bound if isinstance(bound, dict) else {}, ""
        measured = known.get("measured")
        if not known.get("reason") or not isinstance(known.get("at_least"), (int, float)):
            missing = "'at_least' (a number) and a 'reason'"
        elif not measured or not all(isinstance(ratio, (int, float)) for ratio in measured):
            missing = "'measured' (a list of ratios that the bound is made from)"
        if missing:
            raise LoadError(f"{path}: {name!r} needs {missing}, got {bound!r}")
    return dict(ratios)


def verdict(found: dict[str, Any], bound: dict[str, Any]) -> str:
    """ "holds", "VIOLATED: ..." or "not measured: ..." for one row. A bound is at_least and, where there is
    one, at_most.
    """
    if "missing" in found:
        return f"not measured: {found['missing']}"
    if wrong := found.get("failed") or found.get("difference"):
        return f"VIOLATED: {wrong}"
    ratio, least, most = found["ratio"], bound["at_least"], bound.get("at_most")
    before = f"before it was {min(bound['measured'])} to {max(bound['measured'])}"
    if not ratio >= least:
        return f"VIOLATED: below {least}; {before}, because {bound['reason']}"
    if most is not None and not ratio <= most:
        return f"VIOLATED: above {most}; {before}; does the first still do all the work?"
    return f"holds; {before}"


def conclusion(rows: dict[str, dict[str, Any]]) -> str:
    """The last line: how many hold, and what to do about those that do not."""
    words = ("holds", "not measured", "VIOLATED")
    holding, missing, violated = (
        [name for name, row in rows.items() if row["verdict"].startswith(word)] for word in words
    )
    parts = [f"{len(holding)} of {len(rows)} hold"]
    if missing:
        parts.append(f"{len(missing)} not measured")
    if violated:
        again = " ".join(f"--only '{name}'" for name in violated)
        parts.append(f"{len(violated)} violated; on a quiet machine once more: python -m bench.check {again}")
    return ", ".join(parts)


def main(argv: Sequence[str]) -> int:
    arguments = parser("check", "Compares fresh ratios with those that must hold on a CPU.")
    add = arguments.add_argument
    add("--quick", action="store_true", help="a smaller model in the training step, fewer tokens and rounds")
    add("--only", action="append", metavar="NAME", help="only this ratio; may be repeated")
    bounds = "bounds (default bench/expected.json)"
    add("--expected", type=Path, default=EXPECTED, metavar="FILE", help=bounds)
    options = arguments.parse_args(argv)
    if options.device == "cuda":
        raise UsageError("--device cuda: these ratios are those of a CPU; python -m bench.gpu measures a GPU")
    expected = read_expected(options.expected)
    contests = Contests(TINY if options.tiny else QUICK if options.quick else FULL)
    names = options.only or list(expected)
    for name in names:
        if name not in expected or name not in contests.makers:
            known = ", ".join(contests.makers)
            raise UsageError(f"{name!r}: expected a ratio that is measured and has a bound, one of {known}")
    options.device = "cpu"
    part = Part("check", options, cpu=True, note=TINY_NOTE)
    threads = torch.get_num_threads()
    print(f"{threads} threads, torch {torch.__version__}, {part.origin['device']}")
    note = busy()
    if note and not part.tiny:
        print(note)
    print(f"{'':38}{'ratio':>8}{'at least':>10}", flush=True)
    part.save(quick=options.quick, threads=threads, busy=note)
    rows: dict[str, dict[str, Any]] = {}
    for name in names:
        rows[name] = {"missing": "no time was left"}
        if part.left() >= 0:
            rows[name] = run(contests.makers[name], contests.sizes.rounds)
        judged = verdict(rows[name], expected[name])
        if part.tiny and "ratio" in rows[name] and "difference" not in rows[name]:
            judged = "not judged"
        rows[name] |= {"at_least": expected[name]["at_least"], "verdict": judged}
        ratio = f"{rows[name]['ratio']:8.2f}" if "ratio" in rows[name] else f"{'-':>8}"
        print(f"{name:38}{ratio}{rows[name]['at_least']:10.2f}  {judged}", flush=True)
        part.save(rows=rows)
        gc.collect()
    if not part.tiny:
        print(conclusion(rows))
    part.finish()
    return 1 if any(row["verdict"].startswith("VIOLATED") for row in rows.values()) else 0


if __name__ == "__main__":
    sys.exit(run_command(main))
