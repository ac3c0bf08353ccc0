"""Products with quantised weights equal products with the weights that they stand for, in every shape and on
either path.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from smollm2.engine import quantized
from smollm2.engine.quantized import (
    Int8Weight,
    dequantize,
    linear,
    linear_int4,
    linear_int8,
    quantize_groups,
    quantize_rows,
)

# One unit in the last place of the result, and what a sum of K products rounded in fp32 may lose.
ROUNDING = {torch.float32: 2**-24, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def assert_close_to_exact(got: Tensor, x: Tensor, exact_weight: Tensor, weight_rounding: float = 0.0) -> None:
    """exact_weight in float64. Two roundings to the dtype (the product, and its scaling), one of the fp32 sum
    per addend, and `weight_rounding` of each weight.
    """
    expected = x.double() @ exact_weight.t()
    magnitude = x.double().abs() @ exact_weight.abs().t()
    allowed = 2 * ROUNDING[x.dtype] * expected.abs() + (x.shape[-1] * 2**-24 + weight_rounding) * magnitude
    assert got.dtype == x.dtype and got.shape == expected.shape
    assert bool(((got.double() - expected).abs() <= allowed + 1e-30).all())


def values_of(weight: Int8Weight, dtype: torch.dtype) -> Tensor:
    return weight.values.double() * weight.scales.to(dtype).double()[:, None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [576, 575, 8, 1536, 250])
@pytest.mark.parametrize("rows", [1, 2, 7, 16, 17, 64])
def test_int8_in_any_shape(rows, width, dtype):
    """In bfloat16 the kernel reads past the end of a row whose width is no multiple of 16."""
    weight = quantize_rows(torch.randn(63, width).to(dtype))
    x = torch.randn(rows, width).to(dtype)
    assert_close_to_exact(linear_int8(x, weight), x, values_of(weight, dtype))


def test_the_kernel_serves_few_rows_in_bf16_and_nothing_else(monkeypatch):
    kernel, calls = torch._weight_int8pack_mm, []
    monkeypatch.setattr(
        torch, "_weight_int8pack_mm", lambda x, *rest: (calls.append(list(x.shape)), kernel(x, *rest))[1]
    )
    weight = quantize_rows(torch.randn(32, 64).bfloat16())
    for rows, dtype in ((1, torch.bfloat16), (16, torch.bfloat16), (17, torch.bfloat16), (1, torch.float32)):
        linear_int8(torch.randn(rows, 64).to(dtype), weight)
    assert calls == [[1, 64], [16, 64]]
    assert quantized.INT8_KERNEL_ROWS == 16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "group"), [(1, 32), (5, 64), (40, 128)])
def test_int4_in_any_shape(rows, group, dtype):
    weight = quantize_groups(torch.randn(48, 256), group)
    x = torch.randn(rows, 256).to(dtype)
    scales, zeros = (
        part.squeeze(2).t().to(dtype).double().repeat_interleave(group, 1)
        for part in weight.scales_and_zeros.split(1, 2)
    )
    levels = ((dequantize(weight).double() - zeros.float()) / scales).round()  # the values, recovered
    # In bfloat16 a kernel may round each weight before it multiplies (with AVX-512 it does not).
    assert_close_to_exact(
        linear_int4(x, weight), x, levels * scales + zeros, 2**-9 if dtype == torch.bfloat16 else 0.0
    )


@pytest.mark.parametrize("make", [quantize_rows, quantize_groups])
def test_leading_axes_strides_and_no_rows_at_all(make):
    weight = make(torch.randn(32, 64).bfloat16())
    x = torch.randn(2, 3, 64).bfloat16()
    flat = linear(x.view(6, 64), weight)
    assert torch.equal(linear(x, weight), flat.view(2, 3, 32))
    spread = torch.zeros(2, 3, 128, dtype=torch.bfloat16)
    spread[..., ::2] = x
    assert torch.equal(linear(spread[..., ::2], weight), linear(x, weight))
    assert linear(x[:0], weight).shape == (0, 3, 32)


def test_a_plain_weight_is_an_ordinary_product():
    x, weight = torch.randn(3, 8), torch.randn(5, 8)
    assert torch.equal(linear(x, weight), torch.nn.functional.linear(x, weight))
