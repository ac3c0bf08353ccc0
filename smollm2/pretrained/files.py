"""The files of a model folder, JSON and safetensors: errors name the file, writes are whole or not at all."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from smollm2.config import SmolLM2Config
from smollm2.errors import LoadError
from smollm2.json_file import read_json

logger = logging.getLogger(__name__)

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
HEADER_LIMIT = 2**22  # bytes of a safetensors header; the names of 40 thousand tensors
TOKEN_IDS = "bos_token_id", "eos_token_id", "pad_token_id"  # in generation_config.json too
STORED_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I8": torch.int8, "U8": torch.uint8,
}  # fmt: skip
FLOATS = torch.float32, torch.bfloat16, torch.float16, torch.float64  # that weights may have

Writer = Callable[[Path], Any]  # writes the content of one file to the path that it is given


def json_writer(data: Mapping[str, Any]) -> Writer:
    """A writer for `write_files` of readable JSON."""
    text = json.dumps(data, indent=2, ensure_ascii=False) + "\n"
    return lambda path: path.write_text(text, encoding="utf-8")


def write_files(folder: str | Path, writers: Mapping[str, Writer]) -> None:
    """Writes several files into a folder so that each is complete or absent, even after a crash.

    writers: file name -> writer. All are written under temporary names and flushed to disk before the first
    is renamed. Raises LoadError if one cannot be written, and removes the temporary files.
    """
    folder = Path(folder)
    temporary = {name: folder / f".{name}.{os.getpid()}.tmp" for name in writers}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, write in writers.items():
            write(temporary[name])
            _flush(temporary[name])
        for name, path in temporary.items():
            path.replace(folder / name)
        _flush(folder)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        names = ", ".join(writers)
        raise LoadError(f"{folder}: cannot write {names}: {reason}; nothing half-written is left") from error
    finally:
        for path in temporary.values():
            with contextlib.suppress(OSError):  # the folder may turn out to be a file
                path.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    """Returns when the disk has the content of a file, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def model_files(
    config: SmolLM2Config, tensors: dict[str, Tensor], generation: Mapping[str, Any] | None = None
) -> dict[str, Writer]:
    """The files of a model folder for `write_files`: config.json, generation_config.json and the weights.

    generation: what else generation_config.json holds, such as a temperature.
    """
    dtype = str(tensors[EMBEDDING].dtype).removeprefix("torch.")
    data = config.to_dict()
    ids = {name: data[name] for name in TOKEN_IDS if data[name] is not None}
    return {
        # transformers 4 calls dtype torch_dtype
        "config.json": json_writer({**data, "dtype": dtype, "torch_dtype": dtype}),
        "generation_config.json": json_writer({**(generation or {}), **ids}),
        WEIGHTS: lambda path: write_safetensors(path, tensors),
    }


def weights_writer(tensors: Mapping[str, Tensor]) -> Callable[[Path], None]:
    """Writes a folder with these weights alone."""
    return lambda folder: write_files(folder, {WEIGHTS: lambda path: write_safetensors(path, tensors)})


def weight_files(folder: Path) -> list[Path]:
    """The files that `read_tensors` reads, and that a cache of what they hold depends on: model.safetensors,
    or the index and every shard that it names. Raises LoadError where there is neither.
    """
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    index = folder / INDEX
    if not index.is_file():
        pickled = " (pytorch_model.bin is not read: convert it to safetensors)"
        hint = pickled if (folder / "pytorch_model.bin").exists() else ""
        raise LoadError(f"{folder}: expected {WEIGHTS} or {INDEX}, found neither{hint}")
    return [index, *(folder / shard for shard in sorted(set(_weight_map(index).values())))]


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor name -> name of the file beside the index that holds it."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise LoadError(f"{index}: expected a weight_map from tensor names to files, got {weight_map!r:.80}")
    for shard in weight_map.values():
        if not isinstance(shard, str) or not shard or shard != Path(shard).name:
            raise LoadError(f"{index}: expected names of files beside it, got {shard!r:.80}: no such file")
        if not os.path.isfile(index.parent / shard):  # False for a name too long for a file, too
            problem = f"no such file, but {INDEX} names it"
            raise LoadError(f"{index.parent / shard[:255]}: {problem}; the download is incomplete")
    return weight_map


def read_tensors(folder: Path, device: torch.device) -> dict[str, Tensor]:
    """All tensors of `weight_files`, memory-mapped on the CPU. Raises LoadError if two files hold tensors of
    one name that differ, or none holds what the index names.
    """
    first, *shards = weight_files(folder)
    if not shards:
        return read_safetensors(first, device)
    tensors: dict[str, Tensor] = {}
    for path in shards:
        found = read_safetensors(path, device)
        for name in tensors.keys() & found.keys():
            one, other = tensors[name], found[name]
            if one.dtype != other.dtype or not torch.equal(one, other):
                raise LoadError(f"{path}: {name} differs from the tensor of that name in another shard")
        tensors |= found
    # a head and an embedding that are tied are listed both and stored once
    absent = sorted(_weight_map(first).keys() - tensors.keys() - {HEAD, EMBEDDING})
    if absent:
        raise LoadError(f"{first}: names tensors that no shard holds: {abbreviate(absent)}")
    return tensors


def read_safetensors(path: Path, device: torch.device) -> dict[str, Tensor]:
    """The tensors of a file, mapped on the CPU, else copied. Raises LoadError if the file is not sound."""
    try:
        with path.open("rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
        if HEADER_LIMIT < size < path.stat().st_size:
            raise ValueError(f"expected a header of at most {HEADER_LIMIT} bytes, got {size}")
        with safe_open(path, "pt"):  # checks the header
            pass
        return map_safetensors(path) if device.type == "cpu" else load_file(path, device=str(device))
    except (SafetensorError, OSError, ValueError) as error:
        with path.open("rb") as stream:
            pointer = stream.read(7) == b"version"
        damaged = f"truncated or corrupt ({error}); download or convert it again"
        reason = "a Git LFS pointer; run git lfs pull" if pointer else damaged
        raise LoadError(f"{path}: not a safetensors file: {reason}") from error


def map_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a sound safetensors file as views of one private memory map, where neighbours in the
    file can form one matrix.

    `load_file` maps each tensor alone. It takes over where a dtype is none of STORED_DTYPES or the data is
    not aligned.
    """
    with path.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(size))
    header.pop("__metadata__", None)
    if (8 + size) % 8 or any(entry["dtype"] not in STORED_DTYPES for entry in header.values()):
        return load_file(path)
    data = torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)[8 + size :]
    tensors = {}
    for name, entry in header.items():
        (start, end), dtype = entry["data_offsets"], STORED_DTYPES[entry["dtype"]]
        if start % dtype.itemsize:
            return load_file(path)
        tensors[name] = data[start:end].view(dtype).view(entry["shape"])
    return tensors


def write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes a safetensors file in the order given, wider dtypes first for alignment.

    `save_file` sorts by name, which puts o_proj between k and q.
    """
    ordered = dict(sorted(tensors.items(), key=lambda item: -item[1].element_size()))
    names = {dtype: name for name, dtype in STORED_DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in ordered.items():
        end = offset + tensor.nbytes
        header[name] = dict(dtype=names[tensor.dtype], shape=list(tensor.shape), data_offsets=[offset, end])
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % 64)  # the data begins on a cache line
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for tensor in ordered.values():
            stream.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)


def check_numbers(tensors: Mapping[str, Tensor], where: Path) -> None:
    """Raises LoadError for NaN and inf, and warns of numbers beyond fp16, which no sound weights reach.

    One pass at the speed of memory: 0.03 s for the 135M model in fp32.
    """
    # other dtypes, and tensors without elements, are none of the model's own
    known = {name: tensor for name, tensor in tensors.items() if tensor.dtype in FLOATS and tensor.numel()}
    # [tensors, 2]: the extremes of each; NaN if it holds one
    extremes = torch.stack([torch.stack(tensor.aminmax()).float() for tensor in known.values()]).abs()
    largest = dict(zip(known, extremes.amax(1).tolist(), strict=True))
    if bad := [name for name, value in largest.items() if not math.isfinite(value)]:
        hint = "the file is damaged, or the training that wrote it diverged: use an earlier checkpoint"
        raise LoadError(f"{where}: {len(bad)} tensors hold NaN or inf: {abbreviate(bad)}; {hint}")
    if high := [name for name, value in largest.items() if value > torch.finfo(torch.float16).max]:
        found = f"{largest[high[0]]:.3g} in {abbreviate(high)}"
        logger.warning("%s: weights as large as %s; the file is probably damaged", where, found)


def abbreviate(names: list[str]) -> str:
    """The first few of a list of names, and how many more."""
    shown = ", ".join(names[:4])
    return shown if len(names) <= 4 else f"{shown} and {len(names) - 4} more"
