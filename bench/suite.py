"""Results as pytest-benchmark writes them, for `pytest-benchmark compare`, without the name of the
machine.
"""

from __future__ import annotations

import datetime
import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from bench.record import write_json

PROJECT = "smollm2-kernels"  # pytest-benchmark would take the name of the folder
# Kept of the machine. Its name and its kernel's are nobody's business in a committed file.
MACHINE = ("machine", "system", "python_implementation", "python_version")
PROCESSOR = ("brand_raw", "arch", "count", "family", "model")  # of its flags there are a hundred
# What every figure carries in extra_info; None where it has no such thing: a start-up has no FLOPs.
FACTS = (
    "device", "versions", "commit", "date", "phase", "variant", "bytes", "flops", "percent_of_roof",
    "launches", "tokens_per_second", "peak_memory_bytes", "output_hash",
)  # fmt: skip


def machine_facts(machine_info: dict[str, Any]) -> dict[str, Any]:
    """What is kept of pytest-benchmark's description of a machine."""
    kept: dict[str, Any] = {name: machine_info[name] for name in MACHINE if name in machine_info}
    cpu = machine_info.get("cpu", {})
    return kept | {"cpu": {name: cpu[name] for name in PROCESSOR if name in cpu}}


def entry(name: str, group: str, seconds: list[float], facts: dict[str, Any]) -> dict[str, Any]:
    """One figure: its times, one a round, and what it carries."""
    from pytest_benchmark.stats import Stats

    stats = Stats()
    stats.data.extend(seconds)
    return {
        "group": group, "name": name, "fullname": name, "params": None, "param": None,
        "extra_info": dict.fromkeys(FACTS) | facts, "options": {},
        "stats": {**stats.as_dict(), "data": seconds, "iterations": 1},
    }  # fmt: skip


def write_suite(path: Path, entries: Iterable[dict[str, Any]], peers: dict[str, dict[str, Any]]) -> None:
    """A file of entries, and what became of the libraries beside ours."""
    from pytest_benchmark import __version__, plugin, utils

    content = {
        "machine_info": machine_facts(plugin.pytest_benchmark_generate_machine_info()),
        "commit_info": {**utils.get_commit_info(PROJECT), "project": PROJECT}, "benchmarks": list(entries),
        "datetime": datetime.datetime.now(datetime.UTC).isoformat(), "version": __version__, "peers": peers,
    }  # fmt: skip
    write_json(path, content)


def digest(results: Iterable[Tensor]) -> str:
    """The first 12 hex digits of the sha256 of outputs and gradients, in fp32."""
    found = hashlib.sha256()
    for tensor in results:
        found.update(tensor.float().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()[:12]
