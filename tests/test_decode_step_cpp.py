"""The compiled decode step computes what the eager one does, to the bit the same in any company, and touches
nothing but its rows of the cache.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from generation_cases import tiny_model
from numerics import check
from torch import Tensor

from kernels import TORCH, reference, with_ops
from smollm2 import SmolLM2ForCausalLM
from smollm2.engine import compiled, eager_step, native
from smollm2.engine.cache import KVCache
from smollm2.engine.compiled import MAX_ROWS, MAX_TOKENS, CompiledEngine
from smollm2.engine.eager import Engine
from smollm2.engine.eager_step import Weights
from smollm2.engine.quantized import Int8Weight, QuantizedEngine, dequantize
from smollm2.engine.select import select_engine
from smollm2.errors import UsageError
from smollm2.generation.batch import generate_many

pytestmark = pytest.mark.usefixtures("installed_step")


def sizes(hidden: int, inner: int, heads: int, key_heads: int, dim: int, vocab: int) -> dict[str, int]:
    return dict(
        hidden_size=hidden, intermediate_size=inner, num_attention_heads=heads,
        num_key_value_heads=key_heads, head_dim=dim, vocab_size=vocab,
    )  # fmt: skip


# `rows_in_fp32` of a processor with slow products in 16 bits, and of one with fast ones
SLOW, FAST = {torch.bfloat16: 8, torch.float16: 8}.get, dict[torch.dtype, int]().get
ODD = sizes(100, 150, 3, 1, 16, 515)  # nothing is a multiple of a vector or of a block
SHAPES = {
    "odd": ODD, "dim 64, no groups": sizes(72, 96, 2, 2, 64, 512), "dim 128": sizes(50, 61, 8, 2, 128, 601),
    "dim 80": sizes(64, 64, 3, 3, 80, 513), "a group of 20": sizes(96, 40, 20, 1, 6, 515),
}  # fmt: skip
# lengths before the step (pieces of attention end at 144 keys), and tokens of every row
ROWS: list[tuple[list[int], int]] = [
    ([0], 1), ([0], 16), ([7], 5), ([496], 16), ([3, 0, 140], 5), ([143, 144, 145, 288, 287], 1),
    ([142, 286, 500], 3), ([*range(0, 496, 31)], 1), ([9, 9], 8),
]  # fmt: skip


def model_of(**changes: Any) -> SmolLM2ForCausalLM:
    """With norms that are not all ones."""
    model = tiny_model(**changes)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.normal_(1, 0.3)
    return model


def compiled_engine(model: SmolLM2ForCausalLM, below: Engine | None = None) -> CompiledEngine:
    return CompiledEngine(below or Engine(model), native._installed())


def filled(model: SmolLM2ForCausalLM, lengths: list[int], capacity: int = 512) -> KVCache:
    """A cache of texts of those lengths, with what else may lie in its memory."""
    cache = KVCache.allocate(model.config, len(lengths), capacity, model.device, model.dtype)
    generator = torch.Generator().manual_seed(3)
    for row, length in enumerate(lengths):
        for tensor in (cache.keys, cache.values):
            values = torch.randn(tensor[:, row].shape, generator=generator)
            values[:, length:] = 1e3
            tensor[:, row] = values
    cache.lengths.copy_(torch.tensor(lengths))
    cache.longest = max(lengths)
    return cache


def tokens_of(model: SmolLM2ForCausalLM, batch: int, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(4)
    return torch.randint(model.config.vocab_size, (batch, count), generator=generator)


def not_called(*_: object) -> Tensor:
    raise AssertionError("the step went to the engine below")


def decode(engine: Engine, lengths: list[int], count: int) -> tuple[Tensor, KVCache]:
    """A step of the compiled engine with two threads, of others with as many as there are."""
    cache, tokens = filled(engine.model, lengths), tokens_of(engine.model, len(lengths), count)
    if not isinstance(engine, CompiledEngine):
        return engine.decode(tokens, cache), cache
    engine.fallback.decode = not_called  # type: ignore[method-assign]
    with threads(max(2, torch.get_num_threads())):
        return engine.decode(tokens, cache), cache


def row_of(cache: KVCache, row: int) -> KVCache:
    """A copy of one row."""
    parts = (tensor[:, row : row + 1].clone() for tensor in (cache.keys, cache.values))
    return KVCache(*parts, cache.lengths[row : row + 1].clone(), int(cache.lengths[row]))


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("shape", SHAPES)
def test_in_fp32_it_is_the_eager_step(shape):
    model = model_of(**SHAPES[shape])
    for lengths, count in ROWS:
        (ours, cache), (expected, wanted) = (
            decode(engine, lengths, count) for engine in (compiled_engine(model), Engine(model))
        )
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(cache.lengths, wanted.lengths) and cache.longest == wanted.longest
        for found, right in ((cache.keys, wanted.keys), (cache.values, wanted.values)):
            torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_errs_no_more_than_the_eager_step(shape, dtype):
    model = model_of(**SHAPES[shape]).to(dtype)
    wide = copy.deepcopy(model).double()
    for lengths, count in (([3, 0, 140], 5), ([143, 144, 145, 288, 500], 1)):
        cache = filled(model, lengths)
        exact = dataclasses.replace(cache, keys=cache.keys.double(), values=cache.values.double())
        exact.lengths, tokens = cache.lengths.clone(), tokens_of(model, len(lengths), count)
        truth = Engine(wide).decode(tokens, exact).double()
        base, ours = (decode(engine, lengths, count)[0] for engine in (Engine(model), compiled_engine(model)))
        check("decode step", "compiled", ours, base, truth, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_keys_and_values_are_rounded_to_the_nearest(dtype):
    """In the first layer, where all before them is exact."""
    model = model_of(**ODD).to(dtype)
    found, exact = (
        decode(compiled_engine(each), [6, 3], 4)[1] for each in (model, copy.deepcopy(model).float())
    )
    for row, length in enumerate((6, 3)):
        new = slice(length, length + 4)
        assert torch.equal(found.keys[0, row, new], exact.keys[0, row, new].to(dtype))
        assert torch.equal(found.values[0, row, new], exact.values[0, row, new].to(dtype))


def wide(weight: Int8Weight) -> Tensor:
    return weight.values.double() * weight.scales.double()[:, None]


@pytest.mark.parametrize("shape", ["odd", "dim 128"])
def test_with_int8_it_is_the_step_with_the_dequantised_weights(shape):
    model = model_of(**SHAPES[shape])
    for dtype in (torch.float32, torch.bfloat16):
        model = model.to(dtype)
        below = QuantizedEngine(model, "int8")
        plain = Weights(below.layers, below.head, eager_step.linear)
        for lengths, count in (([9], 1), ([3, 0, 140], 5)):
            base = decode(below, lengths, count)[0]
            ours = decode(engine := compiled_engine(model, below), lengths, count)[0]
            del below.decode  # type: ignore[attr-defined]
            assert engine.name == "compiled int8"
            tokens, cache = tokens_of(model, len(lengths), count), filled(model, lengths)
            if dtype == torch.float32:
                expected = eager_step.decode_step(model, plain.changed(dequantize), tokens, cache)
                torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
            exact = dataclasses.replace(cache, keys=cache.keys.double(), values=cache.values.double())
            exact.lengths.copy_(torch.tensor(lengths))
            exact.longest, double = max(lengths), copy.deepcopy(model).double()
            weights = plain.changed(wide)
            layers = [
                layer._replace(input_norm=layer.input_norm.double(), post_norm=layer.post_norm.double())
                for layer in weights.layers
            ]
            truth = eager_step.decode_step(double, weights._replace(layers=layers), tokens, exact)
            check("decode step", "compiled int8", ours, base, truth, dtype)


ENGINES: dict[str, Callable[[SmolLM2ForCausalLM], CompiledEngine]] = {
    "fp32": compiled_engine, "bf16": lambda model: compiled_engine(model.bfloat16()),
    "fp16": lambda model: compiled_engine(model.half()),
    "int8": lambda model: compiled_engine(model, QuantizedEngine(model.bfloat16(), "int8")),
}  # fmt: skip


@pytest.mark.parametrize("kind", ENGINES)
@pytest.mark.parametrize("shape", ["odd", "dim 80", "a group of 20"])
def test_a_row_has_the_same_bits_in_any_company(shape, kind):
    """Alone, in batches of every size, with other rows of other lengths, with any number of threads."""
    engine = ENGINES[kind](model_of(**SHAPES[shape]))
    engine.max_tokens = MAX_TOKENS
    lengths = [0, 3, 143, 144, 145, 288, 20, 9, 500, 1, 2, 60, 300, 7, 8, 90, *range(0, 510, 30)]
    cache, tokens = filled(engine.model, lengths), tokens_of(engine.model, len(lengths), 1)
    single = [engine.decode(tokens[row : row + 1], row_of(cache, row))[0] for row in range(len(lengths))]
    for batch in (2, 3, 4, 5, 7, 8, 11, 16, 33):
        with threads(1 + batch % 5):
            together = engine.decode(tokens[:batch], filled(engine.model, lengths[:batch]))
        for row in range(batch):
            assert torch.equal(together[row], single[row]), (batch, row)


@pytest.mark.parametrize("kind", ENGINES)
@pytest.mark.parametrize("shape", ["odd", "dim 128", "a group of 20"])
@pytest.mark.parametrize("length", [0, 139, 400])
def test_tokens_read_at_once_have_the_bits_of_tokens_one_by_one(length, shape, kind):
    """What the cache holds, too, and across the end of a piece of attention. The fewer threads, the more
    tokens share such a piece.
    """
    engine = ENGINES[kind](model_of(**SHAPES[shape]))
    tokens = tokens_of(engine.model, 2, 8)
    one_by_one = filled(engine.model, [length, length + 2])
    single = torch.cat([engine.decode(tokens[:, at : at + 1], one_by_one) for at in range(8)], 1)
    for count in (1, 2, 5):
        at_once = filled(engine.model, [length, length + 2])
        with threads(count):
            assert torch.equal(engine.decode(tokens, at_once), single)
        assert torch.equal(at_once.keys, one_by_one.keys)
        assert torch.equal(at_once.values, one_by_one.values)


@pytest.mark.parametrize("kind", ENGINES)
def test_numbers_do_not_depend_on_threads_or_chance(kind):
    engine = ENGINES[kind](model_of(**ODD))
    lengths = [3, 290, 0]
    tokens = tokens_of(engine.model, 3, 5)
    found = []
    for count in (1, 2, 3, 5):
        with threads(count):
            found += [engine.decode(tokens, filled(engine.model, lengths, 300)) for _ in range(13)]
    assert all(torch.equal(one, found[0]) for one in found)


def guarded(model: SmolLM2ForCausalLM, batch: int, capacity: int) -> tuple[KVCache, list[Tensor]]:
    """A cache in the midst of other memory, and that memory."""
    config = model.config
    shape = config.num_hidden_layers, batch + 2, capacity + 7, config.num_key_value_heads, config.head_dim
    memory = [torch.full(shape, 7.0, dtype=model.dtype) for _ in range(2)]
    keys, values = (tensor[:, 1:-1, 3:-4] for tensor in memory)
    return KVCache(keys, values, torch.zeros(batch, dtype=torch.int64)), memory


def test_it_writes_the_new_keys_and_nothing_else():
    model = model_of(**ODD)
    cache, memory = guarded(model, 3, 20)
    cache.lengths.copy_(torch.tensor([0, 4, 17]))
    cache.longest = 17
    before = [tensor.clone() for tensor in memory]
    engine = compiled_engine(model)
    engine.fallback.decode = not_called  # type: ignore[method-assign]
    engine.decode(tokens_of(model, 3, 3), cache)
    for tensor, old in zip(memory, before, strict=True):
        for row, length in enumerate((0, 4, 17)):
            new = tensor[:, 1 + row, 3 + length : 6 + length]
            assert bool((new != 7).any(-1).all())
            new.fill_(7)
        assert torch.equal(tensor, old)


BAD: list[tuple[str, list[int], list[int]]] = [
    ("a token beyond", [5, 515], [4, 4]), ("a negative token", [-1, 3], [4, 4]),
    ("a token far away", [2**40, 3], [4, 4]), ("a length beyond", [5, 3], [4, 20]),
    ("a length far away", [5, 3], [4, 2**40]), ("a negative length", [5, 3], [-1, 4]),
]  # fmt: skip


@pytest.mark.parametrize(("tokens", "lengths"), [case[1:] for case in BAD], ids=[case[0] for case in BAD])
def test_what_lies_outside_raises_and_touches_nothing(tokens, lengths):
    model = model_of(**ODD)
    cache, memory = guarded(model, 2, 20)
    cache.lengths.copy_(torch.tensor(lengths))
    cache.longest = 4
    with pytest.raises(IndexError, match="a token outside the vocabulary or a length outside the cache"):
        compiled_engine(model).decode(torch.tensor(tokens)[:, None], cache)
    assert all(bool((tensor == 7).all()) for tensor in memory)


def test_there_are_no_angles_beyond_the_positions_of_the_model():
    """A cache may be longer than the model's tables."""
    model = model_of(max_position_embeddings=32)
    cache = filled(model, [31], 40)
    engine = compiled_engine(model)
    assert engine.decode(torch.tensor([[3]]), cache).isfinite().all()
    with pytest.raises(IndexError):
        engine.decode(torch.tensor([[3]]), cache)


def goes_below(engine: CompiledEngine, tokens: Tensor, cache: KVCache) -> bool:
    calls = []
    engine.fallback.decode = lambda *arguments: calls.append(arguments)  # type: ignore
    try:
        engine.decode(tokens, cache)
    finally:
        del engine.fallback.decode  # type: ignore[attr-defined]
    return bool(calls)


@pytest.mark.parametrize("quantize", ["none", "int8"])
@pytest.mark.parametrize("length", [1, MAX_ROWS, 100])
def test_a_short_prompt_is_read_by_steps(length, quantize, monkeypatch):
    """With the model's own weights of that moment, and to the bits of its tokens one by one."""
    monkeypatch.setattr(compiled, "rows_in_fp32", SLOW if length > MAX_ROWS else FAST)
    model = model_of(**ODD).to(torch.bfloat16)
    ids, lengths = tokens_of(model, 1, length), torch.tensor([length])
    engine = compiled_engine(model, QuantizedEngine(model, quantize) if quantize == "int8" else None)
    engine.prefill(ids, lengths, engine.allocate(1, 128))
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight.mul_(1.5)
    with torch.inference_mode():
        cache, expected_cache = (engine.allocate(1, 128) for _ in range(2))
    plain = compiled_engine(model)
    for token in range(length):
        expected = plain.decode(ids[:, token : token + 1], expected_cache)
    looks, renew = list[None](), engine.renew
    monkeypatch.setattr(engine, "renew", lambda: looks.append(renew()))
    assert torch.equal(engine.prefill(ids, lengths, cache), expected[:, -1])
    assert torch.equal(cache.keys, expected_cache.keys) and torch.equal(cache.values, expected_cache.values)
    assert cache.longest == length and cache.lengths.tolist() == [length]
    assert engine.decode(ids[:, :1], cache).isfinite().all()
    assert len(looks) == 1, "the weights are looked at once a text"


@pytest.mark.parametrize("rows, capacity", [(1, 8), (2, 9)])
def test_a_short_prompt_needs_a_cache_that_it_fits(rows, capacity):
    model, errors = model_of(), []
    for engine in (compiled_engine(model), Engine(model)):
        with pytest.raises(ValueError) as error:
            engine.prefill(tokens_of(model, 1, 9), torch.tensor([9]), engine.allocate(rows, capacity))
        errors.append(str(error.value))
    assert errors[0] == errors[1]


def test_many_short_prompts_look_at_the_weights_once(monkeypatch):
    model = model_of()
    engine, prompts = compiled_engine(model), [[3, 1, 4], [1, 5], [9, 2, 6, 5], [3, 5]]
    looks, renew = list[None](), engine.renew
    monkeypatch.setattr(engine, "renew", lambda: looks.append(renew()))
    for batches in (1, 2):
        assert len(list(generate_many(model, prompts, max_new_tokens=3, slots=1, engine=engine))) == 4
        assert len(looks) == batches and not engine.frozen


@pytest.mark.parametrize("kind", ["bf16", "int8"])
def test_parts_of_several_rows_are_read_together_to_the_bits_of_each_alone(kind, monkeypatch):
    """Their tokens share steps, whose ends lie anywhere; the other rows stay as they are."""
    monkeypatch.setattr(compiled, "rows_in_fp32", SLOW)
    engine = ENGINES[kind](model_of(**ODD))
    lengths, parts = [3, 0, 140, 7, 60, 1], {4: [9, 8, 7], 0: [*range(100, 190)], 1: [5], 2: [*range(40)]}
    together = filled(engine.model, lengths, 300)
    logits = engine.extend(list(parts.values()), list(parts), together)
    expected = filled(engine.model, lengths, 300)
    for number, (slot, part) in enumerate(parts.items()):
        alone = Engine.extend(engine, [part], [slot], expected)
        assert torch.equal(logits[number], alone[0])
        lengths[slot] += len(part)
    assert torch.equal(together.keys, expected.keys) and torch.equal(together.values, expected.values)
    assert together.lengths.tolist() == expected.lengths.tolist() == lengths


@pytest.mark.parametrize("case, rows, length", [
    ("long", 1, 129), ("two rows", 2, 5), ("long in fp32", 1, MAX_TOKENS + 1),
    ("long on a newer processor", 1, MAX_ROWS + 1),
])  # fmt: skip
def test_other_prompts_are_read_at_once(case, rows, length, monkeypatch):
    monkeypatch.setattr(compiled, "rows_in_fp32", FAST if "newer" in case else SLOW)
    monkeypatch.setattr(compiled, "capability", lambda: "AVX512")
    model = model_of(**ODD, max_position_embeddings=200)
    model.to(torch.float32 if "fp32" in case else torch.bfloat16)
    ids = tokens_of(model, rows, length)
    engine = compiled_engine(model)
    engine._run = not_called  # type: ignore[method-assign, assignment]
    logits = engine.prefill(ids, torch.full((len(ids),), ids.shape[1]), engine.allocate(len(ids), 200))
    assert logits.isfinite().all()


def test_what_it_cannot_do_goes_to_the_engine_below(monkeypatch):
    model = model_of()
    for slow, most in ((FAST, MAX_ROWS), (SLOW, MAX_TOKENS)):
        monkeypatch.setattr(compiled, "rows_in_fp32", slow)
        engine = compiled_engine(model)
        assert not goes_below(engine, tokens_of(model, most, 1), filled(model, [5] * most, 8))
        assert goes_below(engine, tokens_of(model, most + 1, 1), filled(model, [5] * (most + 1), 8))
        assert goes_below(engine, tokens_of(model, 1, most + 1), filled(model, [5]))
    assert goes_below(engine, tokens_of(model, 1, 0), filled(model, [5]))
    assert goes_below(engine, tokens_of(model, 1, 1), dataclasses.replace(filled(model, [5]), fixed=True))
    assert goes_below(engine, tokens_of(model, 2, 1), filled(model, [5])), "a row without a cache"
    cache = filled(model, [5])
    doubled = torch.cat((cache.keys, cache.keys), -1)[..., : model.config.head_dim]
    assert goes_below(engine, tokens_of(model, 1, 1), dataclasses.replace(cache, keys=doubled))
    other = dataclasses.replace(cache, keys=cache.keys.bfloat16(), values=cache.values.bfloat16())
    assert goes_below(engine, tokens_of(model, 1, 1), other)


def test_tokens_of_another_integer_type_are_the_same_tokens():
    model = model_of()
    engine = compiled_engine(model)
    expected, _ = decode(engine, [5, 9], 3)
    tokens = tokens_of(model, 2, 3)
    assert torch.equal(engine.decode(tokens.int(), filled(model, [5, 9])), expected)
    assert torch.equal(engine.decode(tokens.t().contiguous().t(), filled(model, [5, 9])), expected)


def test_a_model_that_changes_into_another_kind_goes_below():
    model = model_of()
    engine, tokens = compiled_engine(model), tokens_of(model, 1, 1)
    assert not goes_below(engine, tokens, filled(model, [0]))  # an empty cache: the model is looked at again
    own = model.backend
    model.backend = with_ops(TORCH, swiglu=dataclasses.replace(TORCH, swiglu=lambda *x: reference.swiglu(*x)))
    assert goes_below(engine, tokens, filled(model, [0]))
    model.backend = own
    assert not goes_below(engine, tokens, filled(model, [0]))
    model.double()
    assert goes_below(engine, tokens, filled(model, [0]))
    with pytest.raises(
        UsageError, match="compile: the compiled step takes weights in fp32, bf16 or fp16, got"
    ):
        select_engine(model, compiled=True)
    model.float().model.norm.bfloat16()
    with pytest.raises(UsageError, match="got bfloat16, float32"):
        select_engine(model, compiled=True)


@pytest.mark.parametrize("name", ["q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_that_is_no_number_shows_in_the_logits(name, dtype):
    model = model_of().to(dtype)
    layer = model.model.layers[0]
    part = layer.self_attn if hasattr(layer.self_attn, name) else layer.mlp
    with torch.no_grad():
        getattr(part, name).weight.view(-1)[40] = float("nan")
    assert bool(decode(compiled_engine(model), [6, 150], 2)[0].isnan().all())


def test_nan_with_any_bits_stays_nan():
    """The exponential works on the bits of its argument."""
    model = model_of()
    with torch.no_grad():
        model.model.layers[0].mlp.gate_proj.weight.view(torch.int32)[:] = 0x7FFFFFFF
        model.model.layers[1].self_attn.q_proj.weight.view(torch.int32)[:] = -1
    assert bool(decode(compiled_engine(model), [6, 150], 2)[0].isnan().all())
