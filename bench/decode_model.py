"""`python -m bench.step_model --decode`: what a captured decode step launches, and what an H100 should take.

Nothing runs. The greedy step of the 135M model in bf16 is recorded without a GPU (bench/step_record.py), its
kernels are compiled for sm_90, and their machine code is walked (bench/sass.py). All microseconds are
predictions:

    launch = boundary + max(bytes / memory rate, bytes by loads / L2 rate, issue, warp * waves)

The boundary lies between two launches of a graph. A dependent launch (launch_pdl) has a shorter one, and what
it does before it waits costs nothing. Issue: the cycles that all warps need of the four schedulers of 132
multiprocessors. Warp: the cycles of one warp with its latencies, times a factor for what the walk does not
see. Waves: programs over those that are resident at a time. Of a kernel of torch's own only bytes and FLOPs
are known.

Three constants are set so that steps over 1,024 keys take what an H100 took for them
(results/h100/generation.json, commit 6089c98): the boundary and the factor by batch 1 and 16, the least time
of one of the library's products by batch 256. The launches are those of 2f3f9bb
(results/h100/launches-decode.json), which differs in two warps of one kernel and four small launches of the
sampler. The other steps that were measured show how far a prediction can be trusted, and so do the launch
tables that were tried at 16 rows (results/h100/tuning.json): 15 layers are predicted within 21 % and seven of
them within 3 %, five heads only within 41 %. What a dependent launch saves is a guess: nothing has measured
it here.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from bench import sass, trip_counts
from bench.step_record import PROCESSORS, Launch, by_storage, recording
from kernels import select_backend
from kernels.certify.measure import nvidia_occupancy
from kernels.certify.recorder import RecordedLaunch, Recorder
from kernels.certify.targets import target_for
from smollm2.config import SmolLM2Config
from smollm2.engine.captured import Choice, DecodeLoop
from smollm2.engine.eager import Engine
from smollm2.errors import LoadError
from smollm2.model import SmolLM2ForCausalLM
from smollm2.sampling import SamplingParams

RESULTS = Path(__file__).with_name("results") / "h100"
RECORDED, MEASURED = RESULTS / "launches-decode.json", RESULTS / "generation.json"
TARGET = target_for("sm_90")
SCHEDULERS = 4 * PROCESSORS
CLOCK = 1.755e9  # cycles/s; in training the card ran between 1,530 and 1,965 MHz
MEMORY_RATE = 3.0e12  # bytes/s, of long reads
L2_RATE = 5.5e12
PRODUCT_RATE = 560e12  # FLOP/s, as in bench/step_model.py
# us: between two launches, and where the second is a dependent one
BOUNDARY, DEPENDENT = 1.27, 0.77
STALL = 1.10  # times the cycles of a warp
PRODUCT = 5.9  # us of one of the library's products, however small
TORCH = "torch's small kernels"


@dataclass(frozen=True)
class Kernel:
    """A launch: what it moves, and what its warps do (0: of torch's kernels that is not known)."""

    name: str
    weights: int  # bytes
    cache: int  # what is written into it, 768 bytes a row and layer of the 135M model, is left out
    activations: int
    flops: float = 0.0
    programs: int = 0
    warps: int = 0  # of a program
    resident: int = 0  # programs of a multiprocessor at a time
    dependent: bool = False  # launched with launch_pdl
    instructions: int = 0  # of a warp
    issue: int = 0  # cycles of a scheduler for a warp
    cycles: int = 0  # of a warp alone
    accesses: int = 0  # bytes by the loads and stores of all warps, those that a cache answers included
    in_flight: int = 0  # bytes that are requested before the first is there, of all resident programs

    @property
    def bytes(self) -> int:
        return self.weights + self.cache + self.activations

    @property
    def us(self) -> float:
        """Predicted microseconds."""
        between = DEPENDENT if self.dependent else BOUNDARY
        if self.flops:
            return between + max(PRODUCT, 1e6 * self.bytes / MEMORY_RATE, 1e6 * self.flops / PRODUCT_RATE)
        if not self.cycles:  # a load and what depends on it
            return between + 1e6 * max(self.bytes / MEMORY_RATE, STALL * 2 * sass.MEMORY / CLOCK)
        waves = max(1.0, self.programs / (PROCESSORS * self.resident))
        return between + 1e6 * max(
            self.bytes / MEMORY_RATE,
            self.accesses / L2_RATE,
            self.programs * self.warps * self.issue / (SCHEDULERS * CLOCK),
            STALL * waves * self.cycles / CLOCK,
        )


Step = Mapping[Kernel, int]  # how often each is launched, in the order of their first launches
Steps = dict[tuple[int, int], Step]  # by batch and keys


def record(batch: int, keys: int, walker: Walker) -> Step:
    """A greedy step of this code over a cache of `keys` tokens that it fills."""
    recorder, device = Recorder(TARGET), torch.device("cuda")
    launched: dict[int, tuple[JITFunction[Any], dict[str, Any], RecordedLaunch]] = {}
    specialise = JITFunction.run
    with recording(recorder) as found:
        note = JITFunction.run

        def run(kernel: Any, *args: Any, **options: Any) -> None:
            note(kernel, *args, **options)
            specialise(kernel, *args, **options)
            arguments = dict(zip(kernel.arg_names, args, strict=False)) | options
            launched[len(found) - 1] = kernel, arguments, recorder.launches[-1]

        with mock.patch.object(JITFunction, "run", run):
            with device:
                model = SmolLM2ForCausalLM(SmolLM2Config.preset("135M"), select_backend("triton", device))
            model = model.to(torch.bfloat16).eval()
            loop = DecodeLoop(Engine(model), batch, keys, chunk=2)
            ids = torch.zeros(batch, 8, dtype=torch.int64, device=device)
            loop.start(ids, torch.full((batch,), 8), [0] * batch, Choice(SamplingParams(), (0, 2)))
            before = 0
            for steps in (1, 2):  # what a chunk begins with is not part of a step
                before = len(found)
                found.clear()
                launched.clear()
                loop.run(steps)
            matrices = (matrix for layer in model.pack() for matrix in layer)
            storages = {
                "weights": by_storage([*model.parameters(), *matrices]).keys(),
                "cache": by_storage([loop.cache.keys, loop.cache.values]).keys(),
            }
            every = (
                _kernel(found[place], launched.get(place), storages, keys, walker)
                for place in range(before, len(found))
            )
            return Counter(every)


class Walker:
    """Kernels as machine code, each compiled and walked once."""

    def __init__(self) -> None:
        self._code: dict[str, tuple[Sequence[sass.Instruction], int]] = {}
        self._walked: dict[tuple[Any, ...], tuple[trip_counts.Run, sass.WarpWork]] = {}

    def code(self, recorded: RecordedLaunch) -> tuple[Sequence[sass.Instruction], int]:
        """The instructions, and the bytes of shared memory of a program."""
        if (found := self._code.get(recorded.key)) is None:
            function = getattr(import_module(f"kernels.{recorded.op}"), recorded.kernel)
            attributes = {(index,): value for index, value in recorded.attributes.items()}
            source = ASTSource(function, recorded.signature, recorded.constants, attributes)
            compiled = triton.compile(source, target=TARGET.gpu, options=dict(recorded.options))
            code = sass.parsed(sass.disassembled(compiled.asm["cubin"]))
            found = self._code[recorded.key] = code, int(compiled.metadata.shared)
        return found

    def walked(
        self, recorded: RecordedLaunch, kernel: JITFunction[Any], arguments: Mapping[str, Any],
        grid: Sequence[int], keys: int,
    ) -> tuple[trip_counts.Run, sass.WarpWork]:  # fmt: skip
        """What a launch does with its arguments, and what one of its warps does."""
        numbers = (value for value in arguments.values() if isinstance(value, int))
        key = recorded.key, *grid, keys, *numbers
        if (found := self._walked.get(key)) is None:
            run, code = trip_counts.run(kernel, arguments, grid, keys), self.code(recorded)[0]
            found = self._walked[key] = run, sass.warp_work(code, sass.loops(code, run.trips))
        return found


def _moved(storages: Mapping[int, int], most: int) -> dict[int, int]:
    """Bytes by storage, together at most what the instructions move: of the largest only a part is meant."""
    found = dict(storages)
    for largest in sorted(found, key=lambda one: -found[one]):
        excess = max(0, sum(found.values()) - most)
        found[largest] -= min(found[largest], excess)
    return found


def _kernel(
    launch: Launch, launched: Any, kinds: Mapping[str, Container[int]], keys: int, walker: Walker
) -> Kernel:
    """launched: the kernel of a launch by Triton, with its arguments and specialisation; kinds: storages of
    weights and of the cache.
    """

    def split(*moved: Mapping[int, int]) -> tuple[int, int, int]:
        sums = dict.fromkeys(("weights", "cache", "activations"), 0)
        for storage, size in (item for found in moved for item in found.items()):
            kind = next((kind for kind, storages in kinds.items() if storage in storages), "activations")
            sums[kind] += size
        return sums["weights"], sums["cache"], sums["activations"]

    if launched is None:
        return Kernel(launch.name, *split(launch.storages), flops=launch.flops)
    function, arguments, recorded = launched
    grid = arguments["grid"](arguments) if callable(arguments["grid"]) else arguments["grid"]
    run, warp = walker.walked(recorded, function, arguments, grid, keys)
    code, shared = walker.code(recorded)
    programs, warps = math.prod(grid), int(recorded.options["num_warps"])
    part = nvidia_occupancy(TARGET, sass.registers(code), warps, shared)[0]
    resident = max(1, int(part * TARGET.warps) // warps)
    every = programs * warps

    def of(names: set[str]) -> dict[int, int]:
        return by_storage([arguments[name] for name in names if isinstance(arguments[name], Tensor)])

    read = _moved(of(run.read), every * warp.loaded)
    kept = {storage: size for storage, size in of(run.written).items() if storage not in kinds["cache"]}
    written = _moved(kept, every * warp.stored)
    # a multiprocessor reads a byte once, then its first-level cache has it
    loads = min(every * warp.loaded, PROCESSORS * sum(read.values()))
    return Kernel(
        launch.name, *split(read, written), programs=programs, warps=warps, resident=resident,
        dependent=bool(arguments.get("launch_pdl")), instructions=warp.instructions, issue=warp.issue,
        cycles=warp.cycles, accesses=loads + sum(written.values()),
        in_flight=min(min(programs, PROCESSORS * resident) * warps * warp.first_loaded, sum(read.values())),
    )  # fmt: skip


# what is said of a step


def total_us(step: Step) -> float:
    return sum(kernel.us * launches for kernel, launches in step.items())


def floor_us(step: Step) -> float:
    """What weights and cache alone take at the memory's rate."""
    return 1e6 * sum((one.weights + one.cache) * launches for one, launches in step.items()) / MEMORY_RATE


def _label(kernel: Kernel) -> str:
    return kernel.name if kernel.cycles or kernel.flops else TORCH


# Column -> its figure of the launches of one label, and how it is written.
COLUMNS: dict[str, tuple[Callable[[Kernel], float], str]] = {
    "launches": (lambda one: 1, ",.0f"),
    "MB weights": (lambda one: one.weights / 1e6, ",.1f"),
    "MB cache": (lambda one: one.cache / 1e6, ",.1f"),
    "MB activations": (lambda one: one.activations / 1e6, ",.1f"),
    "M instructions": (lambda one: one.programs * one.warps * one.instructions / 1e6, ",.1f"),
    "us": (lambda one: one.us, ",.0f"),
}
# The same, of one launch: a mean over those of a label.
OF_A_LAUNCH: dict[str, tuple[Callable[[Kernel], float], str]] = {
    "warps": (lambda one: one.programs * one.warps, ",.0f"),
    "instructions a warp": (lambda one: one.instructions, ",.0f"),
    "kB in flight": (lambda one: one.in_flight / 1e3, ",.0f"),
    "us a launch": (lambda one: one.us, ",.1f"),
}


def table(then: Step, now: Step) -> str:
    """Markdown: the launches of a step then and now, by kernel."""
    names = dict.fromkeys([*map(_label, now), *map(_label, then)])
    columns = [*COLUMNS, *OF_A_LAUNCH]
    rows = [f"| {' | '.join(['', *columns])} |", "|---|" + "---:|" * len(columns)]

    def figure(step: Step, name: str | None, column: str) -> str:
        figure, form = COLUMNS.get(column) or OF_A_LAUNCH[column]
        parts = [(one, launches) for one, launches in step.items() if name in (None, _label(one))]
        many = sum(launches for _, launches in parts) if column in OF_A_LAUNCH else 1
        return format(sum(figure(one) * launches for one, launches in parts) / max(1, many), form)

    def row(title: str, name: str | None, mark: str = "") -> str:
        cells = [title]
        for column in columns if name else COLUMNS:
            both = dict.fromkeys(figure(step, name, column) for step in (then, now) if step)
            cells.append(" > ".join(both))
        empty = [""] * (len(columns) + 1 - len(cells))
        return f"| {' | '.join([*(f'{mark}{cell}{mark}' for cell in cells), *empty])} |"

    return "\n".join([*rows, *(row(name, name) for name in names), row("a step", None, "**")])


def _changes(figures: Sequence[float]) -> str:
    """One figure, or two: then > now."""
    return " > ".join(dict.fromkeys(f"{figure:,.0f}" for figure in figures))


def overview(then: Steps, now: Steps) -> str:
    """Markdown: a row for each step, with what was measured of it."""
    measured = measurements()
    rows = [
        "| batch x keys | launches | predicted us | predicted tokens/s | floor us | measured us at 6089c98 |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for (batch, keys), step in now.items():
        both = [one for one in (then.get((batch, keys)), step) if one]
        took = measured.get((batch, keys))
        cells = (
            f"{batch} x {keys:,}", _changes([sum(one.values()) for one in both]),
            _changes([total_us(one) for one in both]),
            _changes([1e6 * batch / total_us(one) for one in both]),
            f"{floor_us(step):,.0f}", f"{took:,.0f}" if took else "",
        )  # fmt: skip
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def residuals(then: Steps) -> str:
    """How far the prediction of every measured step lies from its measurement."""
    measured = measurements()
    parts = [
        f"{batch} x {keys:,}: {100 * (total_us(step) / measured[batch, keys] - 1):+.0f} %"
        for (batch, keys), step in then.items()
        if (batch, keys) in measured
    ]
    return ", ".join(parts)


def measurements() -> dict[tuple[int, int], float]:
    """(batch, keys) -> us of a captured step with backend triton, on an H100 at commit 6089c98."""
    rows = json.loads(MEASURED.read_text(encoding="utf-8"))["generation"]["rows"]
    found = {
        (row["batch"], row["keys"]): row.get("step_us") for row in rows if row["variant"] == "triton captured"
    }
    return {step: us for step, us in found.items() if us}


FIELDS = [field.name for field in dataclasses.fields(Kernel)]


def write(path: Path, steps: Steps) -> None:
    """The launches of steps as JSON, a kernel a line."""
    rows = {
        f"{batch} x {keys}": [[launches, *dataclasses.astuple(one)] for one, launches in step.items()]
        for (batch, keys), step in steps.items()
    }
    text = json.dumps({"fields": ["launches", *FIELDS], "steps": rows})
    path.write_text(text.replace("[[", "[\n[").replace("], [", "],\n[") + "\n", encoding="utf-8")


def read(path: Path) -> Steps:
    """What `write` wrote. Raises LoadError."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["fields"] != ["launches", *FIELDS]:
            raise ValueError(f"expected the fields launches, {', '.join(FIELDS)}")
        return {
            tuple(map(int, name.split(" x "))): {Kernel(*row): launches for launches, *row in rows}  # type: ignore[misc]
            for name, rows in data["steps"].items()
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LoadError(
            f"{path}: not launches of bench.step_model --decode --json ({type(error).__name__}: {error})"
        ) from None


def report(batches: Sequence[int], keys: Sequence[int], path: Path | None) -> str:
    """Everything that the command prints. path: where the launches are written."""
    then = read(RECORDED) if RECORDED.exists() else {}
    walker = Walker()
    now = {(batch, many): record(batch, many, walker) for many in keys for batch in batches}
    if path:
        write(path, now)
    parts = ["Predicted, not measured: no GPU has run this. Then (2f3f9bb) > now.", overview(then, now)]
    for (batch, many), step in now.items():
        parts += [f"batch {batch}, {many:,} keys", table(then.get((batch, many), {}), step)]
    parts.append(f"Predictions against measurements at 6089c98: {residuals(then)}")
    return "\n\n".join(parts)
