"""The compiled decode step: its package for this machine, found or built, and the engine that runs it.

    exported_step.py  -> torch.export -> AOTInductor -> ~/.cache/smollm2/compiled/<sizes>-<dtype>-<hash>.pt2

A package holds code and no weights, so that every model of these sizes uses it. Its name carries what it
depends on: sizes, dtypes, torch's version, the processor's instructions, the number of threads, and the
source of the step.

A package is a shared library that runs as the user. It is loaded only if nobody else can have written it, and
if it has the sha256 that lies beside it, in the form of sha256sum: a damaged one ends the process.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import platform
import shutil
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from smollm2.engine import exported_step
from smollm2.engine.cache import KVCache
from smollm2.engine.eager import Engine
from smollm2.engine.eager_step import plain_weights
from smollm2.engine.exported_step import DecodeStep
from smollm2.engine.quantized import Int4Weight, QuantizedEngine
from smollm2.errors import LoadError, UsageError
from smollm2.pretrained.cache import cache_folder, sweep, unfinished
from smollm2.pretrained.files import write_files
from smollm2.pretrained.trust import check_owners

logger = logging.getLogger(__name__)

_EXAMPLE_TOKENS = 20  # in the cache of the example that is traced; any number from 2 will do


class CompiledEngine(Engine):
    """Single rows through the compiled decode step; prompts and batches go to the engine below.

    Raises LoadError for a package that `read_package` refuses, or that cannot be loaded here.
    """

    def __init__(self, below: Engine, package: Path, why: str = "") -> None:
        super().__init__(below.model, why)
        self.below = below
        self.name = f"compiled {below.name}" if isinstance(below, QuantizedEngine) else "compiled"
        began = time.perf_counter()
        content = read_package(package)
        try:
            # A copy that is private: what was verified is what is loaded.
            with tempfile.TemporaryDirectory() as folder:
                copy = Path(folder) / package.name
                copy.write_bytes(content)
                # torch._inductor.aoti_load_package wraps this, but to import Inductor takes a second.
                self.package = torch._C._aoti.AOTIModelPackageLoader(str(copy), "model", False, 1, -1)
        except (OSError, RuntimeError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise LoadError(f"{package}: cannot be loaded ({reason}); --compile makes it anew") from error
        self.why = f"{why}, loaded in {time.perf_counter() - began:.2f} s"
        self.compiled_for = self._kind()
        self.weights: list[Any] = []

    def _kind(self) -> tuple[object, ...]:
        return self.model.config, self.model.device, self.model.dtype

    def renew(self) -> None:
        super().renew()
        self.below.renew()
        self.below.renewed = True
        fits = self.plain and self._kind() == self.compiled_for
        self.weights = tree_leaves(step_weights(self.below)) if fits else []

    def _decode(self, tokens: Tensor, cache: KVCache) -> Tensor:
        length = int(cache.lengths[0])
        # The exporter takes sizes of 0 and 1 for constants. Without weights the package is for another dtype,
        # or would not call what was added to the layers.
        if tokens.shape != (1, 1) or length < 2 or not self.weights:
            return self.below.decode(tokens, cache)
        cache.advance(1)
        keys, values = cache.keys[:, 0], cache.values[:, 0]  # [layers, S, K, D]
        old = [*keys[:, :length].unbind(), *values[:, :length].unbind()]
        logits, new = self.package.boxed_run([tokens[0], cache.lengths - 1, *self.weights, *old])
        keys[:, length], values[:, length] = new.unbind(1)
        return logits.view(1, 1, -1)


def step_weights(engine: Engine) -> tuple[Any, ...]:
    """The `tensors` of a DecodeStep for an eager or int8 engine. Raises UsageError for int4, and for a model
    with other layers than its own.
    """
    model = engine.model
    if not model.is_plain():
        raise UsageError("compile: expected the model's own layers, and some were replaced or hooked")
    weights = engine.few if isinstance(engine, QuantizedEngine) else plain_weights(model)
    if any(isinstance(matrix, Int4Weight) for matrix in weights.matrices()):
        raise UsageError("compile: the compiled step takes plain or int8 weights, got int4")
    embedding, norm = model.model.embed_tokens.weight.detach(), model.model.norm.weight.detach()
    tuples = weights.changed(lambda matrix: matrix if isinstance(matrix, Tensor) else tuple(matrix))
    layers = [tuple(layer) for layer in tuples.layers]
    # the package is compiled for tables of this length
    cos, sin = model.model.rotary(embedding.device, model.config.max_position_embeddings)
    return cos, sin, embedding, norm, tuples.head, layers


def package_path(engine: Engine) -> Path:
    """Where the package of this engine's step lies, or would lie."""
    model, config, threads = engine.model, engine.model.config, torch.get_num_threads()
    dtype = str(model.lm_head.weight.dtype).removeprefix("torch.")
    what = dtype if engine.name == "eager" else f"{engine.name}-{dtype}"
    # Neither the numbers of special tokens nor training's settings change the code.
    sizes = [
        config.hidden_size, config.intermediate_size, config.num_hidden_layers, config.num_attention_heads,
        config.num_key_value_heads, config.head_dim, config.vocab_size, config.max_position_embeddings,
        config.rms_norm_eps,
    ]  # fmt: skip
    machine = [torch.__version__, torch.backends.cpu.get_cpu_capability(), _processor(), threads]
    source = Path(exported_step.__file__).read_bytes()
    digest = hashlib.sha256(repr((sizes, dtype, what, machine)).encode() + source).hexdigest()[:12]
    name = f"{config.hidden_size}x{config.num_hidden_layers}-{what}-{threads}threads-{digest}.pt2"
    return cache_folder() / "compiled" / name


def _processor() -> str:
    """What the processor can do: the compiler uses all of its instructions."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def find_package(engine: Engine) -> Path | None:
    """The package for this engine, if it has been made and may be used; if it may not, a warning says why."""
    try:
        path = package_path(engine)
    except LoadError:  # no home folder
        return None
    sweep(path.parent, "tmp*")
    if not os.path.lexists(path):
        return None
    try:
        read_package(path)
    except LoadError as error:
        logger.warning("%s; until then the step is not compiled", error)
        return None
    return path


def read_package(path: Path) -> bytes:
    """The content of a package. Raises LoadError where others may have written it, or it is damaged."""
    try:
        check_owners(path, cache_folder())
        if not (path.is_file() and _digest_file(path).is_file()):  # a pipe would be waited for
            raise ValueError("it and its sha256 are not two files")
        content = path.read_bytes()
        if _digest_file(path).read_text(encoding="utf-8") != _digest_line(path, content):
            raise ValueError("it has another sha256 than was written beside it")
    except (OSError, ValueError) as error:
        raise LoadError(f"{path}: not a whole package ({error}); --compile makes it anew") from None
    return content


def _digest_file(package: Path) -> Path:
    return package.with_suffix(".sha256")


def _digest_line(package: Path, content: bytes) -> str:
    return f"{hashlib.sha256(content).hexdigest()}  {package.name}\n"


def build_package(engine: Engine) -> Path:
    """Compiles the step of an eager or int8 engine, says so on stderr, and returns the package's path.

    The package appears under its name when it is complete. Raises UsageError when there is no C++ compiler,
    and LoadError where the cache cannot be written, or others may write to it.
    """
    path = package_path(engine)
    compiler = os.environ.get("CXX", "g++" if sys.platform != "darwin" else "clang++")
    if shutil.which(compiler) is None:
        raise UsageError(
            f"compile: needs a C++ compiler, {compiler!r} was not found; "
            "install one, or name it in the variable CXX"
        )
    try:
        with unfinished(path.parent) as folder:
            check_owners(path.parent, cache_folder())
            _compile(engine, path, folder)
    except OSError as error:
        hint = "SMOLLM2_CACHE names another folder"
        raise LoadError(f"{path}: cannot be written ({error.strerror or error}); {hint}") from error
    return path


def _sound_inductor_cache(folder: Path) -> contextlib.AbstractContextManager[None]:
    """Inductor's own cache, or one in `folder` where others may have written to that: it lies in /tmp under a
    name that anybody can take first, and holds code.
    """
    from torch._inductor.runtime.cache_dir_utils import cache_dir
    from torch._inductor.utils import fresh_cache

    try:
        usual = Path(cache_dir())
        check_owners(usual, usual)
    except (OSError, LoadError):
        return fresh_cache(dir=str(folder))
    return contextlib.nullcontext()


def _compile(engine: Engine, path: Path, folder: Path) -> None:
    """Compiles in `folder` and moves the package, with its digest, to `path` when both are on the disk."""
    config, dtype = engine.model.config, engine.model.lm_head.weight.dtype
    weights = step_weights(engine)
    print(f"compiling the decode step into {path} (about a minute, once)", file=sys.stderr, flush=True)
    began = time.perf_counter()
    shape, layers = (_EXAMPLE_TOKENS, config.num_key_value_heads, config.head_dim), config.num_hidden_layers
    keys, values = ([torch.zeros(shape, dtype=dtype) for _ in range(layers)] for _ in range(2))
    tokens = torch.export.Dim("tokens", min=2, max=config.max_position_embeddings)
    grows = [{0: tokens}] * layers
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, about its own code
        program = torch.export.export(
            DecodeStep(config, dtype),
            (torch.tensor([0]), torch.tensor([_EXAMPLE_TOKENS]), weights, keys, values),
            dynamic_shapes=(None, None, tree_map(lambda _: None, weights), grows, grows),
        )
        with _sound_inductor_cache(folder):
            made = torch._inductor.aoti_compile_and_package(program, package_path=f"{folder}/step.pt2")
    content, whole = Path(made).read_bytes(), folder / "whole"
    digest = _digest_line(path, content)
    write_files(
        whole,
        {
            _digest_file(path).name: lambda file: file.write_text(digest, encoding="utf-8"),
            path.name: lambda file: file.write_bytes(content),
        },
    )
    for file in (_digest_file(path), path):  # a package without its digest would be called damaged
        (whole / file.name).chmod(0o600)  # whatever the umask lets others do
        (whole / file.name).replace(file)
    took, megabytes = time.perf_counter() - began, len(content) / 1e6
    print(f"compiled in {took:.0f} s, {megabytes:.1f} MB", file=sys.stderr, flush=True)
