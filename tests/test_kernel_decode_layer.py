"""The fused decode layer: the numerics contract against the composition, what it writes, and that a row's
bits do not depend on other rows.
"""

import dataclasses
import re

import numerics
import pytest
import torch
from kernel_cases import (
    DEVICE,
    DTYPES,
    EPS,
    LENGTHS,
    ORACLE,
    PLACE,
    TORCH,
    TRITON,
    WITHOUT_FP16,
    angles,
    assert_same,
    configured_for,
    draw,
    far,
    gap,
    swapped,
)  # fmt: skip

from bench.launches import count, triton_part
from kernels import LayerWeights, decode_layer, with_ops
from kernels.backend import LAYER_OPS

# Memory that a kernel does not write holds NaN, and not by chance the right value of an earlier run.
pytestmark = pytest.mark.usefixtures("poison_empty")

MODELS = {"135M": (576, 1536, 9, 3, 64), "360M": (960, 2560, 15, 5, 64), "1.7B": (2048, 8192, 32, 32, 64)}


def weights_of(hidden, ffn, heads, key_heads, head_dim, dtype):
    """Weights of a size that keeps every activation near 1."""
    return LayerWeights(
        input_norm=1 + draw(hidden, dtype=dtype, scale=0.2),
        qkv=draw((heads + 2 * key_heads) * head_dim, hidden, dtype=dtype, scale=hidden**-0.5),
        o=draw(hidden, heads * head_dim, dtype=dtype, scale=(heads * head_dim) ** -0.5),
        post_norm=1 + draw(hidden, dtype=dtype, scale=0.2),
        gate_up=draw(2 * ffn, hidden, dtype=dtype, scale=hidden**-0.5),
        down=draw(hidden, ffn, dtype=dtype, scale=ffn**-0.5),
    )


def layer(
    lengths, new=1, capacity=40, hidden=96, ffn=144, heads=3, key_heads=1, head_dim=32, dtype=torch.float32
):
    """The arguments of decode_layer for rows filled to `lengths`, the new tokens included, by name."""
    batch = len(lengths)
    cos, sin = angles(batch, new, head_dim // 2)
    return dict(
        x=draw(batch, new, hidden, dtype=dtype),
        weights=weights_of(hidden, ffn, heads, key_heads, head_dim, dtype),
        key_cache=draw(batch, capacity, key_heads, head_dim, dtype=dtype),
        value_cache=draw(batch, capacity, key_heads, head_dim, dtype=dtype),
        lengths=torch.tensor(lengths, device=DEVICE, dtype=torch.int64),
        cos=cos,
        sin=sin,
    )


CACHES = ("key_cache", "value_cache")


def run(arguments, ops=TRITON, **caches):
    """(out, key cache, value cache), by default with copies of the caches of arguments."""
    caches = caches or {name: arguments[name].clone() for name in CACHES}
    return ops.decode_layer(**{**arguments, **caches}, eps=EPS, ops=ops), *caches.values()


def doubled(arguments):
    doubles = {name: arguments[name].double() for name in ("x", *CACHES)}
    return {**arguments, **doubles, "weights": LayerWeights(*(w.double() for w in arguments["weights"]))}


def agree(arguments):
    """Holds output and caches to the contract -> the kernels' results."""
    ours, base, truth = run(arguments), run(arguments, ORACLE), run(doubled(arguments), ORACLE)
    for name, *three in zip(("out", "keys", "values"), ours, base, truth, strict=True):
        numerics.check("decode_layer", name, *three)
    return ours


WIDTHS = [
    pytest.param(model, *dtype.values, id=f"{model}-{dtype.id}")
    for model in ("135M", "360M")
    for dtype in WITHOUT_FP16
]
# half a minute, in 16 bits a whole one
WIDTHS += [pytest.param("1.7B", torch.float32, id="1.7B-fp32", marks=pytest.mark.slow)]


@pytest.mark.parametrize(("model", "dtype"), WIDTHS)
def test_models_widths(model, dtype):
    hidden, ffn, heads, key_heads, head_dim = MODELS[model]
    agree(layer((140,), 1, 150, hidden, ffn, heads, key_heads, head_dim, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", LENGTHS)
def test_lengths(length, dtype):
    """A short row beside one that fills a cache of three splits."""
    agree(layer((length, 300), capacity=300, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch, new", [(1, 2), (2, 5), (5, 3), (1, 16), (16, 1)])
def test_several_rows_and_tokens(batch, new, dtype):
    agree(layer([new + 7 * row for row in range(batch)], new, 150, dtype=dtype))


@pytest.mark.parametrize("rows", [1, 5])  # whose splits are added in the launch of o, and in one of their own
def test_more_splits_than_are_loaded_at_a_time(rows):
    """A second eight, full and empty."""
    agree(layer((1200, *[640] * (rows - 1)), capacity=1200))


@pytest.mark.parametrize(
    "heads, key_heads, head_dim", [(2, 2, 32), (6, 2, 64), (5, 1, 64), (3, 3, 128), (2, 1, 128)]
)
def test_heads(heads, key_heads, head_dim):
    agree(layer((3, 33), 2, heads=heads, key_heads=key_heads, head_dim=head_dim))


@pytest.mark.parametrize("hidden, ffn", [(1, 1), (33, 17), (64, 63), (97, 257)])
def test_any_width(hidden, ffn):
    agree(layer((30, 12), hidden=hidden, ffn=ffn))


@pytest.mark.parametrize("scale", [0.0, 1e-3, 30.0])
def test_size_of_the_stream(scale):
    """A row of zeros, and rows whose mean square is below and far above eps."""
    arguments = layer((30, 12))
    agree({**arguments, "x": arguments["x"] * scale})


def test_tables_of_all_rows_and_of_each():
    arguments = layer((9, 9), 3)
    cos, sin = angles(3, 16)
    shared = agree({**arguments, "cos": cos, "sin": sin})
    assert_same(run({**arguments, "cos": cos.expand(2, 3, 16), "sin": sin.expand(2, 3, 16)}), shared)


def test_a_stream_that_is_a_view():
    arguments = layer((9, 11), 3)
    wide = torch.full((2, 3, 2 * 96), float("nan"), device=DEVICE)
    wide[..., ::2] = arguments["x"]
    assert_same(run({**arguments, "x": wide[..., ::2]}), run(arguments))


@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
def test_kinds_of_lengths(kind):
    arguments = layer((9, 40))
    padded = torch.stack((arguments["lengths"],) * 2, 1).to(kind)[:, 0]
    assert_same(run({**arguments, "lengths": padded}), run(arguments))


def test_an_empty_batch():
    out, *_ = run(layer(()))
    assert out.shape == (0, 1, 96)


# What it writes


def test_only_the_new_positions_are_written():
    """The caches are a layer of [layers, B, capacity, K, D], cut to the keys in use: the rest stays."""
    arguments = layer((5, 60, 64), 3, 64, heads=6, key_heads=2)
    new = torch.zeros(3, 64, dtype=torch.bool, device=DEVICE)
    for row, length in enumerate((5, 60, 64)):
        new[row, length - 3 : length] = True
    _, *expected = run(arguments, TORCH)
    caches = {name: draw(2, 3, 100, 2, 32) for name in CACHES}
    before = {name: cache.clone() for name, cache in caches.items()}
    run(arguments, **{name: cache[1, :, :64] for name, cache in caches.items()})
    for name, wanted in zip(caches, expected, strict=True):
        written = caches[name][1, :, :64]
        torch.testing.assert_close(written[new], wanted[new], rtol=1e-5, atol=1e-5)
        written[new] = before[name][1, :, :64][new]
        assert torch.equal(caches[name], before[name])


def test_inputs_are_not_written():
    arguments = layer((9, 40))
    tensors = [*(arguments[name] for name in ("x", "lengths", "cos", "sin")), *arguments["weights"]]
    before = [tensor.clone() for tensor in tensors]
    run(arguments)
    assert_same(tensors, before)


def test_positions_outside_of_the_cache_are_not_written():
    """A row with more keys than the cache, and one with fewer keys than new tokens: the memory is others'."""
    arguments = layer((42, 1, 30), 2, 40)
    around = {name: torch.full((5, 60, 1, 32), 7.0, device=DEVICE) for name in CACHES}
    run(arguments, **{name: cache[1:4, 10:50] for name, cache in around.items()})
    for cache in around.values():
        changed = (cache != 7.0).any(-1).any(-1)
        assert changed.nonzero().tolist() == [[2, 10], [3, 38], [3, 39]]


def test_what_lies_beyond_the_length_is_not_read():
    arguments = layer((130, 5), capacity=270)
    out, *_ = run(arguments)
    for name in CACHES:
        arguments[name][0, 130:], arguments[name][1, 5:] = float("nan"), float("inf")
    assert_same(run(arguments)[:1], [out])


LAYOUTS = {
    "heads first": lambda x: swapped(x, 1, 2),
    "positions first": swapped,
    "every second position": lambda x: gap(x, dim=1),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("name", CACHES)
def test_layouts_of_a_cache(name, layout):
    arguments = layer((9, 40), 2, heads=6, key_heads=2)
    laid = {cache: (layout if cache == name else torch.clone)(arguments[cache]) for cache in CACHES}
    assert_same(run(arguments, **laid), run(arguments))


@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize("name", CACHES)
def test_caches_far_apart(name, dim):
    """Offsets past 2^31 elements; see test_kernel_offsets.py."""
    arguments = layer((3, 2, 3), 1, 3, heads=3, key_heads=3, dtype=torch.float16)
    caches = {cache: arguments[cache].clone() for cache in CACHES}
    caches[name] = far(caches[name], dim)
    assert_same(run(arguments, **caches), run(arguments))


# Batch invariance


def rows_of(arguments, rows, capacity):
    """The same layer with some of its rows, and caches of another capacity."""
    chosen = {name: arguments[name][rows] for name in ("x", "lengths", "cos", "sin")}
    return {**arguments, **chosen, **{name: arguments[name][rows, :capacity] for name in CACHES}}


@pytest.mark.parametrize("dtype", WITHOUT_FP16)
def test_a_row_alone_is_the_row_in_a_batch(dtype):
    """Bitwise, whatever its neighbours, its place and the capacity of the cache; generation relies on it."""
    lengths = (129, 300, 64, 420, 1, 2, 3, 128, 127, 256, 257, 33, 65, 5, 31, 96)
    arguments = layer(lengths, capacity=420, dtype=dtype)
    batch = run(arguments)
    for row in (0, 2, 3, 15):
        for capacity in {lengths[row], min(lengths[row] + 1, 420), 128 * ((lengths[row] + 127) // 128), 420}:
            alone = run(rows_of(arguments, [row], capacity))
            assert_same(alone, [batch[0][[row]], *(cache[[row], :capacity] for cache in batch[1:])])
    some = run(rows_of(arguments, [9, 3, 0], 420))
    assert_same([some[0]], [batch[0][[9, 3, 0]]])


def test_a_later_token_does_not_change_an_earlier_one():
    arguments = layer((40, 20), 4)
    out, *_ = run(arguments)
    arguments["x"][:, 3] += 1
    changed, *_ = run(arguments)
    assert_same([changed[:, :3]], [out[:, :3]])
    assert (changed[:, 3] != out[:, 3]).any(-1).all()


def test_tokens_at_once_are_tokens_one_by_one():
    """Four new tokens at once or in four steps; not bitwise, because the attention's tile differs."""
    arguments = layer((140, 20), 4, 150)
    together = run(arguments)
    keys, values = arguments["key_cache"].clone(), arguments["value_cache"].clone()
    steps = []
    for step in range(4):
        one = {name: arguments[name][:, step : step + 1] for name in ("x", "cos", "sin")}
        one |= dict(key_cache=keys, value_cache=values, lengths=arguments["lengths"] - 3 + step)
        steps.append(TRITON.decode_layer(**{**arguments, **one}, eps=EPS, ops=TRITON))
    torch.testing.assert_close((torch.cat(steps, 1), keys, values), together, rtol=1e-5, atol=1e-5)


def test_the_gpus_configuration_agrees():
    """Two columns a program instead of the interpreter's sixteen: the tails of both."""
    arguments = layer((30, 12), hidden=97, ffn=51)
    ours = agree(arguments)
    with configured_for("sm_90"):
        torch.testing.assert_close(agree(arguments), ours, rtol=1e-5, atol=1e-5)


def test_only_the_splits_grow_with_the_cache(monkeypatch):
    allocate, shapes = torch.empty, []
    monkeypatch.setattr(
        torch, "empty", lambda *size, **options: shapes.append(tuple(*size)) or allocate(*size, **options)
    )
    small, large = layer((100,), capacity=128), layer((100,), capacity=1024)
    run(small)
    of_small = shapes.copy()
    shapes.clear()
    run(large)
    grown = [(one, other) for one, other in zip(of_small, shapes, strict=True) if one != other]
    assert grown == [((3, 1, 32), (3, 8, 32)), ((3, 1), (3, 8)), ((3, 1), (3, 8))]


# Which of the two runs


def counting(op):
    """(TORCH with an operation that counts its calls, the list that grows with each call)."""
    calls = []

    def counted(*args, **kwargs):
        calls.append(op)
        return getattr(TORCH, op)(*args, **kwargs)

    return dataclasses.replace(TORCH, **{op: counted}), calls


@pytest.mark.parametrize("op", sorted(LAYER_OPS))
def test_a_replaced_operation_has_its_effect(op):
    arguments = layer((9, 40))
    other, calls = counting(op)
    out, *_ = run(arguments, with_ops(TRITON, **{op: other}))
    assert calls == [op]
    torch.testing.assert_close(out, run(arguments, TORCH)[0], rtol=1e-4, atol=1e-4)


def test_an_operation_that_a_layer_does_not_contain_changes_nothing(monkeypatch):
    monkeypatch.delattr("kernels.reference.decode_layer")  # the composition must not be called
    arguments = layer((9, 40))
    assert_same(run(arguments, with_ops(TRITON, attention=TORCH)), run(arguments))


def test_the_layer_itself_replaced():
    arguments = layer((9, 40))
    other, calls = counting("decode_layer")
    composed = run(arguments, with_ops(TRITON, decode_layer=other))
    assert calls == ["decode_layer"]
    torch.testing.assert_close(composed, run(arguments), rtol=1e-4, atol=1e-4)
    assert_same(run(arguments, with_ops(TORCH, decode_layer=TRITON)), run(arguments))


@pytest.mark.parametrize("dtype", WITHOUT_FP16)
@pytest.mark.parametrize("batch, new", [(17, 1), (3, 6), (2, 16)])
def test_more_rows_are_composed(batch, new, dtype, monkeypatch):
    """By the kernels of the single operations, within the contract too."""
    monkeypatch.setattr(decode_layer, "decode_layer", None)  # the fused layer must not be called
    agree(layer([new + row for row in range(batch)], new, dtype=dtype))


@pytest.mark.skipif(DEVICE.type != "cpu", reason="a GPU's library may take two kernels for a product")
def test_launches_of_a_composed_layer():
    """Four products and seven kernels between them: the positions in the caches take none."""
    arguments = layer([3] * 32, capacity=140)
    found = count(lambda: run(arguments, **{name: arguments[name] for name in CACHES}), DEVICE)
    del found["fill_"]  # of poison_empty
    assert (sum(found.values()), triton_part(found), found["_rope_cache_kernel"]) == (11, 6, 1), found


# Bad input


def changed(**changes):
    """Arguments, some of them (or of the weights) replaced by a function of themselves."""
    arguments = layer((9, 40), 2)
    for name, change in changes.items():
        if name in LayerWeights._fields:
            weight = change(getattr(arguments["weights"], name))
            arguments["weights"] = arguments["weights"]._replace(**{name: weight})
        else:
            arguments[name] = change(arguments[name])
    return arguments


SHAPE = "key cache of shape [2, S, K, D] with S >= 2 and K > 0"
DOUBLE = "float32, float16 or bfloat16 (the torch backend also takes float64), got torch.float64"
half = torch.Tensor.half
BAD = [
    (dict(x=lambda x: x[0]), "x of shape [B, T, hidden], got [2, 96]"),
    (dict(key_cache=lambda x: x[:1]), f"{SHAPE}, got [1, 40, 1, 32]"),
    (dict(key_cache=lambda x: x[:, :1]), f"{SHAPE}, got [2, 1, 1, 32]"),
    (
        dict(value_cache=lambda x: x[:, 1:]),
        "value cache of shape [2, 40, 1, 32] as the key cache, got [2, 39, 1, 32]",
    ),
    (dict(lengths=lambda x: x[:1]), "lengths of shape [2], got [1]"),
    (dict(lengths=lambda x: x.float()), "lengths of an integer dtype, got torch.float32"),
    (dict(lengths=lambda x: x.to("meta")), f"lengths on {PLACE} as x, got meta"),
    (dict(cos=lambda x: x[:, :1]), "cos of shape [2, 16] or [2, 2, 16], got [2, 1, 16]"),
    (dict(sin=lambda x: x[0]), "sin of shape [2, 2, 16] as cos, got [2, 16]"),
    (dict(sin=half), "cos and sin of one floating-point dtype, got torch.float16"),
    (dict(x=half), "weights.input_norm of dtype torch.float16 as x, got torch.float32"),
    (dict(key_cache=half), "key cache of dtype torch.float32 as x, got torch.float16"),
    (dict(x=lambda x: x.repeat(1, 1, 2)), "weights.input_norm of shape [192], got [96]"),
    (dict(qkv=lambda w: w[:-32]), "weights.qkv of shape [160, 96], got [128, 96]"),
    (dict(o=lambda w: w[:, :-1]), "weights.qkv of shape [128, 96], got [160, 96]"),
    (dict(o=lambda w: w[:, :0]), "query heads (columns of o / 32) that are a multiple of 1, got 0"),
    (dict(post_norm=lambda w: w[1:]), "weights.post_norm of shape [96], got [95]"),
    (dict(gate_up=lambda w: w[:144]), "weights.gate_up of shape [288, 96], got [144, 96]"),
    (dict(down=half), "weights.down of dtype torch.float32 as x, got torch.float16"),
    (dict(down=lambda w: w.t().contiguous().t()), "contiguous weights (down.contiguous()), got (1, 96)"),
    (dict(key_cache=lambda x: gap(x, dim=3)), "key cache with a last stride of 1, got 2"),
    (lambda: layer((9, 40), head_dim=16), "a head dim in [32, 64, 128], got 16"),
    (lambda: doubled(layer((9, 40))), DOUBLE),
    (lambda: layer([9] * 17), "B * T <= 16 rows and widths of at most 16384, got [17, 1, 96]"),
]


@pytest.mark.parametrize("bad, message", BAD, ids=[message for _, message in BAD])
def test_bad_input_is_refused(bad, message):
    arguments = changed(**bad) if isinstance(bad, dict) else bad()
    with pytest.raises(ValueError, match=re.escape(f"decode_layer: expected {message}")):
        decode_layer.decode_layer(**arguments, eps=EPS)


# In graphs


def test_torch_compile_sees_one_operation_that_writes_the_caches():
    arguments = layer((9, 40), 2)
    names = "key_cache", "value_cache", "lengths", "cos", "sin"
    flat = [arguments["x"], *arguments["weights"], *(arguments[name] for name in names)]
    torch.library.opcheck(torch.ops.smollm2.decode_layer.default, (*flat, EPS, False))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="there is no CUDA graph to capture without a GPU")
def test_a_captured_layer_replays(monkeypatch):
    """With other lengths and another stream in the same memory, as a generation does."""
    arguments = layer((9, 40), capacity=300, dtype=torch.bfloat16)
    static = {**arguments, **{name: arguments[name].clone() for name in CACHES}}
    TRITON.decode_layer(**static, eps=EPS, ops=TRITON)  # compiled before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = TRITON.decode_layer(**static, eps=EPS, ops=TRITON)
    other = layer((200, 300), capacity=300, dtype=torch.bfloat16)
    other["weights"] = arguments["weights"]
    for name in ("x", "key_cache", "value_cache", "lengths", "cos", "sin"):
        static[name].copy_(other[name])
    expected = run(other)
    graph.replay()
    assert_same([out, *(static[name] for name in CACHES)], expected)
