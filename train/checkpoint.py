"""Checkpoints: a folder per step that is whole or absent, verified when it is read, rotated, and enough for a bit-exact resume.

    RUN/checkpoints/step-000500/
        config.json model.safetensors generation_config.json tokenizer.json ...   fp32 weights: the folder is a model by itself
        training_state.pt    optimizer, RNG states, digests of the documents seen
        run.json             step, tokens, data position, configuration, backend, versions of libraries
        manifest.json        sha256 of every file above
    RUN/checkpoints/latest   the name of the newest folder

A folder is written under a temporary name, flushed to disk, renamed, and only then named by `latest`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
import random
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from smollm2.checkpoint import load_model, save_model
from smollm2.cli import LoadError, UsageError
from smollm2.model import SmolLM2ForCausalLM
from smollm2.tokenizer import Tokenizer
from train.data import DataState

STATE, RECORD, MANIFEST, LATEST = "training_state.pt", "run.json", "manifest.json", "latest"
LIBRARIES = ("torch", "triton", "numpy", "safetensors", "tokenizers", "datasets", "pyarrow", "transformers")


class SaveError(LoadError):
    """A checkpoint could not be written; those before it are untouched."""


@dataclass
class Progress:
    """What a run is at, apart from its weights: saved with them, and handed back when it is resumed."""

    data: DataState
    config: dict[str, Any]
    backend: str
    tokenizer: str  # Tokenizer.fingerprint()
    step: int = 0  # optimizer steps done
    tokens: int = 0
    skipped_steps: int = 0

    def record(self) -> dict[str, Any]:
        """The content of run.json."""
        plain = {entry.name: getattr(self, entry.name) for entry in dataclasses.fields(self) if entry.name != "data"}
        return {**plain, "data": self.data.to_json(), "versions": library_versions()}


def library_versions() -> dict[str, str]:
    """Python's version and those of the libraries that a result depends on, as far as they are installed."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def save_checkpoint(
    run: Path, model: SmolLM2ForCausalLM, tokenizer: Tokenizer, optimizer: torch.optim.Optimizer, progress: Progress, keep: int
) -> Path:
    """Writes RUN/checkpoints/step-N and returns it; then removes all but the newest `keep` checkpoints (0: none is removed).

    Raises SaveError, with the reason and what is left, when it cannot be written; nothing half-written stays.
    """
    folder = run / "checkpoints" / f"step-{progress.step:06d}"
    temporary = folder.with_name(f".tmp-{folder.name}-{os.getpid()}")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_temporary(folder.parent)
        temporary.mkdir()
        save_model(model, temporary)
        tokenizer.save(temporary)
        state = {"optimizer": optimizer.state_dict()["state"], "rng": rng_states(), "unique": progress.data.unique.state()}
        with (temporary / STATE).open("wb") as stream:
            torch.save(state, stream)
        _write_json(temporary / RECORD, progress.record())
        _write_json(temporary / MANIFEST, {path.name: _sha256(path) for path in sorted(temporary.iterdir())})
        for path in (*temporary.iterdir(), temporary):
            _flush(path)
        if folder.exists():  # a damaged one, or the same step of a run that went back
            folder.rename(folder.with_name(f".tmp-replaced-{folder.name}"))
        temporary.rename(folder)
        _flush(folder.parent)
        pointer = folder.with_name(".tmp-latest")
        pointer.write_text(folder.name + "\n", encoding="utf-8")
        pointer.replace(folder.with_name(LATEST))
    except (OSError, RuntimeError) as error:
        left = _checkpoints(folder.parent)
        remedy = f"then continue from {left[-1].name} with resume=auto" if left else "then start again: there is no earlier checkpoint"
        raise SaveError(f"{folder}: the checkpoint cannot be saved ({error}); free some space, {remedy}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    _rotate(folder, keep)
    return folder


def _remove_temporary(checkpoints: Path) -> None:
    """Removes what a run that was killed while saving left behind."""
    for path in checkpoints.glob(".tmp-*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _rotate(newest: Path, keep: int) -> None:
    """Removes old checkpoints; later steps than the newest save come from before the run went back, and count as older."""
    current = _step(newest)
    by_age = sorted(_checkpoints(newest.parent), key=lambda path: (_step(path) <= current, _step(path)))
    for path in by_age[:-keep] if keep else []:
        shutil.rmtree(path, ignore_errors=True)
    _remove_temporary(newest.parent)


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _checkpoints(folder: Path) -> list[Path]:
    return sorted((path for path in folder.glob("step-*") if re.fullmatch(r"step-\d+", path.name) and path.is_dir()), key=_step)


def newest_checkpoint(run: Path, report: Callable[[str], None]) -> Path | None:
    """The newest checkpoint of a run that is sound, `latest` first; None if the run has none yet.

    A damaged one is reported and skipped. Raises LoadError when all of them are damaged.
    """
    folder = run / "checkpoints"
    candidates = _checkpoints(folder)[::-1]
    pointer = folder / LATEST
    if pointer.is_file():
        name = pointer.read_text(encoding="utf-8").strip()
        candidates.sort(key=lambda path: path.name != name)  # stable: the others stay in order
    for path in candidates:
        try:
            verify(path)
            return path
        except LoadError as error:
            report(f"skipped a damaged checkpoint: {error}")
    if candidates:
        raise LoadError(f"{folder}: expected a sound checkpoint, all {len(candidates)} are damaged; start again with another output_dir")
    return None


def verify(folder: Path) -> None:
    """Compares every file with the manifest. Raises LoadError naming the first that is missing or differs."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        for name, expected in manifest.items():
            if _sha256(folder / name) != expected:
                raise LoadError(f"{folder / name}: its sha256 is not that of the manifest")
    except FileNotFoundError as error:
        raise LoadError(f"{error.filename}: expected in a checkpoint, found nothing") from None
    except (OSError, ValueError, AttributeError) as error:
        raise LoadError(f"{folder}: not a readable checkpoint ({error})") from None


def find_checkpoint(resume: str, run: Path, report: Callable[[str], None]) -> Path | None:
    """The checkpoint that the key `resume` asks for. "none": None; "auto": the newest sound one of the run, if there is one;
    a path: that checkpoint, or the newest sound one of that run folder. Raises UsageError or LoadError if a path names none.
    """
    if resume == "none":
        return None
    if resume == "auto":
        return newest_checkpoint(run, report)
    path = Path(resume).expanduser()
    if (path / "checkpoints").is_dir() and (found := newest_checkpoint(path, report)):
        return found
    if not (path / RECORD).is_file():
        raise UsageError(f"resume: expected none, auto or the folder of a checkpoint, got {resume!r}")
    verify(path)
    return path


def load_progress(folder: Path) -> tuple[Progress, dict[str, Any]]:
    """The record of a verified checkpoint, and the content of training_state.pt for `restore`."""
    state = torch.load(folder / STATE, weights_only=True, map_location="cpu")
    record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    record.pop("versions")
    return Progress(**{**record, "data": DataState.from_json(record["data"], state.pop("unique"))}), state


def load_weights(source: str | Path, backend: Any, device: torch.device) -> SmolLM2ForCausalLM:
    """A model in training mode, with fp32 weights in memory of its own.

    Copied out of the file's memory map, whose alignment could change the last bit of a matrix product.
    """
    model = load_model(source, backend, device, dtype=torch.float32)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model.train()


def restore(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Puts back the optimizer's moments and the RNG states. Learning rate, decay and betas stay those of the configuration."""
    optimizer.load_state_dict({"state": state["optimizer"], "param_groups": optimizer.state_dict()["param_groups"]})
    set_rng_states(state["rng"])


def rng_states() -> dict[str, Any]:
    """The states of every generator that a run may draw from, in types that torch.load(weights_only=True) accepts."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "mps": torch.mps.get_rng_state() if torch.backends.mps.is_available() else None,
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(np.asarray(keys, dtype=np.int64)), *rest),
    }


def set_rng_states(states: dict[str, Any]) -> None:
    """Restores what `rng_states` returned; states of devices that are not here are left out."""
    torch.set_rng_state(states["torch"])
    for index, state in enumerate(states["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(state, index)
    if states["mps"] is not None and torch.backends.mps.is_available():
        torch.mps.set_rng_state(states["mps"])
    random.setstate(states["python"])
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _write_json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def _flush(path: Path) -> None:
    """Asks the disk to keep a file, or the names in a folder, before going on."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
