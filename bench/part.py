"""What every part of the measurements shares: its command line, its clock, and its section of a JSON file.

A section is saved whenever there is something new, by replacing the file, so that a part which is stopped
leaves what it had.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import platform
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from smollm2.config import SmolLM2Config
from smollm2.errors import UsageError

ROOT = Path(__file__).resolve().parent.parent
LIBRARIES = (
    "torch", "triton", "numpy", "safetensors", "tokenizers", "liger-kernel", "transformers", "litgpt",
    "flash-attn", "quack-kernels",
)  # fmt: skip
INTERPRETER_NOTE = "interpreter: times mean nothing"
# What every figure of the pytest-benchmark suites carries in extra_info; None where it has no such thing: a
# start-up has no FLOPs.
FACTS = (
    "device", "versions", "commit", "date", "phase", "variant", "bytes", "flops", "percent_of_roof",
    "launches", "tokens_per_second", "peak_memory_bytes", "output_hash",
)  # fmt: skip


def parser(module: str, description: str) -> argparse.ArgumentParser:
    """The command line that all parts have in common."""
    result = argparse.ArgumentParser(prog=f"python -m bench.{module}", description=description)
    result.add_argument(
        "--device", choices=("auto", "cuda", "cpu"), default="auto", help="auto takes the GPU if there is one"
    )
    result.add_argument(
        "--tiny",
        action="store_true",
        help="toy sizes that run anywhere: exercises the code, measures nothing",
    )
    result.add_argument(
        "--seconds", type=float, default=600.0, metavar="S", help="start nothing new after S seconds"
    )
    result.add_argument(
        "--json", type=Path, metavar="FILE", help="write the results there, beside what other parts wrote"
    )
    result.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return result


def write_json(path: Path, data: Any) -> None:
    """Replaces a JSON file in one move: a reader sees the old content or the new."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def read_json(path: Path) -> dict[str, Any]:
    """The content of a JSON file, or nothing if it is absent or damaged."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}


def one_line(failure: BaseException) -> str:
    """An exception as a result among others."""
    return " ".join(f"{type(failure).__name__}: {failure}".split())[:250]


def device_name(device: torch.device) -> str:
    """The name of the GPU, or of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{models[0] if models else platform.machine()}, {os.cpu_count()} threads"


def provenance(device: torch.device) -> dict[str, Any]:
    """What a figure must carry to be worth anything: device, versions, commit, a digest of the sources, date."""
    versions = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    if torch.version.cuda:
        versions["cuda"] = torch.version.cuda
    sources = hashlib.sha256()
    for path in sorted(
        path
        for package in ("kernels", "smollm2", "train", "bench")
        for path in (ROOT / package).rglob("*.py")
    ):
        sources.update(path.read_bytes())
    return {
        "device": device_name(device),
        "versions": versions,
        "commit": _commit(),
        "sources": sources.hexdigest()[:16],
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _commit() -> str:
    """The git commit, with a mark if tracked files differ from it; "unknown" in a checkout without git."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True, timeout=20
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + (
            " with changes" if git("status", "--porcelain", "--untracked-files=no") else ""
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def resolve_device(name: str, tiny: bool) -> torch.device:
    """ "auto", "cuda" or "cpu" -> a device that is present. Raises UsageError for one that is not, and for
    the CPU at full size.
    """
    present = torch.cuda.is_available()
    if name == "cuda" and not present:
        raise UsageError("--device cuda: no GPU is visible; use --device cpu --tiny to exercise the code")
    if name == "cpu" or not present:
        if not tiny:
            raise UsageError("the full sizes need a GPU; use --device cpu --tiny to exercise the code")
        return torch.device("cpu")
    return torch.device("cuda")


class Part:
    """One part while it runs: where, how long still, and what it has found so far (`data`)."""

    def __init__(self, section: str, options: argparse.Namespace) -> None:
        """Raises UsageError as `resolve_device` does."""
        self.device = resolve_device(options.device, options.tiny)
        if self.device.type == "cpu":
            # read when the kernels are imported, which has not happened yet
            os.environ["TRITON_INTERPRET"] = "1"
        self.tiny: bool = options.tiny
        self.data: dict[str, Any] = {"status": "running"}
        self._section, self._path = section, options.json
        self._provenance = provenance(self.device)
        self._began = time.monotonic()
        self._seconds: float = options.seconds
        if self.tiny:
            self.data["note"] = (
                INTERPRETER_NOTE if self.device.type == "cpu" else "tiny sizes: times mean nothing"
            )
            print(self.data["note"], flush=True)
        self.save()

    def model(self, preset: str, **changes: Any) -> SmolLM2Config:
        """The shapes of a preset; at tiny size those of one small layer."""
        if self.tiny:
            return SmolLM2Config.preset("tiny", num_hidden_layers=1, **changes)
        return SmolLM2Config.preset(preset, **changes)

    def left(self) -> float:
        """Seconds until nothing new should begin."""
        return self._seconds - (time.monotonic() - self._began)

    def save(self, **values: Any) -> None:
        """Adds values to the section and writes the file."""
        self.data.update(values)
        self.data["seconds"] = round(time.monotonic() - self._began, 1)
        if self._path is not None:
            write_json(self._path, {**read_json(self._path), **self._provenance, self._section: self.data})

    def finish(self) -> int:
        """Marks the section complete; returns the exit code."""
        self.save(status="complete")
        return 0
