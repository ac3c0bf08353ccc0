"""decode_attention against the numerics contract, and its promise: a row's bits depend on nothing but the
row.
"""

import numerics
import pytest
import torch
from kernel_cases import DEVICE, DTYPES, HEAD_LAYOUTS, LENGTHS, TRITON, agree, assert_same, draw, gap, over

from kernels import reference
from kernels.eager.attention import library_attention

# Memory that a kernel does not write holds NaN, and not by chance the right value of an earlier run.
pytestmark = pytest.mark.usefixtures("poison_empty")


def inputs(batch, queries, capacity, heads=3, key_heads=1, head_dim=32, dtype=torch.float32):
    return (
        draw(batch, queries, heads, head_dim, dtype=dtype, scale=1.5),
        draw(batch, capacity, key_heads, head_dim, dtype=dtype),
        draw(batch, capacity, key_heads, head_dim, dtype=dtype),
    )


def filled(*lengths):
    return torch.tensor(lengths, device=DEVICE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads, key_heads", [(9, 3), (15, 5), (32, 32)])
def test_models_heads(heads, key_heads, dtype):
    agree("decode_attention", inputs(2, 1, 140, heads, key_heads, 64, dtype), filled(140, 77))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", LENGTHS)
def test_lengths(length, dtype):
    """The row full, and a row of the same length in a larger cache of several splits."""
    agree("decode_attention", inputs(1, 1, length, head_dim=64, dtype=dtype), filled(length))
    agree("decode_attention", inputs(2, 1, 300, head_dim=64, dtype=dtype), filled(length, 300))


def test_scores_far_below_zero():
    """Their weights against a score of zero are nothing: a split that is not there must not count as one."""
    q, keys, values = inputs(2, 1, 150)
    agree("decode_attention", (q.abs() + 8, -keys.abs() - 8, values), filled(150, 3))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("queries", [2, 3, 7, 16])
def test_several_new_queries(queries, dtype):
    agree("decode_attention", inputs(3, queries, 150, 6, 2, dtype=dtype), filled(queries, 64 + queries, 150))


@pytest.mark.parametrize("head_dim", [32, 128])
def test_head_dims(head_dim):
    agree("decode_attention", inputs(2, 2, 131, head_dim=head_dim), filled(131, 128))


@pytest.mark.parametrize("capacity", [40, 140])
def test_rows_that_see_nothing(capacity):
    """Fewer keys than new queries: the first of them see none and give zeros, in one split and in two."""
    (out,), _ = agree("decode_attention", inputs(3, 4, capacity), filled(0, 1, 3))
    assert (out[0] == 0).all() and (out[1, :3] == 0).all() and (out[2, :1] == 0).all()


def test_lengths_beyond_the_cache():
    """What would lie there is not seen, and the queries see as much of the cache as their positions say."""
    agree("decode_attention", inputs(3, 4, 40), filled(41, 43, 50))


# The caches are not copied: their columns must lie side by side.
LAYOUTS = {
    name: layout
    for name, layout in HEAD_LAYOUTS.items()
    if name not in ("every second column", "last first", "one value")
}


@over(LAYOUTS)
def test_layouts(layout):
    q, keys, values = inputs(2, 2, 133, 6, 2)
    agree("decode_attention", (layout(q), layout(keys), values), filled(133, 40))
    agree("decode_attention", (q, keys, layout(values)), gap(filled(133, 40)))


def test_a_view_of_the_whole_cache():
    """One layer of [layers, B, capacity, K, D], cut to the keys in use: what generation passes."""
    keys, values = draw(2, 3, 200, 1, 32), draw(2, 3, 200, 1, 32)
    agree("decode_attention", (draw(3, 1, 3, 32), keys[1, :, :140], values[1, :, :140]), filled(140, 7, 129))


@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
def test_kinds_of_lengths(kind):
    tensors = inputs(2, 1, 40)
    assert_same(
        [TRITON.decode_attention(*tensors, filled(40, 3).to(kind))],
        [TRITON.decode_attention(*tensors, filled(40, 3))],
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_alone_is_the_row_in_a_batch(dtype):
    """Bitwise, whatever its neighbours, its place and the capacity of the cache; generation relies on it."""
    q, keys, values = inputs(4, 2, 420, dtype=dtype)
    lengths = (129, 300, 64, 420)
    batch = TRITON.decode_attention(q, keys, values, filled(*lengths))
    for row, length in enumerate(lengths):
        for capacity in {length, min(length + 1, 420), 128 * ((length + 127) // 128), 420}:
            alone = [x[row : row + 1, :capacity] for x in (keys, values)]
            assert_same(
                [TRITON.decode_attention(q[row : row + 1], *alone, filled(length))], [batch[row : row + 1]]
            )


def test_what_lies_beyond_the_length_is_not_read():
    q, keys, values = inputs(2, 1, 270)
    out = TRITON.decode_attention(q, keys, values, filled(130, 5))
    for cache in (keys, values):
        cache[0, 130:], cache[1, 5:] = float("nan"), float("inf")
    assert_same([TRITON.decode_attention(q, keys, values, filled(130, 5))], [out])


def test_a_later_key_is_not_seen_by_an_earlier_query():
    q, keys, values = inputs(1, 3, 60)
    out = TRITON.decode_attention(q, keys, values, filled(60))
    keys[:, 58:] += 10
    values[:, 58:] += 10
    changed = TRITON.decode_attention(q, keys, values, filled(60))
    assert_same([changed[:, :1]], [out[:, :1]])
    assert (changed[:, 1:] != out[:, 1:]).any(-1).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_is_the_end_of_attention(dtype):
    """The last queries of a prefill, asked again one by one: within the contract of attention."""
    q, k, v = inputs(1, 70, 70, 6, 2, dtype=dtype)
    base = library_attention(q, k, v)
    truth = reference.attention(q.double(), k.double(), v.double())
    for queries, length in ((1, 70), (5, 70), (16, 33)):
        new = slice(length - queries, length)
        ours = TRITON.decode_attention(q[:, new], k, v, filled(length))
        numerics.check("decode_attention", "end of attention", ours, base[:, new], truth[:, new])


def test_empty_batch():
    (out,), _ = agree("decode_attention", inputs(0, 1, 40), filled().long())
    assert out.shape == (0, 1, 3, 32)


@pytest.mark.gpu
@pytest.mark.skipif(
    DEVICE.type != "cuda", reason="a cache of 8,192 keys for 256 rows takes minutes in the interpreter"
)
@pytest.mark.parametrize("batch, capacity", [(1, 8192), (256, 1024)])
def test_large_caches(batch, capacity):
    lengths = torch.randint(1, capacity + 1, (batch,)).to(DEVICE)
    agree("decode_attention", inputs(batch, 1, capacity, 9, 3, 64, torch.bfloat16), lengths)
