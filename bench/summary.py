"""All results of a measurement in at most 44 lines, from the JSON files of its folder. Whatever is missing is
named, never guessed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from bench import clocks
from bench.record import read_json

LINES, WIDTH = 44, 150


def summarise(folder: Path) -> str:
    """The text of summary.txt."""
    found = [read_json(folder / f"{name}.json") for name in ("training", "kernels", "tests", "generation")]
    head = next((content for content in found if content), {})
    sections = {name: section for content in found for name, section in content.items()}
    versions = head.get("versions", {})
    libraries = [f"{name} {versions[name]}" for name in ("torch", "triton", "cuda") if name in versions]
    lines = [
        f"{head.get('device', 'no results')}; {', '.join(libraries)}; commit {head.get('commit', '')[:12]}; "
        f"{head.get('date', '')}"
    ]
    for section, make in SECTIONS.items():
        content = sections.get(section)
        if content is None:
            lines.append(f"{section}: not run")
            continue
        if content.get("note") and len(lines) == 1:
            lines.append(f"NOTE: {content['note']}")
        if content.get("status") != "complete" and "skipped" not in content:
            lines.append(f"{section}: {content.get('status')}; what it had:")
        if "skipped" in content:
            lines.append(f"{'training run' if section == 'run' else section}: skipped, {content['skipped']}")
        else:
            lines += make(content)
    if len(lines) > LINES:
        lines = [*lines[: LINES - 1], f"... {len(lines) - LINES + 1} more lines: see the JSON files"]
    return "\n".join(line[:WIDTH] for line in lines)


def failed(rows: Iterable[tuple[str, dict[str, Any]]], length: int) -> list[str]:
    """ "name: why" of every row that failed, the reason cut to that length."""
    return [f"{name}: {row['failed'][:length]}" for name, row in rows if "failed" in row]


def listed(heading: str, items: Sequence[str]) -> list[str]:
    """A line of the items, or none."""
    return [f"  {heading}: {'; '.join(items)}"] if items else []


def roofline_lines(found: dict[str, Any]) -> list[str]:
    """Bandwidth and rates, then how far a step and a token are from their floors, and what loses most."""
    rates = ", ".join(f"{name} {rate:,.4g}" for name, rate in found.get("matmul_tflops", {}).items())
    lines = [f"roof: copy {found.get('copy_gb_per_s', 0):,.4g} GB/s; matmul {rates} TFLOP/s"]
    for unit in ("step", "token"):
        if unit in found:
            floor, wholes = found[unit]["floor_ms"], found[unit]["whole_ms"].items()
            reached = ", ".join(f"{name} {100 * floor / ms:.0f} %" for name, ms in wholes)
            rows = list(found[unit]["next"].values())[-1][:3]
            parts = [(f"{row['operation']} {row['phase']}".strip(), row["loses_ms"]) for row in rows]
            most = ", ".join(f"{name} {ms:.3g} ms" for name, ms in parts)
            lines.append(f"  {unit}: floor {floor:.3g} ms, reached {reached}; loses most: {most}")
    return lines


def tests_lines(found: dict[str, Any]) -> list[str]:
    """Counts, what failed, and the worst error over its budget."""
    files = found.get("files", {})
    totals: Counter[str] = sum((Counter(outcome["counts"]) for outcome in files.values()), Counter())
    lines = [f"tests: {', '.join(f'{count} {name}' for name, count in totals.items())} in {len(files)} files"]
    if found.get("not_started"):
        lines[0] += f"; not started: {', '.join(found['not_started'])}"
    failures = [name for outcome in files.values() for name in outcome["failures"]]
    lines += [f"  FAILED {name}" for name in failures[:4]]
    lines += [f"  and {len(failures) - 4} more"] if len(failures) > 4 else []
    ends = {name: outcome["end"] for name, outcome in files.items()}
    lines += [f"  {name}: {end}" for name, end in ends.items() if end != "complete"]
    if found.get("numerics"):
        worst = max(found["numerics"], key=lambda row: row["worst"])
        lines.append(f"  worst error over budget: {worst['worst']:.2f} ({worst['op']}, {worst['dtype']})")
    return lines


def kernels_lines(found: dict[str, Any]) -> list[str]:
    """Ours per operation, a line with all phases, beside the fastest of the others, then other forms of
    ours.
    """
    rows = found.get("rows", [])
    size = f"{found.get('batch')} x {found.get('length')} tokens, {found.get('dtype')}"
    lines = [f"kernels, {size}: ours, percent of roof, fastest other"]
    times: dict[tuple[str, str], dict[str, float]] = {}  # of an operation's phase, by variant
    for row in rows:
        if "us" in row:
            times.setdefault((row["op"], row["phase"]), {})[row["variant"]] = row["us"]
    ops: dict[str, list[str]] = {}
    forms: dict[str, list[str]] = {}
    for ours in [row for row in rows if row["variant"] == "triton"]:
        op, cells = ours["op"], ops.setdefault(ours["op"], [])
        if "failed" in ours:
            cells.append(f"{ours.get('phase', '')} {ours['failed']}".strip())
            continue
        others = {name: us for name, us in times[op, ours["phase"]].items() if name != "triton"}
        bare = others.pop("products only", None)  # computes less on purpose
        of_ours = [name for name in others if name.startswith("triton ")]
        if of_ours:
            named = ", ".join(f"{name.removeprefix('triton ')} {others.pop(name):.1f}" for name in of_ours)
            forms.setdefault(op, []).append(f"; {ours['phase']} as {named} us")
        cell = f"{ours['phase']} {ours['us']:.1f} us {ours['percent_of_roof']:.1f} %"
        if others:
            best = min(others, key=others.__getitem__)
            cell += f" ({others[best] / ours['us']:.2f}x {best})"
        cells.append(cell + (f", {ours['us'] / bare:.2f}x its bare products" if bare is not None else ""))
    lines += [f"  {op:21}{'; '.join(cells)}{''.join(forms.get(op, []))}" for op, cells in ops.items()]
    absent = failed(((row["variant"], row) for row in rows if row["variant"] != "triton"), 60)
    lines += listed("not timed", sorted({*absent}))
    if "launches" in found:
        counted = [
            f"{name} {phases['forward']['launches']} + {phases['backward']['launches']}"
            for name, phases in found["launches"].items()
        ]
        lines.append(f"  launches per layer, forward + backward: {', '.join(counted)}")
    return lines


def step_lines(found: dict[str, Any]) -> list[str]:
    """One line per variant."""
    size = f"{found.get('batch')} x {found.get('length')}, {found.get('parameters', 0):,} parameters"
    lines, rows = [f"training step, {size}:"], found.get("variants", {})
    distances = found.get("loss_distance", {})
    for name, row in rows.items():
        if "failed" in row:
            continue
        mfu = f"{100 * row['mfu']:.1f} %" if row["mfu"] is not None else "none"
        line = f"  {name:16}{row['step_ms']:9.2f} ms {row['tokens_per_second']:11,.0f} tok/s  MFU {mfu}"
        line += f"  {row['peak_memory_gb']:.1f} GB" if "peak_memory_gb" in row else ""
        line += f"  {row['launches']['all']} launches" if "launches" in row else ""
        line += "  {mhz:,.0f} MHz {watts:.0f} W".format(**row["gpu"]) if "mhz" in row.get("gpu", {}) else ""
        if name in distances and name != "torch":
            line += f"  losses within {distances[name]:.0e} of torch's"
        lines.append(line)
    return lines + listed("not timed", failed(rows.items(), 40))


def ladder_lines(found: dict[str, Any]) -> list[str]:
    """Every rung's speed over that of the first."""
    rows = {name: row for name, row in found.get("rungs", {}).items() if "step_ms" in row}
    if not rows:
        return ["ladder: no rungs"]
    base = next(iter(rows.values()))
    steps = [f"{name} {base['step_ms'] / row['step_ms']:.2f}x" for name, row in rows.items()]
    foot = f"ladder, {base['tokens_per_second']:,.0f} tok/s at its foot"
    lines = [f"{foot}: {', '.join(steps[1:5])}", f"  {', '.join(steps[5:])}"]
    return lines + listed("not measured", failed(found["rungs"].items(), 60))


def run_lines(found: dict[str, Any]) -> list[str]:
    """The curve's ends, and what to doubt it by. Losses are those of single steps: the last one is a mean of
    ten.
    """
    points, held = found.get("points", []), found.get("held_out", [])
    if not points:
        return [f"training run: no points{': ' * ('end' in found)}{found.get('end', '')}"]
    last = [float(point["loss"]) for point in points[-10:]]  # of text, where it is not a number
    mean = sum(last) / len(last)
    line = f"training run: {points[-1]['step']} steps, loss {float(points[0]['loss']):.2f} -> {mean:.2f}"
    if held:
        line += f", held-out {float(held[0]['held_out_loss']):.2f} -> {float(held[-1]['held_out_loss']):.2f}"
        line += f", unigram entropy {held[-1]['unigram_entropy']:.2f}"
    line += f", {found['epochs']:.2f} epochs"
    line += f", {found['tokens_per_second']:,.0f} tok/s" if "tokens_per_second" in found else ""
    line += f", MFU {100 * found['mfu']:.1f} %" if "mfu" in found else ""
    late = found.get("gpu", [])[-60:]  # the first readings are of the time before the first step
    if late:
        line += ", {mhz:,.0f} MHz {watts:.0f} W".format(**clocks.summary(late))
    return [line]


def generation_lines(found: dict[str, Any]) -> list[str]:
    """A line for each context, with the captured Triton step at every batch size beside two others; then
    prefill and many prompts.
    """
    rows = found.get("rows", [])
    timed = {(row["keys"], row["batch"], row["variant"]): row for row in rows if "step_us" in row}
    same = found.get("fp32_agreement", {})
    title = (
        "generation: decoded tok/s of triton captured, % of bandwidth (times torch captured, transformers)"
    )
    if "share" in same:
        title += f"; {100 * same['share']:.1f} % of greedy tokens the same in fp32"
    lines = [title]
    for keys in dict.fromkeys(key[0] for key in timed):
        cells = []
        for batch in sorted({batch for at, batch, _ in timed if at == keys}):
            names = ("triton captured", "torch captured", "transformers")
            ours, *others = (timed.get((keys, batch, name)) for name in names)
            cell = "-"
            if ours:
                cell = f"{ours['tokens_per_second']:,.0f} {ours['percent_of_bandwidth'] or 0:.0f}%"
            ratios = [f"{row['step_us'] / ours['step_us']:.2g}x" if ours and row else "-" for row in others]
            cells.append(f"{batch}: {cell} ({' '.join(ratios)})")
        lines.append(f"  {keys} keys, batch {'; '.join(cells)}")
    lines += listed(
        "prefill tok/s",
        [
            f"{row['batch']} x {row['tokens']} {row['backend']} {row['tokens_per_second']:,.0f}"
            for row in found.get("prefill", [])
            if "us" in row
        ],
    )
    for row in found.get("many", []):
        rate = row.get("failed") or f"{row['tokens_per_second']:,.0f} tok/s, engine {row['engine']}"
        lines.append(f"  {row['prompts']} prompts through {row['slots']} slots, {row['backend']}: {rate}")
    lines += listed(
        "requests at once to the scheduler: tok/s, ms to the first token",
        [
            f"{row['slots']}: "
            + (row.get("failed") or f"{row['tokens_per_second']:,.0f}, {row['first_ms']:,.0f}")
            for row in found.get("served", [])
        ],
    )
    absent = Counter(failed(((row["variant"], row) for row in rows), 60))
    return lines + listed("not timed", [f"{times} {why}" for why, times in absent.items()])


def tuning_lines(found: dict[str, Any]) -> list[str]:
    """Lines of the launch table of which another candidate is faster by more than a fiftieth."""
    rows = [row for row in found.get("rows", []) if "us" in row]
    table = {(row["op"], row["phase"]): row["us"] for row in rows if row.get("of_table")}
    faster: dict[tuple[str, str], dict[str, Any]] = {}
    for row in sorted(rows, key=lambda row: -row["us"]):
        if row["us"] < 0.98 * table.get((row["op"], row["phase"]), 0.0):
            faster[row["op"], row["phase"]] = row
    best = [
        f"{op} {phase} {row['launch'][:4]} {row['us']:.1f} us of {table[op, phase]:.1f}"
        for (op, phase), row in faster.items()
    ]
    return [f"launch table: {len(rows)} launches timed; faster than its lines: {'; '.join(best) or 'none'}"]


def memcheck_lines(found: dict[str, Any]) -> list[str]:
    """How many operations are clean, and which are not."""
    results = found.get("results", {})
    others = [f"; {op}: {result['result']}" for op, result in results.items() if result["result"] != "clean"]
    return [f"memcheck: {len(results) - len(others)} of {len(results)} clean{''.join(others)}"]


# The sections of a run's files, in the order in which they are told.
SECTIONS: dict[str, Callable[[dict[str, Any]], list[str]]] = {
    "step": step_lines, "tests": tests_lines, "memcheck": memcheck_lines, "kernels": kernels_lines,
    "generation": generation_lines, "run": run_lines, "ladder": ladder_lines, "tuning": tuning_lines,
    "roofline": roofline_lines,
}  # fmt: skip
