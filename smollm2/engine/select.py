"""Which engine runs a model: eager, captured graphs, int8 or int4 weights, or a compiled step."""

from __future__ import annotations

import logging

from smollm2.engine.compiled import CompiledEngine, obstacle
from smollm2.engine.eager import Engine
from smollm2.engine.loops import CapturedEngine
from smollm2.engine.native import build_library, find_library
from smollm2.engine.quantized import KINDS, QuantizedEngine
from smollm2.errors import LoadError, UsageError
from smollm2.model import SmolLM2ForCausalLM

logger = logging.getLogger(__name__)

QUANTIZE = ("none", *KINDS)


def default_engine(model: SmolLM2ForCausalLM) -> Engine:
    """What `generate` uses unless it is told: captured graphs, kept with the model, on CUDA; on a CPU the
    compiled step where the installation has it; else eager.
    """
    if model.device.type == "cpu":
        return select_engine(model)
    if model.device.type != "cuda" or not model.is_plain():  # a graph would not call hooks again
        return Engine(model)
    if not isinstance(model.engine, Engine):
        model.engine = CapturedEngine(model)
    return model.engine


def select_engine(
    model: SmolLM2ForCausalLM, *, quantize: str = "none", compiled: bool | str = "auto"
) -> Engine:
    """The fastest engine at hand; `str(engine)` says which, and why. On CUDA that is the captured one.

    quantize: "none", or "int8" or "int4" weights for the decode steps (CPU only). compiled: "auto" uses the
    compiled step if the installation or the cache has it; True makes it now if there is none (ten seconds);
    False never uses it. Raises UsageError for what the device cannot do, and LoadError for a compiled step
    that was asked for and cannot be made or loaded.
    """
    if quantize not in QUANTIZE:
        raise UsageError(f"quantize: expected one of {', '.join(QUANTIZE)}, got {quantize!r}")
    device = model.device.type
    if quantize != "none":
        engine: Engine = QuantizedEngine(model, quantize, "as asked")
    else:
        engine = Engine(model) if device == "cpu" else default_engine(model)
    why_not = obstacle(model, engine)
    if compiled is True and why_not:
        raise UsageError(f"compile: {why_not}")
    reason = why_not or "compiled step turned off"
    if not (compiled is False or why_not):
        library = find_library()
        if library is None and compiled is True:
            library = build_library()
        reason = "no compiled step yet; --compile builds one, which decodes faster"
        if library is not None:
            try:
                return CompiledEngine(engine, library, library.name)
            except LoadError as error:
                if compiled is True:
                    raise
                reason = str(error)
                logger.warning("%s; until then the step is not compiled", error)
    if device == "cpu":
        engine.why = f"{engine.why}, {reason}" if engine.why else reason
    return engine
