"""rope_cache: the numerics contract for queries and caches, what it writes and what not, and that it is
rope_qkv and a write, in one launch.
"""

import dataclasses
import re

import kernel_cases
import pytest
import torch
from kernel_cases import (
    DEVICE,
    DTYPES,
    HEAD_LAYOUTS,
    LENGTHS,
    ORACLE,
    PLACE,
    TORCH,
    TRITON,
    angles,
    assert_same,
    draw,
    far,
    gap,
    inner,
    over,
    swapped,
)  # fmt: skip

from kernels import with_ops

# Memory that a kernel does not write holds NaN, and not by chance the right value of an earlier run.
pytestmark = pytest.mark.usefixtures("poison_empty")

CACHES = ("key_cache", "value_cache")


def step(lengths, new=1, capacity=40, heads=3, key_heads=1, head_dim=32, dtype=torch.float32):
    """The arguments of rope_cache for rows filled to `lengths`, the new tokens included, by name."""
    batch = len(lengths)
    cos, sin = angles(batch, new, head_dim // 2)
    return dict(
        qkv=draw(batch, new, heads + 2 * key_heads, head_dim, dtype=dtype),
        cos=cos,
        sin=sin,
        key_cache=draw(batch, capacity, key_heads, head_dim, dtype=dtype),
        value_cache=draw(batch, capacity, key_heads, head_dim, dtype=dtype),
        lengths=torch.tensor(lengths, device=DEVICE, dtype=torch.int64),
    )


def run(arguments, ops=TRITON, **caches):
    """(q, key cache, value cache), by default with copies of the caches of arguments."""
    caches = caches or {name: arguments[name].clone() for name in CACHES}
    return ops.rope_cache(**{**arguments, **caches}), *caches.values()


def agree(arguments):
    """Holds queries and caches of both backends to the contract -> the kernel's."""
    *tensors, lengths = arguments.values()
    return kernel_cases.agree("rope_cache", tensors, lengths)[0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads, key_heads", [(9, 3), (15, 5), (32, 32)])
def test_models_heads(heads, key_heads, dtype):
    """11 rows do not fill the tile of 8 tokens twice."""
    agree(step(range(1, 12), 1, 12, heads, key_heads, 64, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("new", LENGTHS)
def test_lengths(new, dtype):
    agree(step((new + 3,), new, new + 4, dtype=dtype))


@pytest.mark.parametrize("head_dim", [2, 16, 32, 128])
def test_head_dims(head_dim):
    agree(step((3, 33), 2, heads=4, key_heads=2, head_dim=head_dim))


@pytest.mark.parametrize("dtype", DTYPES)
def test_is_rope_qkv_and_a_write(dtype):
    """Bitwise: a token has the same queries, keys and values whichever of the two made them."""
    arguments = step((5, 40, 17), 3, heads=6, key_heads=2, dtype=dtype)
    tables = arguments["cos"], arguments["sin"]
    q, k, v = TRITON.rope_qkv(arguments["qkv"], *tables, 2)
    ours, *caches = run(arguments)
    assert_same([ours], [q])
    for cache, new in zip(caches, (k, v), strict=True):
        for row, length in enumerate((5, 40, 17)):
            assert_same([cache[row, length - 3 : length]], [new[row]])


def test_tables_of_all_rows_and_of_each():
    arguments = step((9, 9), 3)
    cos, sin = angles(3, 16)
    shared = agree({**arguments, "cos": cos, "sin": sin})
    assert_same(run({**arguments, "cos": cos.expand(2, 3, 16), "sin": sin.expand(2, 3, 16)}), shared)
    assert_same(run({**arguments, "cos": gap(cos, dim=1), "sin": inner(sin)}), shared)


@over(HEAD_LAYOUTS)
def test_layouts_of_the_projection(layout):
    arguments = step((9, 40), 2, heads=4, key_heads=2)
    agree({**arguments, "qkv": layout(arguments["qkv"])})


LAYOUTS = {
    "heads first": lambda x: swapped(x, 1, 2),
    "positions first": swapped,
    "every second position": lambda x: gap(x, dim=1),
    "columns of a wider buffer": inner,
}


@over(LAYOUTS)
@pytest.mark.parametrize("name", CACHES)
def test_layouts_of_a_cache(name, layout):
    arguments = step((9, 40), 2, heads=4, key_heads=2)
    laid = {cache: (layout if cache == name else torch.clone)(arguments[cache]) for cache in CACHES}
    assert_same(run(arguments, **laid), run(arguments))


@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
@pytest.mark.parametrize("ops", [TRITON, TORCH, ORACLE], ids=lambda ops: ops.name)
def test_kinds_of_lengths(ops, kind):
    arguments = step((9, 40))
    padded = torch.stack((arguments["lengths"],) * 2, 1).to(kind)[:, 0]
    assert_same(run({**arguments, "lengths": padded}, ops), run(arguments, ops))


def test_an_empty_batch():
    for ops in (TRITON, TORCH, ORACLE):
        q, *_ = run(step(()), ops)
        assert q.shape == (0, 1, 3, 32)


# What it writes


@pytest.mark.parametrize("ops", [TRITON, TORCH, ORACLE], ids=lambda ops: ops.name)
def test_only_the_new_positions_are_written(ops):
    """The caches are a layer of [layers, B, capacity, K, D], cut to the keys in use: the rest stays."""
    arguments = step((5, 60, 64), 3, 64, heads=6, key_heads=2)
    caches = {name: draw(2, 3, 100, 2, 32) for name in CACHES}
    before = {name: cache.clone() for name, cache in caches.items()}
    run(arguments, ops, **{name: cache[1, :, :64] for name, cache in caches.items()})
    for name, cache in caches.items():
        changed = (cache != before[name]).any(-1)
        expected = [[1, row, at - 3 + t] for row, at in enumerate((5, 60, 64)) for t in range(3)]
        assert changed.all(-1).nonzero().tolist() == changed.any(-1).nonzero().tolist() == expected


@pytest.mark.parametrize("ops", [TRITON, ORACLE], ids=lambda ops: ops.name)
def test_positions_outside_of_the_cache_are_not_written(ops):
    """A row with more keys than the cache, and one with fewer keys than new tokens: the memory is others'."""
    arguments = step((42, 1, 30, 41), 2, 40)
    around = {name: torch.full((6, 60, 1, 32), 7.0, device=DEVICE) for name in CACHES}
    run(arguments, ops, **{name: cache[1:5, 10:50] for name, cache in around.items()})
    for cache in around.values():
        changed = (cache != 7.0).any(-1).any(-1)
        assert changed.nonzero().tolist() == [[2, 10], [3, 38], [3, 39], [4, 49]]
    torch.testing.assert_close(run(arguments), run(arguments, ORACLE))


@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize("name", ["qkv", *CACHES])
def test_tensors_far_apart(name, dim):
    """Offsets past 2^31 elements; see test_kernel_offsets.py."""
    heads, new = (1, 3) if name == "qkv" else (3, 1)
    arguments = step((3, 3, 3), new, 3, heads, heads, dtype=torch.float16)
    caches = {cache: arguments[cache].clone() for cache in CACHES}
    expected = run(arguments)
    if name == "qkv":
        arguments["qkv"] = far(arguments["qkv"], dim)
    else:
        caches[name] = far(caches[name], dim)
    assert_same(run(arguments, **caches), expected)


# Its row is its own


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_alone_is_the_row_in_a_batch(dtype):
    """Bitwise, whatever its neighbours, its place and the capacity of the cache; generation relies on it."""
    lengths = [2 + 7 * row for row in range(19)]
    arguments = step(lengths, 2, 140, dtype=dtype)
    batch = run(arguments)
    for rows in ([0], [9], [18], [17, 3, 11]):
        capacity = lengths[max(rows)]
        some = {name: tensor[rows] for name, tensor in arguments.items()}
        ours = run({**some, **{name: some[name][:, :capacity] for name in CACHES}})
        assert_same(ours, [batch[0][rows], *(cache[rows, :capacity] for cache in batch[1:])])


# The switch


@pytest.mark.parametrize("backend", [TRITON, TORCH], ids=lambda ops: ops.name)
def test_a_replaced_rope_qkv_is_composed(backend):
    def turned(qkv, cos, sin, key_heads):
        return TORCH.rope_qkv(qkv.flip(-1), cos, sin, key_heads)

    other = dataclasses.replace(TORCH, name="other", rope_qkv=turned)
    arguments = step((9, 40))
    expected = run({**arguments, "qkv": arguments["qkv"].flip(-1)}, TORCH)
    assert_same(run(arguments, with_ops(backend, rope_qkv=other)), expected)
    assert with_ops(backend, rope_qkv=other, rope_cache=TORCH).rope_cache is TORCH.rope_cache
    assert with_ops(with_ops(backend, rope_cache=TORCH), rope_qkv=other).rope_cache is TORCH.rope_cache


# Bad input


def changed(**changes):
    arguments = step((9, 40), 2)
    return {name: changes.get(name, lambda x: x)(tensor) for name, tensor in arguments.items()}


half, double = torch.Tensor.half, torch.Tensor.double
SHAPE = "key cache of shape [2, S, K, D] with S >= 2 and K > 0"
# By rope_qkv and rope too, of which it is made.
SHARED = [
    (dict(qkv=lambda x: x.flatten(2)), "rope_cache: expected qkv of shape [B, T, H + 2K, D], got"),
    (dict(key_cache=lambda x: x[:1]), f"rope_cache: expected {SHAPE}, got [1, 40, 1, 32]"),
    (dict(key_cache=lambda x: x[:, :1]), f"rope_cache: expected {SHAPE}, got [2, 1, 1, 32]"),
    (dict(value_cache=lambda x: x[:, 1:]),
     "rope_cache: expected value cache of shape [2, 40, 1, 32] as the key cache, got [2, 39, 1, 32]"),
    (dict.fromkeys(CACHES, lambda x: x[..., :16]), "rope_cache: expected caches of head dim 32, got 16"),
    (dict(lengths=lambda x: x[:1]), "rope_cache: expected lengths of shape [2], got [1]"),
    (dict(lengths=lambda x: x.float()), "rope_cache: expected lengths of an integer dtype, got torch.float"),
    (dict(lengths=lambda x: x.to("meta")), f"rope_cache: expected lengths on {PLACE} as qkv, got meta"),
    (dict(value_cache=half), "rope_cache: expected value cache of dtype torch.float32 as qkv, got"),
    (dict.fromkeys(CACHES, lambda x: x.expand(2, 40, 3, 32)),
     "rope_qkv: expected key_heads so that H + 2K = 5 with H > 0, got 3"),
    (dict(cos=lambda x: x[:, :1]), "rope: expected cos of shape [2, 16] or [2, 2, 16], got [2, 1, 16]"),
]  # fmt: skip
KERNEL_ONLY = [
    (dict(key_cache=lambda x: gap(x, dim=3)), "key cache with a last stride of 1, got 2"),
    (dict.fromkeys(("qkv", *CACHES), double),
     "float32, float16 or bfloat16 (the torch backend also takes float64), got torch.float64"),
    ({**dict.fromkeys(("qkv", *CACHES), lambda x: x[..., :24]),
      **dict.fromkeys(("cos", "sin"), lambda x: x[..., :12])},
     "a head dim that is a power of two, got 24"),
]  # fmt: skip


@pytest.mark.parametrize("changes, message", SHARED, ids=[message for _, message in SHARED])
@pytest.mark.parametrize("ops", [TRITON, TORCH, ORACLE], ids=lambda ops: ops.name)
def test_bad_input_is_refused_in_the_same_words(ops, changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        ops.rope_cache(**changed(**changes))


@pytest.mark.parametrize("changes, message", KERNEL_ONLY, ids=[message for _, message in KERNEL_ONLY])
def test_the_kernel_refuses_what_it_does_not_do(changes, message):
    with pytest.raises(ValueError, match=re.escape(f"rope_cache: expected {message}")):
        TRITON.rope_cache(**changed(**changes))


@pytest.mark.skipif(DEVICE.type != "cpu", reason="a GPU would end the context by an assertion")
def test_torch_refuses_a_position_past_the_end():
    with pytest.raises(IndexError, match="out of bounds"):
        run(step((9, 41)), TORCH)
