"""The figures in the JSON files of a folder, whichever measurement wrote them, in one form: for
bench/report.py.

Read are pytest-benchmark's JSON of the suites and of bench.generate, and the JSON of bench.step_peers,
bench.train_step, bench.kernels, bench.roofline, bench.generation and bench.ladder. Where two files have the
same figure, the later one counts. A row that failed has no figure.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from bench.record import INTERPRETER_NOTE, read_json
from smollm2.errors import LoadError, UsageError

Facts = dict[str, Any]
K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True)
class Figure:
    """One measured number.

    kind: prefill, decode, step, rung, serving (value in tokens/s), operation (seconds), attention (TFLOP/s)
    or loss memory (bytes). case: figures of one case are compared with each other. limit: the value that the
    machine does not allow to pass; of an operation the seconds that it takes at least. facts: origin (device,
    dtype, date, commit, versions) and what the kind needs: batch, context, tokens, clients; of an operation
    panel, op and phase; columns: further numbers to show, heading -> text.
    """

    kind: str
    case: str
    variant: str
    value: float
    limit: float | None = None
    facts: Facts = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, str, str]:
        return self.kind, self.case, self.variant

    def fact(self, name: str) -> Any:
        """facts[name], or None."""
        return self.facts.get(name)


def grouped(figures: Iterable[Figure], key: Callable[[Figure], K]) -> dict[K, list[Figure]]:
    """The figures by a key, in the order in which keys and figures come."""
    found: dict[K, list[Figure]] = {}
    for figure in figures:
        found.setdefault(key(figure), []).append(figure)
    return found


def gather(folder: Path) -> tuple[list[Figure], list[str]]:
    """(figures, lines about files that were left out) of the JSON files of a folder. Raises LoadError when
    there is no figure.
    """
    if not folder.is_dir():
        raise UsageError(
            f"{folder}: expected a folder of results, found {'a file' if folder.exists() else 'nothing'}"
        )
    found: dict[tuple[str, str, str], Figure] = {}
    left_out = []
    reads: dict[str, float] = {}  # device -> bytes per second, for files whose writers did not measure it
    for path in sorted(folder.glob("*.json")):
        try:
            content = read_json(path)
            figures = read(content)
            if "read_gb_per_s" in (section := content.get("roofline") or _bandwidth(content)):
                reads[content["device"]] = 1e9 * section["read_gb_per_s"]
        except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError) as damage:
            why = f"not as its writer makes it ({type(damage).__name__}: {damage})"
            left_out.append(f"{path.name}: left out, {why}")
            continue
        if not figures:
            left_out.append(f"{path.name}: left out, no figures that bench.report knows")
        for figure in figures:
            before = found.get(figure.key)
            if before is None or before.facts.get("date", "") <= figure.facts.get("date", ""):
                found[figure.key] = figure
    if not found:
        none = f"{folder}: no figures to draw; python -m bench.generate --json {folder}/FILE makes some"
        raise LoadError("\n".join([none, *left_out]))
    return [_with_limit(figure, reads) for figure in found.values()], left_out


def _bandwidth(content: Facts) -> Facts:
    """What bench.generation found of it; nothing where it was not measured."""
    section = content.get("generation")
    return section.get("bandwidth", {}) if isinstance(section, dict) else {}


def _with_limit(figure: Figure, reads: dict[str, float]) -> Figure:
    """Adds the limit of the memory: what must be read, at the rate of the same run or else of `reads`."""
    facts = figure.facts
    own = 1e9 * facts["read_gb_per_s"] if "read_gb_per_s" in facts else None
    speed = own or reads.get(facts.get("device", ""))
    if figure.kind == "decode" and "bytes_per_token" in facts and speed:
        at = f"{speed / 1e9:,.0f} GB/s"
        return replace(figure, limit=speed / facts["bytes_per_token"], facts={**facts, "at": at})
    if figure.kind == "operation" and "product_seconds" in facts and speed:
        at = f"{speed / 1e9:,.0f} GB/s, {facts['matmul_tflops']:,.0f} TFLOP/s"
        floor = max(facts["moved_bytes"] / speed, facts["product_seconds"])
        return replace(figure, limit=floor, facts={**facts, "at": at})
    return figure


def read(content: Facts) -> list[Figure]:
    """The figures of one file: those of every section that is known."""
    origin: Facts = {
        name: content[name] for name in ("device", "versions", "commit", "date") if name in content
    }
    figures: list[Figure] = []
    for name, reader in READERS.items():
        # a trace has a list of kernels
        if isinstance(content.get(name), list if name == "benchmarks" else dict):
            figures += reader(content[name], origin)
    return figures


def _facts(section: Facts, origin: Facts, *names: str, **more: Any) -> Facts:
    """Origin, those values of the section, None where it has none, and more."""
    return {**origin, **{name: section.get(name) for name in names}, **more}


def from_suites(benchmarks: list[Facts], origin: Facts) -> list[Figure]:
    """pytest-benchmark's: bench.generate, bench_kernels and bench_train. Those of start-up and data have no
    picture.
    """
    figures = []
    for entry in benchmarks:
        facts = {**origin, **entry["extra_info"]}
        phase, variant = facts.get("phase", ""), facts.get("variant", "")
        if facts.get("op") == "loss memory":
            case = f"{facts['tokens']} tokens"
            figures.append(Figure("loss memory", case, variant, facts["peak_memory_bytes"], facts=facts))
        elif "op" in facts and not facts.get("note"):  # in the interpreter nothing is measured
            seconds = facts["us"] / 1e6
            floor = seconds * _floor_share(facts)
            figures.append(_operation(_alone(facts), facts["op"], phase, variant, seconds, floor, facts))
        elif phase in ("prefill", "decode"):
            facts["context"] = facts["prompt_tokens"]
            case = f"batch {facts['batch']}, prompt {facts['prompt_tokens']}"
            figures.append(Figure(phase, case, variant, facts["tokens_per_second"], facts=facts))
        elif phase == "step":
            tokens = facts["batch"] * facts["length"]
            limit = 1e3 * tokens / facts["floor_ms"] if "floor_ms" in facts else None
            case, rate = f"{facts['dtype']}, {facts['size']}", facts["tokens_per_second"]
            figures.append(Figure("step", case, variant, rate, limit, facts))
    return figures


def _alone(size: Facts) -> str:
    return f"operations alone, {size['batch']} x {size['length']} tokens, {size['dtype']}"


def _floor_share(facts: Facts) -> float:
    """The least time over the measured one, from bytes and operations: percent_of_roof has too few digits
    where it is small.
    """
    if "roof" not in facts or "bytes" not in facts:
        return float(facts["percent_of_roof"]) / 100
    roof = facts["roof"]
    floor = max(facts["bytes"] / roof["copy_gb_per_s"] / 1e9, facts["flops"] / roof["matmul_tflops"] / 1e12)
    return floor / (facts["us"] * 1e-6)


def _operation(
    panel: str, op: str, phase: str, variant: str, seconds: float, floor: float, facts: Facts
) -> Figure:
    case, facts = f"{panel}: {op} {phase}".rstrip(), {**facts, "panel": panel, "op": op, "phase": phase}
    return Figure("operation", case, variant, seconds, floor, facts)


def from_step_peers(section: Facts, origin: Facts) -> list[Figure]:
    size = f"{section['batch']} x {section['length']}"
    tokens = section["batch"] * section["length"]
    figures = []
    for dtype, found in section.get("results", {}).items():
        facts = _facts(section, origin, "batch", "length", "note", dtype=dtype)
        limit = 1e3 * tokens / found["matmul_floor_ms"]
        for name, row in found["variants"].items():
            if "step_ms" in row:
                rate = round(1e3 * tokens / row["step_ms"], 1)
                figures.append(Figure("step", f"{dtype}, 135M, {size}", name, rate, limit, facts))
    return figures


def from_train_step(section: Facts, origin: Facts) -> list[Figure]:
    """The fastest first."""
    facts = _facts(section, origin, "batch", "length", "note", dtype="bf16")
    case = f"bf16, {section['model']}, {section['batch']} x {section['length']}"
    shown = (("step_ms", "ms", "{:.1f}"), ("peak_memory_gb", "peak GB", "{:.2f}"), ("mfu", "MFU", "{:.1%}"))
    figures = []
    for name, row in section.get("variants", {}).items():
        if "tokens_per_second" in row:
            columns = {title: form.format(row[key]) for key, title, form in shown if row.get(key) is not None}
            more = {**facts, "columns": columns}
            figures.append(Figure("step", case, name, row["tokens_per_second"], None, more))
    return sorted(figures, key=lambda figure: -figure.value)


def from_kernels(section: Facts, origin: Facts) -> list[Figure]:
    """Operations at the size of a step, and attention at every length, of which the size of the step is
    one.
    """
    if section.get("note") == INTERPRETER_NOTE:
        return []
    facts = _facts(section, origin, "dtype", "batch", "length", "note", **section["roof"])
    figures = []
    for row in section.get("rows", []):
        if "us" not in row or row["percent_of_roof"] <= 0:
            continue
        seconds, (op, *words), phase, name = 1e-6 * row["us"], row["op"].split(), row["phase"], row["variant"]
        if not words:
            floors = {
                "moved_bytes": 1e9 * row["gb_per_s"] * seconds,
                "product_seconds": row["tflops"] * seconds / facts["matmul_tflops"],
            }
            floor = seconds * row["percent_of_roof"] / 100
            figures.append(_operation(_alone(section), op, phase, name, seconds, floor, {**facts, **floors}))
        if op == "attention":
            length = int(words[-1]) if words else section["length"]
            kind = "packed documents" if "documents" in words else "one document a row"
            more = {**facts, "tokens": length, "documents": kind, "phase": phase}
            case = f"{length} tokens, {kind}, {phase}"
            figures.append(Figure("attention", case, name, row["tflops"], None, more))
    return figures


def from_roofline(section: Facts, origin: Facts) -> list[Figure]:
    """The operations of a step and of a token, all calls of each together, and the whole of each."""
    facts = _facts(section, origin, "dtype", "note")
    panels = {
        "step": f"a training step, {section.get('batch')} x {section.get('length')} tokens",
        "token": f"a decoded token, {section.get('context')} keys",
    }
    figures = []
    for unit, panel in panels.items():
        found = section.get(unit)
        if not found:
            continue
        measured = {
            **found["operations_ms"],
            "the whole": {k: {"": ms} for k, ms in found["whole_ms"].items()},
        }
        floors_ms = {**found["floors_ms"], "the whole": {"": found["floor_ms"]}}
        for op, backends in measured.items():
            for backend, phases in backends.items():
                for phase, milliseconds in phases.items():
                    floors = floors_ms[op]
                    floor = floors[phase] if phase in floors else sum(floors.values())
                    figures.append(
                        _operation(panel, op, phase, backend, milliseconds * 1e-3, floor * 1e-3, facts)
                    )
    return figures


def from_generation(section: Facts, origin: Facts) -> list[Figure]:
    """Decode steps by keys and batch, and prefills."""
    figures = []
    rate = section.get("bandwidth", {}).get("read_gb_per_s")
    bandwidth = {"read_gb_per_s": rate} if rate else {}
    rows = [row for row in section.get("rows", []) + section.get("prefill", []) if "tokens_per_second" in row]
    for row in sorted(rows, key=lambda row: (row.get("keys", 0), row["batch"])):
        facts = _facts(section, origin, "dtype", "note", batch=row["batch"])
        if "keys" in row:
            kind, variant, case = "decode", row["variant"], f"batch {row['batch']}, {row['keys']} keys"
            facts |= {"context": row["keys"], "keys": row["keys"], **bandwidth}
            facts["bytes_per_token"] = row["bytes"] / row["batch"]
        else:
            kind, variant, case = "prefill", row["backend"], f"batch {row['batch']}, prompt {row['tokens']}"
            facts["columns"] = {"ms": f"{row['us'] / 1e3:.1f}", "TFLOP/s": f"{row['tflops']:.0f}"}
        figures.append(Figure(kind, case, variant, row["tokens_per_second"], None, facts))
    return figures


def from_ladder(section: Facts, origin: Facts) -> list[Figure]:
    """Rungs in order. Of their facts the peak of memory in bytes, and launches of the whole step."""
    size = f"{section['model']} model, {section['batch']} x {section['length']} tokens, {section['dtype']}"
    figures = []
    for name, row in section["rungs"].items():
        if "tokens_per_second" in row:
            facts = _facts(section, origin, "dtype", "batch", "length", "note")
            facts["peak_memory_bytes"] = 1e6 * row.get("peak_mb", 0.0)
            facts["launches"] = sum(row.get("launches", {}).values())
            case = f"{size}, backend {section['backend']}"
            figures.append(Figure("rung", case, name, row["tokens_per_second"], None, facts))
    return figures


def from_serve(section: Facts, origin: Facts) -> list[Figure]:
    """Servers by the number of clients."""
    figures = []
    shared = {"note": section.get("note"), "dtype": f"answers of {section.get('max_tokens')} tokens"}
    for row in section.get("rows", []):
        if "tokens_per_second" in row:
            case = f"{row['clients']} client{'s' if row['clients'] > 1 else ''}"
            facts = {**origin, **shared, **row}
            figures.append(Figure("serving", case, row["variant"], row["tokens_per_second"], None, facts))
    return figures


READERS: dict[str, Callable[[Any, Facts], list[Figure]]] = {
    "benchmarks": from_suites, "step_peers": from_step_peers, "step": from_train_step,
    "kernels": from_kernels, "roofline": from_roofline, "generation": from_generation, "ladder": from_ladder,
    "serve": from_serve,
}  # fmt: skip


def markdown(figures: list[Figure]) -> str:
    """Tables of generation, steps and serving: a row per variant, a column per case."""
    parts = []
    for kind in ("prefill", "decode", "step", "serving"):
        chosen = [figure for figure in figures if figure.kind == kind]
        if not chosen:
            continue
        cases = list(grouped(chosen, lambda figure: figure.case))
        cells = {}
        for figure in chosen:
            share = f" ({100 * figure.value / figure.limit:.0f} %)" if figure.limit else ""
            digits = 1 if figure.value < 1000 else 0
            cells[figure.variant, figure.case] = f"{figure.value:,.{digits}f}{share}"
        lines = [f"| {kind}, tokens/s (of the limit) | {' | '.join(cases)} |", "|---|" + "---:|" * len(cases)]
        for name in grouped(chosen, lambda figure: figure.variant):
            lines.append(f"| {name} | {' | '.join(cells.get((name, case), '') for case in cases)} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)
