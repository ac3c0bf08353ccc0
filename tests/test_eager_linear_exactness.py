"""fp32 products through oneDNN: what F.linear gives, its gradients too, the same bits every time, and nothing
where it does not apply.
"""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import TORCH, products
from kernels.eager import linear as eager_linear

WIDTHS = [(7, 5), (576, 960), (1536, 576), (576, 3072)]  # columns and rows of the weight
needs_onednn = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this torch was built without oneDNN"
)


@pytest.fixture
def onednn(monkeypatch):
    """oneDNN on any processor; -> the shapes of the left factors that went to it."""
    seen: list[tuple[int, ...]] = []
    product = eager_linear._onednn

    def recorded(a: Tensor, b: Tensor) -> Tensor:
        seen.append(tuple(a.shape))
        return product(a, b)

    monkeypatch.setattr(eager_linear, "onednn_is_faster", lambda: True)
    monkeypatch.setattr(eager_linear, "_onednn", recorded)
    monkeypatch.setattr(products, "rows_in_fp32", lambda dtype: None)
    return seen


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def with_gradients(function, x: Tensor, weight: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
    leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
    y = function(*leaves)
    return y.detach(), *torch.autograd.grad(y, leaves, dy)


@needs_onednn
@pytest.mark.parametrize("columns, rows", WIDTHS)
@pytest.mark.parametrize("leading", [(2,), (2, 65), (3, 1, 7)])
def test_the_product_and_its_gradients_are_those_of_a_linear_layer(onednn, leading, columns, rows):
    x, weight, dy = draw(*leading, columns), draw(rows, columns), draw(*leading, rows)
    truth = with_gradients(F.linear, x.double(), weight.double(), dy.double())
    # sums of absolute values, to which rounding is proportional
    sizes = with_gradients(F.linear, x.abs(), weight.abs(), dy.abs())
    ours = with_gradients(eager_linear.linear, x, weight, dy)
    for mine, true, size, terms in zip(
        ours, truth, sizes, (columns, rows, x.numel() // columns), strict=True
    ):
        assert mine.shape == true.shape and mine.is_contiguous()
        assert ((mine - true).abs() <= 2**-23 * terms**0.5 * size).all()
    assert len(onednn) == 2  # the product and the gradient of x; that of the weight is torch's
    assert torch.equal(eager_linear.linear(x, weight), ours[0])  # without a gradient


@needs_onednn
def test_factors_and_gradients_may_have_any_strides(onednn):
    x, weight = draw(576, 2, 20).transpose(0, 2), draw(576, 64).t()
    dy = draw(1, 2, 64).expand(20, 2, 64)
    for mine, theirs in zip(
        with_gradients(eager_linear.linear, x, weight, dy),
        with_gradients(F.linear, x, weight, dy),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(
        eager_linear.mm(draw(576, 9).t(), weight.t()), draw(576, 9).t() @ weight.t(), rtol=1e-5, atol=1e-4
    )
    assert len(onednn) == 3


@needs_onednn
def test_a_row_does_not_depend_on_how_many_others_there_are(onednn):
    x, weight = draw(300, 576), draw(960, 576)
    whole = eager_linear.linear(x, weight)
    for rows in (eager_linear.ROWS, 3, 16, 65, 300):
        assert torch.equal(eager_linear.linear(x[:rows], weight), whole[:rows]), rows
        assert torch.equal(eager_linear.linear(x[-rows:].unsqueeze(0), weight)[0], whole[-rows:]), rows


@needs_onednn
def test_only_the_gradients_that_are_wanted_are_formed(onednn):
    x, weight = draw(4, 16), draw(8, 16)
    eager_linear.linear(x, weight.clone().requires_grad_()).sum().backward()
    assert onednn == [(4, 16)]
    leaf = x.clone().requires_grad_()
    eager_linear.linear(leaf, weight).sum().backward()
    assert onednn[1:] == [(4, 16), (4, 8)] and leaf.grad is not None


@needs_onednn
def test_second_derivatives_are_right(onednn):
    found = []
    for function in (eager_linear.linear, F.linear):
        x, weight = draw(3, 5).requires_grad_(), draw(4, 5).requires_grad_()
        first = torch.autograd.grad(function(x, weight).square().sum(), (x, weight), create_graph=True)
        found.append(torch.autograd.grad(sum(part.square().sum() for part in first), (x, weight)))
    torch.testing.assert_close(*found)


@needs_onednn
@pytest.mark.parametrize(
    "case", ["one row", "no rows", "fp64", "bf16", "switched off", "autocast", "other processor"]
)
def test_everything_else_is_torchs(onednn, case, monkeypatch):
    x, weight = draw({"one row": 1, "no rows": 0}.get(case, 8), 16), draw(8, 16)
    if case in ("fp64", "bf16"):
        x, weight = (
            tensor.to({"fp64": torch.float64, "bf16": torch.bfloat16}[case]) for tensor in (x, weight)
        )
    if case == "other processor":
        monkeypatch.setattr(eager_linear, "onednn_is_faster", lambda: False)
    monkeypatch.setattr(eager_linear.torch.backends.mkldnn, "enabled", case != "switched off")
    with torch.autocast("cpu", torch.bfloat16, enabled=case == "autocast"):
        assert torch.equal(eager_linear.linear(x, weight), F.linear(x, weight))
        assert torch.equal(eager_linear.mm(x, weight.t()), torch.mm(x, weight.t()))
    assert onednn == []


@needs_onednn
def test_wrong_shapes_raise_what_a_linear_layer_raises(onednn):
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        eager_linear.linear(draw(4, 15), draw(8, 16))
    with pytest.raises(RuntimeError):
        eager_linear.mm(draw(4, 15), draw(16, 8))


@pytest.mark.parametrize("vendor, capability, expected", [
    ("AuthenticAMD", "AVX512", True), ("AuthenticAMD", "AVX2", False), ("GenuineIntel", "AVX512", False),
    ("", "AVX512", False),
])  # fmt: skip
@needs_onednn
def test_the_processor_decides_and_no_clock(monkeypatch, vendor, capability, expected):
    monkeypatch.setattr(
        eager_linear, "onednn_is_faster", functools.cache(eager_linear.onednn_is_faster.__wrapped__)
    )
    monkeypatch.setattr(eager_linear, "processor_vendor", lambda: vendor)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    assert eager_linear.onednn_is_faster() is expected


def test_another_torch_without_the_operator_is_served_by_torch(monkeypatch):
    def gone(*_: Tensor) -> Tensor:
        raise AttributeError("no such operator")

    monkeypatch.setattr(eager_linear, "_onednn", gone)
    monkeypatch.setattr(
        eager_linear, "onednn_is_faster", functools.cache(eager_linear.onednn_is_faster.__wrapped__)
    )
    monkeypatch.setattr(eager_linear, "processor_vendor", lambda: "AuthenticAMD")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    x, weight = draw(4, 16), draw(8, 16)
    assert torch.equal(eager_linear.linear(x, weight), F.linear(x, weight))


@needs_onednn
def test_the_loss_takes_its_products_from_here(onednn):
    hidden, weight, targets = draw(40, 16), draw(37, 16), torch.arange(40) % 37
    leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    loss = TORCH.linear_cross_entropy(*leaves, targets)
    expected = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    plain = F.cross_entropy(F.linear(*expected), targets)
    torch.testing.assert_close(loss, plain)
    torch.testing.assert_close(torch.autograd.grad(loss, leaves), torch.autograd.grad(plain, expected))
    assert onednn == [(40, 16), (40, 37)]
