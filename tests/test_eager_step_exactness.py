"""The decode step on the CPU: what the reference's composition gives, for every shape and current weights."""

from __future__ import annotations

import copy
import dataclasses
import gc
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from generation_cases import tiny_model
from numerics import check
from torch import Tensor

from kernels import TORCH, reference, with_ops
from smollm2 import SmolLM2ForCausalLM, generate
from smollm2.engine import eager_step
from smollm2.engine.cache import KVCache
from smollm2.engine.eager import Engine
from smollm2.engine.eager_step import linear, onednn, pack, packed_weights, supports
from smollm2.engine.quantized import INT8_PACKED_ROWS, QuantizedEngine, WideInt8Weight, batch_weights

BFLOAT16 = pytest.mark.skipif(not onednn(torch.bfloat16), reason="oneDNN has no bfloat16 product here")
LENGTHS = [[9], [9, 9, 9], [9, 2, 17], [1, 1]]  # of the prompts


def model_of(dtype: torch.dtype = torch.float32, **changes: Any) -> SmolLM2ForCausalLM:
    return tiny_model(**changes).to(dtype)


def composed(model: SmolLM2ForCausalLM) -> SmolLM2ForCausalLM:
    """The same weights, run by the composition: one operation of the backend is not torch's own."""
    other = copy.deepcopy(model)
    other.backend = dataclasses.replace(TORCH, swiglu=lambda *tensors: reference.swiglu(*tensors))
    return other


def run(
    model: SmolLM2ForCausalLM, lengths: list[int], steps: list[int], engine: Engine | None = None
) -> tuple[Tensor, KVCache]:
    """Prefills prompts of those lengths, then reads steps of so many tokens -> all logits [B, sum, V]."""
    engine, batch = engine or Engine(model), len(lengths)
    generator = torch.Generator().manual_seed(1)
    cache = engine.allocate(batch, max(lengths) + sum(steps))
    prompts = torch.randint(512, (batch, max(lengths)), generator=generator)
    engine.prefill(prompts, torch.tensor(lengths), cache)
    cache.longest = max(lengths)
    tokens = [torch.randint(512, (batch, count), generator=generator) for count in steps]
    return torch.cat([engine.decode(part, cache) for part in tokens], 1), cache


@pytest.mark.parametrize("lengths", LENGTHS)
def test_in_float64_it_is_the_composition(lengths):
    """One token, several at once, rows of one length and of several: no rounding to hide behind."""
    model = model_of(torch.float64)
    other = composed(model)
    assert supports(model, Engine(model).allocate(1, 4)) and not supports(other, Engine(other).allocate(1, 4))
    results = [run(each, lengths, [1, 1, 3, 1]) for each in (model, other)]
    (ours, cache), (expected, other_cache) = results
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)  # logits come in float32
    for row, length in enumerate(lengths):
        for name in ("keys", "values"):
            filled, wanted = (getattr(each, name)[:, row, : length + 6] for each in (cache, other_cache))
            torch.testing.assert_close(filled, wanted, rtol=1e-11, atol=1e-11)
    assert cache.lengths.tolist() == other_cache.lengths.tolist() == [length + 6 for length in lengths]


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=BFLOAT16)]
)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_in_the_models_dtype_it_errs_no_more_than_the_composition(lengths, dtype):
    model = model_of(dtype)
    truth = run(composed(copy.deepcopy(model).double()), lengths, [1, 2])[0].double()
    ours, base = (run(each, lengths, [1, 2])[0] for each in (model, composed(model)))
    check("decode step", "logits", ours, base, truth, dtype)


def test_heads_in_groups_of_one_and_of_five():
    for heads, key_heads in ((2, 2), (5, 1)):
        sizes = dict(hidden_size=64 * heads, num_attention_heads=heads, num_key_value_heads=key_heads)
        model = model_of(torch.float64, **sizes)
        ours, expected = (run(each, [5, 8], [1, 2])[0] for each in (model, composed(model)))
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_norm_is_the_references_bit_for_bit(dtype):
    x, weight = (3 * torch.randn(64, 576)).to(dtype), torch.randn(576).to(dtype)
    assert torch.equal(eager_step._normed(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5))


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=BFLOAT16)])
@pytest.mark.parametrize("rows", [0, 1, 2, 7, 16])
@pytest.mark.parametrize("shape", [(960, 576), (576, 1536), (31, 50)])
def test_products_are_right_to_rounding(shape, rows, dtype):
    """The bound is that of a sum in fp32 in any order, in which libraries differ."""
    weight, x = torch.randn(shape).to(dtype), torch.randn(rows, 1, shape[1]).to(dtype)
    exact = F.linear(x.double(), weight.double())
    magnitude = F.linear(x.double().abs(), weight.double().abs())
    allowed = (2**-8 if dtype == torch.bfloat16 else 2**-24) * exact.abs() + shape[1] * 2**-24 * magnitude
    for matrix in (weight, pack(weight)) if onednn(dtype) and rows else (weight,):
        product = linear(x, matrix)
        assert product.dtype == dtype and product.shape == exact.shape
        assert bool(((product.double() - exact).abs() <= allowed).all())


def test_only_the_eager_cpu_and_the_references_own_operations_are_replaced(monkeypatch):
    model = model_of()
    cache = Engine(model).allocate(1, 4)
    assert supports(model, cache)
    assert not supports(model, dataclasses.replace(cache, fixed=True))
    assert not supports(model, dataclasses.replace(cache, keys=cache.keys.to("meta")))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not supports(model, cache)


@pytest.mark.parametrize(
    "op",
    "rms_norm add_rms_norm rope_qkv rope_cache decode_attention swiglu decode_inputs decode_layer "
    "decode_layers decode_head".split(),
)
def test_a_replaced_operation_is_called(op):
    model, calls = model_of(), []

    def counted(*args: Any, **options: Any) -> Any:
        calls.append(op)
        return getattr(reference, op)(*args, **options)

    expected = run(model, [5], [1])[0]
    model.backend = with_ops(TORCH, **{op: dataclasses.replace(TORCH, **{op: counted})})
    torch.testing.assert_close(run(model, [5], [1])[0], expected, rtol=1e-4, atol=1e-4)
    assert calls


@BFLOAT16
def test_a_packed_copy_is_shared_and_goes_with_its_model():
    model = model_of(torch.bfloat16)
    first, again = packed_weights(model), packed_weights(model)
    assert first.head is again.head and first.head.is_mkldnn and first.layers[0].qkv.is_mkldnn
    assert copy.deepcopy(model) not in eager_step._packed
    before = len(eager_step._packed)
    del model
    gc.collect()
    assert len(eager_step._packed) == before - 1


@BFLOAT16
@pytest.mark.parametrize("change", ["in place", "assigned"])
def test_a_changed_weight_is_packed_anew(change):
    """A bf16 model that trains and samples in turns."""
    model, ids = model_of(torch.bfloat16), torch.arange(1, 10)[None]
    engine = Engine(model)
    before = generate(model, ids, max_new_tokens=12, eos_token_id=[], engine=engine)
    if change == "in place":
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
    else:
        others = {name: torch.randn_like(tensor) for name, tensor in model.state_dict().items()}
        model.load_state_dict(others, assign=True)
        model.tie_weights()
    after = generate(model, ids, max_new_tokens=12, eos_token_id=[], engine=engine)
    other = copy.deepcopy(model)
    fresh = generate(other, ids, max_new_tokens=12, eos_token_id=[], engine=Engine(other))
    assert torch.equal(after, fresh) and not torch.equal(after, before)


@BFLOAT16
def test_without_memory_for_a_copy_the_models_own_weights_serve(monkeypatch):
    monkeypatch.setattr(eager_step, "free_memory", lambda device: 1000)
    model = model_of(torch.bfloat16)
    weights = packed_weights(model)
    assert weights.head.data_ptr() == model.lm_head.weight.data_ptr() and model not in eager_step._packed
    engine = QuantizedEngine(model, "int8")
    assert batch_weights(engine.few).head is engine.head


def test_fp32_needs_no_copy():
    model = model_of()
    assert packed_weights(model).head.data_ptr() == model.lm_head.weight.data_ptr()
    assert model not in eager_step._packed


@BFLOAT16
def test_a_quantised_batch_multiplies_by_the_same_values():
    model = model_of(torch.bfloat16)
    engine = QuantizedEngine(model, "int8")
    many = batch_weights(engine.few)
    x = torch.randn(INT8_PACKED_ROWS, model.config.hidden_size).bfloat16()
    for wide, weight in ((many.head, engine.head), (many.layers[1].qkv, engine.layers[1].qkv)):
        assert isinstance(wide, WideInt8Weight) and wide.scales is weight.scales
        truth = F.linear(x.double(), weight.values.double() * weight.scales.double()[:, None])
        base = F.linear(x, weight.values.bfloat16()) * weight.scales
        check("int8 batch", "y", many.linear(x, wide), base, truth)


@BFLOAT16
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_quantised_batch_is_its_rows_to_rounding(kind):
    model = model_of(torch.bfloat16)
    engine = QuantizedEngine(model, kind)
    lengths = [6] * INT8_PACKED_ROWS
    together, cache = run(model, lengths, [1], engine)
    assert engine.many is not None and engine.many.head is not engine.head
    before = dataclasses.replace(cache, lengths=cache.lengths - 1, longest=cache.longest - 1)
    generator = torch.Generator().manual_seed(1)
    tokens = [torch.randint(512, (len(lengths), count), generator=generator) for count in (6, 1)][-1]
    narrow = eager_step.decode_step(model, engine.few, tokens, before)
    assert 0 < (together - narrow).norm() < 0.02 * narrow.norm()
