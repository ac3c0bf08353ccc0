"""Checkpoints: a folder per step that is whole or absent, verified when it is read, rotated, and enough for a
bit-exact resume.

    RUN/checkpoints/step-000500/
        config.json model.safetensors generation_config.json tokenizer.json ...
                                fp32 weights: the folder is a model by itself
        adapter_config.json adapter_model.safetensors
                                in place of the first three, of a run with lora_rank: peft's files, which name
                                the model that they adapt
        optimizer.safetensors   moments and step counts, by the names of the parameters
        shards/                 in its place, of a sharded run: a file from each rank, by
                                torch.distributed.checkpoint, which any number of ranks reads
        training_state.pt       RNG states of every rank, digests of the documents seen, the guard's averages
        run.json                step, tokens, data position, configuration, backend, versions of libraries,
                                size and sha256 of metrics.jsonl and samples.txt at that step
        manifest.json           schema version; size and sha256 of every file above, and of itself
    RUN/checkpoints/latest      the name of the newest folder

A save is a copy into host memory (`take_snapshot`), for which training waits, and a write (`write_snapshot`),
for which it need not (train/saver.py). A folder is written under a temporary name, flushed to disk, renamed,
and only then named by `latest`.

`python -m train.checkpoint verify DIR` checks a checkpoint, or all those of a run.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import platform
import re
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from smollm2.cli import Parser, run_command
from smollm2.config import SmolLM2Config
from smollm2.errors import LoadError, UsageError
from smollm2.lora import adapter_tensors, adapters
from smollm2.model import SmolLM2ForCausalLM
from smollm2.pretrained.files import read_json
from smollm2.pretrained.load import load_model, stored_tensors, write_adapter, write_weights
from smollm2.pretrained.tokenizer import Tokenizer
from train import sharding
from train.data.state import DataState
from train.distributed import World
from train.manifest import MANIFEST, UnlistedError, as_json, file_entries, flush, manifest
from train.manifest import verify as verify_files

MOMENTS, STATE, RECORD, LATEST = "optimizer.safetensors", "training_state.pt", "run.json", "latest"
SHARDS = "shards"  # a folder, in place of MOMENTS
ALONE = World(torch.device("cpu"))
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
    ranks: int = 1  # processes that trained
    files: dict[str, Any] = field(default_factory=dict)  # of metrics.jsonl and samples.txt: Journal.mark()
    unreported: bool = False  # the evaluation and samples of this step, if due, are still to do
    best: dict[str, Any] = field(default_factory=dict)  # keep_best: step and held_out_loss of that checkpoint
    adapts: dict[str, str] = field(default_factory=dict)  # lora_rank: name and digest of the frozen model
    versions: dict[str, str] = field(default_factory=dict)  # of the libraries; of a resumed run: before

    def record(self) -> dict[str, Any]:
        """The content of run.json."""
        plain = {name: value for name, value in vars(self).items() if name != "data"}
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


# ---- saving ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Snapshot:
    """All that a checkpoint holds, on the CPU: what happens to the model afterwards does not change it."""

    step: int
    config: SmolLM2Config
    tokenizer: Tokenizer
    weights: dict[str, Tensor]  # of a sharded run: on rank 0 only
    moments: dict[str, Tensor]  # of a sharded run: this rank's parts
    state: dict[str, Any]
    record: dict[str, Any]
    sharded: bool = False
    adapter: dict[str, Any] | None = None  # lora_rank: adapter_config.json; `weights` are the adapters'


def take_snapshot(
    model: SmolLM2ForCausalLM, tokenizer: Tokenizer, optimizer: torch.optim.Optimizer, progress: Progress,
    state: dict[str, Any], *, sharded: bool = False, main: bool = True,
) -> Snapshot:  # fmt: skip
    """Copies a run into host memory. state: tensors and plain values, which `load_progress` gives back.

    sharded: every rank must call it; the weights are gathered on the `main` one, the moments stay in parts.
    """
    state = {**state, "unique": progress.data.unique.state()}
    layers, adapter = adapters(model), None
    if sharded:
        weights = sharding.whole_weights(model, keep=main)
    elif layers:
        weights = {name: _copy(tensor) for name, tensor in adapter_tensors(model).items()}
        adapter = next(iter(layers.values())).config.to_peft(progress.adapts["model"])
    else:
        weights = {name: _copy(tensor) for name, tensor in stored_tensors(model).items()}
    moments = _moments(model, optimizer, sharding.host_copy if sharded else _copy)
    return Snapshot(
        progress.step, model.config, tokenizer, weights, moments, state, progress.record(), sharded, adapter
    )


def _copy(tensor: Tensor) -> Tensor:
    """The tensor on the CPU, contiguous, in memory of its own."""
    return torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach())


def _names(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """The names of the parameters, in the order in which the optimizer counts them."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]


def _moments(
    model: nn.Module, optimizer: torch.optim.Optimizer, copy: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    """The optimizer's state as `parameter name/entry` -> tensor, on the CPU."""
    names, state = _names(model, optimizer), optimizer.state_dict()["state"]
    entries = ((names[index], entry, value) for index, one in state.items() for entry, value in one.items())
    return {f"{name}/{entry}": copy(value) for name, entry, value in entries}


def write_snapshot(
    run: Path, snapshot: Snapshot, keep: int, keep_every: int = 0, writers: World = ALONE
) -> Path:
    """Writes RUN/checkpoints/step-N and returns it; then removes all but the newest `keep` checkpoints (0:
    none is removed).

    Steps divisible by keep_every and the best one are not removed; what cannot be removed is warned of.
    Raises SaveError, with the reason and what is left, when the checkpoint cannot be written; nothing
    half-written stays. writers: the ranks of a sharded run, all of which must call it: rank 0 writes all but
    the others' shards.
    """
    folder = checkpoint_folder(run, snapshot.step)
    temporary = folder.with_name(f".tmp-{folder.name}-{writers.from_main(os.getpid)}")
    try:
        writers.from_main(lambda: _begin(temporary))
        files = _write_shards(temporary, snapshot, writers) if snapshot.sharded else {}
        if not writers.main:
            return folder
        if snapshot.adapter is None:
            write_weights(temporary, snapshot.config, snapshot.weights)
        else:
            write_adapter(temporary, snapshot.adapter, snapshot.weights)
        snapshot.tokenizer.save(temporary)
        if not snapshot.sharded:
            save_file(snapshot.moments, temporary / MOMENTS)
            # safetensors' own mode is for the owner alone
            os.chmod(temporary / MOMENTS, next(temporary.glob("*config.json")).stat().st_mode)
        with (temporary / STATE).open("wb") as stream:
            torch.save(snapshot.state, stream)
        (temporary / RECORD).write_text(as_json(snapshot.record), encoding="utf-8")
        files |= file_entries(temporary, sorted(path for path in temporary.iterdir() if path.is_file()))
        (temporary / MANIFEST).write_text(manifest(files), encoding="utf-8")
        for path in (*temporary.iterdir(), temporary):
            flush(path)
        for name in snapshot.record["files"]:  # what it counts on; a resume names what is not there
            with contextlib.suppress(OSError):
                flush(run / name)
        if folder.exists():  # a damaged one, or the same step of a run that went back
            folder.rename(folder.with_name(f".tmp-replaced-{folder.name}"))
        temporary.rename(folder)
        flush(folder.parent)
        pointer = folder.with_name(".tmp-latest")
        pointer.write_text(folder.name + "\n", encoding="utf-8")
        pointer.replace(folder.with_name(LATEST))
    except (OSError, RuntimeError, SafetensorError) as error:
        remedy = "then start again: there is no earlier checkpoint"
        if left := checkpoints(run):
            remedy = f"then continue from {left[-1].name} with resume=auto"
        what = f"{folder}: the checkpoint cannot be saved ({error})"
        raise SaveError(f"{what}; free some space, {remedy}") from error
    finally:
        if writers.main:
            shutil.rmtree(temporary, ignore_errors=True)
    try:
        _rotate(run, snapshot.step, keep, keep_every, snapshot.record.get("best", {}).get("step"))
    except OSError as error:  # this checkpoint is whole all the same
        print(f"warning: {folder.parent}: what is old cannot be removed ({error})", flush=True)
    return folder


def _begin(temporary: Path) -> None:
    """Makes an empty folder to write into. Raises LoadError: unlike OSError it reaches all ranks."""
    try:
        temporary.parent.mkdir(parents=True, exist_ok=True)
        _remove_temporary(temporary.parent)
        temporary.mkdir()
    except OSError as error:
        raise LoadError(str(error)) from error


def _write_shards(temporary: Path, snapshot: Snapshot, writers: World) -> dict[str, Any]:
    """Writes the moments of all ranks -> the manifest's entries for their files; every rank reads back and
    digests its own.
    """
    sharding.write_shards(temporary / SHARDS, snapshot.moments, writers.control)
    own = sorted((temporary / SHARDS).glob(f"__{writers.rank}_*"))
    own += [temporary / SHARDS / ".metadata"] if writers.main else []
    try:
        found: dict[str, Any] | str = file_entries(temporary, own)
    except OSError as error:
        found = str(error)
    files: dict[str, Any] = {}
    for entries in writers.gather(found):
        if isinstance(entries, str):
            raise OSError(entries)
        files |= entries
    return files


def _remove_temporary(folder: Path) -> None:
    """Removes what a run that was killed while saving left behind."""
    for path in folder.glob(".tmp-*"):
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def _rotate(run: Path, current: int, keep: int, keep_every: int, best: int | None) -> None:
    """Removes old checkpoints. Steps after `current` were saved before the run went back: they are older."""
    by_age = sorted(checkpoints(run), key=lambda path: (_step(path) <= current, _step(path)))
    for path in by_age[:-keep] if keep else []:
        if _step(path) != best and (not keep_every or _step(path) % keep_every):
            # A name that no reader takes for a checkpoint, should the removal be cut short.
            doomed = path.with_name(f".tmp-old-{path.name}")
            path.rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)
    _remove_temporary(run / "checkpoints")


# ---- reading -----------------------------------------------------------------------------------------------


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def checkpoint_folder(run: Path, step: int) -> Path:
    """Where the checkpoint of a step belongs."""
    return run / "checkpoints" / f"step-{step:06d}"


def checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run, sound or not, by their steps."""
    found = (run / "checkpoints").glob("step-*")
    named = [path for path in found if re.fullmatch(r"step-\d+", path.name) and path.is_dir()]
    return sorted(named, key=_step)


def newest_checkpoint(run: Path, report: Callable[[str], None]) -> Path | None:
    """The newest checkpoint of a run that is sound, `latest` first; None if the run has none yet.

    A damaged one is reported and skipped. Raises LoadError when all of them are damaged, and for a whole one
    with a file that no save wrote: to go back to an earlier one would cost the steps since.
    """
    candidates = checkpoints(run)[::-1]
    pointer = run / "checkpoints" / LATEST
    if pointer.is_file():
        name = pointer.read_bytes().strip()
        candidates.sort(key=lambda path: os.fsencode(path.name) != name)  # stable: the others stay in order
    for path in candidates:
        try:
            verify(path)
            return path
        except UnlistedError:
            raise
        except LoadError as error:
            report(f"skipped a damaged checkpoint: {error}")
    if candidates:
        found = f"expected a sound checkpoint, all {len(candidates)} are damaged"
        raise LoadError(f"{run / 'checkpoints'}: {found}; start again with another output_dir")
    return None


def best_checkpoint(run: Path) -> Path | None:
    """The checkpoint that keep_best kept, by the record of the newest sound one; None if it is not there.
    Raises LoadError for a damaged one.
    """
    newest = newest_checkpoint(run, print)
    best = read_json(newest / RECORD).get("best") if newest else None
    if not best or not (path := checkpoint_folder(run, best["step"])).is_dir():
        return None
    verify(path)
    return path


def verify(folder: Path) -> int:
    """Checks a checkpoint as far as that goes without loading it; returns its bytes. Raises LoadError naming
    what is damaged, missing, or not written by a save.
    """
    size = verify_files(folder)
    if (folder / SHARDS).is_dir():
        sharding.read_metadata(folder / SHARDS)
    return size


def find_checkpoint(resume: str, run: Path, report: Callable[[str], None]) -> Path | None:
    """The checkpoint that the key `resume` asks for. "none": None; "auto": the newest sound one of the run,
    if there is one; a path: that checkpoint, or the newest sound one of that run folder. Raises UsageError or
    LoadError if a path names none.
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
    """The record of a verified checkpoint, and the rest of training_state.pt: the `state` that was given to
    `take_snapshot`. Raises LoadError.
    """
    record = read_json(folder / RECORD)
    try:
        state = torch.load(folder / STATE, weights_only=True, map_location="cpu")
        record["data"] = DataState.from_json(record["data"], state.pop("unique"))
        return Progress(**record), state
    except (pickle.UnpicklingError, RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = str(error).partition("\n")[0]
        raise LoadError(f"{folder}: {RECORD} or {STATE} is not what a save writes ({reason})") from None


def load_weights(source: str | Path, backend: Any, device: torch.device) -> SmolLM2ForCausalLM:
    """A model in training mode, with fp32 weights in memory of its own.

    Copied out of the file's memory map, whose alignment could change the last bit of a matrix product.
    """
    model = load_model(source, backend, device, dtype=torch.float32)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model.train()


def load_moments(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Puts back the optimizer's state. Learning rate, decay and betas stay those of the configuration.

    Raises LoadError for state that does not fit the parameters: fused kernels would write past its end.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    names = _names(model, optimizer)
    index = {name: number for number, name in enumerate(names)}
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in read_moments(folder, dict(zip(names, parameters, strict=True))).items():
        name, _, entry = key.rpartition("/")
        wanted = [] if entry == "step" else list(parameters[index[name]].shape) if name in index else None
        if list(value.shape) != wanted:
            expected = "no such parameter" if wanted is None else f"expected shape {wanted}"
            raise LoadError(f"{folder}: optimizer state {key!r:.200}: {expected}, got {list(value.shape)}")
        state.setdefault(index[name], {})[entry] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def read_moments(folder: Path, parameters: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The optimizer's state as `parameter name/entry` -> tensor, whole or cut as that parameter is."""
    like = parameters or {}
    if (folder / SHARDS).is_dir():
        return sharding.read_shards(folder / SHARDS, like)
    return {
        key: sharding.cut_like(value, like.get(key.rpartition("/")[0]))
        for key, value in load_file(folder / MOMENTS).items()
    }


def main(argv: Sequence[str]) -> int:
    parser = Parser("python -m train.checkpoint", description="Checks checkpoints against their manifests.")
    compares = "compare every file with the size and sha256 in the manifest"
    parser.add_argument("command", choices=["verify"], help=compares)
    which = "a checkpoint, or the folder of a run: all its checkpoints"
    parser.add_argument("folder", type=Path, metavar="DIR", help=which)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    folder: Path = parser.parse_args(argv).folder
    found = checkpoints(folder) if (folder / "checkpoints").is_dir() else [folder]
    if not folder.is_dir() or not found:
        expected = "a checkpoint or the folder of a run with checkpoints"
        raise UsageError(f"{folder}: expected {expected}, found none")
    damaged = 0
    for path in found:
        try:
            print(f"sound    {path}  {verify(path) / 1e6:,.1f} MB")
        except LoadError as error:
            damaged += 1
            print(f"damaged  {error}")
    return 1 if damaged else 0


if __name__ == "__main__":
    sys.exit(run_command(main))
