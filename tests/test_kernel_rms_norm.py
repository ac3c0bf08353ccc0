"""rms_norm and add_rms_norm against the numerics contract, in every shape and layout that they meet."""

import pytest
import torch
from kernel_cases import (
    DEVICE,
    DTYPES,
    EPS,
    LENGTHS,
    ROW_LAYOUTS,
    TORCH,
    TRITON,
    Call,
    agree,
    assert_same,
    draw,
    gap,
    over,
    swapped,
)

from kernels import rms_norm

# Memory that a kernel does not write holds NaN, and not by chance the right value of an earlier run.
pytestmark = pytest.mark.usefixtures("poison_empty")

WIDTHS = [576, 960, 2048]


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """Three programs in the backward pass, on a GPU too, so that each of them loops over several tiles of
    rows in a small test.
    """
    monkeypatch.setattr(rms_norm, "programs", lambda device: 3)


def weight_like(x):
    return 1 + 0.2 * draw(x.shape[-1], dtype=x.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_models_widths(width, dtype):
    x = draw(11, width, dtype=dtype)  # 11 rows: the last tile of two rows, and the last program, are not full
    agree("rms_norm", (x, weight_like(x)), EPS)
    agree("add_rms_norm", (x, draw(11, width, dtype=dtype), weight_like(x)), EPS)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", LENGTHS)
def test_numbers_of_rows(rows, dtype):
    x = draw(rows, 96, dtype=dtype)
    agree("add_rms_norm", (x, draw(rows, 96, dtype=dtype), weight_like(x)), EPS)


@pytest.mark.parametrize("width", [1, 2, 7, 575, 577, 1025])
def test_widths_that_are_no_models(width):
    x = draw(2, 3, width)
    agree("rms_norm", (x, weight_like(x)), EPS)
    agree("add_rms_norm", (x, draw(2, 3, width), weight_like(x)), EPS)


def test_more_partial_sums_than_are_added_at_a_time(monkeypatch):
    monkeypatch.setattr(rms_norm, "programs", lambda device: 36)
    x = draw(71, 40)  # 36 shares of dw, the last of one row; 32 are added at a time
    agree("rms_norm", (x, weight_like(x)), EPS)


@pytest.mark.parametrize("dtype", DTYPES)
@over(ROW_LAYOUTS)
def test_layouts_of_inputs_and_upstream_gradients(layout, dtype):
    x, residual = draw(5, 96, dtype=dtype), draw(5, 96, dtype=dtype)
    agree("rms_norm", (layout(x), weight_like(x)), EPS, upstream=layout)
    agree("add_rms_norm", (layout(x), residual, weight_like(x)), EPS, upstream=layout)
    agree("add_rms_norm", (x, layout(residual), gap(weight_like(x))), EPS)


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_fp32_weights_of_16_bit_activations(dtype):
    """They count as rounded, to the bit, and their gradient is not rounded at all."""
    x, residual, weight = draw(7, 96, dtype=dtype), draw(7, 96, dtype=dtype), 1 + 0.2 * draw(96)
    wide, _ = agree("add_rms_norm", (x, residual, weight), EPS)
    narrow, _ = agree("add_rms_norm", (x, residual, weight.to(dtype)), EPS)
    assert_same(wide, narrow)
    upstream = [draw(7, 96, dtype=dtype)]
    _, (_, dw) = Call("rms_norm", (x, weight), (EPS,)).run(TRITON, upstream)
    assert dw.dtype == torch.float32 and not torch.equal(dw, dw.to(dtype).float())


def test_leading_dimensions():
    agree("rms_norm", (draw(576), draw(576)), EPS)
    agree("rms_norm", (swapped(draw(3, 2, 96)), draw(96)), EPS, upstream=swapped)
    agree("add_rms_norm", (draw(2, 3, 96).expand(2, 2, 3, 96), draw(2, 2, 3, 96), draw(96)), EPS)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sizes_of_the_values(dtype):
    """Statistics are in fp32: neither the squares of large fp16 values overflow, nor does eps vanish beside
    small ones.
    """
    for scale in (0.0, 1e-4, 1e3):
        x = draw(4, 96, dtype=dtype, scale=scale)
        agree("rms_norm", (x, weight_like(x)), EPS, upstream=lambda dy, scale=scale: dy * max(scale, 1e-3))


def test_empty_batch():
    x, weight = draw(0, 7, 96), draw(96)
    (y, total), (dx, dresidual, dw) = agree("add_rms_norm", (x, x, weight), EPS)
    assert y.shape == total.shape == dx.shape == dresidual.shape == (0, 7, 96)
    assert_same([dw], [torch.zeros_like(weight)])


def test_a_width_of_nothing():
    x = torch.zeros(4, 0, device=DEVICE, requires_grad=True)
    y = TRITON.rms_norm(x, torch.zeros(0, device=DEVICE), EPS)
    assert y.shape == (4, 0) and torch.autograd.grad(y.sum(), x)[0].shape == (4, 0)


@pytest.mark.parametrize("op", ["rms_norm", "add_rms_norm"])
def test_a_frozen_weight_costs_no_launch(op, monkeypatch):
    monkeypatch.setattr(rms_norm, "_rms_norm_bwd_dw_kernel", None)  # whoever launches it fails
    inputs = [draw(5, 96).requires_grad_() for _ in range(1 + (op == "add_rms_norm"))]
    frozen = getattr(TRITON, op)(*inputs, draw(96), EPS)
    found = torch.autograd.grad(frozen[0] if isinstance(frozen, tuple) else frozen, inputs, draw(5, 96))
    assert all(x.isfinite().all() for x in found)


def test_the_rounded_sum_is_normalised():
    """Bitwise: s = x + r as the dtype holds it, and its norm is what rms_norm makes of it."""
    x, residual, weight = (
        draw(5, 576, dtype=torch.float16),
        draw(5, 576, dtype=torch.float16),
        draw(576, dtype=torch.float16),
    )
    y, total = TRITON.add_rms_norm(x, residual, weight, EPS)
    assert_same([y, total], [TRITON.rms_norm(x + residual, weight, EPS), x + residual])


def test_rounds_before_it_scales():
    """As Hugging Face Llama does: nearly all bits are the reference's (rsqrt may differ in its last one);
    rounding once changes a fifth.
    """
    x, weight = draw(9, 576, dtype=torch.float16), draw(576, dtype=torch.float16)
    same = TRITON.rms_norm(x, weight, EPS) == TORCH.rms_norm(x, weight, EPS)
    assert same.float().mean() > 0.99


@pytest.mark.parametrize("used", [0, 1])
def test_only_one_output_has_a_gradient(used):
    """The last norm's sum, or the sum alone, reaches the loss."""
    call = Call("add_rms_norm", (draw(5, 96), draw(5, 96), draw(96)), (EPS,))
    dy = draw(5, 96)

    def gradients(backend):
        leaves, outputs = call.forward(backend)
        return torch.autograd.grad(outputs[used], leaves, dy, allow_unused=True)

    for ours, expected in zip(gradients(TRITON), gradients(TORCH), strict=True):
        assert (ours is None) == (expected is None)
        if ours is not None:
            torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def test_gradients_of_x_and_residual_do_not_share_memory():
    """Both are the same numbers; scaling one in place (gradient clipping) must not scale the other."""
    leaves, outputs = Call("add_rms_norm", (draw(5, 96), draw(5, 96), draw(96)), (EPS,)).forward(TRITON)
    torch.autograd.backward(outputs, [draw(5, 96), draw(5, 96)])
    before = leaves[1].grad.clone()
    leaves[0].grad.mul_(0.5)
    assert_same([leaves[1].grad], [before])


@pytest.mark.gpu
@pytest.mark.skipif(
    DEVICE.type != "cuda", reason="two launches' worth of rows take minutes in the interpreter"
)
@pytest.mark.parametrize("rows", [65536, 65537])
def test_many_rows(rows, monkeypatch):
    monkeypatch.undo()
    x = draw(rows, 576, dtype=torch.bfloat16)
    agree("add_rms_norm", (x, draw(rows, 576, dtype=torch.bfloat16), weight_like(x)), EPS)
