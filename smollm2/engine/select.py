"""Which engine runs a model: eager, captured graphs, int8 or int4 weights, or a compiled step."""

from __future__ import annotations

import logging

from kernels import TORCH
from smollm2.engine.compiled import CompiledEngine, build_package, find_package
from smollm2.engine.eager import Engine
from smollm2.engine.loops import CapturedEngine
from smollm2.engine.quantized import KINDS, QuantizedEngine
from smollm2.errors import LoadError, UsageError
from smollm2.model import SmolLM2ForCausalLM

logger = logging.getLogger(__name__)

QUANTIZE = ("none", *KINDS)
COMPILED_QUANTIZE = ("none", "int8")  # what the compiled step takes


def default_engine(model: SmolLM2ForCausalLM) -> Engine:
    """What `generate` uses unless it is told: captured graphs, kept with the model, on CUDA; else eager."""
    # a graph would not call hooks again
    if model.device.type != "cuda" or not model.is_plain():
        return Engine(model)
    if not isinstance(model.engine, Engine):
        model.engine = CapturedEngine(model)
    return model.engine


def select_engine(
    model: SmolLM2ForCausalLM, *, quantize: str = "none", compiled: bool | str = "auto"
) -> Engine:
    """The fastest engine at hand; `str(engine)` says which, and why. On CUDA that is the captured one.

    quantize: "none", or "int8" or "int4" weights for the decode steps (CPU only). compiled: "auto" uses a
    package that `python -m smollm2.compile` made for these sizes, this machine and this torch, if there is
    one; True makes it now if there is none (a minute); False never uses one. Raises UsageError for what the
    device cannot do, and LoadError for a compiled step that was asked for and cannot be made or loaded.
    """
    if quantize not in QUANTIZE:
        raise UsageError(f"quantize: expected one of {', '.join(QUANTIZE)}, got {quantize!r}")
    device = model.device.type
    engine = default_engine(model) if quantize == "none" else QuantizedEngine(model, quantize, "as asked")
    obstacle = ""
    if device != "cpu":
        obstacle = f"the compiled step is for the CPU, the device is {device}"
    elif model.backend.decode_layer is not TORCH.decode_layer:
        obstacle = f"the compiled step replaces backend torch, got {model.backend.name}"
    elif not model.is_plain():
        obstacle = "the compiled step is for the model's own layers, some were replaced or hooked"
    elif quantize not in COMPILED_QUANTIZE:
        obstacle = f"the compiled step takes plain or int8 weights, got {quantize}"
    if compiled is True and obstacle:
        raise UsageError(f"compile: {obstacle}")
    if compiled is False or obstacle:
        reason = obstacle or "compiled step not wanted"
    else:
        package = find_package(engine)
        if package is None and compiled is True:
            package = build_package(engine)
        reason = "no compiled step for it yet: --compile makes one, and decodes faster"
        if package is not None:
            try:
                return CompiledEngine(engine, package, f"package {package.name}")
            except LoadError as error:
                if compiled is True:
                    raise
                reason = str(error)
                logger.warning("%s; until then the step is not compiled", error)
    if device == "cpu":
        engine.why = f"{engine.why}, {reason}" if engine.why else reason
    return engine
