"""What every measurement shares: its command line, its section of a JSON file, and where its figures come
from.

A section is saved whenever there is something new, by replacing the file, so that a part that is stopped
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
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kernels import waiting
from smollm2.cli import Parser
from smollm2.config import SmolLM2Config
from smollm2.errors import UsageError

ROOT = Path(__file__).resolve().parent.parent
LIBRARIES = (
    "torch", "triton", "numpy", "safetensors", "tokenizers", "liger-kernel", "transformers", "litgpt",
    "flash-attn", "quack-kernels",
)  # fmt: skip
INTERPRETER_NOTE = "interpreter: times mean nothing"
TINY_NOTE = "tiny sizes: times mean nothing"


def command_line(module: str, description: str) -> Parser:
    """The command line of a module, with what every one has."""
    result = Parser(prog=f"python -m bench.{module}", description=description)
    result.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return result


def add_device(parser: argparse.ArgumentParser) -> None:
    chosen = "auto takes the GPU if there is one"
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto", help=chosen)


def parser(module: str, description: str) -> argparse.ArgumentParser:
    """The command line that all parts have in common."""
    result = command_line(module, description)
    add_device(result)
    add = result.add_argument
    tiny = "toy sizes that run anywhere: exercises the code, measures nothing"
    add("--tiny", action="store_true", help=tiny)
    add("--seconds", type=float, default=600.0, metavar="S", help="start nothing new after S seconds")
    beside = "write the results there, beside what other parts wrote"
    add("--json", type=Path, metavar="FILE", help=beside)
    return result


def python(module: str, *arguments: object) -> list[str]:
    """The command that runs a module of this project."""
    return [sys.executable, "-m", module, *map(str, arguments)]


def speed_of_data(folder: Path, *arguments: object) -> dict[str, Any]:
    """What `python -m train.data_speed` writes. Raises UsageError where it fails."""
    path = folder / "speed.json"
    command = python("train.data_speed", "--json", path, *arguments)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        last = " ".join(done.stderr.split())[-200:]
        raise UsageError(f"train.data_speed ended with exit code {done.returncode}: {last}")
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


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
    """An exception as a result among others; a reason that was written to be read is not given its type."""
    if isinstance(failure, UsageError):
        return " ".join(str(failure).split())
    if isinstance(failure, ModuleNotFoundError) and failure.name:
        return f"{failure.name} is not installed"
    return " ".join(f"{type(failure).__name__}: {failure}".split())[:250]


def digits(value: float) -> float:
    """A number to four digits, whatever its size."""
    return float(f"{value:.4g}")


def rounded(value: Any) -> Any:
    """The same with every float to four digits."""
    if isinstance(value, dict):
        return {name: rounded(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [rounded(entry) for entry in value]
    return digits(value) if isinstance(value, float) else value


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


def wait_policy() -> str:
    """How idle OpenMP threads wait in this process (kernels/waiting.py), as it stands in the environment."""
    found = [f"{name}={os.environ[name]}" for name in waiting.VARIABLES if name in os.environ]
    return " ".join(found) or "default"


def provenance(device: torch.device) -> dict[str, Any]:
    """What a figure must carry to be worth anything: device, versions, commit, a digest of the sources,
    date.
    """
    versions = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    if torch.version.cuda:
        versions["cuda"] = torch.version.cuda
    sources = hashlib.sha256()
    packages = ("kernels", "smollm2", "train", "bench")
    for path in sorted(path for package in packages for path in (ROOT / package).rglob("*.py")):
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


def resolve_device(name: str, tiny: bool, cpu: bool = False) -> torch.device:
    """ "auto", "cuda" or "cpu" -> a device that is present. cpu: one is measured at full size too.

    Raises UsageError for a device that is not there.
    """
    present = torch.cuda.is_available()
    if name == "cuda" and not present:
        raise UsageError("--device cuda: no GPU is visible; use --device cpu --tiny to exercise the code")
    if name == "cpu" or not present:
        if not tiny and not cpu:
            raise UsageError("the full sizes need a GPU; use --device cpu --tiny to exercise the code")
        return torch.device("cpu")
    return torch.device("cuda")


class Part:
    """One measurement while it runs: where, how long still, and what it has found so far (`data`)."""

    def __init__(
        self, section: str, options: argparse.Namespace, *, cpu: bool = False, note: str | None = None
    ) -> None:
        """cpu: a CPU is measured at full size too, without Triton's interpreter. note: of toy sizes.

        Raises UsageError as `resolve_device` does.
        """
        self.device = resolve_device(options.device, options.tiny, cpu)
        self.tiny: bool = options.tiny
        interpreted = self.device.type == "cpu" and (self.tiny or not cpu)
        if interpreted:
            os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are imported, which is later
        self.data: dict[str, Any] = {"status": "running"}
        self._section, self._path = section, options.json
        self.origin = provenance(self.device)
        self._began = time.monotonic()
        self._seconds: float = options.seconds
        if self.tiny:
            self.data["note"] = note or (INTERPRETER_NOTE if interpreted else TINY_NOTE)
            print(self.data["note"], flush=True)
        self.save()

    def model(self, preset: str, **changes: Any) -> SmolLM2Config:
        """The shapes of a preset; at tiny size those of one small layer."""
        if self.tiny:
            return SmolLM2Config.preset("tiny", num_hidden_layers=1, **changes)
        return SmolLM2Config.preset(preset, **changes)

    def ids(self, config: SmolLM2Config, batch: int, length: int) -> Tensor:
        """Random tokens [B, T], always the same."""
        drawn = torch.randint(config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(0))
        return drawn.to(self.device)

    def left(self) -> float:
        """Seconds until nothing new should begin."""
        return self._seconds - (time.monotonic() - self._began)

    def save(self, **values: Any) -> None:
        """Adds values to the section and writes the file."""
        self.data.update(values)
        self.data["seconds"] = round(time.monotonic() - self._began, 1)
        if self._path is not None:
            write_json(self._path, {**read_json(self._path), **self.origin, self._section: self.data})

    def finish(self) -> int:
        """Marks the section complete; returns the exit code."""
        self.save(status="complete")
        return 0
