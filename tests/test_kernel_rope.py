"""rope and rope_qkv against the numerics contract; the gradient is the rotation back."""

import pytest
import torch
from kernel_cases import (
    DEVICE,
    DTYPES,
    HEAD_LAYOUTS,
    LENGTHS,
    TORCH,
    TRITON,
    Call,
    agree,
    angles,
    assert_same,
    draw,
    gap,
    over,
)

# Memory that a kernel does not write holds NaN, and not by chance the right value of an earlier run.
pytestmark = pytest.mark.usefixtures("poison_empty")

HEADS = [(9, 3), (15, 5), (32, 32)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads, key_heads", HEADS)
def test_models_heads(heads, key_heads, dtype):
    tables = angles(11, 32)  # 11 tokens do not fill two tiles of 8
    agree("rope", (draw(1, 11, heads, 64, dtype=dtype), draw(1, 11, key_heads, 64, dtype=dtype)), *tables)
    agree("rope_qkv", (draw(1, 11, heads + 2 * key_heads, 64, dtype=dtype),), *tables, key_heads)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", LENGTHS)
def test_lengths(length, dtype):
    agree("rope_qkv", (draw(1, length, 5, 64, dtype=dtype),), *angles(length, 32), 1)


@pytest.mark.parametrize("head_dim", [2, 16, 32, 128])
def test_head_dims(head_dim):
    tables = angles(9, head_dim // 2)
    agree("rope", (draw(2, 9, 3, head_dim), draw(2, 9, 1, head_dim)), *tables)
    agree("rope_qkv", (draw(2, 9, 5, head_dim),), *tables, 1)


@pytest.mark.parametrize("op", ["rope", "rope_qkv"])
def test_positions_of_each_row(op):
    """Tables [B, T, D/2]: rows with positions of their own, and one table expanded over the batch, or
    strided.
    """
    tensors, rest = {
        "rope": ((draw(3, 7, 3, 32), draw(3, 7, 1, 32)), ()),
        "rope_qkv": ((draw(3, 7, 5, 32),), (1,)),
    }[op]
    agree(op, tensors, *angles(3, 7, 16), *rest)
    agree(op, tensors, *(table.expand(3, 7, 16) for table in angles(7, 16)), *rest)
    agree(op, tensors, *(gap(table, dim=1) for table in angles(3, 7, 16)), *rest)


def test_offset_is_a_slice_of_the_tables():
    cos, sin = angles(64, 16)
    q, k = draw(1, 8, 3, 32), draw(1, 8, 1, 32)
    assert_same(
        TRITON.rope(q, k, cos[40:48], sin[40:48]), TRITON.rope(q, k, cos[40:48].clone(), sin[40:48].clone())
    )
    agree("rope", (q, k), cos[40:48], sin[40:48])


@over(HEAD_LAYOUTS)
def test_layouts_of_inputs_and_upstream_gradients(layout):
    tables = angles(7, 16)
    q, k, qkv = draw(2, 7, 3, 32), draw(2, 7, 2, 32), draw(2, 7, 7, 32)
    agree("rope", (layout(q), k), *tables, upstream=layout)
    agree("rope", (q, layout(k)), *tables)
    agree("rope_qkv", (layout(qkv),), *tables, 2, upstream=layout)


def test_slices_of_a_packed_projection_are_read_in_place():
    """q and k as views of [B, T, (H + 2K) D], the layout that one matrix product leaves."""
    packed = draw(2, 5, 5 * 64).view(2, 5, 5, 64)
    q, k, v = packed.split((3, 1, 1), dim=2)
    tables = angles(5, 32)
    assert_same(agree("rope", (q, k), *tables)[0], TRITON.rope_qkv(packed, *tables, 1)[:2])
    assert TRITON.rope_qkv(packed, *tables, 1)[2].data_ptr() == v.data_ptr()


@pytest.mark.parametrize("op", ["rope", "rope_qkv"])
def test_gradient_is_the_rotation_back(op):
    """Rotating and pulling the result back gives the input: a wrong sign does not."""
    cos, sin = angles(7, 16)
    call = Call(
        op,
        *{
            "rope": ((draw(2, 7, 3, 32), draw(2, 7, 1, 32)), (cos, sin)),
            "rope_qkv": ((draw(2, 7, 5, 32),), (cos, sin, 1)),
        }[op],
    )
    _, outputs = call.forward(TRITON)
    _, back = call.run(TRITON, [y.detach() for y in outputs])
    for gradient, x in zip(back, call.tensors, strict=True):
        torch.testing.assert_close(gradient, x)


@pytest.mark.parametrize("op, used", [("rope", 0), ("rope", 1), ("rope_qkv", 0), ("rope_qkv", 2)])
def test_only_one_output_has_a_gradient(op, used):
    cos, sin = angles(7, 16)
    call = Call(
        op,
        *{
            "rope": ((draw(2, 7, 3, 32), draw(2, 7, 1, 32)), (cos, sin)),
            "rope_qkv": ((draw(2, 7, 5, 32),), (cos, sin, 1)),
        }[op],
    )
    dy = draw(*call.forward(TORCH)[1][used].shape)

    def gradients(backend):
        leaves, outputs = call.forward(backend)
        return torch.autograd.grad(outputs[used], leaves, dy, allow_unused=True)

    for ours, expected in zip(gradients(TRITON), gradients(TORCH), strict=True):
        expected = torch.zeros_like(ours) if expected is None else expected
        torch.testing.assert_close(ours, expected)


def test_empty_batch():
    (q, k, v), (dqkv,) = agree("rope_qkv", (draw(0, 7, 5, 64),), *angles(7, 32), 1)
    assert q.shape == (0, 7, 3, 64) and k.shape == v.shape == (0, 7, 1, 64) and dqkv.shape == (0, 7, 5, 64)
    agree("rope", (draw(2, 0, 3, 64), draw(2, 0, 1, 64)), *angles(0, 32))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="65,537 tokens take minutes in the interpreter")
@pytest.mark.parametrize("tokens", [65536, 65537])
def test_many_tokens(tokens):
    agree("rope_qkv", (draw(1, tokens, 15, 64, dtype=torch.bfloat16),), *angles(tokens, 32), 3)
