"""The autograd.Functions of the reference against the plain formulas that they stand in for, and what they may not do."""

import pytest
import torch

from kernels import reference

EPS = 1e-5


def draw(*shape, dtype=torch.float32):
    return torch.randn(*shape).to(dtype)


def tables(*shape):
    angle = torch.rand(*shape) * 6.3
    return angle.cos(), angle.sin()


def cases(dtype):
    """op -> (function of leaves, leaves)"""
    cos, sin = tables(2, 33, 32)
    return {
        "rms_norm": (lambda x, w: reference.rms_norm(x, w, EPS), (draw(2, 33, 576, dtype=dtype), draw(576, dtype=dtype))),
        "rms_norm of a vector": (lambda x, w: reference.rms_norm(x, w, EPS), (draw(576, dtype=dtype), draw(576, dtype=dtype))),
        "add_rms_norm": (
            lambda x, r, w: reference.add_rms_norm(x, r, w, EPS),
            (draw(2, 33, 576, dtype=dtype), draw(2, 33, 576, dtype=dtype), draw(576, dtype=dtype)),
        ),
        "rope_qkv": (lambda qkv: reference.rope_qkv(qkv, cos, sin, 3), (draw(2, 33, 15, 64, dtype=dtype),)),
        "swiglu": (reference.swiglu, (draw(2, 33, 3072, dtype=dtype),)),
    }


def run(op, leaves, upstream=None):
    """(outputs, upstream gradients, gradients of the leaves)"""
    leaves = [x.detach().requires_grad_() for x in leaves]
    out = op(*leaves)
    out = out if isinstance(out, tuple) else (out,)
    if upstream is None:
        upstream = [draw(*y.shape).transpose(0, -1).contiguous().transpose(0, -1).to(y.dtype) for y in out]  # strided on purpose
    return [y.detach() for y in out], upstream, torch.autograd.grad(out, leaves, upstream)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", cases(torch.float32))
def test_forward_is_the_formula_bit_for_bit_and_gradients_are_as_close_to_the_truth(name, dtype, monkeypatch):
    op, leaves = cases(dtype)[name]
    ours, upstream, gradients = run(op, leaves)
    monkeypatch.setattr(reference, "_fused", lambda *tensors: False)
    plain, _, plain_gradients = run(op, leaves, upstream)
    _, _, truth = run(op, [x.double() for x in leaves], [dy.double() for dy in upstream])
    assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))
    for mine, base, true in zip(gradients, plain_gradients, truth, strict=True):
        assert mine.dtype == base.dtype and mine.shape == base.shape
        error, allowed = ((x.double() - true).norm() / true.norm() for x in (mine, base))
        assert error <= 1.5 * allowed + 1e-7


@pytest.mark.parametrize("name", cases(torch.float32))
def test_a_second_backward_pass_gives_the_same(name):
    op, leaves = cases(torch.float32)[name]
    leaves = [x.requires_grad_() for x in leaves]
    out = op(*leaves)
    loss = sum((y * y).sum() for y in (out if isinstance(out, tuple) else (out,)))
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    kept = [gradient.clone() for gradient in first]
    second = torch.autograd.grad(loss, leaves)
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(kept, first, second, strict=True))


@pytest.mark.parametrize("used", [0, 1])
def test_only_one_output_of_add_rms_norm_has_a_gradient(used, monkeypatch):
    leaves = [draw(5, 96).requires_grad_(), draw(5, 96).requires_grad_(), draw(96).requires_grad_()]
    dy, results = draw(5, 96), []
    for fused in (reference._fused, lambda *tensors: False):
        monkeypatch.setattr(reference, "_fused", fused)
        results.append(torch.autograd.grad(reference.add_rms_norm(*leaves, EPS)[used], leaves, dy, allow_unused=True))
    for mine, plain in zip(*results, strict=True):
        assert (mine is None) == (plain is None)
        if mine is not None:
            torch.testing.assert_close(mine, plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_gives_its_gradients_away_and_forms_them_again(dtype):
    hidden, weight = draw(70, 16, dtype=dtype).requires_grad_(), draw(37, 16).requires_grad_()
    loss = reference.linear_cross_entropy(hidden, weight, torch.randint(0, 37, (70,)), z_loss=1e-3)
    first = torch.autograd.grad(loss, (hidden, weight), torch.tensor(2.0), retain_graph=True)
    kept = [gradient.clone() for gradient in first]
    for gradient in first:
        gradient.zero_()  # theirs who asked for it, to do with as they like
    second = torch.autograd.grad(loss, (hidden, weight), torch.tensor(2.0))
    assert all(torch.equal(a, b) for a, b in zip(kept, second, strict=True))


def test_a_gradient_of_a_gradient_is_refused_and_not_wrong():
    x = draw(3, 8).requires_grad_()
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.autograd.grad(reference.swiglu(x).sum(), x, create_graph=True)


def test_rows_are_tiled_and_chunked_without_a_trace(monkeypatch):
    """Losses and gradients do not depend on where a tile or a chunk of rows ends."""
    hidden, weight, targets = draw(70, 16).double(), draw(37, 16).double(), torch.randint(0, 37, (70,))
    results = []
    for chunk, tile in ((1024, 1024), (32, 7), (9, 64)):
        monkeypatch.setattr(reference, "CHUNK_TOKENS", chunk)
        monkeypatch.setattr(reference, "TILE_BYTES", tile * 8 * 37)  # rows of 37 logits in fp64
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        loss = reference.linear_cross_entropy(*leaves, targets, label_smoothing=0.1)
        results.append((loss.detach(), *torch.autograd.grad(loss, leaves)))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0])
