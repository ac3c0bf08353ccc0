"""The PyTorch backend against the formulas that it stands in for, and what its backward passes may not do."""

import numerics
import pytest
import torch

from kernels import TORCH, reference
from kernels.eager import loss

EPS = 1e-5


def draw(*shape, dtype=torch.float32):
    return torch.randn(*shape).to(dtype)


def tables(*shape):
    angle = torch.rand(*shape) * 6.3
    return angle.cos(), angle.sin()


def cases(dtype):
    """name -> (operation, leaves, further arguments)"""
    tokens = 2, 33
    return {
        "rms_norm": ("rms_norm", (draw(*tokens, 576, dtype=dtype), draw(576, dtype=dtype)), (EPS,)),
        "rms_norm of a vector": ("rms_norm", (draw(576, dtype=dtype), draw(576, dtype=dtype)), (EPS,)),
        "add_rms_norm": (
            "add_rms_norm",
            (draw(*tokens, 576, dtype=dtype), draw(*tokens, 576, dtype=dtype), draw(576, dtype=dtype)),
            (EPS,),
        ),
        "rope_qkv": ("rope_qkv", (draw(*tokens, 15, 64, dtype=dtype),), (*tables(*tokens, 32), 3)),
        "swiglu": ("swiglu", (draw(*tokens, 3072, dtype=dtype),), ()),
    }


def run(op, leaves, rest, upstream=None):
    """(outputs, upstream gradients, gradients of the leaves)"""
    leaves = [x.detach().requires_grad_() for x in leaves]
    out = op(*leaves, *rest)
    out = out if isinstance(out, tuple) else (out,)
    if upstream is None:
        # strided on purpose
        upstream = [draw(*y.shape).transpose(0, -1).contiguous().transpose(0, -1).to(y.dtype) for y in out]
    return [y.detach() for y in out], upstream, torch.autograd.grad(out, leaves, upstream)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", [*cases(torch.float32), "swiglu of two"])
def test_in_inference_mode_it_is_the_formula_bit_for_bit_and_writes_to_no_input(name, dtype):
    op, inputs, rest = cases(dtype)[name.removesuffix(" of two")]
    if name.endswith("of two"):
        inputs = inputs[0].chunk(2, dim=-1)
    before = [x.clone() for x in inputs]
    with torch.inference_mode():
        ours, formula = (getattr(ops, op)(*inputs, *rest) for ops in (TORCH, reference))
    pairs = zip(ours, formula, strict=True) if isinstance(ours, tuple) else [(ours, formula)]
    assert all(torch.equal(mine, other) and not mine.requires_grad for mine, other in pairs)
    assert all(torch.equal(x, old) for x, old in zip(inputs, before, strict=True))


@pytest.mark.parametrize("name", ["rms_norm", "add_rms_norm", "swiglu"])
def test_in_inference_mode_it_can_be_vectorised(name):
    op, inputs, rest = cases(torch.float32)[name]
    count = 1 if name == "swiglu" else len(inputs) - 1  # of inputs with rows
    axes = (*[0] * count, *[None] * (len(inputs) - count))
    with torch.inference_mode():
        found = torch.vmap(lambda *leaves: getattr(TORCH, op)(*leaves, *rest), axes)(*inputs)
        expected = getattr(reference, op)(*inputs, *rest)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", cases(torch.float32))
def test_forward_is_the_formula_bit_for_bit_and_gradients_are_as_close_to_the_truth(name, dtype):
    op, leaves, rest = cases(dtype)[name]
    ours, upstream, gradients = run(getattr(TORCH, op), leaves, rest)
    formula = getattr(reference, op)
    plain, _, plain_gradients = run(formula, leaves, rest, upstream)
    _, _, truth = run(formula, [x.double() for x in leaves], rest, [dy.double() for dy in upstream])
    assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))
    for mine, base, true in zip(gradients, plain_gradients, truth, strict=True):
        assert mine.dtype == base.dtype and mine.shape == base.shape
        error, allowed = ((x.double() - true).norm() / true.norm() for x in (mine, base))
        assert error <= 1.5 * allowed + 1e-7


@pytest.mark.parametrize("name", cases(torch.float32))
def test_a_second_backward_pass_gives_the_same(name):
    op, leaves, rest = cases(torch.float32)[name]
    leaves = [x.requires_grad_() for x in leaves]
    out = getattr(TORCH, op)(*leaves, *rest)
    loss = sum((y * y).sum() for y in (out if isinstance(out, tuple) else (out,)))
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    kept = [gradient.clone() for gradient in first]
    second = torch.autograd.grad(loss, leaves)
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(kept, first, second, strict=True))


@pytest.mark.parametrize("used", [0, 1])
def test_only_one_output_of_add_rms_norm_has_a_gradient(used):
    leaves = [draw(5, 96).requires_grad_(), draw(5, 96).requires_grad_(), draw(96).requires_grad_()]
    dy = draw(5, 96)
    results = [
        torch.autograd.grad(ops.add_rms_norm(*leaves, EPS)[used], leaves, dy, allow_unused=True)
        for ops in (TORCH, reference)
    ]
    for mine, plain in zip(*results, strict=True):
        assert (mine is None) == (plain is None)
        if mine is not None:
            torch.testing.assert_close(mine, plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_gives_its_gradients_away_and_forms_them_again(dtype):
    hidden, weight = draw(70, 16, dtype=dtype).requires_grad_(), draw(37, 16).requires_grad_()
    total = loss.linear_cross_entropy(hidden, weight, torch.randint(0, 37, (70,)), z_loss=1e-3)
    first = torch.autograd.grad(total, (hidden, weight), torch.tensor(2.0), retain_graph=True)
    kept = [gradient.clone() for gradient in first]
    for gradient in first:
        gradient.zero_()  # theirs who asked for it, to do with as they like
    second = torch.autograd.grad(total, (hidden, weight), torch.tensor(2.0))
    assert all(torch.equal(a, b) for a, b in zip(kept, second, strict=True))


@pytest.mark.parametrize("upstream", [1.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_of_logits_far_apart(dtype, upstream):
    """Logits up to some hundreds, whose exponentials are no fp32 numbers, and targets that are ignored."""
    hidden, weight = 30 * draw(70, 16, dtype=dtype), draw(97, 16, dtype=dtype).float()
    targets = torch.randint(0, 97, (70,)).masked_fill_(torch.arange(70) % 9 == 0, -100)
    found = []
    for ops, cast in ((TORCH, None), (reference, None), (reference, torch.float64)):
        leaves = [x.detach().to(cast or x.dtype).requires_grad_() for x in (hidden, weight)]
        total = ops.linear_cross_entropy(*leaves, targets, z_loss=1e-3, label_smoothing=0.1)
        found.append([total.detach(), *torch.autograd.grad(total, leaves, torch.full_like(total, upstream))])
    for name, *three in zip(("loss", "dhidden", "dweight"), *found, strict=True):
        numerics.check("linear_cross_entropy, torch", name, *three)


def test_a_gradient_of_a_gradient_is_refused_and_not_wrong():
    x = draw(3, 8).requires_grad_()
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.autograd.grad(TORCH.swiglu(x).sum(), x, create_graph=True)


def test_rows_are_tiled_and_chunked_without_a_trace(monkeypatch):
    """Losses and gradients do not depend on where a tile or a chunk of rows ends."""
    hidden, weight, targets = draw(70, 16).double(), draw(37, 16).double(), torch.randint(0, 37, (70,))
    results = []
    for chunk, tile in ((1024, 1024), (32, 7), (9, 64)):
        monkeypatch.setattr(loss, "CHUNK_TOKENS", chunk)
        monkeypatch.setattr(loss, "TILE_BYTES", tile * 8 * 37)  # rows of 37 logits in fp64
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        total = loss.linear_cross_entropy(*leaves, targets, label_smoothing=0.1)
        results.append((total.detach(), *torch.autograd.grad(total, leaves)))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0])


def test_linear_cross_entropy_keeps_the_gradient_of_fp32_masters_in_fp32(monkeypatch):
    # one chunk's product alone is rounded to bf16, the sum is not
    monkeypatch.setattr(loss, "CHUNK_TOKENS", 16)
    hidden, weight = draw(64, 32, dtype=torch.bfloat16).requires_grad_(), draw(100, 32).requires_grad_()
    loss.linear_cross_entropy(hidden, weight, torch.randint(0, 100, (64,))).backward()
    assert hidden.grad.dtype == torch.bfloat16
    assert weight.grad.dtype == torch.float32
    assert not torch.equal(weight.grad, weight.grad.bfloat16().float())


def test_linear_cross_entropy_never_holds_all_logits(monkeypatch):
    """The largest tensor of the forward and backward pass is one chunk of logits."""
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.numel())
            return out

    monkeypatch.setattr(loss, "CHUNK_TOKENS", 16)
    hidden, weight = draw(160, 8).requires_grad_(), draw(500, 8).requires_grad_()
    with Watch():
        loss.linear_cross_entropy(hidden, weight, torch.randint(0, 500, (160,))).backward()
    assert largest == 16 * 500
