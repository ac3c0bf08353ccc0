"""What runs a model's prompts and decode steps, chosen once: eager, int8 weights, or a compiled step.

    engine = select_engine(model, quantize="int8")
    cache  = engine.allocate(batch, capacity)
    logits = engine.prefill(input_ids, lengths, cache)        # then, token by token:
    logits = engine.decode(tokens, cache)

Every engine fills the same cache and returns the same shapes, so that a generation may begin on one and go on
with another.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import LayerWeights, reference
from smollm2.engine.cache import KVCache
from smollm2.engine.captured import DecodeLoops
from smollm2.engine.eager_step import Weights, decode_step, packed_weights, plain_weights, serves
from smollm2.engine.exported_step import Layer, Matrix, StepWeights
from smollm2.engine.quantized import (
    INT8_PACKED_ROWS,
    KINDS,
    Int4Weight,
    Int8Weight,
    QuantizedLayer,
    QuantizedWeight,
    batch_weights,
    linear,
    quantized_layers,
)
from smollm2.errors import UsageError

if TYPE_CHECKING:
    from smollm2.model import SmolLM2ForCausalLM

QUANTIZE = ("none", *KINDS)


@torch.inference_mode()
def prefill(model: SmolLM2ForCausalLM, input_ids: Tensor, lengths: Tensor, cache: KVCache) -> Tensor:
    """Runs the prompts through the model and fills the empty cache.

    input_ids [B, T], row b holding lengths[b] tokens and then anything -> logits [B, V] after the last token
    of each row. Causality makes what follows a row's tokens harmless, and the decode steps overwrite it in
    the cache.
    """
    cache.advance(input_ids.shape[1])
    cache.lengths.copy_(lengths)
    layers = [cache.layer(index) for index in range(len(model.model.layers))]
    hidden = model.model(input_ids, cache=layers)
    last = hidden[torch.arange(len(lengths), device=hidden.device), lengths - 1]
    return F.linear(last, model.lm_head.weight)


@torch.inference_mode()
def decode(model: SmolLM2ForCausalLM, tokens: Tensor, cache: KVCache) -> Tensor:
    """Appends a few tokens to every row. tokens [B, T] -> logits [B, T, V] in fp32; the cache grows by T."""
    if serves(model, cache):
        return decode_step(model, plain_weights(model), tokens, cache).float()
    backend, eps = model.backend, model.config.rms_norm_eps
    x, cos, sin = _begin(model, tokens, cache)
    for index, weights in enumerate(model.pack()):
        x = backend.decode_layer(
            x, weights, *cache.layer(index), cache.lengths, cos, sin, eps=eps, ops=backend
        )
    return backend.decode_head(x, model.model.norm.weight, model.lm_head.weight, eps)


def _begin(model: SmolLM2ForCausalLM, tokens: Tensor, cache: KVCache) -> tuple[Tensor, Tensor, Tensor]:
    """Makes room for the tokens -> their embeddings [B, T, hidden], cos and sin [B, T, D/2] of their
    positions.
    """
    length = tokens.shape[1]
    cache.advance(length)
    position = cache.lengths[:, None] - length + torch.arange(length, device=tokens.device)
    cos, sin = (table[position] for table in model.model.rotary(tokens.device))
    return model.model.embed_tokens(tokens), cos, sin


class Engine:
    """The model as it is, operation by operation."""

    name = "eager"
    loops: DecodeLoops | None = None  # with them, a generation is captured graphs

    def __init__(self, model: SmolLM2ForCausalLM, why: str = "") -> None:
        self.model, self.why = model, why
        # of the steps on the CPU; looked at anew for every prompt: training may have changed them
        self.decoding: Weights | None = None

    def allocate(self, batch: int, capacity: int) -> KVCache:
        """An empty cache for `batch` rows of at most `capacity` tokens. Raises UsageError when it does not
        fit into memory.
        """
        weight = self.model.lm_head.weight
        return KVCache.allocate(self.model.config, batch, capacity, weight.device, weight.dtype)

    def prefill(self, input_ids: Tensor, lengths: Tensor, cache: KVCache) -> Tensor:
        """`prefill`: [B, T], [B] -> logits [B, V]"""
        self.decoding = None
        return prefill(self.model, input_ids, lengths, cache)

    def decode(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """`decode`: [B, T] -> logits [B, T, V]"""
        if not serves(self.model, cache):
            return decode(self.model, tokens, cache)
        self.decoding = self.decoding or packed_weights(self.model)
        return decode_step(self.model, self.decoding, tokens, cache).float()

    def __str__(self) -> str:
        return f"{self.name} ({self.why})" if self.why else self.name


class CapturedEngine(Engine):
    """The model as it is, its steps recorded as CUDA graphs: `generate` hands the loop over the tokens to the
    device.
    """

    name = "captured"

    def __init__(self, model: SmolLM2ForCausalLM, why: str = "") -> None:
        super().__init__(model, why)
        self.loops = DecodeLoops(self)


class QuantizedEngine(Engine):
    """Decode steps with int8 or int4 weights. Prompts use the model's own: many tokens at a time are bound by arithmetic, which fewer bits
    do not save."""

    def __init__(self, model: SmolLM2ForCausalLM, kind: str, why: str = "") -> None:
        super().__init__(model, why)
        self.name = kind
        self.layers, self.head = quantized_layers(model, kind)
        self.few = Weights(list(self.layers), self.head, linear)
        self.many: Weights | None = None  # for batches; made at the first one

    @torch.inference_mode()
    def decode(self, tokens: Tensor, cache: KVCache) -> Tensor:
        if serves(self.model, cache):
            step = self.few
            if tokens.numel() >= INT8_PACKED_ROWS:
                step = self.many = self.many or batch_weights(self.layers, self.head)
            return decode_step(self.model, step, tokens, cache)
        backend, eps = self.model.backend, self.model.config.rms_norm_eps
        layer = partial(reference.decode_layer, eps=eps, ops=backend, linear=linear)
        x, cos, sin = _begin(self.model, tokens, cache)
        for index, weights in enumerate(self.layers):
            x = layer(x, cast(LayerWeights, weights), *cache.layer(index), cache.lengths, cos, sin)
        return linear(backend.rms_norm(x, self.model.model.norm.weight, eps), self.head)


class CompiledEngine(Engine):
    """Single rows through the compiled decode step; prompts and batches go to the engine below."""

    def __init__(self, below: Engine, package: Path, why: str = "") -> None:
        super().__init__(below.model, why)
        self.below, self.name = (
            below,
            f"compiled {below.name}" if isinstance(below, QuantizedEngine) else "compiled",
        )
        began = time.perf_counter()
        # What torch._inductor.aoti_load_package wraps, without the second that importing Inductor takes, and
        # without a walk through nested lists at every step.
        self.package = torch._C._aoti.AOTIModelPackageLoader(str(package), "model", False, 1, -1)
        self.why = f"{why}, loaded in {time.perf_counter() - began:.2f} s"
        self.weights = step_weights(below).flat()

    def prefill(self, input_ids: Tensor, lengths: Tensor, cache: KVCache) -> Tensor:
        return self.below.prefill(input_ids, lengths, cache)

    @torch.inference_mode()
    def decode(self, tokens: Tensor, cache: KVCache) -> Tensor:
        length = int(cache.lengths[0])
        if tokens.shape != (1, 1) or length < 2:  # the exporter takes sizes of 0 and 1 for constants
            return self.below.decode(tokens, cache)
        cache.advance(1)
        keys, values = cache.keys[:, 0], cache.values[:, 0]  # [layers, S, K, D]
        old = [*keys[:, :length].unbind(), *values[:, :length].unbind()]
        logits, new = self.package.boxed_run([tokens[0], cache.lengths - 1, *self.weights, *old])
        keys[:, length], values[:, length] = new.unbind(1)
        return logits.view(1, 1, -1)


def step_weights(engine: Engine) -> StepWeights:
    """The weights of an eager or int8 engine as the compiled step takes them."""
    model = engine.model
    layers: Sequence[LayerWeights | QuantizedLayer]
    head: Tensor | QuantizedWeight
    if isinstance(engine, QuantizedEngine):
        layers, head = engine.layers, engine.head
    else:
        layers, head = model.pack(), model.lm_head.weight.detach()
    blocks = [
        Layer(
            block.input_norm,
            _matrix(block.qkv),
            _matrix(block.o),
            block.post_norm,
            _matrix(block.gate_up),
            _matrix(block.down),
        )
        for block in layers
    ]
    cos, sin = model.model.rotary(model.lm_head.weight.device)
    return StepWeights(
        cos,
        sin,
        model.model.embed_tokens.weight.detach(),
        model.model.norm.weight.detach(),
        _matrix(head),
        blocks,
    )


def _matrix(weight: Tensor | QuantizedWeight) -> Matrix:
    if isinstance(weight, Int4Weight):
        raise UsageError("compile: the compiled step takes plain or int8 weights, got int4")
    return Matrix(*weight) if isinstance(weight, Int8Weight) else Matrix(weight)


def default_engine(model: SmolLM2ForCausalLM) -> Engine:
    """What `generate` uses unless it is told: captured graphs on CUDA, kept with the model for the next call;
    else eager.
    """
    if model.lm_head.weight.device.type != "cuda":
        return Engine(model)
    if model.engine is None:
        model.engine = CapturedEngine(model)
    return model.engine


def select_engine(
    model: SmolLM2ForCausalLM, *, quantize: str = "none", compiled: bool | str = "auto"
) -> Engine:
    """The fastest engine that is at hand; `str(engine)` says which, and why. On CUDA that is the captured
    one.

    quantize: "none", or "int8" or "int4" weights for the decode steps (CPU only). compiled: "auto" uses a
    package that `python -m smollm2.compile` made for these sizes, this machine and this torch, if there is
    one; True makes it now if there is none (a minute); False never uses one. Raises UsageError for what the
    device cannot do.
    """
    from smollm2.compile import build_package, find_package

    if quantize not in QUANTIZE:
        raise UsageError(f"quantize: expected one of {', '.join(QUANTIZE)}, got {quantize!r}")
    device = model.lm_head.weight.device.type
    engine = default_engine(model) if quantize == "none" else QuantizedEngine(model, quantize, "as asked")
    obstacle = ""
    if device != "cpu":
        obstacle = f"the compiled step is for the CPU, the device is {device}"
    elif model.backend.decode_layer is not reference.decode_layer:
        obstacle = f"the compiled step replaces backend torch, got {model.backend.name}"
    elif quantize == "int4":
        obstacle = "the compiled step takes plain or int8 weights, got int4"
    if compiled is False or obstacle:
        if compiled is True:
            raise UsageError(f"compile: {obstacle}")
        if device == "cpu":
            engine.why = ", ".join(
                part for part in (engine.why, obstacle or "compiled step not wanted") if part
            )
        return engine
    package = find_package(engine)
    if package is None and compiled is True:
        package = build_package(engine)
    if package is None:
        hint = "no compiled step for it yet: --compile makes one, and decodes faster"
        engine.why = ", ".join(part for part in (engine.why, hint) if part)
        return engine
    return CompiledEngine(engine, package, f"package {package.name}")
