"""swiglu, on separate tensors and on a packed buffer, against the numerics contract."""

import pytest
import torch
from kernel_cases import (
    DEVICE,
    DTYPES,
    LENGTHS,
    ROW_LAYOUTS,
    TRITON,
    Call,
    agree,
    assert_same,
    draw,
    over,
    swapped,
)

# Memory that a kernel does not write holds NaN, and not by chance the right value of an earlier run.
pytestmark = pytest.mark.usefixtures("poison_empty")

WIDTHS = [1536, 2560, 8192]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_models_widths(width, dtype):
    # 5 rows: the last tile of 4 is not full
    agree("swiglu", (draw(5, width, dtype=dtype), draw(5, width, dtype=dtype)))
    agree("swiglu", (draw(5, 2 * width, dtype=dtype),))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", LENGTHS)
def test_numbers_of_rows(rows, dtype):
    agree("swiglu", (draw(1, rows, 2 * 96, dtype=dtype),))


@pytest.mark.parametrize("width", [1, 7, 511, 513])
def test_widths_that_are_no_models(width):
    agree("swiglu", (draw(2, 3, width), draw(2, 3, width)))
    agree("swiglu", (draw(2, 3, 2 * width),))


@over(ROW_LAYOUTS)
def test_layouts_of_inputs_and_upstream_gradients(layout):
    gate, up = draw(5, 96), draw(5, 96)
    agree("swiglu", (layout(gate), up), upstream=layout)
    agree("swiglu", (gate, layout(up)))
    agree("swiglu", (layout(draw(5, 192)),), upstream=layout)


def test_leading_dimensions():
    agree("swiglu", (draw(96), draw(96)))
    agree("swiglu", (swapped(draw(3, 2, 192)),), upstream=swapped)


def test_packed_is_separate():
    packed = draw(5, 2 * 576)
    dy = [draw(5, 576)]
    outputs, (gradient,) = Call("swiglu", (packed,)).run(TRITON, dy)
    expected, gradients = Call("swiglu", packed.chunk(2, dim=1)).run(TRITON, dy)
    assert_same(outputs, expected)
    assert_same(gradient.chunk(2, dim=1), gradients)
    assert gradient.is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES)
# in the interpreter; exp(-x) = inf is right
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
def test_large_gates(dtype):
    """sigmoid saturates to 0 and 1 without an overflow on the way."""
    gate = torch.tensor([[-6e4, -100.0, -20.0, -0.0, 0.0, 20.0, 100.0, 6e4]], dtype=dtype, device=DEVICE)
    agree("swiglu", (gate, torch.ones_like(gate)))


def test_empty_batch():
    (y,), (dpacked,) = agree("swiglu", (draw(0, 7, 192),))
    assert y.shape == (0, 7, 96) and dpacked.shape == (0, 7, 192)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="65,537 rows take minutes in the interpreter")
@pytest.mark.parametrize("rows", [65536, 65537])
def test_many_rows(rows):
    agree("swiglu", (draw(rows, 2 * 1536, dtype=torch.bfloat16),))
