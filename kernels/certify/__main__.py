"""`python -m kernels.certify`: compiles every launch of every kernel for six GPUs that need not be present.

    python -m kernels.certify                     compiles what changed, writes certificate.json and
                                                  CERTIFICATE.md, applies the gates
    python -m kernels.certify --check             compiles nothing; fails if the committed table does not
                                                  belong to this source
    python -m kernels.certify --target sm_90 --op attention    compiles these again and prints them; writes
                                                  nothing
    python -m kernels.certify --fill DIR --arch sm_90          fills a Triton cache for that GPU (fill.py)
    python -m kernels.certify --verify DIR --arch sm_90        how much of it would be found

The launches are recorded, not listed (cases.py, recorder.py); measure.py says what the figures mean, gates.py
the limits they must keep. The table holds the figures of two versions of Triton, the newest that is tested
and the oldest that is allowed. A run adds those of the installed version, so a change of a kernel or of a
launch takes two runs:

    python -m kernels.certify
    pip install --no-deps --target /tmp/triton-3.6.0 triton==3.6.0
    PYTHONPATH=/tmp/triton-3.6.0 python -m kernels.certify

With any other version all rows are compiled and printed, and only a row that does not compile fails.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

try:
    import triton
    from triton import knobs
except ModuleNotFoundError as error:
    if __name__ != "__main__" or error.name != "triton":
        raise
    print("kernels.certify needs triton, which is not installed: pip install triton", file=sys.stderr)
    sys.exit(2)

from kernels.certify.cases import DECODE, EMBEDDING, LAST_NORM, LAYER, LAYERS, LOSS, OPTIMIZER, record
from kernels.certify.fill import SOURCES, present_gpu, report
from kernels.certify.gates import Row, faults, name_of
from kernels.certify.measure import compile_rows
from kernels.certify.page import page, summary, target_table
from kernels.certify.recorder import RecordedLaunch
from kernels.certify.targets import TARGETS

VERSIONS = ("3.7.1", "3.6.0")  # of Triton: that of constraints.txt, and the oldest that pyproject.toml allows
JSON_FILE = Path(__file__).parent.with_name("certificate.json")
TABLE_FILE = Path(__file__).parent.with_name("CERTIFICATE.md")
PARTS = {
    "embedding": EMBEDDING, "layer": LAYER, "last norm": LAST_NORM, "loss": LOSS, "optimizer": OPTIMIZER,
    "decode layer": DECODE,
}  # fmt: skip


def rows_of(launches: Iterable[RecordedLaunch]) -> dict[str, tuple[RecordedLaunch, Row]]:
    """key -> the first launch that has it, and the row of all that have it, still without figures."""
    rows: dict[str, tuple[RecordedLaunch, Row]] = {}
    for launch in launches:
        if launch.key in rows:
            cases = rows[launch.key][1]["cases"]
            if launch.case not in cases:
                cases.append(launch.case)
            continue
        row: Row = {
            name: getattr(launch, name) for name in ("key", "target", "dtype", "op", "phase", "kernel")
        }
        row |= {"cases": [launch.case], "constants": launch.constants}
        row["not_divisible"] = [  # of arguments that could be: a descriptor is always aligned
            name
            for index, (name, kind) in enumerate(launch.signature.items())
            if not (name in launch.constants or index in launch.attributes or kind.startswith("tensordesc"))
        ]
        rows[launch.key] = launch, row | {"options": launch.options, "figures": {}}
    return rows


def launch_counts(launches: Sequence[RecordedLaunch]) -> dict[str, dict[str, dict[str, int]]]:
    """Triton launches by part of the work, phase and op: {"layer": {"forward": {"rms_norm": 2, ...}, ...},
    "step": ..., ...}.

    A step is the embedding, LAYERS layers, the last norm and the loss; the optimizer is not included. (The
    first norm of the first layer has no residual, but the same number of launches.)
    """
    bf16 = [launch for launch in launches if launch.dtype == "bfloat16"]
    parts = {
        part: Counter((launch.phase, launch.op) for launch in bf16 if launch.case == case)
        for part, case in PARTS.items()
    }
    parts["step"] = parts["embedding"] + parts["last norm"] + parts["loss"]
    for key, count in parts["layer"].items():
        parts["step"][key] += LAYERS * count
    counts: dict[str, dict[str, dict[str, int]]] = {}
    for part, counter in parts.items():
        counts[part] = {"forward": {}, "backward": {}}
        for (phase, op), count in sorted(counter.items()):
            counts[part][phase][op] = count
    return counts


def dump(certificate: dict[str, Any]) -> str:
    """JSON with one row a line, for readable diffs."""
    rows = ",\n".join(json.dumps(row) for row in certificate["rows"])
    head = json.dumps({name: value for name, value in certificate.items() if name != "rows"}, indent=1)
    return f'{head[:-2]},\n "rows": [\n{rows}\n]}}\n'


def load() -> dict[str, Any]:
    """The committed certificate, or an empty one."""
    if JSON_FILE.exists():
        return json.loads(JSON_FILE.read_text())
    return {"triton": list(VERSIONS), "launches": {}, "numerics": [], "rows": []}


def merge_numerics(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Entries {op, dtype, worst}; a new entry replaces an old one of the same op and dtype."""
    merged = {(entry["op"], entry["dtype"]): entry for entry in [*old, *new]}
    return [merged[key] for key in sorted(merged)]


def check(
    rows: dict[str, tuple[RecordedLaunch, Row]], counts: dict[str, Any], committed: dict[str, Any]
) -> list[str]:
    """Why the committed files do not belong to this source, one line each."""
    known = {row["key"]: row for row in committed["rows"]}
    found = [f"missing: {name_of(row)}" for key, (_, row) in rows.items() if key not in known]
    found += [f"no longer launched: {name_of(row)}" for key, row in known.items() if key not in rows]
    for version in VERSIONS:
        found += [
            f"no figures of Triton {version}: {name_of(row)}"
            for row in known.values()
            if version not in row["figures"]
        ]
    if committed["launches"] != counts:
        found.append("launch counts differ")
    if not TABLE_FILE.exists() or TABLE_FILE.read_text() != page(committed):
        found.append(f"{TABLE_FILE.name} is not the page of {JSON_FILE.name}")
    return found + faults(committed["rows"])


def folder(text: str) -> Path:
    """A path of the command line. An empty one comes from a shell variable that was not set."""
    if not text:
        raise argparse.ArgumentTypeError("expected a folder, got nothing")
    return Path(text).expanduser()


def main(arguments: Sequence[str] | None = None) -> int:
    """0 if all is well, 1 if a gate or the check fails, 2 if it cannot run."""
    parser = argparse.ArgumentParser(
        prog="python -m kernels.certify",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    ahead, add = parser.add_mutually_exclusive_group(), parser.add_argument
    ahead.add_argument(
        "--check", action="store_true", help="compare the table with the source; compile nothing"
    )
    for name, text in (
        ("--fill", "fill a Triton cache, for TRITON_CACHE_DIR on a machine with a GPU"),
        ("--verify", "how much of what would be launched such a cache holds"),
    ):
        ahead.add_argument(name, type=folder, metavar="DIR", help=text)
    add("--target", nargs="+", choices=list(TARGETS), help="only these targets; print, write nothing")
    add("--op", nargs="+", metavar="OP", help="only these ops (attention, ...); print, write nothing")
    add("--fresh", action="store_true", help="compile unchanged rows too")
    text = "JSON list of {op, dtype, worst} to enter into the table"
    add("--numerics", type=Path, metavar="FILE", help=text)
    add("--arch", help="--fill, --verify: the GPU, as sm_90 or sm_86 (default: the one here, or sm_90)")
    text = "whose launches; model (training and generation of every preset; default), tests, bench"
    add("--from", nargs="+", dest="sources", choices=SOURCES, help=f"--fill, --verify: {text}")
    add("--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: one a core)")
    options = parser.parse_args(arguments)
    if options.jobs < 1:
        parser.error(f"--jobs: expected at least 1, got {options.jobs}")
    cache = options.fill or options.verify
    for name in ("target", "op", "fresh", "numerics") if cache else ("arch", "sources"):
        if getattr(options, name):
            flag = "from" if name == "sources" else name
            parser.error(f"--{flag}: not with the other arguments given; see --help")
    if knobs.runtime.interpret:
        print(
            "kernels.certify needs the compiler, but TRITON_INTERPRET=1 replaces it: unset that variable",
            file=sys.stderr,
        )
        return 2
    if cache:
        try:
            arch, sources = options.arch or present_gpu(), options.sources or ["model"]
            return report(options.fill is not None, cache, arch, sources, options.jobs)
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
            made = " and ".join(VERSIONS)
            print(f"the table is made with Triton {made}, this is {version}: {len(rows)} rows, not compared")
            return 0
        problems = check(rows, counts, committed)
        if not problems:
            print(f"certificate: {len(rows)} rows, up to date ({time.time() - started:.1f} s)")
            return 0
        print("\n".join(problems))
        remedy = f"run python -m kernels.certify and commit kernels/{JSON_FILE.name}"
        print(f"certificate: {len(problems)} problems; {remedy}", file=sys.stderr)
        return 1

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
    measured = json.loads(options.numerics.read_text()) if options.numerics else []
    kernels_only = [entry for entry in measured if not entry["op"].endswith(", torch")]
    certificate = {
        "triton": list(VERSIONS if kept else [version]),
        "launches": counts,
        "numerics": merge_numerics(committed["numerics"], kernels_only),
        "rows": [row for _, row in chosen.values()],
    }
    problems = faults(certificate["rows"])
    if partial:
        for name in options.target or TARGETS:
            lines = target_table([row for row in certificate["rows"] if row["target"] == name])
            print("\n".join(["", f"## {name}", "", *lines]))
    else:
        print("\n".join(summary(certificate)) if kept else page(certificate))
    if kept:
        JSON_FILE.write_text(dump(certificate))
        TABLE_FILE.write_text(page(certificate))
        print(f"\nwrote {JSON_FILE} and {TABLE_FILE.name}")
    print(
        f"\n{len(problems)} faults in {len(chosen)} rows, {time.time() - started:.0f} s", *problems, sep="\n"
    )
    if version not in VERSIONS:
        problems = [row["key"] for row in certificate["rows"] if "error" in row["figures"][version]]
    return bool(problems)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
