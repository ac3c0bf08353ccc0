"""The reference against independent formulas in float64: it is the oracle of the kernels, so it is checked
first.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import TORCH, reference

LENGTHS = [1, 7, 63, 64, 65, 127, 200, 257]


def draw(*shape, dtype=torch.float64, grad=False):
    return torch.randn(*shape, dtype=dtype, requires_grad=grad)


def naive_attention(q, k, v, doc_start=None, scale=None):
    """One query at a time, one head at a time."""
    batch, length, heads, head_dim = q.shape
    keys, group = k.shape[1], heads // k.shape[2]
    out = torch.zeros_like(q)
    for b in range(batch):
        for t in range(length):
            first = 0 if doc_start is None else int(doc_start[b, t])
            last = t + keys - length
            if first > last:
                continue
            for h in range(heads):
                window = slice(first, last + 1)
                scores = (
                    k[b, window, h // group]
                    @ q[b, t, h]
                    * (1 / math.sqrt(head_dim) if scale is None else scale)
                )
                out[b, t, h] = torch.softmax(scores, 0) @ v[b, window, h // group]
    return out


@pytest.mark.parametrize("width", [576, 960, 2048, 1, 7])
def test_rms_norm_is_torchs(width):
    x, weight = draw(5, width), draw(width)
    torch.testing.assert_close(reference.rms_norm(x, weight, 1e-5), F.rms_norm(x, (width,), weight, 1e-5))


def test_rms_norm_rounds_before_it_scales():
    x, weight = draw(64, 576).bfloat16(), draw(576).bfloat16()
    wide = x.float()
    normed = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)).bfloat16()
    assert torch.equal(reference.rms_norm(x, weight, 1e-5), normed * weight)


def test_add_rms_norm_normalises_the_rounded_sum():
    x, residual, weight = draw(9, 576).bfloat16(), draw(9, 576).bfloat16(), draw(576).bfloat16()
    normed, total = reference.add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(total, x + residual)
    assert torch.equal(normed, reference.rms_norm(x + residual, weight, 1e-5))


def test_rope_is_a_complex_rotation():
    q, k = draw(2, 11, 9, 64), draw(2, 11, 3, 64)
    angle = draw(11, 32)
    turned, _ = reference.rope(q, k, angle.cos(), angle.sin())
    expected = torch.complex(q[..., :32], q[..., 32:]) * torch.polar(torch.ones_like(angle), angle)[:, None]
    torch.testing.assert_close(turned, torch.cat((expected.real, expected.imag), -1))


def test_rope_takes_positions_per_row():
    q, k = draw(2, 5, 3, 8), draw(2, 5, 1, 8)
    angle = draw(2, 5, 4)
    turned = reference.rope(q, k, angle.cos(), angle.sin())
    for row in range(2):
        alone = reference.rope(q[row : row + 1], k[row : row + 1], angle[row].cos(), angle[row].sin())
        assert all(torch.equal(a[row : row + 1], b) for a, b in zip(turned, alone, strict=True))


@pytest.mark.parametrize("length", LENGTHS)
def test_attention_is_the_naive_one(length):
    q, k, v = draw(1, length, 3, 8), draw(1, length, 1, 8), draw(1, length, 1, 8)
    torch.testing.assert_close(reference.attention(q, k, v), naive_attention(q, k, v))


@pytest.mark.parametrize("scale", [None, 0.7, 0.0, -0.0, -0.3])
@pytest.mark.parametrize("attention", [reference.attention, TORCH.attention], ids=["reference", "torch"])
def test_attention_with_documents_longer_keys_and_any_scale(attention, scale):
    q, k, v = draw(2, 7, 6, 8, grad=True), draw(2, 12, 2, 8, grad=True), draw(2, 12, 2, 8, grad=True)
    doc_start = torch.tensor([[0, 0, 0, 8, 8, 8, 8], [5, 5, 7, 7, 9, 9, 9]])
    out, naive = attention(q, k, v, doc_start, scale=scale), naive_attention(q, k, v, doc_start, scale)
    torch.testing.assert_close(out, naive)
    upstream = draw(2, 7, 6, 8)
    for ours, truth in zip(*(torch.autograd.grad(y, (q, k, v), upstream) for y in (out, naive)), strict=True):
        torch.testing.assert_close(ours, truth)


def test_attention_that_sees_nothing_gives_zeros_and_finite_gradients():
    q, k, v = draw(1, 4, 3, 8, grad=True), draw(1, 4, 1, 8, grad=True), draw(1, 4, 1, 8, grad=True)
    out = reference.attention(q, k, v, torch.tensor([[0, 3, 0, 4]]))
    assert torch.equal(out[0, 1], torch.zeros(3, 8).double()) and torch.equal(
        out[0, 3], torch.zeros(3, 8).double()
    )
    grads = torch.autograd.grad(out, (q, k, v), draw(1, 4, 3, 8))
    assert all(grad.isfinite().all() for grad in grads)


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_decode_attention_is_the_end_of_attention(data):
    batch, new = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 4))
    key_heads, group = data.draw(st.sampled_from([(1, 3), (3, 3), (2, 1)]))
    lengths = data.draw(st.lists(st.integers(new, 20), min_size=batch, max_size=batch))
    q = draw(batch, new, key_heads * group, 8)
    keys, values = draw(batch, 23, key_heads, 8), draw(batch, 23, key_heads, 8)
    out = reference.decode_attention(q, keys, values, torch.tensor(lengths))
    for row, length in enumerate(lengths):
        expected = naive_attention(
            q[row : row + 1], keys[row : row + 1, :length], values[row : row + 1, :length]
        )
        torch.testing.assert_close(out[row : row + 1], expected)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("z_loss, smoothing", [(0.0, 0.0), (1e-2, 0.0), (0.0, 0.1), (1e-3, 0.2)])
def test_linear_cross_entropy_is_torchs(reduction, z_loss, smoothing):
    hidden, weight = draw(2100, 16, grad=True), draw(37, 16, grad=True)  # three chunks, the last one ragged
    targets = torch.randint(0, 37, (2100,))
    targets[::5] = -100
    logits = hidden @ weight.t()
    expected = F.cross_entropy(logits, targets, reduction=reduction, label_smoothing=smoothing)
    penalty = z_loss * logits.logsumexp(-1).square()[targets != -100]
    expected = expected + (penalty.mean() if reduction == "mean" else penalty.sum())
    ours = reference.linear_cross_entropy(
        hidden, weight, targets, reduction=reduction, z_loss=z_loss, label_smoothing=smoothing
    )
    torch.testing.assert_close(ours, expected)
    upstream = torch.tensor(1.7, dtype=torch.float64)
    grads = [torch.autograd.grad(loss, (hidden, weight), upstream) for loss in (ours, expected)]
    torch.testing.assert_close(*grads)


def test_linear_cross_entropy_without_reduction():
    hidden, weight, targets = draw(10, 4), draw(7, 4), torch.tensor([0, 1, 2, 3, 4, 5, 6, -100, 0, 1])
    losses = reference.linear_cross_entropy(hidden, weight, targets, reduction="none")
    torch.testing.assert_close(losses, F.cross_entropy(hidden @ weight.t(), targets, reduction="none"))


def test_linear_cross_entropy_of_nothing_is_zero():
    hidden, weight = draw(6, 4, grad=True), draw(7, 4, grad=True)
    loss = reference.linear_cross_entropy(hidden, weight, torch.full((6,), -100))
    grads = torch.autograd.grad(loss, (hidden, weight))
    assert loss.item() == 0.0
    assert all(torch.equal(grad, torch.zeros_like(grad)) for grad in grads)


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda: reference.rms_norm(draw(2, 576), draw(575), 1e-5),
            r"rms_norm: expected weight of shape \[576\], got \[575\]",
        ),
        (
            lambda: reference.rms_norm(draw(2, 8), draw(8).float(), 1e-5),
            "expected weight of dtype torch.float64 as x, got torch.float32",
        ),
        (
            lambda: reference.add_rms_norm(draw(2, 8), draw(3, 8), draw(8), 1e-5),
            r"add_rms_norm: expected residual of shape \[2, 8\]",
        ),
        (
            lambda: reference.rope(draw(1, 4, 3, 8), draw(1, 4, 1, 8), draw(3, 4), draw(3, 4)),
            r"expected cos of shape \[4, 4\]",
        ),
        (
            lambda: reference.attention(draw(1, 4, 4, 8), draw(1, 4, 3, 8), draw(1, 4, 3, 8)),
            "divide the 4 query heads, got 3",
        ),
        (
            lambda: reference.attention(draw(1, 4, 3, 8), draw(1, 3, 3, 8), draw(1, 3, 3, 8)),
            "as many keys as the 4 queries, got 3",
        ),
        (
            lambda: reference.decode_attention(
                draw(1, 1, 3, 8), draw(1, 9, 1, 8), draw(1, 9, 1, 8), torch.tensor([3.0])
            ),
            "integer dtype",
        ),
        (
            lambda: reference.swiglu(draw(2, 8), draw(2, 7)),
            r"swiglu: expected up of shape \[2, 8\] as gate, got \[2, 7\]",
        ),
        (
            lambda: reference.linear_cross_entropy(draw(2, 8), draw(9, 7), torch.tensor([0, 1])),
            r"weight of shape \[V, 8\], got \[9, 7\]",
        ),
        (
            lambda: reference.linear_cross_entropy(
                draw(2, 8), draw(9, 8), torch.tensor([0, 1]), reduction="max"
            ),
            "reduction",
        ),
    ],
)
def test_wrong_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
