"""The compiled decode step: its package for this machine, found or built, and the engine that runs it.

    exported_step.py  -> torch.export -> AOTInductor -> ~/.cache/smollm2/compiled/<sizes>-<dtype>-<hash>.pt2

A package holds code and no weights, so that every model of these sizes uses it. Its name carries what it
depends on: sizes, dtypes, torch's version, the processor's instructions, the number of threads, and the
source of the step.
"""

from __future__ import annotations

import hashlib
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
from smollm2.errors import UsageError
from smollm2.pretrained.cache import cache_folder

_EXAMPLE_TOKENS = 20  # in the cache of the example that is traced; any number from 2 will do


class CompiledEngine(Engine):
    """Single rows through the compiled decode step; prompts and batches go to the engine below."""

    def __init__(self, below: Engine, package: Path, why: str = "") -> None:
        super().__init__(below.model, why)
        self.below = below
        self.name = f"compiled {below.name}" if isinstance(below, QuantizedEngine) else "compiled"
        began = time.perf_counter()
        # What torch._inductor.aoti_load_package wraps, without the second that importing Inductor takes.
        self.package = torch._C._aoti.AOTIModelPackageLoader(str(package), "model", False, 1, -1)
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
    """The package for this engine, if it has been made."""
    path = package_path(engine)
    return path if path.exists() else None


def build_package(engine: Engine) -> Path:
    """Compiles the step of an eager or int8 engine, says so on stderr, and returns the package's path.

    Raises UsageError when there is no C++ compiler. The package appears under its name when it is complete.
    """
    path = package_path(engine)
    compiler = os.environ.get("CXX", "g++" if sys.platform != "darwin" else "clang++")
    if shutil.which(compiler) is None:
        raise UsageError(
            f"compile: needs a C++ compiler, {compiler!r} was not found; "
            "install one, or name it in the variable CXX"
        )
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
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            made = torch._inductor.aoti_compile_and_package(program, package_path=f"{folder}/step.pt2")
            Path(made).replace(path)
    took, megabytes = time.perf_counter() - began, path.stat().st_size / 1e6
    print(f"compiled in {took:.0f} s, {megabytes:.1f} MB", file=sys.stderr, flush=True)
    return path
