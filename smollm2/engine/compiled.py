"""The compiled decode step: the engine that runs decode_step.cpp on a model's weights, where these lie
(memory-mapped). smollm2/engine/native.py finds or builds the library.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Sequence
from ctypes import POINTER, Structure, c_double, c_int64, c_void_p
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kernels import LayerWeights
from kernels.products import rows_in_fp32
from smollm2.engine.cache import KVCache
from smollm2.engine.eager import Engine
from smollm2.engine.eager_step import Weights, only_torch, plain_weights
from smollm2.engine.native import capability, load_library
from smollm2.engine.quantized import Int8Weight, QuantizedEngine
from smollm2.model import SmolLM2ForCausalLM

MAX_TOKENS = 64  # of a step, as in decode_step.cpp
MAX_ROWS = 16  # of a step on processors with fast products in bf16, where more are for the fallback
# Tokens of a 16-bit prompt that steps read faster than products of all of them at once in fp32.
SHORT_PROMPT = {"AVX512": 128, "AVX2": 512}
# Kind of decode_step.cpp: of matrices, and of the embedding and the cache
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3}


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
        ("count", c_int64), ("batch", c_int64), ("capacity", c_int64), ("tokens", c_void_p),
        ("rows", c_void_p), ("positions", c_void_p), ("outputs", c_int64), ("output", c_void_p),
        ("keys", c_void_p), ("values", c_void_p), ("layer_stride", c_int64), ("row_stride", c_int64),
        ("logits", c_void_p), ("threads", c_int64),
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
            DTYPE_CODES[head.values.dtype if isinstance(head, Int8Weight) else head.dtype],
            DTYPE_CODES[embedding.dtype],
            config.rms_norm_eps, None, None, self._address(embedding),
            self._floats(model.model.norm.weight), self._matrix(head), (_Layer * len(layers))(*layers),
        )  # fmt: skip

    def set_rotary_tables(self, tables: tuple[Tensor, Tensor]) -> None:
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
    """Steps of up to `most` tokens, of one row or several, through the compiled step, and a prompt of up to
    `short_prompt` tokens, which it reads to the bits of its tokens one by one. Larger batches and longer
    prompts go to the fallback. Tokens/s of prompts on two cores, by steps and by products of all tokens
    in bf16: 16 tokens 551 and 239, 64 tokens 731 and 455 on an Intel Xeon (Emerald Rapids, no matrix unit);
    64 tokens 466 and 205 on an EPYC 7003 (Zen 3).

    Raises LoadError for a library that `find_library` would refuse, or that cannot be loaded here.
    """

    def __init__(self, fallback: Engine, library: Path, why: str = "") -> None:
        super().__init__(fallback.model, why)
        self.fallback = fallback
        self.name = f"compiled {fallback.name}" if isinstance(fallback, QuantizedEngine) else "compiled"
        converts = rows_in_fp32(self.model.dtype) is not None  # weights, at every product of many tokens
        slow = converts or rows_in_fp32(torch.bfloat16) is not None
        self.short_prompt = self.max_tokens = MAX_TOKENS if slow else MAX_ROWS
        if converts:
            self.short_prompt, self.reads_at_once = SHORT_PROMPT[capability()], MAX_TOKENS
        self._step = load_library(library).smollm2_decode_step
        self._bound: _Bound | None = None
        self._for_prompts: _Bound | None = None

    def renew(self) -> None:
        super().renew()
        self.fallback.renew()
        self.fallback.renewed = True
        self._bound = self._for_prompts = None
        if self.plain and not obstacle(self.model, self.fallback):
            # as everywhere, a prompt is read with the model's own weights
            self._bound = self._for_prompts = _Bound(self.model, plain_weights(self.model))
            if isinstance(self.fallback, QuantizedEngine):
                self._bound = _Bound(self.model, self.fallback.few)

    def prefill(self, input_ids: Tensor, lengths: Tensor, cache: KVCache) -> Tensor:
        rows, length = input_ids.shape
        is_short = rows == 1 and 0 < int(lengths) == length <= self.short_prompt
        if not (is_short and self._reads_by_steps(cache, rows)):
            return super().prefill(input_ids, lengths, cache)
        cache.reserve(length)
        return self._read(input_ids.tolist(), [0], cache)

    def extend(self, parts: Sequence[Sequence[int]], slots: Sequence[int], cache: KVCache) -> Tensor:
        are_short = max(map(len, parts)) <= self.short_prompt
        if not (are_short and self._reads_by_steps(cache, len(cache.lengths))):
            return super().extend(parts, slots, cache)
        return self._read(parts, slots, cache)

    @torch.inference_mode()
    def _read(self, parts: Sequence[Sequence[int]], slots: Sequence[int], cache: KVCache) -> Tensor:
        """`extend` by steps, where `_reads_by_steps`."""
        assert self._for_prompts is not None
        lengths = cache.lengths.tolist()
        places = [
            (token, slot, lengths[slot] + index)
            for part, slot in zip(parts, slots, strict=True)
            for index, token in enumerate(part)
        ]
        ends = list(itertools.accumulate(map(len, parts)))
        logits = torch.empty(len(parts), self.model.config.vocab_size)
        done = 0
        for first in range(0, len(places), MAX_TOKENS):
            ids, rows, positions = torch.tensor(places[first : first + MAX_TOKENS]).unbind(1)
            wanted = [end - 1 - first for end in ends if first < end <= first + MAX_TOKENS]
            outputs, found = torch.tensor(wanted, dtype=torch.int64), logits[done : done + len(wanted)]
            self._run(self._for_prompts, ids, rows, positions, outputs, cache, found)
            done += len(wanted)
        for part, slot in zip(parts, slots, strict=True):
            cache.lengths[slot] += len(part)
        return logits

    def _reads_by_steps(self, cache: KVCache, rows: int) -> bool:
        """Whether steps can read prompts into this cache of so many rows. They read with the weights as they
        are now, and the first step need not look again.
        """
        self.renewed = self.renewed and self.frozen
        if not self.renewed:
            self.renew()
            self.renewed = True
        return self._for_prompts is not None and _can_address(cache, rows, self.model)

    def _decode(self, tokens: Tensor, cache: KVCache) -> Tensor:
        batch, length = tokens.shape
        if (
            self._bound is None
            or not 0 < batch * length <= self.max_tokens
            or not _can_address(cache, batch, self.model)
        ):
            return self.fallback.decode(tokens, cache)
        cache.advance(length)
        rows, new = torch.arange(batch).repeat_interleave(length), torch.arange(length)
        positions = (cache.lengths[:, None] - length + new).flatten()
        logits = torch.empty(batch * length, self.model.config.vocab_size)
        self._run(self._bound, tokens.flatten(), rows, positions, torch.arange(len(rows)), cache, logits)
        return logits.view(batch, length, -1)

    def _run(
        self, bound: _Bound, tokens: Tensor, rows: Tensor, positions: Tensor, outputs: Tensor,
        cache: KVCache, logits: Tensor,
    ) -> None:  # fmt: skip
        """One step: tokens [N] into those rows and positions of the cache, and the results of those that
        `outputs` names into logits [len(outputs), V]. All integers are int64.
        """
        reach = min(cache.capacity, self.model.config.max_position_embeddings)
        bound.set_rotary_tables(self.model.model.rotary(tokens.device, reach))
        integers = [one.long().contiguous() for one in (tokens, rows, positions, outputs)]
        keys = cache.keys
        step = _Step(
            len(tokens), keys.shape[1], reach, *(one.data_ptr() for one in integers[:3]), len(outputs),
            integers[3].data_ptr(), keys.data_ptr(), cache.values.data_ptr(), keys.stride(0), keys.stride(1),
            logits.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        if failed := self._step(ctypes.byref(bound.model), ctypes.byref(step)):
            if failed == 2:
                raise MemoryError("decode: no memory for a step")
            raise IndexError("decode: a token outside the vocabulary or a length outside the cache")


def _can_address(cache: KVCache, batch: int, model: SmolLM2ForCausalLM) -> bool:
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


def obstacle(model: SmolLM2ForCausalLM, fallback: Engine | None = None) -> str:
    """Why the compiled step cannot run a model, with the weights of `fallback`; empty if it can."""
    if model.device.type != "cpu":
        return f"the compiled step is for the CPU, the device is {model.device.type}"
    if not only_torch(model.backend):
        return f"the compiled step replaces backend torch, got {model.backend.name}"
    if not model.is_plain():
        return "the compiled step is for the model's own layers, some were replaced or hooked"
    dtypes = {parameter.dtype for parameter in model.parameters()}
    if len(dtypes) > 1 or not dtypes <= DTYPE_CODES.keys():
        names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        return f"the compiled step takes weights in fp32, bf16 or fp16, got {names}"
    if isinstance(fallback, QuantizedEngine) and fallback.name != "int8":
        return f"the compiled step takes plain or int8 weights, got {fallback.name}"
    return ""
