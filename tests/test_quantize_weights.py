"""The error of quantised weights is what the method promises, whatever the weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from smollm2.engine.quantized import Int4Weight, dequantize, quantize_groups, quantize_rows
from smollm2.errors import UsageError

DTYPES = [torch.float32, torch.bfloat16]


def weights(kind: str, dtype: torch.dtype, rows: int = 48, width: int = 128) -> Tensor:
    weight = torch.randn(rows, width)
    if kind == "outliers":
        weight[:, 5] *= 100
    elif kind == "tiny":
        weight *= 1e-30
    elif kind == "offset":
        weight = weight * 0.01 + 3
    elif kind == "mixed":
        weight *= torch.logspace(-6, 4, rows)[:, None]
    return weight.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["normal", "outliers", "tiny", "offset", "mixed"])
def test_int8_is_within_half_a_scale(kind, dtype):
    weight = weights(kind, dtype)
    values, scales = quantize_rows(weight)
    assert (values.dtype, values.shape) == (torch.int8, weight.shape)
    assert (scales.dtype, scales.shape) == (dtype, weight.shape[:1])
    error = (weight.double() - values.double() * scales.double()[:, None]).abs()
    # The quotient is rounded to fp32 before it is rounded to an integer: 127 last places beyond the half.
    assert bool((error <= scales.double()[:, None] * (0.5 + 127 * 2**-23)).all())
    assert values.abs().amax(1).eq(127).all(), "the largest weight of a row takes the whole range"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["normal", "outliers", "offset", "mixed"])
def test_int4_is_within_half_a_scale_and_the_rounding_of_scale_and_zero(kind, dtype):
    weight = weights(kind, dtype)
    quantised = quantize_groups(weight, 32)
    parts = quantised.scales_and_zeros.split(1, 2)
    scales, zeros = (part.squeeze(2).t().repeat_interleave(32, 1).double() for part in parts)
    unit = torch.finfo(dtype).eps / 2
    # The range begins at zero - 8 scale, ends at zero + 7 scale, and each end may be rounded the wrong way.
    bound = scales / 2 + unit * (zeros.abs() + 8 * scales + 8 * scales)
    rounding = torch.finfo(dtype).eps * weight.double().abs()  # of dequantize's own result
    assert bool(((weight.double() - dequantize(quantised).double()).abs() <= bound + rounding).all())


@pytest.mark.parametrize("group", [32, 64, 128])
def test_int4_gives_back_weights_that_were_on_its_grid(group):
    """As those of a Q4_1 file are: sixteen levels per group, both ends of them in use."""
    levels = torch.randint(16, (32, 256 // group, group))
    levels[..., 0], levels[..., 1] = 0, 15
    weight = ((levels - 8) * 2.0 ** torch.randint(-6, 0, (32, 256 // group, 1))).view(32, 256)
    assert torch.equal(dequantize(quantize_groups(weight, group)), weight)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_and_groups_of_zeros_stay_zero(dtype):
    weight = torch.randn(16, 64).to(dtype)
    weight[3] = 0
    weight[5, 32:] = 0
    eight, four = dequantize(quantize_rows(weight)), dequantize(quantize_groups(weight))
    assert eight[3].eq(0).all() and eight.isfinite().all()
    assert four[3].abs().max() < 1e-30 and four[5, 32:].abs().max() < 1e-30 and four.isfinite().all()


def test_constant_weights_are_exact_in_int4():
    weight = torch.full((16, 64), 0.3)
    assert torch.equal(dequantize(quantize_groups(weight)), weight)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused(bad):
    weight = torch.randn(16, 64)
    weight[2, 3] = bad
    for quantize in (quantize_rows, quantize_groups):
        with pytest.raises(UsageError, match="expected finite weights, got NaN or inf"):
            quantize(weight)


def test_what_is_no_matrix_of_weights_is_refused():
    for wrong in (torch.randn(4), torch.ones(4, 4, dtype=torch.int64)):
        with pytest.raises(UsageError, match=r"expected a matrix of floating-point weights \[N, K\], got"):
            quantize_rows(wrong)


@pytest.mark.parametrize(("shape", "group"), [((15, 64), 32), ((16, 48), 32), ((16, 64), 16)])
def test_shapes_that_the_int4_kernel_cannot_take_are_refused(shape, group):
    message = "int4: expected rows in multiples of 16 and columns in multiples of the group .*; use int8"
    with pytest.raises(UsageError, match=message):
        quantize_groups(torch.randn(shape), group)


def test_the_fields_have_the_documented_shapes():
    quantised = quantize_groups(torch.randn(48, 128).bfloat16(), 64)
    assert isinstance(quantised, Int4Weight)
    found = [(part.dtype, list(part.shape)) for part in quantised]
    assert found == [(torch.uint8, [48, 64]), (torch.bfloat16, [2, 48, 2])]
