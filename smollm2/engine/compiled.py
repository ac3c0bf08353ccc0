"""The compiled decode step: the engine that runs decode_step.cpp on a model's weights, where these lie
(memory-mapped). smollm2/engine/native.py finds or builds the library.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, Structure, c_double, c_int64, c_void_p
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kernels import LayerWeights
from kernels.products import WIDE_ROWS, faster_in_fp32
from smollm2.engine.cache import KVCache
from smollm2.engine.eager import Engine, outside_autocast, prefill
from smollm2.engine.eager_step import Weights, only_torch, plain_weights
from smollm2.engine.native import load_library
from smollm2.engine.quantized import Int8Weight, QuantizedEngine
from smollm2.model import SmolLM2ForCausalLM

MAX_ROWS = 16  # tokens of a step, as in decode_step.cpp
SHORT_PROMPT = 256  # tokens
# Kind of decode_step.cpp: of matrices, and of the embedding and the cache
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3}


class _Matrix(Structure):
    _fields_ = [("values", c_void_p), ("scales", c_void_p)]


class _Layer(Structure):
    _fields_ = [
        ("input_norm", c_void_p), ("qkv", _Matrix), ("o", _Matrix), ("post_norm", c_void_p),
        ("gate_up", _Matrix), ("down", _Matrix),
    ]  # fmt: skip


class _Model(Structure):
    _fields_ = [
        *((name, c_int64) for name in ("layers", "hidden", "intermediate", "heads", "key_heads", "head_dim")),
        ("vocab", c_int64), ("matrices", c_int64), ("dtype", c_int64), ("eps", c_double), ("cos", c_void_p),
        ("sin", c_void_p), ("embedding", c_void_p), ("norm", c_void_p), ("head", _Matrix),
        ("layer", POINTER(_Layer)),
    ]  # fmt: skip


class _Step(Structure):
    _fields_ = [
        ("batch", c_int64), ("length", c_int64), ("capacity", c_int64), ("tokens", c_void_p),
        ("lengths", c_void_p), ("keys", c_void_p), ("values", c_void_p), ("layer_stride", c_int64),
        ("row_stride", c_int64), ("logits", c_void_p), ("threads", c_int64),
    ]  # fmt: skip


class _Bound:
    """A model as decode_step.cpp takes it, and the tensors that it points to."""

    def __init__(self, model: SmolLM2ForCausalLM, weights: Weights) -> None:
        config, self.kept = model.config, list[Any]()
        self.tables: tuple[Tensor, ...] = ()
        embedding, head = model.model.embed_tokens.weight.detach(), weights.head
        layers = [self._layer(layer) for layer in weights.layers]
        self.model = _Model(
            config.num_hidden_layers, config.hidden_size, config.intermediate_size,
            config.num_attention_heads, config.num_key_value_heads, config.head_dim, config.vocab_size,
            KINDS[head.values.dtype if isinstance(head, Int8Weight) else head.dtype], KINDS[embedding.dtype],
            config.rms_norm_eps, None, None, self._address(embedding),
            self._floats(model.model.norm.weight), self._matrix(head), (_Layer * len(layers))(*layers),
        )  # fmt: skip

    def turn_by(self, tables: tuple[Tensor, Tensor]) -> None:
        """Takes the cosines and sines of the positions that a step reaches."""
        if tables is not self.tables:
            self.tables = tables
            self.model.cos, self.model.sin = map(self._floats, tables)

    def _address(self, tensor: Tensor) -> int:
        self.kept.append(tensor := tensor.detach().contiguous())
        return tensor.data_ptr()

    def _floats(self, tensor: Tensor) -> int:
        return self._address(tensor.float())

    def _matrix(self, matrix: Tensor | Int8Weight) -> _Matrix:
        if isinstance(matrix, Tensor):
            return _Matrix(self._address(matrix), None)
        return _Matrix(self._address(matrix.values), self._floats(matrix.scales))

    def _layer(self, layer: LayerWeights[Any]) -> _Layer:
        return _Layer(
            self._floats(layer.input_norm), self._matrix(layer.qkv), self._matrix(layer.o),
            self._floats(layer.post_norm), self._matrix(layer.gate_up), self._matrix(layer.down),
        )  # fmt: skip


class CompiledEngine(Engine):
    """Steps of up to MAX_ROWS tokens, of one row or several, through the compiled step. Larger batches go to
    the engine below, and prompts, but for short ones on processors without 16-bit products: two cores of an
    EPYC 7003 (Zen 3) read a bf16 prompt of 32 tokens at 391 tokens/s by steps of 16 and at 205 otherwise.

    Raises LoadError for a library that `find_library` would refuse, or that cannot be loaded here.
    """

    def __init__(self, below: Engine, library: Path, why: str = "") -> None:
        super().__init__(below.model, why)
        self.below = below
        self.name = f"compiled {below.name}" if isinstance(below, QuantizedEngine) else "compiled"
        self._step = load_library(library).smollm2_decode_step
        self._bound: _Bound | None = None
        self._for_prompts: _Bound | None = None

    def renew(self) -> None:
        super().renew()
        self.below.renew()
        self.below.renewed = True
        self._bound = self._for_prompts = None
        if self.plain and not obstacle(self.model, self.below):
            # as everywhere, a prompt is read with the model's own weights
            self._bound = self._for_prompts = _Bound(self.model, plain_weights(self.model))
            if isinstance(self.below, QuantizedEngine):
                self._bound = _Bound(self.model, self.below.few)

    def prefill(self, input_ids: Tensor, lengths: Tensor, cache: KVCache) -> Tensor:
        with outside_autocast(input_ids.device):
            by_steps = faster_in_fp32(cache.keys, WIDE_ROWS) and _is_short(input_ids, lengths)
        if not by_steps:
            return super().prefill(input_ids, lengths, cache)
        self.renewed = self.renewed and self.frozen
        if not self.renewed:
            self.renew()
            self.renewed = True  # the first step need not look again
        if self._for_prompts is None or not _is_plain(cache, 1, self.model):
            return prefill(self.model, input_ids, lengths, cache)
        *chunks, last = input_ids.split(MAX_ROWS, dim=1)
        with torch.inference_mode():
            for chunk in chunks:
                self._run(self._for_prompts, chunk, cache, None)
            logits = torch.empty(1, last.shape[1], self.model.config.vocab_size)
            self._run(self._for_prompts, last, cache, logits)
        return logits[:, -1]

    def _decode(self, tokens: Tensor, cache: KVCache) -> Tensor:
        batch, length = tokens.shape
        if (
            self._bound is None
            or not 0 < batch * length <= MAX_ROWS
            or not _is_plain(cache, batch, self.model)
        ):
            return self.below.decode(tokens, cache)
        logits = torch.empty(batch, length, self.model.config.vocab_size)
        self._run(self._bound, tokens, cache, logits)
        return logits

    def _run(self, bound: _Bound, tokens: Tensor, cache: KVCache, logits: Tensor | None) -> None:
        """One step: tokens [B, T] into the cache, and its results into logits [B, T, V]."""
        batch, length = tokens.shape
        cache.advance(length)
        tokens, lengths, keys, values = tokens.long().contiguous(), cache.lengths, cache.keys, cache.values
        reach = min(cache.capacity, self.model.config.max_position_embeddings)
        bound.turn_by(self.model.model.rotary(tokens.device, reach))
        step = _Step(
            batch, length, reach, tokens.data_ptr(), lengths.data_ptr(), keys.data_ptr(),
            values.data_ptr(), keys.stride(0), keys.stride(1), None if logits is None else logits.data_ptr(),
            torch.get_num_threads(),
        )  # fmt: skip
        if failed := self._step(ctypes.byref(bound.model), ctypes.byref(step)):
            if failed == 2:
                raise MemoryError("decode: no memory for a step")
            raise IndexError("decode: a token outside the vocabulary or a length outside the cache")


def _is_short(input_ids: Tensor, lengths: Tensor) -> bool:
    """Whether this is one prompt that steps read faster than products of all its tokens."""
    return input_ids.shape[0] == 1 and 0 < int(lengths) == input_ids.shape[1] <= SHORT_PROMPT


def _is_plain(cache: KVCache, batch: int, model: SmolLM2ForCausalLM) -> bool:
    """Whether the step can address this cache, and it has so many rows."""
    dim, heads = model.config.head_dim, model.config.num_key_value_heads
    return (
        not cache.fixed
        and cache.keys.shape[:2] == (model.config.num_hidden_layers, batch)
        and cache.keys.shape == cache.values.shape
        and cache.lengths.shape == (batch,)
        and cache.lengths.is_contiguous()
        and cache.keys.stride() == cache.values.stride()
        and cache.keys.stride()[2:] == (heads * dim, dim, 1)
        and cache.keys.dtype == cache.values.dtype == model.dtype
        and cache.keys.device.type == "cpu"
    )


def obstacle(model: SmolLM2ForCausalLM, below: Engine | None = None) -> str:
    """Why the compiled step cannot run a model, with the weights of the engine below; empty if it can."""
    if model.device.type != "cpu":
        return f"the compiled step is for the CPU, the device is {model.device.type}"
    if not only_torch(model.backend):
        return f"the compiled step replaces backend torch, got {model.backend.name}"
    if not model.is_plain():
        return "the compiled step is for the model's own layers, some were replaced or hooked"
    dtypes = {parameter.dtype for parameter in model.parameters()}
    if len(dtypes) > 1 or not dtypes <= KINDS.keys():
        names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        return f"the compiled step takes weights in fp32, bf16 or fp16, got {names}"
    if isinstance(below, QuantizedEngine) and below.name != "int8":
        return f"the compiled step takes plain or int8 weights, got {below.name}"
    return ""
