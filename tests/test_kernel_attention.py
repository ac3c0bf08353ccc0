"""attention: the numerics contract, causality, isolated documents, grouped heads."""

import numerics
import pytest
import torch
from kernel_cases import (
    DEVICE,
    DTYPES,
    HEAD_LAYOUTS,
    LENGTHS,
    TRITON,
    Call,
    agree,
    assert_same,
    dense,
    draw,
    far,
    over,
    swapped,
)

from kernels import reference
from kernels.eager.attention import library_attention

pytestmark = [
    # Memory that a kernel does not write holds NaN, and not by chance the right value of an earlier run.
    pytest.mark.usefixtures("poison_empty"),
    # In the interpreter, what overflows is masked right after.
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
]


def qkv(batch, queries, keys, heads, key_heads, head_dim=32, dtype=torch.float32):
    """q, k, v with scores that spread: a softmax over nearly equal scores hides a wrong mask."""
    return (
        draw(batch, queries, heads, head_dim, dtype=dtype, scale=1.5),
        draw(batch, keys, key_heads, head_dim, dtype=dtype),
        draw(batch, keys, key_heads, head_dim, dtype=dtype),
    )


def starts(*lengths):
    """doc_start of one row packed with documents of these lengths."""
    first = [torch.full((n,), sum(lengths[:i])) for i, n in enumerate(lengths)]
    return torch.cat(first).to(torch.int32)[None].to(DEVICE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads, key_heads, length", [(9, 3, 65), (15, 5, 33), (32, 32, 9)])
def test_models_heads(heads, key_heads, length, dtype):
    agree("attention", qkv(1, length, length, heads, key_heads, 64, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", LENGTHS)
def test_lengths(length, dtype):
    agree("attention", qkv(1, length, length, 3, 1, 64, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [32, 128])
def test_head_dims(head_dim, dtype):
    agree("attention", qkv(1, 129, 129, 2, 1, head_dim, dtype))


@pytest.mark.parametrize("heads, key_heads", [(1, 1), (3, 3), (5, 1), (6, 2)])
def test_groups(heads, key_heads):
    agree("attention", qkv(2, 35, 35, heads, key_heads))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("queries, keys", [(1, 2), (1, 200), (7, 64), (33, 65), (64, 193), (65, 129)])
def test_more_keys_than_queries(queries, keys, dtype):
    """The last query sees the last key: chunked prefill."""
    agree("attention", qkv(1, queries, keys, 3, 1, dtype=dtype))


DOCUMENTS = {
    "one": starts(140),
    "short ones": starts(1, 2, 3, 30, 1, 27, 64, 12),
    "on tile boundaries": starts(32, 32, 64, 12),
    "across tile boundaries": starts(31, 34, 63, 12),
    "alone in the middle": starts(70, 1, 69),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("doc_start", DOCUMENTS.values(), ids=DOCUMENTS.keys())
def test_documents(doc_start, dtype):
    agree("attention", qkv(1, 140, 140, 3, 1, dtype=dtype), doc_start)


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_first_key(dtype):
    """Neither sorted nor within the row: negative sees all, one past its own position sees nothing and gives
    zeros.
    """
    doc_start = torch.randint(-3, 150, (2, 99), dtype=torch.int32).to(DEVICE)
    doc_start[0, :40] = 500  # a whole tile of queries that see nothing
    doc_start[1, :] = torch.arange(99).flip(0)
    (out,), _ = agree("attention", qkv(2, 99, 131, 3, 1, dtype=dtype), doc_start)
    blind = doc_start > torch.arange(99, device=DEVICE) + 32
    assert blind.any() and not blind.all()
    assert (out[blind] == 0).all()


def test_sliding_window_is_a_first_key():
    time = torch.arange(150, dtype=torch.int32, device=DEVICE)
    agree("attention", qkv(1, 150, 150, 3, 1), (time - 40 + 1).clamp(min=0)[None])


def test_fully_masked_document():
    """Nothing is visible anywhere: zeros, and gradients of exactly zero."""
    doc_start = torch.full((1, 37), 37, dtype=torch.int32, device=DEVICE)
    (out,), gradients = agree("attention", qkv(1, 37, 37, 3, 1), doc_start)
    assert_same([out, *gradients], [torch.zeros_like(x) for x in (out, *gradients)])


@pytest.mark.parametrize("kind", [torch.int64, torch.int32, torch.int16])
def test_kinds_and_layouts_of_doc_start(kind):
    doc_start = DOCUMENTS["short ones"].to(kind).expand(2, 140)
    tensors = qkv(2, 140, 140, 1, 1)
    expected = TRITON.attention(*tensors, DOCUMENTS["short ones"].repeat(2, 1))
    for layout in (lambda x: x, dense, swapped):
        assert_same([TRITON.attention(*tensors, layout(doc_start))], [expected])


def test_a_start_beyond_32_bits_sees_nothing():
    doc_start = DOCUMENTS["short ones"].to(torch.int64).repeat(2, 1)
    doc_start[0, 3:90] = torch.iinfo(torch.int64).max
    doc_start[1, 5], doc_start[1, 60:] = 1 << 33, -(1 << 40)
    (out,), _ = agree("attention", qkv(2, 140, 140, 3, 1), doc_start)
    assert not out[0, 3:90].any() and not out[1, 5].any() and out[1, 60:].any(-1).all()


def test_a_grid_has_65535_rows_times_heads():
    q, k = torch.zeros(21846, 1, 3, 32), torch.zeros(21846, 1, 1, 32)
    with pytest.raises(ValueError, match="at most 65,535 rows times heads; split the batch, got 65538"):
        TRITON.attention(q, k, k)
    lengths, caches = torch.ones(65536, dtype=torch.int32), torch.zeros(65536, 1, 1, 32)
    with pytest.raises(ValueError, match="decode_attention: expected at most 65,535 rows .*, got 65536"):
        TRITON.decode_attention(caches, caches, caches, lengths)


@pytest.mark.parametrize("scale", [0.02, 0.1, 1.0, -0.1, 0.0])
def test_scale(scale):
    """At 1, with logits of 35, gradients hold only if both passes round the scores alike: see the header of
    kernels/attention.py.
    """
    agree("attention", qkv(1, 40, 40, 3, 1), scale=scale)


def test_scale_that_is_not_positive():
    """The kernel takes the maximum before it scales."""
    (q, k, v), upstream = qkv(1, 40, 40, 3, 1), [draw(1, 40, 3, 32)]

    def run(q, scale):
        (out,), gradients = Call("attention", (q, k, v), (), {"scale": scale}).run(TRITON, upstream)
        return out, *gradients

    out, dq, dk, dv = run(-q, 0.1)
    assert_same(run(q, -0.1), [out, -dq, dk, dv])
    out, dq, dk, _ = run(q, 0.0)
    mean = v.cumsum(1) / torch.arange(1, 41, device=DEVICE)[:, None, None]
    torch.testing.assert_close(out, mean.expand_as(out), rtol=1e-5, atol=1e-5)
    assert (dq == 0).all() and (dk == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_scores(dtype):
    """Scores of several hundred: the maximum is subtracted before the exponential."""
    # Eight rows: of one, a single element decides, and whether the errors of its scores cancel in one
    # implementation or the other.
    q, k, v = qkv(8, 70, 70, 3, 1, dtype=dtype)
    agree("attention", (q * 20, k * 8, v))


def test_the_first_of_many_keys_has_the_maximum():
    """What was added up under a maximum stays what it is in all blocks that have no larger one, whatever the
    size of the scores.
    """
    direction = torch.nn.functional.normalize(draw(32, dtype=torch.float32), dim=0)
    size = (20 * 32**0.5) ** 0.5  # scores near 20
    q, k = (
        draw(1, length, heads, 32, dtype=torch.float32) + size * direction
        for length, heads in ((16, 3), (2048, 1))
    )
    k[:, 0] = 1.5 * size * direction
    inputs = q, k, draw(1, 2048, 1, 32, dtype=torch.float32)
    truth = reference.attention(*(x.double() for x in inputs))
    numerics.check(
        "attention",
        "out below an early maximum",
        TRITON.attention(*inputs),
        library_attention(*inputs),
        truth,
    )


@over(HEAD_LAYOUTS)
def test_layouts_of_inputs_and_upstream_gradients(layout):
    q, k, v = qkv(2, 37, 41, 3, 1)
    agree("attention", (layout(q), k, v), upstream=layout)
    agree("attention", (q, layout(k), layout(v)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_views_of_a_packed_projection(dtype):
    packed = draw(2, 65, 5 * 64, dtype=dtype).view(2, 65, 5, 64)
    agree("attention", packed.split((3, 1, 1), dim=2))


@pytest.mark.parametrize("batch, queries, keys", [(0, 7, 7), (2, 0, 0), (2, 0, 5)])
def test_empty_batch(batch, queries, keys):
    (out,), (dq, dk, dv) = agree("attention", qkv(batch, queries, keys, 3, 1))
    assert out.shape == dq.shape == (batch, queries, 3, 32)
    assert_same([dk, dv], [torch.zeros(batch, keys, 1, 32, device=DEVICE)] * 2)


@pytest.mark.parametrize("position", [0, 31, 32, 64, 69])
def test_causality(position):
    """What happens from a position on changes no bit before it, and something at it."""
    q, k, v = qkv(1, 70, 70, 3, 1)
    changed = [x.clone() for x in (q, k, v)]
    for x in changed[1:]:
        x[:, position:] += 100 * torch.rand_like(x[:, position:])
    before, after = TRITON.attention(q, k, v), TRITON.attention(q, *changed[1:])
    assert_same([after[:, :position]], [before[:, :position]])
    assert (after[:, position:] != before[:, position:]).any(-1).all()

    dout = draw(1, 70, 3, 32)
    dout[:, position:] = 0.0
    _, (dq, dk, dv) = Call("attention", (q, k, v)).run(TRITON, [dout])
    # no later key or query helped the outputs before the position, hence exact zeros
    for gradient in (dq, dk, dv):
        assert (gradient[:, position:] == 0).all()


@pytest.mark.parametrize(
    "name, position", [("short ones", 20), ("across tile boundaries", 10), ("across tile boundaries", 100)]
)
def test_documents_are_isolated(name, position):
    """Whatever stands in the other documents of a row changes no bit of this one, forward or backward."""
    doc_start = DOCUMENTS[name]
    tensors, dout = qkv(1, 140, 140, 3, 1), draw(1, 140, 3, 32)
    first = int(doc_start[0, position])
    document = (doc_start == first)[0]
    assert document.any() and not document.all()
    changed = [x.clone() for x in (*tensors, dout)]
    for x in changed:
        x[:, ~document] = 50 * torch.randn_like(x[:, ~document])
    outputs, gradients = Call("attention", tensors, (doc_start,)).run(TRITON, [dout])
    others, other_gradients = Call("attention", changed[:3], (doc_start,)).run(TRITON, [changed[3]])
    for ours, other in zip((*outputs, *gradients), (*others, *other_gradients), strict=True):
        assert_same([ours[:, document]], [other[:, document]])
        assert not torch.equal(ours[:, ~document], other[:, ~document])


def test_a_row_alone_is_the_row_in_a_batch():
    tensors, dout = qkv(3, 40, 40, 3, 1), draw(3, 40, 3, 32)
    outputs, gradients = Call("attention", tensors).run(TRITON, [dout])
    alone, alone_gradients = Call("attention", [x[1:2] for x in tensors]).run(TRITON, [dout[1:2]])
    assert_same([x[1:2] for x in (*outputs, *gradients)], [*alone, *alone_gradients])


@pytest.mark.parametrize("tensor", [0, 1, 2])
def test_heads_of_a_group_far_apart(tensor):
    """Offsets past 2^31 elements between the query heads of one key head, and between keys that three query
    heads read.
    """
    tensors, upstream = (
        list(qkv(1, 3, 3, 3, 1, dtype=torch.float16)),
        [draw(1, 3, 3, 32, dtype=torch.float16)],
    )
    expected, gradients = Call("attention", tensors).run(TRITON, upstream)
    tensors[tensor] = far(tensors[tensor], 1 if tensor else 2)
    ours, our_gradients = Call("attention", tensors).run(TRITON, upstream)
    assert_same([*ours, *our_gradients], [*expected, *gradients])


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="4,097 tokens take minutes in the interpreter")
@pytest.mark.parametrize("length", [1024, 4097])
def test_long_rows(length):
    tensors = qkv(1, length, length, 9, 3, 64, torch.bfloat16)
    agree("attention", tensors)
    agree("attention", tensors, starts(length // 2 + 1, 7, length - length // 2 - 8))
