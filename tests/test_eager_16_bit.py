"""16-bit products on a processor where fp32 is faster: computed in fp32 and rounded once, forward and
backward, and only there.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from kernels import TORCH, products, reference
from kernels.eager import linear as eager_linear
from smollm2 import cli

DTYPES = [torch.bfloat16, torch.float16]
both = pytest.mark.parametrize("dtype", DTYPES, ids=["bf16", "fp16"])


@pytest.fixture(autouse=True)
def old_processor(monkeypatch):
    """As if this were one."""
    monkeypatch.setattr(products, "rows_in_fp32", {torch.bfloat16: 8, torch.float16: 8}.get)


@pytest.fixture
def product_dtypes(monkeypatch):
    """-> the dtypes in which torch.mm was called."""
    seen, mm = [], torch.mm

    def recorded(a, b, **options):
        seen.append(a.dtype)
        return mm(a, b, **options)

    monkeypatch.setattr(torch, "mm", recorded)
    return seen


def draw(*shape, dtype=torch.float32, scale=1.0):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))) * scale).to(dtype)


def assert_rounded_once(ours, truth):
    """Off the truth by half a unit in the last place, and by the error of fp32 sums."""
    unit = torch.finfo(ours.dtype).eps
    allowed = truth.abs() * unit / 2 * 1.01 + truth.abs().max() * 1e-5
    error = (ours.double() - truth).abs()
    assert (error <= allowed).all(), f"{(error / allowed).max().item():.2f} of what one rounding allows"


@both
@pytest.mark.parametrize("leading", [(8,), (3, 5), (300,)])
def test_a_linear_layer_and_its_gradients(dtype, leading, product_dtypes):
    x, weight, dy = (
        draw(*leading, 96, dtype=dtype),
        draw(40, 96, dtype=dtype),
        draw(*leading, 40, dtype=dtype),
    )
    leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
    y = eager_linear.linear(*leaves)
    found = y.detach(), *torch.autograd.grad(y, leaves, dy)
    assert product_dtypes == [torch.float32] * 3
    wide = x.double().requires_grad_(), weight.double().requires_grad_()
    truth = F.linear(*wide)
    for ours, exact in zip(found, (truth, *torch.autograd.grad(truth, wide, dy.double())), strict=True):
        assert ours.dtype == dtype
        assert_rounded_once(ours, exact.detach())
    assert torch.equal(eager_linear.linear(x, weight), found[0])  # without a gradient
    out = torch.empty(x.flatten(0, -2).shape[0], 40, dtype=dtype)
    assert eager_linear.mm(x.flatten(0, -2), weight.t(), out=out) is out
    assert torch.equal(out, found[0].flatten(0, -2))


@both
def test_the_gradient_of_fp32_master_weights_is_not_rounded(dtype):
    x, weight, dy = draw(20, 96, dtype=dtype), draw(40, 96).requires_grad_(), draw(20, 40, dtype=dtype)
    for copy in (weight.detach().to(dtype), None):
        weight.grad = None
        eager_linear.linear(x, weight, copy).backward(dy)
        torch.testing.assert_close(weight.grad.double(), dy.double().t() @ x.double(), rtol=0, atol=1e-4)


@both
@pytest.mark.parametrize("packed", [False, True])
def test_attention(dtype, packed):
    q, k, v, dout = (draw(2, 40, heads, 32, dtype=dtype) for heads in (6, 2, 2, 6))
    doc_start = torch.tensor([[0] * 20 + [20] * 20, [0] * 40], dtype=torch.int32) if packed else None
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out = TORCH.attention(*leaves, doc_start)
    assert out.dtype == dtype
    wide = [x.double().requires_grad_() for x in (q, k, v)]
    truth = reference.attention(*wide, doc_start)
    gradients = torch.autograd.grad(out, leaves, dout), torch.autograd.grad(truth, wide, dout.double())
    for ours, exact in zip((out, *gradients[0]), (truth, *gradients[1]), strict=True):
        assert_rounded_once(ours.detach(), exact.detach())


def test_attention_of_two_dtypes_is_refused():
    q, k, v = (draw(1, 16, heads, 32, dtype=torch.bfloat16) for heads in (4, 2, 2))
    with pytest.raises(ValueError, match="attention: expected"):
        TORCH.attention(q, k.float(), v)


@both
def test_the_loss_of_a_training_step(dtype, product_dtypes):
    hidden, weight = draw(50, 64, dtype=dtype).requires_grad_(), draw(101, 64, scale=0.3).requires_grad_()
    targets = torch.arange(50)
    loss = TORCH.linear_cross_entropy(hidden, weight, targets, chunk_tokens=32)
    loss.backward()
    assert set(product_dtypes) == {torch.float32}
    wide = hidden.detach().double().requires_grad_(), weight.detach().to(dtype).double().requires_grad_()
    truth = F.cross_entropy(F.linear(*wide), targets)
    truth.backward()
    assert abs(loss.item() - truth.item()) < 4 * torch.finfo(dtype).eps
    for ours, exact in ((hidden.grad, wide[0].grad), (weight.grad, wide[1].grad)):
        error = (ours.double() - exact).abs().max() / exact.abs().max()
        assert error < 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize(
    "case, x, rows",
    [
        ("few rows", draw(7, 16, dtype=torch.bfloat16), 7),
        ("fp32", draw(64, 16), 64),
        ("autocast", draw(64, 16, dtype=torch.bfloat16), 64),
        ("newer processor", draw(64, 16, dtype=torch.bfloat16), 64),
        ("meta", torch.empty(64, 16, dtype=torch.bfloat16, device="meta"), 64),
    ],
)
def test_everything_else_stays_in_its_dtype(case, x, rows, monkeypatch):
    if case == "newer processor":
        monkeypatch.setattr(products, "rows_in_fp32", lambda dtype: None)
    with torch.autocast("cpu", torch.bfloat16, enabled=case == "autocast"):
        assert not products.faster_in_fp32(x, rows)


# What torch says of processors: its instruction set, what oneDNN takes (bf16 also where it imitates it), and
# instructions for bf16; then rows from which bf16 and fp16 are multiplied in fp32.
PROCESSORS = {
    "x86 before AVX2": ("DEFAULT", "", "GenuineIntel", None, None),
    "ARM": ("DEFAULT", "bf16", "", None, None),
    "Zen 3": ("AVX2", "", "AuthenticAMD", 8, 8),
    "Alder Lake": ("AVX2", "", "GenuineIntel", 8, 8),
    "Arrow Lake": ("AVX2", "bf16 fp16", "GenuineIntel", None, None),
    "Ice Lake": ("AVX512", "bf16", "GenuineIntel", 8, 8),
    "Zen 4": ("AVX512", "bf16 avx512_bf16", "AuthenticAMD", None, 8),
    "Cooper Lake": ("AVX512", "bf16 avx512_bf16", "GenuineIntel", 64, 8),
    "Sapphire Rapids": ("AVX512", "bf16 fp16 avx512_bf16 amx_tile", "GenuineIntel", None, None),
    "Sapphire Rapids without AMX": ("AVX512", "bf16 fp16 avx512_bf16", "GenuineIntel", 64, None),
}


@pytest.fixture(params=PROCESSORS)
def processor(request, monkeypatch):
    monkeypatch.undo()
    capability, known, vendor, *expected = PROCESSORS[request.param]
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(products, "processor_vendor", lambda: vendor)
    for dtype in ("bf16", "fp16"):
        monkeypatch.setattr(
            torch.ops.mkldnn, f"_is_mkldnn_{dtype}_supported", lambda dtype=dtype: dtype in known.split()
        )
    for name in ("avx512_bf16", "amx_tile"):
        monkeypatch.setattr(torch.cpu, f"_is_{name}_supported", lambda name=name: name in known)
    for each in (products.rows_in_fp32, products.multiplies_bf16):
        each.cache_clear()
    yield capability, expected
    for each in (products.rows_in_fp32, products.multiplies_bf16):
        each.cache_clear()


def test_the_processor_decides(processor):
    capability, expected = processor
    assert [products.rows_in_fp32(dtype) for dtype in DTYPES] == expected
    assert products.rows_in_fp32(torch.float32) is products.rows_in_fp32(torch.float64) is None
    loaded = torch.float32 if capability == "DEFAULT" else torch.bfloat16
    assert cli.resolve_dtype("auto", torch.device("cpu")) is loaded
    assert cli.resolve_dtype("fp32", torch.device("cpu")) is torch.float32
