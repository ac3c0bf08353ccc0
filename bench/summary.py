"""All results of a measurement in at most 44 lines, from the JSON files of its folder. Whatever is missing is
named, never guessed.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from bench.record import read_json

LINES, WIDTH = 44, 150


def summarise(folder: Path) -> str:
    """The text of summary.txt."""
    files = {
        name: read_json(folder / f"{name}.json") for name in ("training", "kernels", "tests", "generation")
    }
    head = next((content for content in files.values() if content), {})
    versions = head.get("versions", {})
    libraries = ", ".join(
        f"{name} {versions[name]}" for name in ("torch", "triton", "cuda") if name in versions
    )
    lines = [
        f"{head.get('device', 'no results')}; {libraries}; commit {head.get('commit', '')[:12]}; "
        f"{head.get('date', '')}"
    ]
    makers = (
        ("training", "step", step_lines), ("tests", "tests", tests_lines),
        ("tests", "memcheck", memcheck_lines), ("kernels", "kernels", kernels_lines),
        ("generation", "generation", generation_lines), ("training", "run", run_lines),
        ("training", "ladder", ladder_lines), ("kernels", "tuning", tuning_lines),
        ("kernels", "roofline", roofline_lines),
    )  # fmt: skip
    for name, section, make in makers:
        content = files[name].get(section)
        if content is None:
            lines.append(f"{section}: not run")
            continue
        if content.get("note") and len(lines) == 1:
            lines.append(f"NOTE: {content['note']}")
        if content.get("status") != "complete" and "skipped" not in content:
            lines.append(f"{section}: {content.get('status')}; what it had:")
        lines += make(content)
    if len(lines) > LINES:
        lines = [*lines[: LINES - 1], f"... {len(lines) - LINES + 1} more lines: see the JSON files"]
    return "\n".join(line[:WIDTH] for line in lines)


def roofline_lines(found: dict[str, Any]) -> list[str]:
    """Bandwidth and rates, then how far a step and a token are from their floors, and what loses most."""
    rates = ", ".join(f"{name} {rate:,.4g}" for name, rate in found.get("matmul_tflops", {}).items())
    lines = [f"roof: copy {found.get('copy_gb_per_s', 0):,.4g} GB/s; matmul {rates} TFLOP/s"]
    for unit in ("step", "token"):
        if unit not in found:
            continue
        reached = ", ".join(
            f"{name} {100 * found[unit]['floor_ms'] / ms:.0f} %"
            for name, ms in found[unit]["whole_ms"].items()
        )
        rows = list(found[unit]["next"].values())[-1][:3]
        most = ", ".join(
            f"{row['operation']} {row['phase']}".strip() + f" {row['loses_ms']:.3g} ms" for row in rows
        )
        lines.append(
            f"  {unit}: floor {found[unit]['floor_ms']:.3g} ms, reached {reached}; loses most: {most}"
        )
    return lines


def tests_lines(found: dict[str, Any]) -> list[str]:
    """Counts, what failed, and the worst error over its budget."""
    if "skipped" in found:
        return [f"tests: skipped, {found['skipped']}"]
    files = found.get("files", {})
    totals: Counter[str] = sum((Counter(outcome["counts"]) for outcome in files.values()), Counter())
    lines = [f"tests: {', '.join(f'{count} {name}' for name, count in totals.items())} in {len(files)} files"]
    if found.get("not_started"):
        lines[0] += f"; not started: {', '.join(found['not_started'])}"
    failures = [name for outcome in files.values() for name in outcome["failures"]]
    lines += [f"  FAILED {name}" for name in failures[:4]] + (
        [f"  and {len(failures) - 4} more"] if len(failures) > 4 else []
    )
    lines += [
        f"  {name}: {outcome['end']}" for name, outcome in files.items() if outcome["end"] != "complete"
    ]
    if found.get("numerics"):
        worst = max(found["numerics"], key=lambda row: row["worst"])
        lines.append(f"  worst error over budget: {worst['worst']:.2f} ({worst['op']}, {worst['dtype']})")
    return lines


def kernels_lines(found: dict[str, Any]) -> list[str]:
    """Ours per operation, a line with all phases, beside the fastest of the others, then other forms of
    ours.
    """
    rows = found.get("rows", [])
    lines = [
        f"kernels, {found.get('batch')} x {found.get('length')} tokens, {found.get('dtype')}: ours, "
        "percent of roof, fastest other"
    ]
    ops: dict[str, list[str]] = {}
    forms: dict[str, list[str]] = {}
    for ours in [row for row in rows if row["variant"] == "triton"]:
        cells = ops.setdefault(ours["op"], [])
        if "failed" in ours:
            cells.append(f"{ours.get('phase', '')} {ours['failed']}".strip())
            continue
        others = {
            row["variant"]: row["us"]
            for row in rows
            if "us" in row and (row["op"], row["phase"]) == (ours["op"], ours["phase"])
        }
        del others["triton"]
        bare = others.pop("products only", None)  # computes less on purpose
        of_ours = {
            name.removeprefix("triton "): others.pop(name) for name in [*others] if name.startswith("triton ")
        }
        if of_ours:
            times = ", ".join(f"{name} {us:.1f}" for name, us in of_ours.items())
            forms.setdefault(ours["op"], []).append(f"{ours['phase']} as {times} us")
        cell = f"{ours['phase']} {ours['us']:.1f} us {ours['percent_of_roof']:.1f} %"
        if others:
            best = min(others, key=others.__getitem__)
            cell += f" ({others[best] / ours['us']:.2f}x {best})"
        cells.append(cell + (f", {ours['us'] / bare:.2f}x its bare products" if bare is not None else ""))
    lines += [
        f"  {op:21}{'; '.join(cells)}{''.join(f'; {form}' for form in forms.get(op, []))}"
        for op, cells in ops.items()
    ]
    absent = {
        f"{row['variant']}: {row['failed'][:60]}"
        for row in rows
        if "failed" in row and row["variant"] != "triton"
    }
    lines += [f"  not timed: {'; '.join(sorted(absent))}"] if absent else []
    if "launches" in found:
        counted = [
            f"{name} {phases['forward']['launches']} + {phases['backward']['launches']}"
            for name, phases in found["launches"].items()
        ]
        lines.append(f"  launches per layer, forward + backward: {', '.join(counted)}")
    return lines


def step_lines(found: dict[str, Any]) -> list[str]:
    """One line per variant."""
    lines = [
        f"training step, {found.get('batch')} x {found.get('length')}, {found.get('parameters', 0):,} "
        "parameters:"
    ]
    distances = found.get("loss_distance", {})
    for name, row in found.get("variants", {}).items():
        if "failed" in row:
            continue
        mfu = f"{100 * row['mfu']:.1f} %" if row["mfu"] is not None else "none"
        line = f"  {name:16}{row['step_ms']:9.2f} ms {row['tokens_per_second']:11,.0f} tok/s  MFU {mfu}"
        line += f"  {row['peak_memory_gb']:.1f} GB" if "peak_memory_gb" in row else ""
        line += f"  {row['launches']['all']} launches" if "launches" in row else ""
        line += (
            f"  losses within {distances[name]:.0e} of torch's"
            if name in distances and name != "torch"
            else ""
        )
        lines.append(line)
    absent = [
        f"{name}: {row['failed'][:40]}" for name, row in found.get("variants", {}).items() if "failed" in row
    ]
    return lines + ([f"  not timed: {'; '.join(absent)}"] if absent else [])


def ladder_lines(found: dict[str, Any]) -> list[str]:
    """Every rung's speed over that of the first."""
    rows = {name: row for name, row in found.get("rungs", {}).items() if "step_ms" in row}
    if not rows:
        return ["ladder: no rungs"]
    base = next(iter(rows.values()))
    steps = [f"{name} {base['step_ms'] / row['step_ms']:.2f}x" for name, row in rows.items()]
    missing = [f"{name}: {row['failed'][:60]}" for name, row in found["rungs"].items() if "failed" in row]
    lines = [
        f"ladder, {base['tokens_per_second']:,.0f} tok/s at its foot: {', '.join(steps[1:5])}",
        f"  {', '.join(steps[5:])}",
    ]
    return lines + ([f"  not measured: {'; '.join(missing)}"] if missing else [])


def run_lines(found: dict[str, Any]) -> list[str]:
    """The curve's ends, and what to doubt it by. Losses are those of single steps: the last one is a mean of
    ten.
    """
    if "skipped" in found:
        return [f"training run: skipped, {found['skipped']}"]
    points, held = found.get("points", []), found.get("held_out", [])
    if not points:
        return [f"training run: no points{': ' * ('end' in found)}{found.get('end', '')}"]
    last = [float(point["loss"]) for point in points[-10:]]  # of text, where it is not a number
    line = (
        f"training run: {points[-1]['step']} steps, loss {float(points[0]['loss']):.2f} -> "
        f"{sum(last) / len(last):.2f}"
    )
    if held:
        line += f", held-out {float(held[0]['held_out_loss']):.2f} -> {float(held[-1]['held_out_loss']):.2f}"
        line += f", unigram entropy {held[-1]['unigram_entropy']:.2f}"
    line += f", {found['epochs']:.2f} epochs"
    line += f", {found['tokens_per_second']:,.0f} tok/s" if "tokens_per_second" in found else ""
    return [line + (f", MFU {100 * found['mfu']:.1f} %" if "mfu" in found else "")]


def generation_lines(found: dict[str, Any]) -> list[str]:
    """A line for each context, with the captured Triton step at every batch size beside two others; then
    prefill and many prompts.
    """
    timed = {
        (row["keys"], row["batch"], row["variant"]): row for row in found.get("rows", []) if "step_us" in row
    }
    same = found.get("fp32_agreement", {})
    title = (
        "generation: decoded tok/s of triton captured, % of bandwidth (times torch captured, transformers)"
    )
    lines = [
        title
        + (f"; {100 * same['share']:.1f} % of greedy tokens the same in fp32" if "share" in same else "")
    ]
    for keys in dict.fromkeys(key[0] for key in timed):
        cells = []
        for batch in sorted({batch for at, batch, _ in timed if at == keys}):
            ours, *others = (
                timed.get((keys, batch, name))
                for name in ("triton captured", "torch captured", "transformers")
            )
            ratios = " ".join(
                f"{row['step_us'] / ours['step_us']:.2g}x" if ours and row else "-" for row in others
            )
            rate = (
                f"{ours['tokens_per_second']:,.0f} {ours['percent_of_bandwidth'] or 0:.0f}%" if ours else "-"
            )
            cells.append(f"{batch}: {rate} ({ratios})")
        lines.append(f"  {keys} keys, batch {'; '.join(cells)}")
    rates = {
        (row["batch"], row["tokens"], row["backend"]): row["tokens_per_second"]
        for row in found.get("prefill", [])
        if "us" in row
    }
    shown = [f"{batch} x {tokens} {name} {rate:,.0f}" for (batch, tokens, name), rate in rates.items()]
    lines += [f"  prefill tok/s: {'; '.join(shown)}"] if shown else []
    for row in found.get("many", []):
        rate = row.get("failed") or f"{row['tokens_per_second']:,.0f} tok/s, engine {row['engine']}"
        lines.append(f"  {row['prompts']} prompts through {row['slots']} slots, {row['backend']}: {rate}")
    absent = Counter(
        f"{row['variant']}: {row['failed'][:60]}" for row in found.get("rows", []) if "failed" in row
    )
    return lines + (
        [f"  not timed: {'; '.join(f'{times} {why}' for why, times in absent.items())}"] if absent else []
    )


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
    if "skipped" in found:
        return [f"memcheck: skipped, {found['skipped']}"]
    results = found.get("results", {})
    clean = [op for op, result in results.items() if result["result"] == "clean"]
    others = [f"{op}: {result['result']}" for op, result in results.items() if op not in clean]
    return [f"memcheck: {len(clean)} of {len(results)} clean" + (f"; {'; '.join(others)}" if others else "")]
