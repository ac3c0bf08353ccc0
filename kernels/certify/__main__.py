"""`python -m kernels.certify`: compiles every launch of every kernel for six GPUs, none of which has to be
there.

    python -m kernels.certify                       compiles what changed, writes certificate.json and CERTIFICATE.md, applies the gates
    python -m kernels.certify --check               compiles nothing; fails when the committed table is not that of this source
    python -m kernels.certify --target sm_90 --op attention      compiles these again and prints them; writes nothing
    python -m kernels.certify --fill DIR --arch sm_90            fills a Triton cache for that GPU (kernels/certify/cache_fill.py)
    python -m kernels.certify --verify DIR --arch sm_90          how much of it would be found

What is compiled is what would be launched (kernels/certify/launches.py); what the figures mean, and the
limits they are held against, stands in kernels/certify/targets.py. The table holds the figures of two
versions of Triton, the newest that is tested and the oldest that is allowed. A run adds those of the version
that it finds, so that a change of a kernel or of a launch takes two:

    python -m kernels.certify pip install --no-deps --target /tmp/triton-3.6.0 triton==3.6.0 &&
    PYTHONPATH=/tmp/triton-3.6.0 python -m kernels.certify

With any other version all rows are compiled and printed, and only a row that does not compile fails.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import triton
from triton import knobs

from kernels.certify.cache_fill import SOURCES, present_gpu, report
from kernels.certify.launches import (
    DECODE,
    EMBEDDING,
    LAST_NORM,
    LAYER,
    LAYERS,
    LOSS,
    OPTIMIZER,
    Launch,
    record,
)
from kernels.certify.targets import TARGETS, measure

VERSIONS = ("3.7.1", "3.6.0")  # of Triton: that of constraints.txt, and the oldest that pyproject.toml allows
JSON_FILE = Path(__file__).parent.with_name("certificate.json")
TABLE_FILE = Path(__file__).parent.with_name("CERTIFICATE.md")
# Kernels that only move data: each must read and write 16 bytes at a time.
MEMORY_BOUND = {
    "_rms_norm_fwd_kernel",
    "_rms_norm_bwd_dx_kernel",
    "_rope_kernel",
    "_swiglu_fwd_kernel",
    "_swiglu_bwd_kernel",
    "_softmax_gradient_kernel",
    "_adamw_kernel",
    "_norm_qkv_rope_kernel",
    "_norm_gate_up_kernel",
    "_down_kernel",
    "_norm_head_kernel",
}
PARTS = {
    "embedding": EMBEDDING, "layer": LAYER, "last norm": LAST_NORM, "loss": LOSS, "optimizer": OPTIMIZER,
    "decode layer": DECODE,
}  # fmt: skip
# Of a decode step, what is read are weights and what is written are single rows.
READS_ONLY = {"decode_layer", "decode_head"}
# Kernels that must use the matrix instruction that their target is built for. Decoding is not among them: its
# tiles have 16 rows.
MATRIX_BOUND = {
    "_attention_fwd_kernel",
    "_attention_bwd_dq_kernel",
    "_attention_bwd_dkv_kernel",
    "_mlp_fwd_kernel",
    "_mlp_bwd_kernel",
}

# a Launch without its repetitions, and its Figures by version of Triton: one line of certificate.json
Row = dict[str, Any]


def rows_of(launches: Iterable[Launch]) -> dict[str, tuple[Launch, Row]]:
    """key -> one launch that has it, and the row that all of them share, without figures yet."""
    rows: dict[str, tuple[Launch, Row]] = {}
    for launch in launches:
        if launch.key in rows:
            cases = rows[launch.key][1]["cases"]
            if launch.case not in cases:
                cases.append(launch.case)
            continue
        rows[launch.key] = (
            launch,
            {
                "key": launch.key,
                "target": launch.target,
                "dtype": launch.dtype,
                "op": launch.op,
                "phase": launch.phase,
                "kernel": launch.kernel,
                "cases": [launch.case],
                "constants": launch.constants,
                "not_divisible": [  # of what could be: a descriptor is aligned, or could not have been made
                    name
                    for index, (name, kind) in enumerate(launch.signature.items())
                    if name not in launch.constants
                    and index not in launch.attributes
                    and not kind.startswith("tensordesc")
                ],
                "options": launch.options,
                "figures": {},
            },
        )
    return rows


def faults(rows: Iterable[Row]) -> list[str]:
    """What the gates object to, one line each."""
    found = []
    for row in rows:
        target, kernel, dtype = TARGETS[row["target"]], row["kernel"], row["dtype"]
        for version, figures in row["figures"].items():
            name = f"{target.name} {kernel} {dtype} ({row['cases'][0]}), Triton {version}"
            if "error" in figures:
                found.append(f"{name}: does not compile: {figures['error']}")
                continue
            if figures["shared"] > target.shared_limit:
                found.append(
                    f"{name}: {figures['shared']} bytes of shared memory, the target has {target.shared_limit}"
                )
            if dtype == "float32":
                continue  # ieee products run on the ordinary units, for tests: reported only
            if figures["spill_bytes"] and target.nvidia:
                found.append(f"{name}: spills {figures['spill_bytes']} bytes")
            if figures.get("serialized"):
                found.append(f"{name}: ptxas serialized its matrix instructions")
            if kernel in MATRIX_BOUND and not figures["matrix"].get(target.matrix):
                found.append(f"{name}: no {target.matrix} instruction, only {figures['matrix'] or 'none'}")
            loads, stores = figures["wide_loads"], figures["wide_stores"]
            if (
                kernel in MEMORY_BOUND
                and dtype == "bfloat16"
                and not (loads and (stores or not _stores_rows(row)))
            ):
                found.append(f"{name}: {loads} loads and {stores} stores of 16 bytes")
    return found


def _stores_rows(row: Row) -> bool:
    """Whether the kernel writes tensors as large as those it reads; the loss without its gradient does not,
    nor does a decode step.
    """
    return row["op"] not in READS_ONLY and bool(row["constants"].get("GRADIENT", True))


def launch_counts(launches: Sequence[Launch]) -> dict[str, dict[str, dict[str, int]]]:
    """Triton launches by part of the work, phase and op: {"layer": {"forward": {"rms_norm": 2, ...}, ...},
    "step": ..., ...}.

    A step is the embedding, LAYERS layers, the last norm and the loss; the optimizer comes on top. (The first
    norm of the first layer has no residual and as many launches.)
    """
    parts: dict[str, Counter[tuple[str, str]]] = {}
    for part, case in PARTS.items():
        parts[part] = Counter(
            (launch.phase, launch.op)
            for launch in launches
            if launch.case == case and launch.dtype == "bfloat16"
        )
    parts["step"] = parts["embedding"] + parts["last norm"] + parts["loss"]
    for key, count in parts["layer"].items():
        parts["step"][key] += LAYERS * count
    counts: dict[str, dict[str, dict[str, int]]] = {}
    for part, counter in parts.items():
        counts[part] = {"forward": {}, "backward": {}}
        for (phase, op), count in sorted(counter.items()):
            counts[part][phase][op] = count
    return counts


def compile_rows(launches: Sequence[Launch], jobs: int) -> list[dict[str, Any]]:
    """The figures of each launch. Several processes, in a cache folder of their own: the compiler must really
    run.
    """
    if not launches:
        return []
    results = []
    with tempfile.TemporaryDirectory() as folder:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(jobs, context, initializer=_use_cache, initargs=(folder,)) as pool:
            for number, figures in enumerate(pool.map(measure, launches), 1):
                results.append(figures)
                if number % 50 == 0:
                    print(f"  {number} of {len(launches)}", file=sys.stderr, flush=True)
    return results


def _use_cache(folder: str) -> None:
    knobs.cache.dir = folder


def _differences(rows: Sequence[Row]) -> list[str]:
    """For rows of one kernel: what of its constants, or else of its arguments, sets each row apart from the
    others.
    """
    traits = [{**row["constants"], **dict.fromkeys(row["not_divisible"], "any")} for row in rows]
    # it goes with HEAD_DIM
    names = [name for name in dict.fromkeys(name for trait in traits for name in trait) if name != "SCALE"]
    varying = [name for name in names if len({json.dumps(trait.get(name)) for trait in traits}) > 1]

    def text(trait: dict[str, Any], wanted: Iterable[str]) -> str:
        return " ".join(
            f"{name}={trait[name]:g}"
            if isinstance(trait.get(name), float)
            else f"{name}={trait.get(name, '16n')}"
            for name in wanted
        )

    short = [text(trait, [name for name in varying if name.isupper()]) for trait in traits]
    arguments = [name for name in varying if not name.isupper()]
    return [
        f"{line} {text(trait, [name for name in arguments if name in trait])}".strip()
        if short.count(line) > 1
        else line
        for line, trait in zip(short, traits, strict=True)
    ]


def _line(cells: Iterable[object]) -> str:
    return f"| {' | '.join(str(cell) for cell in cells)} |"


COLUMNS = (
    "kernel", "case", "what differs", "dtype", "warps x stages", "registers", "spill B", "shared B", "matrix",
    "16 B ld/st", "occupancy",
)  # fmt: skip


def _cells(row: Row, figures: dict[str, Any]) -> list[str]:
    """The columns of one version's figures."""
    if "error" in figures:
        return ["", figures["error"].replace("|", "/").replace("\n", " "), *[""] * 4]
    spill = str(figures["spill_bytes"]) + (
        f" + {figures['scalar_spills']} scalars" if figures["scalar_spills"] else ""
    )
    matrix = " ".join(f"{kind} {count}" for kind, count in figures["matrix"].items())
    wide, occupancy = (
        f"{figures['wide_loads']}/{figures['wide_stores']}",
        f"{figures['occupancy']:.0%} ({figures['limited_by']})",
    )
    return [str(figures["registers"]), spill, str(figures["shared"]), matrix, wide, occupancy]


def target_table(rows: Sequence[Row]) -> list[str]:
    """A Markdown table of the rows of one target: the figures of the first version, and in brackets those
    that another one changes.
    """
    lines = [_line(COLUMNS), _line(["---"] * len(COLUMNS))]
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["kernel"], row["dtype"]), []).append(row)
    for group in groups.values():
        for row, difference in zip(group, _differences(group), strict=True):
            case = row["cases"][0] + (f" (+{len(row['cases']) - 1})" if len(row["cases"]) > 1 else "")
            first = (row["kernel"].strip("_").removesuffix("_kernel"), case, difference, row["dtype"])
            versions = [_cells(row, figures) for figures in row["figures"].values()]
            cells = ["; ".join(dict.fromkeys(values)) for values in zip(*versions, strict=True)]
            warps = next((figures["warps"] for figures in row["figures"].values() if "warps" in figures), "")
            lines.append(_line((*first, f"{warps} x {row['options'].get('num_stages', '')}", *cells)))
    return lines


def summary(certificate: dict[str, Any]) -> list[str]:
    """The first part of the page: launches, targets at a glance, numerics."""
    counts, rows = certificate["launches"], certificate["rows"]
    lines = [
        "## Launches",
        "",
        f"Triton kernels only; matrix products and copies of PyTorch come on top. 135M model, {LAYERS} layers.",
        "",
    ]
    lines += [_line(("", "forward", "backward", "which")), _line(["---"] * 4)]
    for part in counts:
        forward, backward = counts[part]["forward"], counts[part]["backward"]
        which = "; ".join(
            ", ".join(f"{op} {count}" for op, count in ops.items()) for ops in (forward, backward) if ops
        )
        lines.append(_line((part, sum(forward.values()), sum(backward.values()), which)))
    lines += ["", "## Targets", "", "Worst over the rows in bf16 and fp16.", ""]
    head = (
        "target",
        "Triton",
        "rows",
        "registers",
        "rows that spill",
        "spill B",
        "shared B",
        "limit",
        "faults",
    )
    lines += [_line(head), _line(["---"] * len(head))]
    for name, target in TARGETS.items():
        mine = [row for row in rows if row["target"] == name]
        for version in certificate["triton"]:
            own = [
                {**row, "figures": {version: row["figures"][version]}}
                for row in mine
                if version in row["figures"]
            ]
            sixteen = [
                row["figures"][version]
                for row in own
                if row["dtype"] != "float32" and "error" not in row["figures"][version]
            ]
            if sixteen:
                registers, spill, shared = (
                    max(figures[name] for figures in sixteen)
                    for name in ("registers", "spill_bytes", "shared")
                )
                spilling = sum(figures["spill_bytes"] > 0 for figures in sixteen)
                lines.append(
                    _line(
                        (
                            name,
                            version,
                            len(own),
                            registers,
                            spilling,
                            spill,
                            shared,
                            target.shared_limit,
                            len(faults(own)),
                        )
                    )
                )
    if certificate["numerics"]:
        lines += [
            "",
            "## Numerics",
            "",
            "Worst error as a part of its budget (tests/numerics.py); 1 would fail.",
            "",
        ]
        lines += [_line(("op", "dtype", "worst")), _line(["---"] * 3)]
        lines += [
            _line((entry["op"], entry["dtype"], f"{entry['worst']:.3f}")) for entry in certificate["numerics"]
        ]
    return lines


def page(certificate: dict[str, Any]) -> str:
    """CERTIFICATE.md, a function of certificate.json alone."""
    lines = [
        "# Certificate",
        "",
        f"Made by `python -m kernels.certify` with Triton {' and '.join(certificate['triton'])}; do not edit. "
        "Each row is a launch that the public functions make at the models' shapes, compiled for a GPU that need not be there. "
        "Registers and spills are a thread's, shared memory is a program's. 16 B ld/st: global loads and stores of 16 bytes in the code. "
        "Occupancy: part of a multiprocessor's warps that can be resident, and what limits it. "
        "What differs: compile-time constants; of arguments, `1` and `any` (not known to be a multiple of 16). "
        "Where the versions of Triton differ in a figure, theirs stand one after the other.",
        "",
        *summary(certificate),
    ]
    for name in TARGETS:
        lines += [
            "",
            f"## {name}",
            "",
            *target_table([row for row in certificate["rows"] if row["target"] == name]),
        ]
    return "\n".join(lines) + "\n"


def dump(certificate: dict[str, Any]) -> str:
    """JSON with one row a line, so that a change shows in a diff."""
    rows = ",\n".join(json.dumps(row) for row in certificate["rows"])
    head = json.dumps({name: value for name, value in certificate.items() if name != "rows"}, indent=1)
    return f'{head[:-2]},\n "rows": [\n{rows}\n]}}\n'


def load() -> dict[str, Any]:
    """The committed certificate, or an empty one."""
    if JSON_FILE.exists():
        return json.loads(JSON_FILE.read_text())
    return {"triton": list(VERSIONS), "launches": {}, "numerics": [], "rows": []}


def merge_numerics(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Entries {op, dtype, worst}; a new one replaces the old one of the same op and dtype."""
    merged = {(entry["op"], entry["dtype"]): entry for entry in [*old, *new]}
    return [merged[key] for key in sorted(merged)]


def check(
    rows: dict[str, tuple[Launch, Row]], counts: dict[str, Any], committed: dict[str, Any]
) -> list[str]:
    """Why the committed files are not those of this source and this table, one line each."""
    known = {row["key"]: row for row in committed["rows"]}

    def name(row: Row) -> str:
        return f"{row['target']} {row['kernel']} {row['dtype']} ({row['cases'][0]})"

    found = [f"missing: {name(row)}" for key, (_, row) in rows.items() if key not in known]
    found += [f"no longer launched: {name(row)}" for key, row in known.items() if key not in rows]
    for version in VERSIONS:
        found += [
            f"no figures of Triton {version}: {name(row)}"
            for row in known.values()
            if version not in row["figures"]
        ]
    if committed["launches"] != counts:
        found.append("launch counts differ")
    if not TABLE_FILE.exists() or TABLE_FILE.read_text() != page(committed):
        found.append(f"{TABLE_FILE.name} is not the page of {JSON_FILE.name}")
    return found + faults(committed["rows"])


def folder(text: str) -> Path:
    """A path of the command line; an empty one is a variable of the shell that was not set."""
    if not text:
        raise argparse.ArgumentTypeError("expected a folder, got nothing")
    return Path(text).expanduser()


def main(arguments: Sequence[str] | None = None) -> int:
    """0 when all is well, 1 when a gate or the check fails, 2 when it cannot run."""
    parser = argparse.ArgumentParser(
        prog="python -m kernels.certify",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    ahead = parser.add_mutually_exclusive_group()
    ahead.add_argument(
        "--check", action="store_true", help="compare the committed table with the source; compile nothing"
    )
    ahead.add_argument(
        "--fill",
        type=folder,
        metavar="DIR",
        help="fill a Triton cache, for TRITON_CACHE_DIR on a machine with a GPU",
    )
    ahead.add_argument(
        "--verify", type=folder, metavar="DIR", help="how much of what would be launched such a cache holds"
    )
    parser.add_argument(
        "--target", nargs="+", choices=list(TARGETS), help="only these targets; print, write nothing"
    )
    parser.add_argument(
        "--op",
        nargs="+",
        metavar="OP",
        help="only these ops (attention, rms_norm, ...); print, write nothing",
    )
    parser.add_argument("--fresh", action="store_true", help="compile unchanged rows too")
    parser.add_argument(
        "--numerics",
        type=Path,
        metavar="FILE",
        help="JSON list of {op, dtype, worst} to enter into the certificate",
    )
    parser.add_argument(
        "--arch", help="--fill, --verify: the GPU, as sm_90 or sm_86 (default: the one here, or sm_90)"
    )
    parser.add_argument(
        "--from", nargs="+", dest="sources", choices=SOURCES,
        help="--fill, --verify: whose launches; model (training and generation of every preset; default), tests, bench",
    )  # fmt: skip
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: one a core)"
    )
    options = parser.parse_args(arguments)
    if options.jobs < 1:
        parser.error(f"--jobs: expected at least 1, got {options.jobs}")
    of_the_table = ("target", "op", "fresh", "numerics")
    of_a_cache = ("arch", "sources")
    for name in of_the_table if options.fill or options.verify else of_a_cache:
        if getattr(options, name):
            parser.error(
                f"--{'from' if name == 'sources' else name}: not with the other arguments given; see --help"
            )
    if knobs.runtime.interpret:
        print(
            "kernels.certify needs the compiler, but TRITON_INTERPRET=1 replaces it: unset that variable",
            file=sys.stderr,
        )
        return 2
    if options.fill or options.verify:
        try:
            cache, sources = options.fill or options.verify, options.sources or ["model"]
            return report(
                options.fill is not None, cache, options.arch or present_gpu(), sources, options.jobs
            )
        except (OSError, RuntimeError, ValueError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2

    started = time.time()
    version = triton.__version__.partition("+")[0]
    recorded = {name: record(TARGETS[name]) for name in TARGETS}
    rows = rows_of(launch for launches in recorded.values() for launch in launches)
    counts, committed = launch_counts(recorded["sm_90"]), load()
    if options.check:
        if version not in VERSIONS:
            print(
                f"the table is made with Triton {' and '.join(VERSIONS)}, this is {version}: {len(rows)} rows recorded, not compared"
            )
            return 0
        problems = check(rows, counts, committed)
        print(
            "\n".join(problems)
            if problems
            else f"certificate: {len(rows)} rows, up to date ({time.time() - started:.1f} s)"
        )
        if problems:
            print(
                f"certificate: {len(problems)} problems; run python -m kernels.certify and commit kernels/{JSON_FILE.name}",
                file=sys.stderr,
            )
        return bool(problems)

    partial = bool(options.target or options.op)
    kept = version in VERSIONS and not partial
    chosen = {
        key: pair
        for key, pair in rows.items()
        if (not options.target or pair[1]["target"] in options.target)
        and (not options.op or pair[1]["op"] in options.op)
    }
    known = {row["key"]: row["figures"] for row in committed["rows"]} if kept else {}
    pending = [key for key in chosen if options.fresh or version not in known.get(key, {})]
    print(f"{len(chosen)} rows, {len(pending)} to compile with Triton {version}", file=sys.stderr, flush=True)
    fresh = dict(zip(pending, compile_rows([chosen[key][0] for key in pending], options.jobs), strict=True))
    for key, (_, row) in chosen.items():
        found = {**known.get(key, {}), **({version: fresh[key]} if key in fresh else {})}
        row["figures"] = {name: found[name] for name in sorted(found, reverse=True)}
    fresh_numerics = json.loads(options.numerics.read_text()) if options.numerics else []
    certificate = {
        "triton": list(VERSIONS if kept else [version]),
        "launches": counts,
        "numerics": merge_numerics(committed["numerics"], fresh_numerics),
        "rows": [row for _, row in chosen.values()],
    }
    problems = faults(certificate["rows"])
    if partial:
        for name in options.target or TARGETS:
            print(
                "\n".join(
                    [
                        "",
                        f"## {name}",
                        "",
                        *target_table([row for row in certificate["rows"] if row["target"] == name]),
                    ]
                )
            )
    else:
        print("\n".join(summary(certificate)) if kept else page(certificate))
    if kept:
        JSON_FILE.write_text(dump(certificate))
        TABLE_FILE.write_text(page(certificate))
        print(f"\nwrote {JSON_FILE} and {TABLE_FILE.name}")
    print(
        "\n".join(
            ["", f"{len(problems)} faults in {len(chosen)} rows, {time.time() - started:.0f} s", *problems]
        )
    )
    return bool(
        problems
        if version in VERSIONS
        else [row for row in certificate["rows"] if "error" in row["figures"][version]]
    )


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
