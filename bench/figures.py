"""The figures in the JSON files of a folder, whichever measurement wrote them, in one form: for
bench/report.py.

Read are pytest-benchmark's JSON of the suites and of bench.generate, and the JSON of bench.step_peers,
bench.train_step, bench.kernels, bench.roofline, bench.generation and bench.ladder. Where two files have the
same figure, the later one counts. A row that failed is none.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bench.record import INTERPRETER_NOTE, read_json
from smollm2.errors import LoadError, UsageError


@dataclass(frozen=True)
class Figure:
    """One measured number.

    kind: prefill, decode, step, rung (value in tokens/s), operation (seconds), attention (TFLOP/s) or loss
    memory (bytes). case: what is compared with each other. limit: the value that the machine does not allow
    to pass; of an operation the seconds that it takes at least. facts: origin (device, dtype, date, commit,
    versions) and what the kind needs: batch, context, tokens; of an operation panel, op and phase; columns:
    what else to say of it, heading -> text.
    """

    kind: str
    case: str
    variant: str
    value: float
    limit: float | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, str, str]:
        return self.kind, self.case, self.variant


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
    reads: dict[str, float] = {}  # device -> bytes per second, of files that measured no more
    for path in sorted(folder.glob("*.json")):
        try:
            content = read_json(path)
            figures = read(content)
            if "read_gb_per_s" in (section := content.get("roofline") or bandwidth(content)):
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
    return [with_limit(figure, reads) for figure in found.values()], left_out


def bandwidth(content: dict[str, Any]) -> dict[str, Any]:
    """Of bench.generation; nothing where it was not measured."""
    section = content.get("generation")
    return section.get("bandwidth", {}) if isinstance(section, dict) else {}


def with_limit(figure: Figure, reads: dict[str, float]) -> Figure:
    """The limit of the memory: what must be read, at the rate that was measured in the same run.

    reads: device -> bytes per second, for files whose writers measured no such rate then.
    """
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


def read(content: dict[str, Any]) -> list[Figure]:
    """The figures of one file: those of every section that is known."""
    origin: dict[str, Any] = {
        name: content[name] for name in ("device", "versions", "commit", "date") if name in content
    }
    figures: list[Figure] = []
    for name, reader in READERS.items():
        # a trace has a list of kernels
        if isinstance(content.get(name), list if name == "benchmarks" else dict):
            figures += reader(content[name], origin)
    return figures


def from_suites(benchmarks: list[dict[str, Any]], origin: dict[str, Any]) -> list[Figure]:
    """pytest-benchmark's: bench.generate, bench_kernels and bench_train. Those of start-up and data have no
    picture.
    """
    figures = []
    for entry in benchmarks:
        facts = {**origin, **entry["extra_info"]}
        phase, variant, rate = (
            facts.get("phase", ""),
            facts.get("variant", ""),
            facts.get("tokens_per_second"),
        )
        if facts.get("op") == "loss memory":
            case = f"{facts['tokens']} tokens"
            figures.append(Figure("loss memory", case, variant, facts["peak_memory_bytes"], facts=facts))
        elif "op" in facts and not facts.get("note"):  # in the interpreter nothing is measured
            seconds = facts["us"] / 1e6
            where = f"operations alone, {facts['batch']} x {facts['length']} tokens, {facts['dtype']}"
            floor = seconds * floor_share(facts)
            figures.append(operation(where, facts["op"], phase, variant, seconds, floor, facts))
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


def floor_share(facts: dict[str, Any]) -> float:
    """The least time over the measured one, from bytes and operations: percent_of_roof has too few digits
    where it is small.
    """
    if "roof" not in facts or "bytes" not in facts:
        return float(facts["percent_of_roof"]) / 100
    roof = facts["roof"]
    floor = max(facts["bytes"] / roof["copy_gb_per_s"] / 1e9, facts["flops"] / roof["matmul_tflops"] / 1e12)
    return floor / (facts["us"] * 1e-6)


def from_step_peers(section: dict[str, Any], origin: dict[str, Any]) -> list[Figure]:
    tokens = section["batch"] * section["length"]
    figures = []
    for dtype, found in section.get("results", {}).items():
        facts = {
            **origin,
            "dtype": dtype,
            **{name: section.get(name) for name in ("batch", "length", "note")},
        }
        limit = 1e3 * tokens / found["matmul_floor_ms"]
        case = f"{dtype}, 135M, {section['batch']} x {section['length']}"
        for name, row in found["variants"].items():
            if "step_ms" in row:
                rate = round(1e3 * tokens / row["step_ms"], 1)
                figures.append(Figure("step", case, name, rate, limit, facts))
    return figures


def from_train_step(section: dict[str, Any], origin: dict[str, Any]) -> list[Figure]:
    """The fastest first."""
    facts = {**origin, "dtype": "bf16", **{name: section.get(name) for name in ("batch", "length", "note")}}
    case = f"bf16, {section['model']}, {section['batch']} x {section['length']}"
    shown = (("step_ms", "ms", "{:.1f}"), ("peak_memory_gb", "peak GB", "{:.2f}"), ("mfu", "MFU", "{:.1%}"))
    figures = []
    for name, row in section.get("variants", {}).items():
        if "tokens_per_second" in row:
            columns = {title: form.format(row[key]) for key, title, form in shown if row.get(key) is not None}
            more = {**facts, "columns": columns}
            figures.append(Figure("step", case, name, row["tokens_per_second"], None, more))
    return sorted(figures, key=lambda figure: -figure.value)


def operation(
    panel: str, op: str, phase: str, variant: str, seconds: float, floor: float, facts: dict[str, Any]
) -> Figure:
    case = f"{panel}: {op} {phase}".rstrip()
    return Figure(
        "operation", case, variant, seconds, floor, {**facts, "panel": panel, "op": op, "phase": phase}
    )


def from_kernels(section: dict[str, Any], origin: dict[str, Any]) -> list[Figure]:
    """Operations at the size of a step, and attention at every length, of which the size of the step is
    one.
    """
    if section.get("note") == INTERPRETER_NOTE:
        return []
    facts = {
        **origin,
        **{name: section[name] for name in ("dtype", "batch", "length", "note") if name in section},
        **section["roof"],
    }
    panel = f"operations alone, {section['batch']} x {section['length']} tokens, {section['dtype']}"
    figures = []
    for row in section.get("rows", []):
        if "us" not in row or row["percent_of_roof"] <= 0:
            continue
        seconds, (op, *words) = 1e-6 * row["us"], row["op"].split()
        if not words:
            floors = {
                "moved_bytes": 1e9 * row["gb_per_s"] * seconds,
                "product_seconds": row["tflops"] * seconds / facts["matmul_tflops"],
            }
            floor = seconds * row["percent_of_roof"] / 100
            figures.append(
                operation(panel, op, row["phase"], row["variant"], seconds, floor, {**facts, **floors})
            )
        if op == "attention":
            length, kind = (
                int(words[-1]) if words else section["length"],
                "packed documents" if "documents" in words else "one document a row",
            )
            more = {"tokens": length, "documents": kind, "phase": row["phase"]}
            case = f"{length} tokens, {kind}, {row['phase']}"
            figures.append(Figure("attention", case, row["variant"], row["tflops"], None, {**facts, **more}))
    return figures


def from_roofline(section: dict[str, Any], origin: dict[str, Any]) -> list[Figure]:
    """The operations of a step and of a token, all calls of each together, and the whole of each."""
    facts = {**origin, "dtype": section.get("dtype"), "note": section.get("note")}
    figures = []
    for unit in ("step", "token"):
        found = section.get(unit)
        if not found:
            continue
        size = (
            f"{section['batch']} x {section['length']} tokens"
            if unit == "step"
            else f"{section['context']} keys"
        )
        panel = f"a training step, {size}" if unit == "step" else f"a decoded token, {size}"
        for op, backends in found["operations_ms"].items():
            for backend, phases in backends.items():
                for phase, milliseconds in phases.items():
                    floors = found["floors_ms"][op]
                    floor = floors[phase] if phase in floors else sum(floors.values())
                    figures.append(
                        operation(panel, op, phase, backend, milliseconds * 1e-3, floor * 1e-3, facts)
                    )
        for backend, milliseconds in found["whole_ms"].items():
            figures.append(
                operation(
                    panel, "the whole", "", backend, milliseconds * 1e-3, found["floor_ms"] * 1e-3, facts
                )
            )
    return figures


def from_generation(section: dict[str, Any], origin: dict[str, Any]) -> list[Figure]:
    """Decode steps by keys and batch, and prefills."""
    figures = []
    rows = [row for row in section.get("rows", []) + section.get("prefill", []) if "tokens_per_second" in row]
    for row in sorted(rows, key=lambda row: (row.get("keys", 0), row["batch"])):
        facts = {**origin, "dtype": section.get("dtype"), "batch": row["batch"], "note": section.get("note")}
        if "keys" in row:
            kind, variant, case = "decode", row["variant"], f"batch {row['batch']}, {row['keys']} keys"
            facts |= {
                "context": row["keys"],
                "keys": row["keys"],
                "bytes_per_token": row["bytes"] / row["batch"],
            }
            facts |= {
                name: rate for name, rate in section.get("bandwidth", {}).items() if name == "read_gb_per_s"
            }
        else:
            kind, variant, case = "prefill", row["backend"], f"batch {row['batch']}, prompt {row['tokens']}"
            facts["columns"] = {"ms": f"{row['us'] / 1e3:.1f}", "TFLOP/s": f"{row['tflops']:.0f}"}
        figures.append(Figure(kind, case, variant, row["tokens_per_second"], None, facts))
    return figures


def from_ladder(section: dict[str, Any], origin: dict[str, Any]) -> list[Figure]:
    """Rungs in order. Of their facts the peak of memory in bytes, and launches of the whole step."""
    size = {name: section.get(name) for name in ("dtype", "batch", "length", "note")}
    case = (
        f"{section['model']} model, {section['batch']} x {section['length']} tokens, {section['dtype']}, "
        f"backend {section['backend']}"
    )
    figures = []
    for name, row in section["rungs"].items():
        if "tokens_per_second" in row:
            more = {
                "peak_memory_bytes": 1e6 * row.get("peak_mb", 0.0),
                "launches": sum(row.get("launches", {}).values()),
            }
            figures.append(
                Figure("rung", case, name, row["tokens_per_second"], None, {**origin, **size, **more})
            )
    return figures


READERS: dict[str, Callable[[Any, dict[str, Any]], list[Figure]]] = {
    "benchmarks": from_suites, "step_peers": from_step_peers, "step": from_train_step,
    "kernels": from_kernels, "roofline": from_roofline, "generation": from_generation, "ladder": from_ladder,
}  # fmt: skip


def markdown(figures: list[Figure]) -> str:
    """Tables of generation and steps: a row per variant, a column per case."""
    parts = []
    for kind in ("prefill", "decode", "step"):
        chosen = [figure for figure in figures if figure.kind == kind]
        if not chosen:
            continue
        cases = list(dict.fromkeys(figure.case for figure in chosen))
        values = {
            (figure.variant, figure.case): f"{figure.value:,.{1 if figure.value < 1000 else 0}f}"
            for figure in chosen
        }
        limits = {(f.variant, f.case): f" ({100 * f.value / f.limit:.0f} %)" for f in chosen if f.limit}
        lines = [f"| {kind}, tokens/s (of the limit) | {' | '.join(cases)} |", "|---|" + "---:|" * len(cases)]
        for name in dict.fromkeys(figure.variant for figure in chosen):
            cells = [values.get((name, case), "") + limits.get((name, case), "") for case in cases]
            lines.append(f"| {name} | {' | '.join(cells)} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)
